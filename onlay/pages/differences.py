"""What differs between two texts, marked in one of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from markupsafe import Markup, escape

WORD = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|[^\w\s])(\s*)")
"""A word and the white space behind it.  Chinese and Japanese have no spaces: a character is a word."""
MOST_WORDS = 800
"""Differences between longer texts are not looked for: that takes time as their lengths' product."""
LEAST_IN_COMMON = 0.3
"""With less in common nearly every word would be marked, which says nothing."""


def marked(answer: str, *, expected: str) -> Markup:
    """The answer, escaped, with <ins> around words that are not in the expected one and <del> around those that are missing.

    White space is not compared.  Plain where either text is too long or has no words, or where less than LEAST_IN_COMMON of
    their characters are in common.
    """
    ours, theirs = WORD.findall(answer), WORD.findall(expected)
    if not ours or not theirs or max(len(ours), len(theirs)) > MOST_WORDS:
        return escape(answer)
    ours_words, their_words = [word for word, _ in ours], [word for word, _ in theirs]
    matcher = difflib.SequenceMatcher(None, their_words, ours_words, autojunk=False)
    blocks = matcher.get_matching_blocks()
    common = sum(len(word) for start, _, size in blocks for word in their_words[start : start + size])
    if 2 * common / sum(map(len, ours_words + their_words)) < LEAST_IN_COMMON:
        return escape(answer)
    parts = [escape(answer[: len(answer) - len(answer.lstrip())])]
    for change, from_start, from_end, to_start, to_end in matcher.get_opcodes():
        missing, said = (_joined(one) for one in (theirs[from_start:from_end], ours[to_start:to_end]))
        if change == "equal":
            parts.append(escape("".join(said)))
            continue
        if missing[0]:  # Its line breaks are those of the other text.
            parts.append(Markup("<del>{}</del>{}").format(missing[0], " " if missing[1] else ""))
        if said[0]:
            parts.append(Markup("<ins>{}</ins>{}").format(*said))
    return Markup("").join(parts)


def _joined(words: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Text of some words, and the white space behind the last."""
    text = "".join(word + space for word, space in words)
    return text.rstrip(), text[len(text.rstrip()) :]


def differs_in_white_space_alone(answer: str, *, expected: str) -> bool:
    return answer.strip() != expected.strip() and answer.split() == expected.split()
