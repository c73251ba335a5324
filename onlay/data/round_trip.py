"""Whether a templated conversation reads back as the turns that went in: no role forged, no turn lost or changed.

No parser for each family of templates, but a comparison.  The same turns are rendered a second time, each content replaced
by a placeholder; between the placeholders lies what the template itself writes.  That skeleton says three things about
the row, and each has to hold:

    marks      the special tokens and marker texts of row and skeleton are the same, in kind and number.  A content that
               holds `<|im_end|>`, `[INST]` or a line `### Response:` has more: a reader would see another turn.
    contents   the skeleton with the contents put in for the placeholders is the row, but for white space.
    order      every content is there, once, in the order of the turns.

Special tokens are compared as token ids, so what counts is what the tokenizer makes of the text.  Marker texts are learned
from the template: what it writes around system, user and assistant turns, by lines, if it is more than a plain word; words
such as `User:` count at the beginning of a line only, where the template writes them, tags such as `[INST]` everywhere.

Not a fault here: white space that is trimmed, and reasoning that the template leaves out (noted by onlay.data.template).
Skeletons depend on the roles alone where there are no tools, so that all rows of one form share one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onlay.data.read import Conversation, Document, Turn
from onlay.data.template import ChatTemplate, Encoded
from onlay.errors import DataError

MOST_SKELETONS = 4096
"""Kept at a time; conversations of hundreds of turns come in many forms."""
_PLACEHOLDER = re.compile(r"zq(\d+)qz")
_THINK = re.compile(r"(</?think>)")
_BETWEEN_TAGS = r"(?<=[>\]])(?=[<\[])"
_WORDS = re.compile(r"[\w ]*")

Item = Conversation | Document


@dataclass(frozen=True, slots=True)
class _Form:
    """A conversation with numbered placeholders for its contents."""

    skeleton: Conversation
    parts: list[str]
    """What the placeholders stand for."""
    needed: set[int]
    """Numbers of the parts that have to be printed: all but reasoning, and turns after the last answer."""
    results: set[int]
    """Numbers of the parts that functions gave."""
    written: str
    """What stays as it is: arguments of calls and descriptions of tools, as JSON."""

    @property
    def key(self) -> tuple[tuple[str, str, str | None, bool], ...] | None:
        """Equal for conversations with one skeleton; None where a conversation has its own, because of tools or names."""
        turns = self.skeleton.turns
        if self.written or any(turn.name for turn in turns):
            return None
        return tuple((turn.role, turn.content, turn.reasoning, turn.trained) for turn in turns)


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What the template makes of a form."""

    literals: list[str]
    """Without white space: before, between and after the placeholders that were printed."""
    order: list[int]
    """Numbers of the placeholders, as printed."""
    special: list[int]
    """Special tokens, in order."""
    marks: list[int]
    """How often each marker text is there."""

    def filled(self, parts: Sequence[str]) -> str:
        """The text, without white space, with parts in place of the placeholders."""
        pieces = [self.literals[0]]
        for number, literal in zip(self.order, self.literals[1:], strict=True):
            pieces += (_squeezed(parts[number]), literal)
        return "".join(pieces)


