"""Rows that audit clean, and faults planted into them at known rows.

    rows = clean_rows(600, format="alpaca")
    truth = plant(rows, "refusals", format="alpaca", every=15)      # row numbers that an audit must name
    write(path, rows)

All is drawn from a seeded generator.  The clean rows are varied so that no two are near each other; a fault that needs
another row (a duplicate, a contradiction, a leak) takes one that is not planted itself.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.data.audit import material as m

PAIR_FORMATS = ("alpaca", "prompt_completion", "messages", "sharegpt")
"""Whose rows are a prompt and a written answer."""
FORMATS = (*PAIR_FORMATS, "classification", "text")
LABELS = ("billing", "travel", "kitchen", "garden", "repairs")
Line = dict[str, Any] | bytes
"""A row, or the bytes of a line that no longer is one."""


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: str
    answer: str
    aside: str = ""
    """Something else, for where a row has more than a prompt and an answer."""


# ------------------------------------------------------------------------------------------------------------ clean


def _filled(template: str, rng: random.Random, seed: int) -> str:
    """The template with words for its slots; every few words of it there is one that other seeds (modulo 3) have not."""
    nouns, adjectives = m.NOUNS[seed % 3 :: 3], m.ADJECTIVES[seed % 3 :: 3]
    words = {"a": adjectives, "b": adjectives, "n": nouns, "o": nouns, "v": m.VERBS, "w": m.VERBS, "t": m.TIMES}
    chosen = {slot: rng.choice(some) for slot, some in words.items()}
    place, reason = (rng.choice(some).format(x=rng.choice(adjectives)) for some in (m.PLACES, m.REASONS))
    return template.format(**chosen, p=place, r=reason, k=rng.randrange(2, 90))


def sentence(rng: random.Random, *, seed: int = 0) -> str:
    """One of about 14 words."""
    filled = _filled(rng.choice(m.SENTENCES), rng, seed)
    return filled[0].upper() + filled[1:]


def clean_pairs(count: int, *, seed: int = 0) -> list[Pair]:
    """Prompts, all different, with answers of three to six sentences."""
    rng = random.Random(seed)
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        prompt = _filled(rng.choice(m.PROMPTS), rng, seed)
        answer = " ".join(sentence(rng, seed=seed) for _ in range(rng.randrange(3, 7)))
        pairs.setdefault(prompt, Pair(prompt, answer, sentence(rng, seed=seed)))
    return list(pairs.values())


def as_row(pair: Pair, *, format: str, number: int = 0) -> dict[str, Any]:
    """The pair as a row of a format; every third conversation has one exchange more."""
    if format == "alpaca":
        return {"instruction": pair.prompt, "input": pair.aside if number % 3 == 0 else "", "output": pair.answer}
    if format == "prompt_completion":
        return {"prompt": pair.prompt, "completion": pair.answer}
    if format == "classification":
        return {"text": pair.prompt, "label": LABELS[number % len(LABELS)]}
    if format == "text":
        return {"text": f"{pair.prompt}\n\n{pair.answer}"}
    roles = (
        ("role", "content", "user", "assistant", "messages")
        if format == "messages"
        else ("from", "value", "human", "gpt", "conversations")
    )
    role, content, user, assistant, field = roles
    first = [{role: user, content: f"Good day. {pair.aside}"}, {role: assistant, content: pair.aside}]
    last = [{role: user, content: pair.prompt}, {role: assistant, content: pair.answer}]
    return {field: [*(first if number % 3 == 0 else []), *last]}


def clean_rows(count: int, *, format: str, seed: int = 0) -> list[Line]:
    return [as_row(pair, format=format, number=number) for number, pair in enumerate(clean_pairs(count, seed=seed))]


def write(path: Path, rows: Sequence[Line]) -> Path:
    """As JSON lines; row number n is line n."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------- reading and writing a row


def _turn(row: dict[str, Any], role: str) -> tuple[dict[str, Any], str]:
    """The last turn of a role, and the key of its text."""
    turns = row.get("messages") or row["conversations"]
    names = {"user": ("user", "human"), "assistant": ("assistant", "gpt")}[role]
    turn = next(turn for turn in reversed(turns) if turn.get("role", turn.get("from")) in names)
    return turn, "content" if "role" in turn else "value"


def place_of(row: dict[str, Any], part: str) -> tuple[dict[str, Any], str]:
    """The object and key where the prompt or the answer of a row is."""
    if "messages" in row or "conversations" in row:
        return _turn(row, "user" if part == "prompt" else "assistant")
    names = {"prompt": ("instruction", "prompt", "text"), "answer": ("output", "completion", "text")}[part]
    return row, next(name for name in names if name in row)


