"""Texts as they are compared: normalised, as 8-byte keys, and as hashed runs of words.

    item ─texts_of─▶ (prompt, answer) ─normalise─▶ words ─▶ keys (equal texts) | shingles (similar texts) | n-grams

Normalising keeps what carries meaning and drops what does not: NFKC, case folded, letters, marks and digits, single
spaces.  Symbols (+ = < > $ emoji) stay, each a word of its own, and so do `- * / %` beside a digit: without them
`3 - 4` and `3 + 4`, or `-5` and `5`, would be equal.  Other punctuation becomes a space.  Scripts that write no
spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) count each character as a word.

A shingle is a run of SHINGLE_WORDS words; a text of one or two words is one shingle.  Prompt and answer are cut
separately, system turns are left out (they say nothing about a row that shares them with all others), and so are the
descriptions of tools: they are compared as a whole (`tools_key`), or rows with the same long list would all be similar.

Words are hashed in numpy over whole chunks of rows: a polynomial in an odd constant modulo 2**64, one row's word at a
time, then the finaliser of SplitMix64.  No hash depends on the process, so chunks of several workers can be joined.

Sources: shingling and resemblance, Broder 1997 (On the resemblance and containment of documents); the finaliser,
Steele, Lea and Flood 2014 (Fast splittable pseudorandom number generators).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from onlay.data.read import Conversation, Document, Turn

SHINGLE_WORDS = 3
BOILERPLATE_SHARE, BOILERPLATE_ROWS = 0.05, 100
"""A shingle in the prompts of at least this share, and at least this number, of the sampled rows is a template's."""
PIECE_BYTES = 1 << 20
_BASE, _GOLDEN = 0x9E3779B97F4A7C55, 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
SYMBOL, NUMERAL, LETTERS = 0, 1, 2

Item = Conversation | Document

# ------------------------------------------------------------------------------------------------------- normalising

_OPERATORS = {"-": "\ue000", "*": "\ue001", "/": "\ue002", "%": "\ue003"}
_BESIDE_DIGIT = re.compile(r"(?<=[0-9])[ ]?[-*/%]|[-*/%](?=[ ]?[0-9])")
_SYMBOL_ASCII = re.compile(rb"[$+<=>|~^]|(?<=[0-9])[ ]?[-*/%]|[-*/%](?=[ ]?[0-9])")
_SYMBOLS = b"$+<=>|~^-*/%"
_ASCII_OPERATORS = {b"-": b" \x80 ", b"*": b" \x81 ", b"/": b" \x82 ", b"%": b" \x83 "}
_SPACELESS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3040, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


@functools.cache
def _ascii_table() -> bytes:
    """What bytes.translate makes of each byte; 0x80 to 0x83 stand for operators beside a digit."""
    kept = {
        byte: chr(byte).lower().encode()[0] for byte in range(128) if chr(byte).isalnum() or chr(byte) in "$+<=>|~^"
    }
    kept |= {0x80: ord("-"), 0x81: ord("*"), 0x82: ord("/"), 0x83: ord("%")}
    return bytes(kept.get(byte, 32) for byte in range(256))


class _Table(dict[int, str]):
    """What str.translate makes of each character, found out when it is first met."""

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        if category == "Cf" or 0xFE00 <= code <= 0xFE0F:
            made = ""  # Soft hyphens, joiners, variation selectors: inside words, and not seen.
        elif category in ("Sm", "Sc", "So") or character == "^":
            made = f" {character} "
        elif category[0] in "LMN":
            made = f" {character} " if any(low <= code <= high for low, high in _SPACELESS) else character
        else:
            made = " "
        self[code] = made
        return made


@functools.cache
def _unicode_table() -> _Table:
    return _Table({ord(mark): f" {operator} " for operator, mark in _OPERATORS.items()})


@functools.cache
def _kinds() -> np.ndarray:
    """(256,) uint8: what a byte of a word makes it."""
    characters = [chr(byte) for byte in range(128)]
    kinds = [LETTERS if one.isalpha() else NUMERAL if one.isdigit() else SYMBOL for one in characters]
    return np.array(kinds + [LETTERS] * 128, dtype=np.uint8)


def _spaced(found: re.Match[bytes]) -> bytes:
    symbol = found.group().strip()
    return _ASCII_OPERATORS.get(symbol) or b" " + symbol + b" "


