"""Cuts a collection of books into clean documents for the first training stage.

    python recipes/pocket/books.py BOOKS.jsonl.gz --train books_train.jsonl --heldout books_heldout.jsonl

The input is gzip JSON lines {author, title, text}.  The output is JSON lines {text}: documents of 2,000 to 8,000
characters cut at paragraph boundaries.  Books that were translated into English are left out unless
--with-translations is given: an author's death says nothing about when the translator died, so their standing in the
public domain is not plain.
The held-out part is whole books, so that no page of a held-out book has been seen.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MIN_DOCUMENT_CHARS = 2_000
AIM_DOCUMENT_CHARS = 6_000
MAX_DOCUMENT_CHARS = 8_000
MIN_ENGLISH_FRACTION = 0.12
"""English prose has 17 to 30 % of the ten words below; French, German and Latin have under 5 %."""
ENGLISH_WORDS = frozenset(["the", "of", "and", "to", "a", "in", "that", "it", "was", "is"])
TRANSLATED_AUTHORS = frozenset(
    (
        "Alexandre Dumas", "Anton Chekhov", "Friedrich Nietzsche", "Fyodor Dostoyevsky", "Jules Verne", "Leo Tolstoy",
        "Victor Hugo", "Voltaire", "Franz Kafka", "Gaston Leroux", "Ivan Turgenev", "Nikolai Gogol",
        "Gustave Flaubert", "Hans Christian Andersen", "Jacob and Wilhelm Grimm", "Henrik Ibsen", "Honore de Balzac",
        "Johann Wolfgang von Goethe", "Johanna Spyri", "Carlo Collodi", "Miguel de Cervantes", "Dante Alighieri",
        "Plato", "Marcus Aurelius", "Homer",
    )
)
BOILERPLATE = re.compile(
    r"project gutenberg|gutenberg-tm|\be-?text\b|transcriber'?s? note|produced by .* proofread|^\s*\[illustration", re.I
)
CONTENTS_HEADING = re.compile(r"(table of )?contents\.?", re.I)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("books", type=Path, help="gzip JSON lines of {author, title, text}")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--heldout-fraction", type=float, default=0.01, help="of all characters, by whole book")
    parser.add_argument("--with-translations", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    books = [
        book
        for book in read_books(arguments.books)
        if keep(book, counts, with_translations=arguments.with_translations)
    ]
    documents = {
        (book["author"], book["title"]): split_documents(clean_paragraphs(book["text"], counts)) for book in books
    }
    heldout = choose_heldout(documents, fraction=arguments.heldout_fraction, seed=arguments.seed)
    for part, path in (("train", arguments.train), ("heldout", arguments.heldout)):
        chosen = [text for key, texts in documents.items() if (key in heldout) == (part == "heldout") for text in texts]
        random.Random(arguments.seed).shuffle(chosen)
        path.write_text(
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen), encoding="utf-8"
        )
        counts[f"{part} documents"], counts[f"{part} characters"] = len(chosen), sum(map(len, chosen))
    for name, count in counts.items():
        print(f"{count:>12,} {name}")
    print("held out:", "; ".join(f"{author}, {title}" for author, title in sorted(heldout)))


def read_books(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        for line in lines:
            yield json.loads(line)


def keep(book: dict, counts: Counter, *, with_translations: bool) -> bool:
    counts["books read"] += 1
    if not is_english(book["text"]):
        counts["books dropped: not English"] += 1
        return False
    if book["author"] in TRANSLATED_AUTHORS and not with_translations:
        counts["books dropped: translations"] += 1
        return False
    counts["books kept"] += 1
    return True


def is_english(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text[:200_000].lower())
    return bool(words) and sum(word in ENGLISH_WORDS for word in words) / len(words) >= MIN_ENGLISH_FRACTION


def clean_paragraphs(text: str, counts: Counter) -> Iterator[str]:
    """The paragraphs worth training on: no Markdown headings, no boilerplate, no tables of contents, no rules."""
    in_contents = False
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        kept = [line.rstrip() for line in block.split("\n") if line.strip() and not line.lstrip().startswith("#")]
        counts["heading lines dropped"] += sum(line.lstrip().startswith("#") for line in block.split("\n"))
        paragraph = "\n".join(re.sub(r"[ \t\u00a0]{2,}", " ", line) for line in kept).strip().replace("\ufeff", "")
        if not paragraph:
            continue
        if CONTENTS_HEADING.fullmatch(paragraph.strip("*_ ")):
            in_contents = True
        in_contents = in_contents and len(paragraph) < 200
        if in_contents or not re.search(r"[^\W_]", paragraph) or BOILERPLATE.search(paragraph):
            counts["paragraphs dropped: contents, rules, boilerplate"] += 1
            continue
        yield without_markup(paragraph)


def without_markup(paragraph: str) -> str:
    """Markdown emphasis is taken away: the model reads prose, and *stars* and _bars_ would teach it decoration."""
    return re.sub(r"(?<!\w)(\*\*\*|\*\*|\*|_)(?=\S)([^*_\n]+?)(?<=\S)\1(?!\w)", r"\2", paragraph)


def split_documents(paragraphs: Iterator[str]) -> list[str]:
    """Joins paragraphs up to about AIM_DOCUMENT_CHARS; a paragraph above the maximum is cut at sentence ends."""
    documents: list[str] = []
    open_document = ""
    for paragraph in paragraphs:
        for piece in cut_long(paragraph):
            if (
                open_document
                and len(open_document) + len(piece) > AIM_DOCUMENT_CHARS
                and len(open_document) >= MIN_DOCUMENT_CHARS
            ):
                documents.append(open_document)
                open_document = ""
            open_document = f"{open_document}\n\n{piece}" if open_document else piece
    if open_document:
        documents.append(open_document)
    return documents


def cut_long(paragraph: str) -> Iterator[str]:
    limit = MAX_DOCUMENT_CHARS - MIN_DOCUMENT_CHARS
    while len(paragraph) > limit:
        cut = max(paragraph.rfind(". ", 0, limit), paragraph.rfind("\n", 0, limit)) + 1 or limit
        yield paragraph[:cut].strip()
        paragraph = paragraph[cut:].strip()
    yield paragraph


def choose_heldout(documents: dict[tuple[str, str], list[str]], *, fraction: float, seed: int) -> set[tuple[str, str]]:
    """Whole books in random order until `fraction` of the characters is reached, passing over those too large."""
    sizes = {key: sum(map(len, texts)) for key, texts in documents.items()}
    aim_chars = fraction * sum(sizes.values())
    chosen: set[tuple[str, str]] = set()
    for key in random.Random(seed).sample(sorted(sizes), len(sizes)):
        taken = sum(sizes[name] for name in chosen)
        if taken < aim_chars and taken + sizes[key] <= 1.5 * aim_chars:
            chosen.add(key)
    return chosen


if __name__ == "__main__":
    main()