class RoundTrip:
    """Reads templated rows back.  `template` has to be the one that encoded them."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        tokenizer = template.tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = {text for text in added | set(tokenizer.all_special_tokens) if text.strip()}
        if tokenizer.unk_token not in (tokenizer.bos_token, tokenizer.eos_token):
            texts.discard(tokenizer.unk_token)  # A character that the vocabulary lacks becomes <unk>: that is no mark.
        self._special_texts = sorted(texts, key=lambda text: (-len(text), text))
        self._special = frozenset(tokenizer.convert_tokens_to_ids(self._special_texts))
        self._line_marks, self._tags = self._learn_marks()
        self._document = self._special_of(template.encode(Document("zq0qz")))
        self._known: dict[object, _Skeleton | None] = {}

    @property
    def marker_texts(self) -> list[str]:
        """What counts as a mark beside special tokens; `^` stands for the beginning of a line."""
        return [*(f"^{mark}" for mark in self._line_marks), *self._tags]

    def check(self, items: Sequence[Item], encoded: Sequence[Encoded]) -> list[bool | None]:
        """Of each item whether it reads back; None where the template takes the row but no placeholders, so that nothing
        can be said.  `encoded`: what the template's `encode_batch` made of the items, none of them refused."""
        cut = self._template.loss_on == "assistant"
        forms = [_form_of(item, cut=cut) for item in items if isinstance(item, Conversation)]
        pairs = iter(zip(forms, self._skeletons_of(forms), strict=True))
        return [
            self._special_of(one) == self._document
            if isinstance(item, Document)
            else self._reads_back(*next(pairs), one)
            for item, one in zip(items, encoded, strict=True)
        ]

    def _skeletons_of(self, forms: Sequence[_Form]) -> list[_Skeleton | None]:
        """One for each form; what is not known yet is encoded in one batch."""
        if len(self._known) > MOST_SKELETONS:
            self._known.clear()
        keys = [form.key or i for i, form in enumerate(forms)]
        new = {key: form for key, form in zip(keys, forms, strict=True) if key not in self._known}
        refused: dict[int, DataError] = {}
        batch = self._template.encode_batch([form.skeleton for form in new.values()], refused=refused)
        found = {key: None if i in refused else self._skeleton_of(batch[i]) for i, key in enumerate(new)}
        skeletons = [found[key] if key in found else self._known[key] for key in keys]
        self._known |= {key: skeleton for key, skeleton in found.items() if not isinstance(key, int)}
        return skeletons

    def _skeleton_of(self, encoded: Encoded) -> _Skeleton:
        pieces = _PLACEHOLDER.split(encoded.text)
        return _Skeleton(
            literals=[_squeezed(piece) for piece in pieces[::2]], order=[int(number) for number in pieces[1::2]],
            special=self._special_of(encoded), marks=self._marks_of(encoded.text),
        )  # fmt: skip

    def _reads_back(self, form: _Form, skeleton: _Skeleton | None, encoded: Encoded) -> bool | None:
        if skeleton is None:
            return None
        if self._special_of(encoded) != skeleton.special or self._marks_of(encoded.text) != skeleton.marks:
            return False
        if form.written and any(mark in form.written for mark in (*self._special_texts, *self._tags)):
            return False  # The skeleton has it too.
        order = skeleton.order
        if not form.needed <= set(order) or any(a >= b for a, b in itertools.pairwise(order)):
            return False
        found = _squeezed(encoded.text)
        if found == skeleton.filled(form.parts):
            return True
        if not form.results:
            return False
        # Some templates print what a function gave as JSON text.
        quoted = [
            json.dumps(part, ensure_ascii=False)[1:-1] if n in form.results else part
            for n, part in enumerate(form.parts)
        ]
        return found == skeleton.filled(quoted)

    def _special_of(self, encoded: Encoded) -> list[int]:
        special = self._special
        return [token for token in encoded.ids if token in special]

    def _marks_of(self, text: str) -> list[int]:
        by_line = "\n" + text
        return [by_line.count("\n" + mark) for mark in self._line_marks] + [text.count(mark) for mark in self._tags]

    # ------------------------------------------------------------------------------------------------------------ marks

    def _learn_marks(self) -> tuple[list[str], list[str]]:
        """Marker texts that count at the beginning of a line, and those that count everywhere."""
        at_line: dict[str, bool] = {}
        indented: set[str] = set()
        exchanges = ("user", "assistant", "user", "assistant")
        probes: list[tuple[tuple[str, ...], bool]] = [(exchanges, not self._template.accepts.system)]
        if self._template.accepts.system:
            probes.append((("system", *exchanges), True))
        for roles, opening in probes:
            text = self._probe(roles)
            found = list(_PLACEHOLDER.finditer(text))
            # Without a system message some templates begin with one of their own: that is text, no mark.
            starts = ([0] if opening else [found[0].end()]) + [match.end() for match in found[not opening :]]
            ends = [match.start() for match in found[not opening :]] + [len(text)]
            for start, end in zip(starts, ends, strict=True):
                for mark, begins_line, indent in self._lines_of(text, start, end):
                    at_line[mark] = at_line.get(mark, True) and begins_line
                    indented.add(indent + mark)
        lines = {mark for mark, begins_line in at_line.items() if begins_line and mark[0] not in "<[{|"}
        tags = sorted(set(at_line) - lines)
        return sorted(lines | {mark for mark in indented if mark.lstrip() in lines}), tags

    def _probe(self, roles: Sequence[str]) -> str:
        turns = tuple(Turn(role, f"zq{i}qz") for i, role in enumerate(roles))
        refused: dict[int, DataError] = {}
        two, one = self._template.encode_batch([Conversation(turns), Conversation(turns[:-2])], refused=refused)
        return one.text if 0 in refused else two.text

    def _lines_of(self, text: str, start: int, end: int) -> Iterator[tuple[str, bool, str]]:
        """What the template writes in text[start:end], by lines and between special tokens: each text that is more than
        words, whether it begins a line, and the white space before it."""
        special = "|".join(re.escape(one) for one in self._special_texts if one in text) or "(?!)"
        at = start
        for piece in re.split(f"({special}|\n)|{_BETWEEN_TAGS}", text[start:end]):
            if piece is None:
                continue
            before, mark = text[:at], piece.strip()
            at += len(piece)
            if re.fullmatch(special, mark) or _WORDS.fullmatch(mark) or _THINK.fullmatch(mark):
                continue
            if len(mark) > 2 or any(map(str.isalnum, mark)):
                begins_line = before.endswith("\n") or not re.sub(special, "", before).strip()
                yield mark, begins_line, piece[: len(piece) - len(piece.lstrip())]


def _form_of(item: Conversation, *, cut: bool) -> _Form:
    """`cut`: turns after the last answer are left out by the template."""
    turns: list[Turn] = []
    parts: list[str] = []
    needed: set[int] = set()
    results: set[int] = set()
    last = max((i for i, turn in enumerate(item.turns) if turn.role == "assistant"), default=-1)
    printed = last + 1 if cut and last >= 0 else len(item.turns)
    for i, turn in enumerate(item.turns):
        reasoning = turn.reasoning
        if reasoning and reasoning.strip():
            reasoning = f"zq{len(parts)}qz"
            parts.append(turn.reasoning or "")
        # Reasoning within the content is left out of history by the templates that know it.
        thinks = turn.role == "assistant" and "think>" in turn.content
        texts = _THINK.split(turn.content) if thinks else [turn.content]
        for at in range(0, len(texts), 2):
            if not texts[at].strip():
                texts[at] = ""
                continue
            if at == len(texts) - 1 and i < printed:
                needed.add(len(parts))
            if turn.role == "tool":
                results.add(len(parts))
            parts.append(texts[at])
            texts[at] = f"zq{len(parts) - 1}qz"
        turns.append(
            Turn(turn.role, "".join(texts), turn.tool_calls, reasoning, turn.trained, turn.name, turn.tool_call_id)
        )
    arguments = [call.arguments for turn in item.turns for call in turn.tool_calls]
    written = json.dumps([arguments, item.tools], ensure_ascii=False) if arguments or item.tools else ""
    return _Form(Conversation(tuple(turns), item.tools, item.place), parts, needed, results, written)


def _squeezed(text: str) -> str:
    return "".join(text.split())