def normalise_bytes(text: str) -> bytes:
    """`normalise(text)` in UTF-8."""
    if text.isascii():
        plain = text.encode()
        if len(plain.translate(None, _SYMBOLS)) < len(plain):  # Far faster than searching, and most texts have none.
            plain = _SYMBOL_ASCII.sub(_spaced, plain)
        return b" ".join(plain.translate(_ascii_table()).split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    marked = _BESIDE_DIGIT.sub(lambda found: _OPERATORS[found.group().strip()], folded)
    return " ".join(marked.translate(_unicode_table()).split()).encode()


def normalise(text: str) -> str:
    """The text's words, as they are compared: see the top of this file.  Empty where only punctuation is there."""
    return normalise_bytes(text).decode()


# -------------------------------------------------------------------------------------------------------------- keys


def _loose(text: str, normal: bytes | None = None) -> bytes:
    """Normalised, or as it is where nothing would be left (`?!` and `...` are not equal)."""
    return (normalise_bytes(text) if normal is None else normal) or b" ".join(
        text.encode("utf-8", "surrogatepass").split()
    )


def key_of(data: bytes) -> int:
    """A uint64 of these bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def loose_key(text: str) -> int:
    """A uint64 that is equal for texts that are equal up to case, punctuation and white space."""
    return key_of(_loose(text))


def _json(value: object) -> str:
    """As JSON; what has no JSON form, such as a date out of a Parquet file, as text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _said(turn: Turn) -> str:
    """What a turn says, its tool calls included."""
    if not turn.tool_calls:
        return turn.content
    calls = [f"{call.name} {_json(call.arguments)}" for call in turn.tool_calls]
    return "\n".join([turn.content, *calls] if turn.content else calls)


def texts_of(item: Item) -> tuple[str, str]:
    """(prompt, answer) as rows are compared and shown.

    The answer is the last assistant turn and what follows it, the prompt all before it but system turns; where either
    has several turns, each begins with its role.  A document is all prompt.
    """
    if isinstance(item, Document):
        return item.text, ""
    turns = [turn for turn in item.turns if turn.role != "system"]
    last = len(turns)
    for at in range(len(turns) - 1, -1, -1):
        if turns[at].role == "assistant":
            last = at
            break
    return _joined(turns[:last]), _joined(turns[last:])


def _joined(turns: Sequence[Turn]) -> str:
    if len(turns) == 1:
        return _said(turns[0])
    return "\n".join(f"{turn.role}: {_said(turn)}" for turn in turns)


def _tools(item: Conversation) -> bytes:
    return _loose(_json(item.tools)) if item.tools else b""


def tools_key(item: Item) -> int:
    """A uint64 that is equal for rows whose lists of tools are equal; 0 where there are none."""
    return key_of(_tools(item)) if isinstance(item, Conversation) and item.tools else 0


def keys_of(item: Item, *, normal: Sequence[bytes] | None = None) -> tuple[int, int, int]:
    """(loose_prompt_key, answer_key, row_key) as RowTable keeps them, each a uint64.

    The prompt's key counts system turns and tools too: others may ask for another answer.  A document's answer key
    is 0.  The row's key counts everything that could be trained, reasoning included.
    `normal`: its prompt and answer, normalised, where they are known (None: not yet).
    """
    prompt, answer = texts_of(item)
    asked = _loose(prompt, normal[0] if normal else None)
    if isinstance(item, Document):
        key = key_of(asked)
        return key, 0, key
    answered = _loose(answer, normal[1] if normal else None)
    system = b"\x00".join(_loose(turn.content) for turn in item.turns if turn.role == "system")
    reasoning = b"\x00".join(_loose(turn.reasoning) for turn in item.turns if turn.reasoning)
    before = b"\x00\x00".join([_tools(item), system, asked])
    return key_of(before), key_of(answered), key_of(before + b"\x00\x00" + answered + b"\x00\x00" + reasoning)


# ---------------------------------------------------------------------------------------------------- hashed words


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place: every bit of a hash depends on every bit of what was hashed."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _hash_piece(piece: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and kinds of the words of a text whose words stand one space apart."""
    codes = np.frombuffer(piece + b" ", dtype=np.uint8)
    ends = np.flatnonzero(codes == 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _BASE, dtype=np.uint64))
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    hashes = np.add.reduceat(codes * powers[place], starts)
    return _mix(hashes), np.maximum.reduceat(_kinds()[codes], starts)


