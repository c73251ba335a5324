"""Every finding that an audit may make: how bad it is, what it says, what to do.  And the tally that counts them."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onlay.records import Finding, RowAt, Severity

CHOICE = re.compile(r"(\w+)\|(\w+)")


@dataclass(frozen=True, slots=True)
class Kind:
    severity: Severity
    words: str
    """What follows the count: `rows|row that are|is ...`, as it is said of many and of one, `_` for a space in a choice.
    {names} are filled in when the finding is listed."""
    remedy: str

    @property
    def message(self) -> str:
        """As it is said of many."""
        return self.said_of(2)

    def said_of(self, count: int) -> str:
        return CHOICE.sub(lambda found: found[1 if count != 1 else 2].replace("_", " "), self.words)


KINDS: dict[str, Kind] = {
    # Shape: such a row cannot be trained on; `prepare` and `train` stop at it.
    "not_json": Kind("error", "rows|row that are|is not JSON, or not the file's own syntax", "Correct or delete them."),
    "wrong_field_count": Kind("error", "rows|row with more or fewer fields than the header", "Quote fields that hold commas, quotes or line breaks, and write every field, if empty."),
    "not_text": Kind("error", "rows|row that are|is not UTF-8 text", "Save the file as UTF-8."),
    "not_an_object": Kind("error", "rows|row that are|is no object of named fields", "Write each row as an object, such as {\"prompt\": ..., \"completion\": ...}."),
    "missing_field": Kind("error", "rows|row without a field that the format needs", "Fill the field in, delete the row, or name your columns in the data section."),
    "empty_field": Kind("error", "rows|row with an empty prompt or answer", "Fill it, or delete the row."),
    "wrong_type": Kind("error", "rows|row with a field of the wrong type", "Write the field as the format needs it."),
    "unknown_role": Kind("error", "conversations|conversation with a role that is not known", "Use system, user, assistant and tool."),
    "reading_ended": Kind("error", "places|place at which reading ended early; what comes after them|it in the file was not looked at", "Mend the file there: the reason says what was expected."),
    "roles_order": Kind("error", "conversations|conversation whose turns are in an order that most templates refuse", "Put the system message first, alternate user and assistant, and let a tool's result follow its call."),
    "mixed_formats": Kind("error", "rows|row in another format than the first rows", "Keep one format in a file."),
    "template_refused": Kind("error", "rows|row that the base's chat template refuses", "Put the turns in the order that it wants, or choose another data.template."),
    "placeholder_answer": Kind("warning", "answers|answer that are_placeholders|is_a_placeholder or speak|speaks of being an AI", "Write the answer, or delete the row."),
    "broken_encoding": Kind("warning", "rows|row with broken characters (mojibake, replacement or control characters)", "Read the source in its true encoding and write the rows again."),
    # Size
    "few_rows": Kind("warning", "training rows|row, fewer than {least}; {method} is usually given {typical}", "Collect more rows, or expect the adapter to repeat what it saw."),
    "overlong_rows": Kind("warning", "rows|row longer than {max_tokens} tokens; data.overlong = {overlong} decides what becomes of them|it", "Raise data.max_tokens, or split the rows."),
    "length_estimated": Kind("note", "rows|row so long that only the beginning was tokenized; the length in tokens is estimated from it", "Split them, or leave them out."),
    # Duplicates
    "duplicates_exact": Kind("warning", "rows|row that repeat|repeats an earlier row (up to case, punctuation and white space)", "Set data.duplicates: drop_exact."),
    "duplicates_near": Kind("warning", "rows|row that nearly repeat|repeats an earlier row (Jaccard similarity of shingles at least {threshold})", "Set data.duplicates: drop_near, or look at the clusters."),
    # Contradictions
    "contradictory_answers": Kind("warning", "rows|row with a prompt that other rows answer differently", "Keep one answer, or say in the prompt what tells them apart."),
    "contradictory_answers_near": Kind("note", "rows|row with nearly the prompt of other rows, and another answer", "Look at the groups."),
    # Lengths and balance
    "length_outliers": Kind("note", "rows|row far longer than the others", "Look at them: they are often several rows in one."),
    "answer_shorter_than_usual": Kind("note", "answers|answer far shorter than the others, beside their_prompts|its_prompt", "Look at them: they are often cut off."),
    "domain_imbalance": Kind("warning", "rows|row of the domain {domain}: {share} of all", "Set data.balance: cap or equal."),
    "rare_domains": Kind("note", "rows|row of domains|a_domain with fewer than {least} rows", "Collect more of them."),
    "no_domain": Kind("note", "training rows|row without {field}, the field that names domains; no row of {files} has it", "Add the field to them, or look whether another name is meant."),
    # Leakage
    "leakage_exact": Kind("error", "training rows|row whose prompt is also in the evaluation rows", "Delete them from one of the two."),
    "leakage_near": Kind("warning", "training rows|row nearly equal to an evaluation row", "Delete them from one of the two."),
    "leakage_ngrams": Kind("warning", "training rows|row that share|shares {ngram} or more words in a row with an evaluation row", "Look at them."),
    "benchmark_exact": Kind("error", "training rows|row whose prompt is also in a benchmark file", "Delete them: the benchmark would measure memory."),
    "benchmark_near": Kind("warning", "training rows|row nearly equal to a row of a benchmark file", "Delete them."),
    "benchmark_ngrams": Kind("warning", "training rows|row that share|shares {ngram} or more words in a row with a benchmark file", "Look at them."),
    # Texts
    "repetition": Kind("warning", "answers|answer that repeat|repeats themselves|itself", "Delete them: the model would learn to loop."),
    "boilerplate_openings": Kind("note", "answers|answer that begin|begins with one of the openings most often used", "Vary or cut the opening, unless you want it."),
    "language_mix": Kind("note", "answers|answer in another script or language than their_prompts|its_prompt", "Look at them."),
    "other_language": Kind("note", "rows|row in another script or language than most", "Look at them."),
    "refusals": Kind("warning", "answers|answer that refuse|refuses a prompt", "Keep only those that you want the model to refuse."),
    "listed_terms": Kind("warning", "rows|row with a term of your list", "Look at them."),
    # Personal data and secrets
    "personal_email": Kind("warning", "rows|row with an e-mail address", "Set data.anonymise: pseudonyms or redact."),
    "personal_phone": Kind("warning", "rows|row with a telephone number", "Set data.anonymise: pseudonyms or redact."),
    "personal_card": Kind("warning", "rows|row with a payment card number (Luhn)", "Set data.anonymise: redact."),
    "personal_iban": Kind("warning", "rows|row with an IBAN (mod 97)", "Set data.anonymise: pseudonyms or redact."),
    "personal_national_id": Kind("warning", "rows|row with a national identity number", "Set data.anonymise: redact."),
    "personal_ip": Kind("warning", "rows|row with an IP address", "Set data.anonymise: pseudonyms or redact."),
    "personal_url": Kind("note", "rows|row with a web address", "Look at them: an address may name a person."),
    "personal_address": Kind("warning", "rows|row with a postal address", "Set data.anonymise: pseudonyms or redact."),
    "personal_name": Kind("note", "rows|row with the name of a person", "Set data.anonymise: pseudonyms or redact; names are found best with the extra `privacy`."),
    "secret_url_credentials": Kind("error", "rows|row with a web address that holds a password", "Delete the password and change it: it is known now."),
    "secret_key": Kind("error", "rows|row with an API key, token or private key", "Delete the key and revoke it: a model can repeat it."),
    # Masks
    "no_trained_tokens": Kind("error", "rows|row in which no token would train", "Give an answer that is trained, or raise data.max_tokens."),
    "end_not_trained": Kind("error", "rows|row whose answer's end token would not train", "Raise data.max_tokens, or choose a template that ends its answers."),
    "little_trained": Kind("note", "rows|row of which less than {share} of the tokens train", "Nothing, if prompts are long by nature."),
    "round_trip_failed": Kind("warning", "rows|row whose templated text does not read back as the same turns", "The row holds the template's own marks: take them out."),
    # What the base knows
    "known_by_base": Kind("note", "rows|row, of {scored} looked at, whose answers|answer the base gives already", "They teach little; you may leave them out."),
    "beyond_base": Kind("note", "rows|row, of {scored} looked at, whose answers|answer are|is far from anything the base expects", "Look at them: wrong answers look like this."),
}  # fmt: skip
RANK = {"error": 0, "warning": 1, "note": 2}


def finding(code: str, *, count: int, told: Mapping[str, object] | None = None) -> Finding:
    """A finding about the data as a whole, which no row is an example of."""
    kind = KINDS[code]
    return Finding(
        code=code,
        severity=kind.severity,
        count=count,
        message=kind.said_of(count).format(**(told or {})),
        remedy=kind.remedy,
    )


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda one: (RANK[one.severity], -one.count, one.code))


class Tally:
    """Rows by code, as (source, row number), 12 bytes each; a row counts once for a code."""

    def __init__(self) -> None:
        self._sources: dict[str, array[int]] = {}
        self._numbers: dict[str, array[int]] = {}

    def add(self, code: str, *, source: int, number: int) -> None:
        assert code in KINDS, code
        sources, numbers = self._sources.setdefault(code, array("i")), self._numbers.setdefault(code, array("q"))
        if numbers and numbers[-1] == number and sources[-1] == source:
            return
        sources.append(source)
        numbers.append(number)

    def add_many(self, code: str, *, sources: Iterable[int], numbers: Iterable[int]) -> None:
        for source, number in zip(sources, numbers, strict=True):
            self.add(code, source=int(source), number=int(number))

    def merge(self, other: Tally) -> None:
        """Adds what another tally counted after this one."""
        for code in other._numbers:
            self.add_many(code, sources=other._sources[code], numbers=other._numbers[code])

    def count(self, code: str) -> int:
        return len(self._numbers.get(code, ()))

    def rows(self, code: str) -> list[tuple[int, int]]:
        """All (source, row number) of a code, in order."""
        return sorted(zip(self._sources.get(code, ()), self._numbers.get(code, ()), strict=True))

    def findings(
        self, files: Sequence[str], *, shown: int | None = 20, told: Mapping[str, Mapping[str, object]] | None = None
    ) -> list[Finding]:
        """Worst first.  `shown`: most rows listed with each (None: all); `told`: by code, what fills the {names}."""
        found = []
        for code in self._numbers:
            kind, names = KINDS[code], (told or {}).get(code, {})
            rows = [RowAt(file=files[source], row=number) for source, number in self.rows(code)[:shown]]
            found.append(
                Finding(
                    code=code, severity=kind.severity, count=self.count(code),
                    message=kind.said_of(self.count(code)).format(**names), rows=rows, remedy=kind.remedy,
                )
            )  # fmt: skip
        return worst_first(found)
