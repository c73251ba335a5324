"""Mixes books and exercises into one file of plain text for pocket's first stage: {"text": ...} a line.

Exercises are written with the chat template and joined to documents of about the books' length, so that the first stage
sees both kinds of text in every batch.

    python recipes/pocket/mix.py --tokenizer FOLDER --books books.jsonl --exercises exercises.jsonl --out text.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

CHARACTERS_A_DOCUMENT = 3000


def bundles(exercises: Path, template: str) -> Iterator[str]:
    """Rendered exercises, joined until a document is long enough."""
    import jinja2

    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    parts: list[str] = []
    size = 0
    with exercises.open(encoding="utf-8") as lines:
        for line in lines:
            text = render(messages=json.loads(line)["messages"], bos_token="<|begin|>", eos_token="<|end|>")
            parts.append(text)
            size += len(text)
            if size >= CHARACTERS_A_DOCUMENT:
                yield "".join(parts)
                parts, size = [], 0
    if parts:
        yield "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--exercises", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    template = (arguments.tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    documents = list(bundles(arguments.exercises, template))
    exercises = len(documents)
    with arguments.books.open(encoding="utf-8") as lines:
        documents += [json.loads(line)["text"] for line in lines]
    random.Random(arguments.seed).shuffle(documents)
    with arguments.out.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    print(f"{len(documents):,} documents: {len(documents) - exercises:,} of books, {exercises:,} of exercises")


if __name__ == "__main__":
    main()