def hash_words(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All words of normalised texts, one text after the other.

    Returns their hashes (W,) uint64, their kinds (W,) uint8 (SYMBOL, NUMERAL or LETTERS: the highest of its characters),
    and offsets (N + 1,) int64: where each text's words begin.
    """
    counts = np.array([text.count(b" ") + 1 if text else 0 for text in texts], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    flat = b" ".join(text for text in texts if text)
    hashes, kinds, at = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint8)], 0
    while at < len(flat):
        end = len(flat)
        if end - at > PIECE_BYTES:
            cut = flat.rfind(b" ", at, at + PIECE_BYTES)
            cut = cut if cut > at else flat.find(b" ", at + PIECE_BYTES)
            end = cut if cut > at else end
        piece, kind = _hash_piece(flat[at:end])
        hashes.append(piece)
        kinds.append(kind)
        at = end + 1
    return np.concatenate(hashes), np.concatenate(kinds), offsets


def hash_runs(words: np.ndarray, offsets: np.ndarray, *, length: int, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (R,) uint64 of every run of `length` words inside a text, and (R,) int64: where its first word is.

    `short`: a text of fewer words is one run; otherwise it has none.
    """
    text = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    left = offsets[1:][text] - np.arange(len(words))
    runs = np.zeros(len(words), dtype=np.uint64)
    for step in range(length):
        factor = np.uint64(((2 * step + 1) * _GOLDEN) & _MASK)
        if step == 0:
            runs += words * factor
        elif step < len(words):
            runs[:-step] += np.where(left[:-step] > step, words[step:] * factor, np.uint64(0))
    whole = left >= length
    if short:
        counts = np.diff(offsets)
        whole |= (counts[text] < length) & (left == counts[text])
    return _mix(runs[whole]), np.flatnonzero(whole)


def text_of(places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(P,) int64: the text that holds the word at each place."""
    return np.searchsorted(offsets, places, side="right") - 1


def _shingles(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    words, _, offsets = hash_words(texts)
    shingles, first = hash_runs(words, offsets, length=SHINGLE_WORDS, short=True)
    return shingles, text_of(first, offsets)


def rows_of_texts(items: Iterable[Item]) -> list[bytes]:
    """Normalised texts, two a row: its prompt and its answer."""
    return [normalise_bytes(text) for item in items for text in texts_of(item)]


def shingles_of(
    texts: Sequence[bytes], *, boilerplate: np.ndarray | None, whole: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Shingles (S,) uint64 of normalised texts, two a row, and (S,) int64: the text that each is of.

    A row's prompt is text 2 * row, its answer the next.  Prompts' shingles that are in `boilerplate` are left out, but
    for the rows that are `whole` ((N,) bool; None: no row): a document, which has no answer, has no template either.
    """
    shingles, text = _shingles(texts)
    if boilerplate is not None and len(boilerplate):
        kept = (text % 2 == 1) | ~is_in(shingles, boilerplate)
        if whole is not None:
            kept |= whole[text // 2]
        shingles, text = shingles[kept], text[kept]
    return shingles, text


def _shingles_of_row(texts: tuple[str, str], boilerplate: np.ndarray | None) -> np.ndarray:
    normal = [normalise_bytes(text) for text in texts]
    return shingles_of(normal, boilerplate=boilerplate, whole=np.array([not texts[1]]))[0]


def similarity(first: tuple[str, str], second: tuple[str, str], *, boilerplate: np.ndarray | None = None) -> float:
    """Jaccard similarity, exact, of two rows given as (prompt, answer); 0 where a row has no shingles."""
    one, other = (_shingles_of_row(texts, boilerplate) for texts in (first, second))
    one, other, together = distinct(one), distinct(other), len(distinct(np.concatenate([one, other])))
    return (len(one) + len(other) - together) / together if together else 0.0


def distinct(values: np.ndarray) -> np.ndarray:
    """The values, sorted, each once.  numpy.unique hashes them first, which takes 40 times as long for millions."""
    ordered: np.ndarray = np.sort(values)
    once: np.ndarray = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return once


def is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N,) bool: which of the values are in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    found: np.ndarray = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found


def find_boilerplate(items: Sequence[Item]) -> np.ndarray:
    """Shingles, (B,) uint64 and sorted, that so many of these rows have in their prompts that they are a template's.

    Documents have no prompts, and are passed by.  At least BOILERPLATE_ROWS rows and BOILERPLATE_SHARE of them.  Without this, rows that share a long instruction and
    differ in a short question would all be near-duplicates.  Answers are never boilerplate: they are what is learned.
    """
    texts = [normalise_bytes(texts_of(item)[0]) for item in items if isinstance(item, Conversation)]
    shingles, row = _shingles(texts)
    return often(shingles, row, least=max(BOILERPLATE_ROWS, BOILERPLATE_SHARE * len(texts)))


def often(hashes: np.ndarray, rows: np.ndarray, *, least: float) -> np.ndarray:
    """(H,) uint64, sorted: the hashes that at least `least` rows hold; `rows` says which row each hash is of."""
    order = np.lexsort((rows, hashes))
    hashes, rows = hashes[order], rows[order]
    new = np.append(True, (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1]))[: len(hashes)]
    unique, counts = np.unique(hashes[new], return_counts=True)
    return unique[counts >= least]