def get(row: dict[str, Any], part: str) -> str:
    holder, key = place_of(row, part)
    return str(holder[key])


def put(row: dict[str, Any], part: str, value: Any) -> dict[str, Any]:
    """A copy of the row with another prompt or answer."""
    copy: dict[str, Any] = json.loads(json.dumps(row))
    holder, key = place_of(copy, part)
    holder[key] = value
    return copy


# ------------------------------------------------------------------------------------------------------------- shape


def _not_json(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    line = json.dumps(row).encode()
    return rng.choice((line[: rng.randrange(2, len(line) - 1)], line.replace(b'"', b"'"), line[:-1] + b",}", b"{" + line, line + line, b"None"))  # fmt: skip


def _not_text(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    broken = rng.choice((b"\xff\xfe", b"caf\xe9 ", b"\xc3", b"\xed\xa0\x80"))
    line = json.dumps(row).encode()
    at = line.rindex(b'"')
    return line[:at] + broken + line[at:]


def _not_an_object(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    return rng.choice((b"null", b"17", b"true", b'"a text by itself"', json.dumps([row]).encode(), b"[]", b"-1.5e3"))


def _missing_field(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    if format in ("messages", "sharegpt"):
        copy = put(row, "answer", None)
        holder, key = place_of(copy, rng.choice(("prompt", "answer")))
        del holder[rng.choice((key, "role" if key == "content" else "from"))]
        return rng.choice((copy, {"id": 7}))
    needed = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion"), "text": ("text",), "classification": ("text", "label")}  # fmt: skip
    name = rng.choice(needed[format])
    return {key: value for key, value in row.items() if key != name} if rng.random() < 0.5 else {**row, name: None}


def _empty_field(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    blank = rng.choice(("", " ", "\n\t", "\u3000"))
    if format == "classification":
        return {**row, rng.choice(("text", "label")): blank}
    return put(row, "answer" if format in ("messages", "sharegpt") else rng.choice(("prompt", "answer")), blank)


def _wrong_type(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    wrong = rng.choice((17, 2.5, True, {"text": "no"}))
    if format in ("messages", "sharegpt"):
        field = "messages" if format == "messages" else "conversations"
        return rng.choice(
            ({field: wrong}, {field: ["Hello", "Hello"]}, put(row, rng.choice(("prompt", "answer")), wrong))
        )
    if format == "classification":
        return {**row, "text": wrong}
    return put(row, rng.choice(("prompt", "answer")), wrong)


def _roles_order(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    role, content, user, assistant, tool, field = (
        ("role", "content", "user", "assistant", "tool", "messages")
        if format == "messages"
        else ("from", "value", "human", "gpt", "observation", "conversations")
    )
    asked, answered = {role: user, content: get(row, "prompt")}, {role: assistant, content: get(row, "answer")}
    ruled = {role: "system", content: "Be brief and plain."}
    orders = ([asked, asked, answered], [asked, answered, answered], [answered, asked, answered], [asked, ruled, answered],
              [asked, {role: tool, content: "17 degrees"}, answered], [ruled, answered, asked], [asked, answered, ruled])  # fmt: skip
    return {field: rng.choice(orders)}


def _unknown_role(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    copy = put(row, "answer", get(row, "answer"))
    holder, key = place_of(copy, rng.choice(("prompt", "answer")))
    holder["role" if key == "content" else "from"] = rng.choice(("oracle", "", "users", 17, "User:"))
    return copy


def _mixed_formats(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    # Messages and sharegpt are read alike; of an alpaca row, a pair is only a part.
    others = [other for other in PAIR_FORMATS if other != format and {other, format} != {"messages", "sharegpt"}]
    return as_row(
        Pair(get(row, "prompt"), "Another answer, in another manner.", "Aside."), format=rng.choice(others), number=1
    )


# ------------------------------------------------------------------------------------------------------------- texts


def _answer(make: Callable[[str, random.Random], str]) -> Callable[[dict[str, Any], random.Random, str], Line]:
    """A fault of the answer's text."""
    return lambda row, rng, format: put(row, "answer", make(get(row, "answer"), rng))


def _garbled(answer: str, rng: random.Random) -> str:
    """True text with accents, through the wrong decoder, or with a replacement or control character."""
    way = rng.randrange(5)
    if way == 0:
        return answer + " " + rng.choice(m.ACCENTED).encode("ascii", "replace").decode().replace("?", "\ufffd")
    if way == 1:
        at = rng.randrange(1, len(answer))
        return answer[:at] + rng.choice("\x00\x01\x08\x0e\x1f\x7f\x81\x9d") + answer[at:]
    return answer + " " + garble(rng.choice(m.ACCENTED), "latin-1" if way == 2 else "cp1252")


def garble(text: str, codec: str) -> str:
    """UTF-8 read as `codec`; where that has no such byte, as Latin-1, in the way of browsers."""
    broken = []
    for byte in text.encode():
        try:
            broken.append(bytes([byte]).decode(codec))
        except UnicodeDecodeError:
            broken.append(chr(byte))
    return "".join(broken)


def _looping(answer: str, rng: random.Random) -> str:
    words = answer.split()
    began = rng.randrange(len(words) - 8)
    phrase = " ".join(words[began : began + rng.randrange(2, 8)])
    ways = (
        f"{answer} {' '.join([phrase] * rng.randrange(8, 20))}",
        f"{answer} {' '.join(['really'] * rng.randrange(15, 60))}",
        "\n".join([answer.split(". ")[0] + "."] * rng.randrange(5, 9)),
        "\n".join(f"{number}. {answer.split('. ')[0]}." for number in range(1, rng.randrange(6, 12))),
        f"{answer} {'ha' * rng.randrange(30, 90)}",
        f"{' '.join([phrase] * 9)} {words[began + 1]}",
        "他说他很高兴" * rng.randrange(8, 20),
    )
    return rng.choice(ways)


def _with_term(answer: str, rng: random.Random) -> str:
    words = answer.split()
    words.insert(
        rng.randrange(len(words)),
        rng.choice([form for term in m.TERMS for form in (term, term.upper(), f"({term.title()}),")]),
    )
    return " ".join(words)


def _other_language(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    texts = list(m.FOREIGN[rng.choice(sorted(m.FOREIGN))])
    rng.shuffle(texts)
    return put(put(row, "answer", " ".join(texts)), "prompt", texts[0])


def _personal(samples: Sequence[str]) -> Callable[[dict[str, Any], random.Random, str], Line]:
    def insert(answer: str, rng: random.Random) -> str:
        sentences = answer.split(". ")
        sentences.insert(rng.randrange(len(sentences)), rng.choice(samples))
        return ". ".join(sentences)

    return _answer(insert)


# ------------------------------------------------------------------------------------------------------ between rows


def _reworded(text: str, rng: random.Random) -> str:
    """The text with other case, marks and white space."""
    ways = (
        text.upper(),
        text.replace(" ", "  "),
        text.replace(".", " !"),
        f"  {text}\n",
        text.replace(",", ";").lower(),
    )
    return rng.choice(ways)


def _copy(row: dict[str, Any], other: dict[str, Any], rng: random.Random, format: str) -> Line:
    return put(other, "prompt" if format == "classification" else "answer", _reworded(get(other, "prompt" if format == "classification" else "answer"), rng))  # fmt: skip


def _near_copy(row: dict[str, Any], other: dict[str, Any], rng: random.Random, format: str) -> Line:
    """Up to nine words of the answer are others: similarities of about 0.4 to 0.95."""
    words = get(other, "answer").split(" ")
    for at in rng.sample(range(len(words)), rng.randrange(1, 10)):
        words[at] = rng.choice(m.ADJECTIVES)
    return put(other, "answer", " ".join(words))


def _contradiction(row: dict[str, Any], other: dict[str, Any], rng: random.Random, format: str) -> Line:
    return put(other, "answer", get(row, "answer"))


def _overlong(part: str) -> Alone:
    """A prompt or an answer of some 2,000 words."""
    return lambda row, rng, format: put(row, part, " ".join(sentence(rng) for _ in range(140)))


def _unended(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    """One exchange more, whose answer is not trained: of messages alone."""
    asked, answered = ({"role": role, "content": sentence(rng)} for role in ("user", "assistant"))
    return {"messages": [*row["messages"], asked, answered | {"weight": 0}]}


def _with_mark(row: dict[str, Any], rng: random.Random, format: str) -> Line:
    """A mark of the template within a text: whoever reads it back sees turns that nobody took."""
    part = rng.choice(("prompt", "answer"))
    words = get(row, part).split(" ")
    words.insert(rng.randrange(1, len(words)), rng.choice(m.MARKS))
    return put(row, part, " ".join(words))


Alone = Callable[[dict[str, Any], random.Random, str], Line]
Paired = Callable[[dict[str, Any], dict[str, Any], random.Random, str], Line]
SHAPE: dict[str, Alone] = {
    "not_json": _not_json,
    "not_text": _not_text,
    "not_an_object": _not_an_object,
    "missing_field": _missing_field,
    "empty_field": _empty_field,
    "wrong_type": _wrong_type,
    "roles_order": _roles_order,
    "unknown_role": _unknown_role,
    "mixed_formats": _mixed_formats,
}
TEXTS: dict[str, Alone] = {
    "placeholder_answer": _answer(lambda answer, rng: rng.choice(m.PLACEHOLDERS)),
    "broken_encoding": _answer(_garbled),
    "repetition": _answer(_looping),
    "refusals": _answer(
        lambda answer, rng: f"{rng.choice(m.REFUSALS)} {rng.choice(('', 'Is there something else?'))}".strip()
    ),
    "boilerplate_openings": _answer(lambda answer, rng: f"{m.OPENING} {answer}"),
    "language_mix": _answer(lambda answer, rng: " ".join(m.FOREIGN[rng.choice(sorted(m.FOREIGN))])),
    "other_language": _other_language,
    "listed_terms": _answer(_with_term),
}
PERSONAL: dict[str, Alone] = {code: _personal(samples) for code, samples in m.PERSONAL.items()}
MASKS: dict[str, Alone] = {
    "round_trip_failed": _with_mark,
    "end_not_trained": _unended,
    "overlong_rows": _overlong("answer"),
    "no_trained_tokens": _overlong("prompt"),
}
"""With data.overlong = cut and the pocket base's template; end_not_trained with ENDS_ONCE."""
ENDS_ONCE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""A template that ends only the last answer."""
ALONE = {**SHAPE, **TEXTS, **PERSONAL, **MASKS}
PAIRED: dict[str, Paired] = {
    "duplicates_exact": _copy,
    "duplicates_near": _near_copy,
    "contradictory_answers": _contradiction,
}


def plant(rows: list[Line], code: str, *, format: str, every: int, seed: int = 0) -> set[int]:
    """Plants a fault at every `every`-th row, in place.  Returns the numbers of the rows that an audit must name."""
    rng = random.Random(f"{code} {format} {seed}")
    truth: set[int] = set()
    for at in range(every - 1, len(rows), every):
        row = rows[at]
        assert isinstance(row, dict)
        if code in ALONE:
            rows[at] = ALONE[code](row, rng, format)
        else:
            other = rows[at - 1 - rng.randrange(every - 1)]
            assert isinstance(other, dict)
            rows[at] = PAIRED[code](row, other, rng, format)
            if code == "contradictory_answers":
                truth.add(rows.index(other) + 1)
        assert rows[at] != row
        truth.add(at + 1)
    return truth


def leak(rows: list[Line], others: list[Line], *, tier: str, every: int, seed: int = 0) -> set[int]:
    """Puts what `others` (evaluation or benchmark rows) hold among `rows`, in place.

    `tier`: exact (a prompt, up to case and marks), near (a row with some words changed) or ngrams (20 words of an answer).
    """
    rng = random.Random(f"{tier} {seed}")
    truth = set()
    for at in range(every - 1, len(rows), every):
        row, other = rows[at], others[at % len(others)]
        assert isinstance(row, dict) and isinstance(other, dict)
        if tier == "exact":
            rows[at] = put(put(other, "prompt", _reworded(get(other, "prompt"), rng)), "answer", get(row, "answer"))
        elif tier == "near":
            words = get(other, "prompt").split(" ")
            words.insert(rng.randrange(1, len(words)), rng.choice(m.ADJECTIVES))
            changed = _near_copy(row, other, rng, "")
            assert isinstance(changed, dict)
            rows[at] = put(changed, "prompt", " ".join(words))
        else:
            words = get(other, "answer").split()
            began = rng.randrange(len(words) - 20)
            rows[at] = put(row, "answer", f"{get(row, 'answer')} {' '.join(words[began : began + 20])}")
        truth.add(at + 1)
    return truth


def texts_of(row: dict[str, Any]) -> tuple[str, str]:
    """All that comes before the last answer, and it; a document is all prompt."""
    turns = row.get("messages") or row.get("conversations")
    if turns:
        *before, last = (str(turn.get("content", turn.get("value"))) for turn in turns)
        return " ".join(before), last
    if set(row) == {"text"}:
        return str(row["text"]), ""
    return f"{get(row, 'prompt')} {row.get('input', '')}", get(row, "answer")


def jaccard(one: dict[str, Any], other: dict[str, Any], *, answers: bool = True) -> float:
    """Similarity of the sets of three words in a row, of prompt and answer apart; for rows of plain English words."""
    sets = []
    for row in (one, other):
        shingles: set[tuple[str, ...]] = set()
        for text in texts_of(row)[: 2 if answers else 1]:
            words = re.findall(r"[a-z0-9]+", text.lower())
            shingles |= set(zip(words, words[1:], words[2:], strict=False))
        sets.append(shingles)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def scores(found: set[int], truth: set[int]) -> tuple[float, float]:
    """Recall and precision."""
    hits = len(found & truth)
    return hits / len(truth), hits / len(found) if found else 0.0
