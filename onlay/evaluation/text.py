"""Words of a text, for scores that compare words: any script, the same for composed and decomposed letters.

Three cuts, each for its scores:

    words       letters and digits, lower case, no punctuation           ROUGE
    f1_words    SQuAD's normalisation: no punctuation, no English article token F1
    pieces      words and punctuation marks, nothing lost but white space repetition

Scripts that are written without spaces are cut into characters; a mark stays with the letter it belongs to (cutting at
marks, as patterns over `\\w` do, tears Hindi and Thai words apart).
"""

from __future__ import annotations

import string
import unicodedata
from functools import cache

import regex  # type: ignore[import-untyped]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CHARACTER = rf"[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*"
_RUN = rf"(?:[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]\p{{M}}*)+"
_WORD = rf"(?V1){_CHARACTER}|{_RUN}|\p{{So}}"
"""One character of an unspaced script, a run of letters and digits of another, or a pictograph."""
_PIECE = rf"(?V1){_CHARACTER}|{_RUN}|\S"
_F1_PIECE = rf"(?V1){_CHARACTER}|[\S--[[{_UNSPACED}]&&\p{{L}}]]+"


def words(text: str) -> list[str]:
    """Words of `text` in lower case, compatibility forms made equal (NFKC), invisible format characters left out.

    Of ASCII text these are the words of rouge-score's own tokenizer without stemming: runs of a-z and 0-9.
    """
    found: list[str] = regex.findall(_WORD, _plain(text).lower())
    return found


def pieces(text: str) -> list[str]:
    """Words as written, and every other visible character by itself."""
    found: list[str] = regex.findall(_PIECE, _plain(text))
    return found


def f1_words(text: str) -> list[str]:
    """Words as SQuAD's evaluation normalises them, with MLQA's reading of "punctuation" and of Chinese for all scripts.

    Lower case; punctuation of any script is taken out, not made a space ("don't" is "dont"); then `a`, `an`, `the`; then
    cut at white space, unspaced scripts by character.  Equal to SQuAD's on text whose punctuation is ASCII.
    """
    lowered = unicodedata.normalize("NFC", text).lower()
    bare = "".join(character for character in lowered if not _is_punctuation(character))
    found: list[str] = regex.findall(_F1_PIECE, regex.sub(r"\b(a|an|the)\b", " ", bare))
    return found


def label_of(text: str) -> str:
    """A label as it is compared: NFKC, case folded, white space made one, quotes and marks around it left out."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip("\"'`“”‘’«».,;:!?()[]<>*。，；：！？ ") or folded


def _plain(text: str) -> str:
    if text.isascii():
        return text
    visible: str = regex.sub(r"\p{Cf}", "", unicodedata.normalize("NFKC", text))
    return visible


@cache
def _is_punctuation(character: str) -> bool:
    # ASCII's has symbols such as $ and + that Unicode does not call punctuation.
    return character in string.punctuation or unicodedata.category(character).startswith("P")
