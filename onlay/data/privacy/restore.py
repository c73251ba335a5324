"""Texts of any length with their pseudonyms replaced by what they stand for, so that JSON stays JSON and tables stay tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from onlay.data.privacy.pseudonyms import TOKEN, Vault

Form = Literal["json", "csv", "tsv", "text"]
"""`json`: tokens stand in JSON strings; `text`: a line that is a JSON object or list of its own is JSON, every other is not."""
FORMS: dict[str, Form] = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv"}
"""By the end of a file's name; everything else is text."""
BOM = "\ufeff"
LINES = 1000
"""Looked up at once.  No token stands on two lines."""


class Restorer:
    """`restored` and `unknown` (tokens that the vault does not know, which stay) grow with every text."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.restored = 0
        self.unknown: Counter[str] = Counter()

    def restore(self, lines: Iterable[str], *, form: Form) -> Iterator[str]:
        """The text in pieces, in order; memory holds LINES lines.

        A value goes into JSON with its escapes, and into a table's field with the quotes that it then needs.
        Raises SetupError as `Vault.look_up` does, before the first piece; csv.Error for a table that is none.
        """
        self.vault.look_up(())
        source = iter(lines)
        if form in ("csv", "tsv"):
            yield from self._tables(source, "," if form == "csv" else "\t")
            return
        while some := list(itertools.islice(source, LINES)):
            texts = self._look_up(some)
            yield "".join(self._line(line, texts, form) for line in some)

    def _tables(self, lines: Iterator[str], delimiter: str) -> Iterator[str]:
        first = next(lines, None)
        if first is None:
            return
        end = "\r\n" if first.endswith("\r\n") else "\n"
        if first.startswith(BOM):
            yield BOM
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(itertools.chain([first.removeprefix(BOM)], lines), delimiter=delimiter, strict=True)
        while some := list(itertools.islice(rows, LINES)):
            texts = self._look_up(field for row in some for field in row)
            out = io.StringIO()
            writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
            writer.writerows([self._replaced(field, texts, _plain) for field in row] for row in some)
            yield out.getvalue()

    def _look_up(self, some: Iterable[str]) -> dict[str, str]:
        tokens = {token for text in some for token in TOKEN.findall(text)}
        return self.vault.look_up(tokens) if tokens else {}

    def _line(self, line: str, texts: dict[str, str], form: Form) -> str:
        if TOKEN.search(line) is None:
            return line
        return self._replaced(line, texts, _in_json if form == "json" or _is_json(line) else _plain)

    def _replaced(self, text: str, texts: dict[str, str], written: Callable[[str], str]) -> str:
        def value(found: re.Match[str]) -> str:
            if found[0] not in texts:
                self.unknown[found[0]] += 1
                return found[0]
            self.restored += 1
            return written(texts[found[0]])

        return TOKEN.sub(value, text)


def _is_json(line: str) -> bool:
    if not line.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _in_json(text: str) -> str:
    return _plain(json.dumps(text, ensure_ascii=False)[1:-1])


def _plain(text: str) -> str:
    """Half of a surrogate pair, which no file can hold, is written out as JSON does."""
    return text.encode("utf-8", "backslashreplace").decode()
