"""Precision and recall of the search for personal data, by kind, on labelled texts; what it finds where little is; its speed.

    python bench/privacy.py FOLDER [--presidio] [--model en_core_web_lg] [--out bench/results/privacy.json] [--page docs/privacy.md]

FOLDER holds pii_presidio/synth_dataset_v2.json and generated_small.json (presidio-research), and gsm8k, clinc150, self_instruct
and instruct_demo.  --presidio (pip install "onlay[privacy]") adds presidio's own recognisers with a blank spaCy model, for
comparison; --model adds the names of an installed spaCy model to onlay's.  --page writes the tables between the marks of a page.

A labelled span counts as found where a span of its kind overlaps it by at least one character; a found span counts as right where
it overlaps a label of its kind.  An address that overlaps a label of its parts (town, postcode) is right.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onlay.data.privacy.detect import find
from onlay.data.privacy.names import presidio_names
from onlay.data.privacy.spans import Span, span_of
from onlay.errors import SetupError

LABELS = {
    "EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "IP_ADDRESS": "ip",
    "DOMAIN_NAME": "url", "URL": "url", "US_SSN": "national_id", "PERSON": "name", "STREET_ADDRESS": "address", "ADDRESS": "address",
}  # fmt: skip
ADDRESS_PARTS = ("GPE", "LOCATION", "ZIP_CODE")
LABELLED = ("synth_dataset_v2.json", "generated_small.json")
OTHERS = {
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "clinc150": ("clinc150/data_full.json",),
    "self_instruct": ("self_instruct/seed_tasks.jsonl", "self_instruct/user_oriented_instructions.jsonl"),
    "instruct_demo": ("instruct_demo/alpaca_en_demo.json", "instruct_demo/glaive_toolcall_en_demo.json", "instruct_demo/c4_demo.jsonl"),
}  # fmt: skip
ROW_CHARACTERS = 300
BEGIN, END = "<!-- measured: bench/privacy.py -->", "<!-- end of measured -->"

Finder = Callable[[str], list[Span]]


@dataclass
class Score:
    labelled: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)

    def rows(self) -> dict[str, dict[str, float | int | None]]:
        return {
            kind: {
                "labelled": self.labelled[kind],
                "recall": round(self.hit[kind] / self.labelled[kind], 4) if self.labelled[kind] else None,
                "found": self.found[kind],
                "precision": round(self.right[kind] / self.found[kind], 4) if self.found[kind] else None,
            }
            for kind in dict.fromkeys(LABELS.values())
            if self.labelled[kind]
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--presidio", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    finders: dict[str, Finder] = {"onlay": find}
    if arguments.model:
        names = presidio_names(arguments.model)
        finders[f"onlay, names by {arguments.model}"] = lambda text: find(text, names=names)
    if arguments.presidio:
        finders["presidio, blank model"] = presidio_alone()
    result: dict[str, Any] = {
        "command": "bench/privacy.py FOLDER" + (" --presidio" if arguments.presidio else "") + (f" --model {arguments.model}" if arguments.model else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: installed(name) for name in ("presidio-analyzer", "spacy")},
        "labelled": {name: {who: scored(arguments.folder / "pii_presidio" / name, finder) for who, finder in finders.items()} for name in LABELLED},
        "others": {name: counted([arguments.folder / one for one in files]) for name, files in OTHERS.items()},
        "speed": speed(arguments.folder),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        arguments.page.write_text(f"{before}{BEGIN}\n\n{tables(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def presidio_alone() -> Finder:
    """Its recognisers of patterns and checksums; a blank model finds no names and no places."""
    try:
        import spacy
        import tldextract
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError:
        raise SetupError(
            "presidio is not installed.", 'pip install "onlay[privacy]", or leave --presidio out.'
        ) from None
    import tempfile

    # Its e-mail recogniser would fetch a list of web suffixes.
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())
    with tempfile.TemporaryDirectory() as folder:
        spacy.blank("en").to_disk(folder)
        engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": folder}])
        engine.load()
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])

    def finder(text: str) -> list[Span]:
        found = analyzer.analyze(text, language="en")
        return [
            span_of(LABELS[one.entity_type], text, one.start, one.end, one.score)
            for one in found
            if one.entity_type in LABELS
        ]

    return finder


def scored(path: Path, finder: Finder) -> dict[str, Any]:
    score = Score()
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        labels = [(one["entity_type"], one["start_position"], one["end_position"]) for one in row["spans"]]
        spans = finder(row["full_text"])
        for name, start, end in labels:
            kind = LABELS.get(name)
            if kind:
                score.labelled[kind] += 1
                score.hit[kind] += any(one.kind == kind and one.start < end and start < one.end for one in spans)
        for one in spans:
            fitting = [name for name, start, end in labels if one.start < end and start < one.end]
            score.found[one.kind] += 1
            score.right[one.kind] += any(
                LABELS.get(name) == one.kind or (one.kind == "address" and name in ADDRESS_PARTS) for name in fitting
            )
    return {"texts": len(rows), "kinds": score.rows()}


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(inner)


def texts_of(path: Path) -> list[str]:
    content = path.read_text(encoding="utf-8")
    rows = (
        [json.loads(line) for line in content.splitlines() if line.strip()]
        if path.suffix == ".jsonl"
        else json.loads(content)
    )
    return list(texts(rows))


def counted(paths: list[Path]) -> dict[str, Any]:
    every = [text for path in paths for text in texts_of(path)]
    found = Counter(span.kind for text in every for span in find(text))
    return {"texts": len(every), "characters": sum(map(len, every)), "found": dict(found.most_common())}


def speed(folder: Path) -> dict[str, float]:
    """Microseconds of processor time for 300 characters, the best of three passes."""
    prose = [text for text in texts_of(folder / "instruct_demo" / "alpaca_en_demo.json") if 100 < len(text) < 600]
    sums = [text for text in texts_of(folder / "gsm8k" / "test.jsonl") if 100 < len(text) < 600]
    return {
        "prose without personal data": timed([text for text in prose if not find(text)]),
        "arithmetic without personal data": timed([text for text in sums if not find(text)]),
        "with names": timed([text for text in sums if find(text)]),
    }


def timed(some: list[str]) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for text in some:
            find(text)
        best = min(best, time.process_time() - began)
    return round(best / sum(map(len, some)) * ROW_CHARACTERS * 1e6, 1)


def tables(result: dict[str, Any]) -> str:
    parts = []
    for name, by_finder in result["labelled"].items():
        first = next(iter(by_finder.values()))
        head = "".join(f" {who}: recall | precision |" for who in by_finder)
        parts += [
            f"`{name}`, {first['texts']:,} texts:",
            "",
            f"| kind | labelled |{head}",
            "|---|---|" + "---|---|" * len(by_finder),
        ]
        for kind in first["kinds"]:
            numbers = "".join(
                f" {told(one['kinds'][kind]['recall'])} | {told(one['kinds'][kind]['precision'])} |"
                for one in by_finder.values()
            )
            parts.append(f"| {kind} | {first['kinds'][kind]['labelled']} |{numbers}")
        parts.append("")
    parts += ["Found in rows that hold little:", "", "| data | texts | found |", "|---|---|---|"]
    for name, one in result["others"].items():
        parts.append(
            f"| {name} | {one['texts']:,} | {', '.join(f'{count:,} {kind}' for kind, count in one['found'].items())} |"
        )
    parts += [
        "",
        f"Microseconds of one core for {ROW_CHARACTERS} characters ({result['machine']}):",
        "",
        "| rows | microseconds |",
        "|---|---|",
    ]
    parts += [f"| {name} | {one:.0f} |" for name, one in result["speed"].items()]
    versions = ", ".join(f"{name} {one}" for name, one in result["versions"].items() if one)
    return "\n".join([*parts, "", f"Made with `{result['command']}`" + (f" ({versions})." if versions else "."), ""])


def told(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


if __name__ == "__main__":
    main()
