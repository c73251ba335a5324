"""Renders conversations with a chat template and decides which tokens train.

Only what the model itself would write trains: the text of assistant turns and the token that ends them.  Where such a
turn starts is not guessed from markers but checked: the turns before it, rendered with the generation prompt as at
inference, must be a prefix of the whole rendering.  A turn that fails the check (a template that drops earlier
reasoning, say) is masked and counted.  The whole text is tokenized once, with offsets; a token trains if it lies
wholly inside a trained span.

    turns ──adapt──▶ messages the template accepts ──render──▶ text ──spans──▶ [start, end) ──tokenize──▶ ids, trained

Chat templates are Jinja programs that differ in what they accept.  What this one accepts is found by rendering a few
probes when it is loaded: system messages, tools, tool calls (arguments as object or as text), tool results, reasoning.
What it does not accept is folded into what it does, and counted.

The date is pinned: `strftime_now` and `date_string` print PINNED_DATE, so that two days give the same tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from onlay.data.read import Conversation, Document, ToolCall, Turn
from onlay.errors import DataError, RecipeError
from onlay.recipe import digest_of
from onlay.records import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED_DATE = date(2024, 7, 26)
"""What templates print as today's date, in training and in generation alike."""
ENCODING_VERSION = 1
"""Raise it when the same input would give other tokens or another mask: it is part of the template digest."""
NAMED = ("alpaca", "chatml", "gemma", "llama-3", "mistral", "plain", "vicuna", "zephyr")
DOCUMENT_CHARACTERS = 1 << 20
"""Longer documents are tokenized in parts, cut after a line end."""
NOTES = {
    "masked_turns": "earlier assistant turns that the template changes once they are history; not trained",
    "boundary_merges": "answers whose first token also holds the end of the prompt; that token is not trained",
    "system_folded": "system messages put into the first user turn, because the template has no system role",
    "tools_in_system": "lists of functions put into the system message, because the template does not print tools",
    "tool_calls_as_text": "tool calls written as JSON text, because the template does not print tool calls",
    "tool_results_as_user": "tool results written as user turns, because the template has no tool role",
    "reasoning_not_rendered": "reasoning that the template does not print; not trained",
    "trailing_turns_cut": "turns after the last assistant turn; left out",
}
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
_STRFTIME = {
    **{code: f"{PINNED_DATE:{code}}" for code in ("%d", "%m", "%B", "%b", "%Y", "%y", "%A", "%a", "%j")},
    **{"%-d": str(PINNED_DATE.day), "%-m": str(PINNED_DATE.month), "%Z": "UTC", "%z": "+0000"},
    **{"%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"},
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One token sequence.  `trained[i]` says that token i is a target; the first token never is."""

    ids: list[int]
    trained: list[bool]
    notes: dict[str, int] = field(default_factory=dict)
    """Code of NOTES to count."""
    is_document: bool = False
    place: str = ""
    kept_at_end: int = 0
    """So many of the last tokens stay when the rest is cut to length."""
    text: str = ""
    """What was tokenized: the conversation as the template prints it, or the document."""


@dataclass(frozen=True, slots=True)
class _Accepts:
    """What the template renders, by probe."""

    system: bool
    needs_system: bool
    """It fails without a system message (an undefined variable); an empty one is then given."""
    tools: bool
    tool_calls: bool
    arguments_as_text: bool
    tool_role: bool
    reasoning: bool


class ChatTemplate:
    """A chat template bound to a tokenizer.  `template` is a recipe's data.template.

    Raises RecipeError for an unknown name, a file that is not there or not Jinja, and a template that cannot be used.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: str = "auto", loss_on: str = "assistant"
    ) -> None:
        if not tokenizer.is_fast:
            raise RecipeError(
                f"model.base: its tokenizer {type(tokenizer).__name__} gives no offsets, so no exact mask.",
                "Use a base with a tokenizer.json.",
            )
        self.tokenizer: Any = tokenizer
        self.loss_on = loss_on
        self.name, source = _find_source(tokenizer, template)
        self.source = _pin_date(source)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self._variables = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
        if "date_string" in source:
            self._variables["date_string"] = f"{PINNED_DATE:%d %b %Y}"
        self._adds_bos = self._tokenizer_adds_bos()
        added = tokenizer.added_tokens_decoder.values()
        self._special = {str(token) for token in added} | set(tokenizer.all_special_tokens)
        self._ends: tuple[str, ...] = ()
        self._excess = self._lead = ""
        self._prompt_from_answer = False
        self.accepts = self._probe_inputs()
        self._probe_ends()
        self.digest = digest_of([self.source, PINNED_DATE.isoformat(), ENCODING_VERSION])

    # ------------------------------------------------------------------------------------------------------ probes

    def _tokenizer_adds_bos(self) -> bool:
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        usual = self.tokenizer("a")["input_ids"]
        return self.bos_id is not None and len(usual) > len(plain) and usual[0] == self.bos_id

    def _try(
        self, messages: list[dict[str, Any]], *, prompt: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> str | None:
        try:
            return self._render(messages, tools, prompt)
        except _RENDER_ERRORS:
            return None

    def _probe_inputs(self) -> _Accepts:
        user, system = {"role": "user", "content": "zqUser"}, {"role": "system", "content": "zqSystem"}
        empty = {"role": "system", "content": ""}
        with_system = self._try([system, user], prompt=True)
        alone = self._try([user], prompt=True)
        needs_system = alone is None and self._try([empty, user], prompt=True) is not None
        if alone is None and not needs_system:
            try:
                self._render([user], None, True)
            except TemplateSyntaxError as error:
                raise RecipeError(
                    f"data.template = {self.name}, line {error.lineno}: {error.message}.", "Correct the Jinja template."
                ) from None
            except _RENDER_ERRORS as error:
                raise RecipeError(
                    f"data.template = {self.name} cannot render one user turn: {_brief(error)}.",
                    f"Choose another: {', '.join(NAMED)}, or a .jinja file.",
                ) from None
        start = [empty] if needs_system else []
        tool = {
            "type": "function",
            "function": {"name": "zqTool", "description": "zq", "parameters": {"type": "object", "properties": {}}},
        }
        with_tools = self._try([*start, user], prompt=True, tools=[tool])
        calls, as_text = False, False
        for text_form in (False, True):
            rendered = self._try([*start, user, self._call_probe(text_form)], tools=[tool])
            if (
                rendered
                and "zqName" in rendered
                and "'zqKey'" not in rendered
                and "zqKey" in rendered
                and '\\"zqKey' not in rendered
            ):
                calls, as_text = True, text_form
                break
        call = self._call_probe(as_text) if calls else {"role": "assistant", "content": "zqCall"}
        result = {"role": "tool", "content": "zqResult", "name": "zqName", "tool_call_id": "call00000"}
        with_result = self._try(
            [*start, user, call, result, {"role": "assistant", "content": "zqAnswer"}], tools=[tool]
        )
        reasoned = self._try(
            [*start, user, {"role": "assistant", "content": "zqAnswer", "reasoning_content": "zqReason"}]
        )
        return _Accepts(
            system=with_system is not None and "zqSystem" in with_system,
            needs_system=needs_system,
            tools=with_tools is not None and "zqTool" in with_tools,
            tool_calls=calls,
            arguments_as_text=as_text,
            tool_role=with_result is not None and "zqResult" in with_result,
            reasoning=reasoned is not None and "zqReason" in reasoned,
        )

    @staticmethod
    def _call_probe(as_text: bool) -> dict[str, Any]:
        arguments: Any = '{"zqKey": "zqValue"}' if as_text else {"zqKey": "zqValue"}
        function = {"name": "zqName", "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        }

    def _probe_ends(self) -> None:
        """Finds the tokens that end a turn, and what the generation prompt has too much."""
        user, answer = Turn("user", "zqUser"), Turn("assistant", "Zqanswer")
        messages, _, _ = self._adapt((user, answer), ())
        full = self._render(messages, None)
        prompt = self._render(messages[:-1], None, True)
        at = full.rfind("Zqanswer")
        common = _common_prefix(prompt, full)
        if at < 0 or "zqUser" not in full[:at]:
            raise RecipeError(
                f"data.template = {self.name} does not print a user turn and then the answer; it prints {full[:80]!r}.",
                f"Choose another: {', '.join(NAMED)}, or a .jinja file.",
            )
        ignores_it = prompt == self._render(messages[:-1], None)
        if (prompt[common:] or ignores_it) and (full[common:at].strip() or common > at):
            self._prompt_from_answer = True
            common = len(full[:at].rstrip(" "))
        else:
            self._excess = prompt[common:]
        self._lead = full[common:at]
        ends = [self._first_special(full[at + len("Zqanswer") :])]
        twice = self._try(
            [*messages, {"role": "user", "content": "zqNext"}, {"role": "assistant", "content": "Zqlast"}]
        )
        if twice is not None and twice.find("Zqanswer") < twice.find("zqNext"):
            between = twice[twice.find("Zqanswer") + len("Zqanswer") : twice.find("zqNext")]
            # A template may end an earlier turn with another token; the next turn's header is no end.
            header = _common_prefix(between[::-1], full[: full.find("zqUser")][::-1])
            ends.append(self._first_special(between[: len(between) - header]))
        if self.accepts.tool_calls:
            called = self._try([*messages[:-1], self._call_probe(self.accepts.arguments_as_text)])
            if called is not None:
                last = max((called.rfind(token) + len(token), token) for token in self._special)
                if not called[last[0] :].strip() and last[1] in self._specials_that_end:
                    ends.append(last[1])
        self._ends = tuple(dict.fromkeys(end for end in ends if end))
        if not self._ends and self.eos_id is None:
            raise RecipeError(
                f"data.template = {self.name} writes no token that ends an answer, and the tokenizer has no end token.",
                "Choose a template whose end token the tokenizer has, or a base with an eos_token.",
            )

    @cached_property
    def _specials_that_end(self) -> set[str]:
        """Tokens that are special, not merely added: `</tool_call>` is added, and ends no turn."""
        added = self.tokenizer.added_tokens_decoder.values()
        return {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)

    def _first_special(self, tail: str) -> str | None:
        """The added token that follows content with nothing but white space between; None where none does."""
        text = tail.lstrip()
        return max((token for token in self._special if text.startswith(token)), key=len, default=None)

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an assistant turn: the template's own and the tokenizer's end token; sorted."""
        ids = {self.tokenizer.convert_tokens_to_ids(end) for end in self._ends}
        return sorted(ids | ({self.eos_id} if self.eos_id is not None else set()))

    @cached_property
    def findings(self) -> list[Finding]:
        """What is worth telling about the template itself, before any row."""
        found = []
        messages, _, _ = self._adapt((Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")), ())
        rendered = self._try(messages) or ""
        marks = dict.fromkeys(re.findall(r"<\|[^\s|<>]+\|>|<(?:start|end)_of_turn>", rendered))
        missing = [mark for mark in marks if mark not in self._special]
        if missing:
            found.append(
                Finding(
                    code="template_tokens_missing",
                    count=len(missing),
                    message=f"marks that the tokenizer spells in several tokens: {' '.join(missing)}",
                )
            )
        if self._prompt_from_answer:
            found.append(
                Finding(
                    code="generation_prompt_unused",
                    count=1,
                    message="no generation prompt that leads to answers; prompts end where answers begin",
                )
            )
        if self._excess.strip():
            found.append(
                Finding(
                    code="generation_prompt_cut",
                    count=1,
                    message=f"the generation prompt ends with {self._excess!r}, which answers lack; left out",
                )
            )
        return found

    # ----------------------------------------------------------------------------------------------------- rendering

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=prompt,
            **self._variables,
        )
        bos = self._variables["bos_token"]
        if bos and text[:1].isspace() and text.lstrip().startswith(bos):
            return text.lstrip()  # White space before BOS would make it a token in the middle.
        return text

    def _adapt(
        self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
        """The turns as messages that this template renders, its tools, and notes on what had to change."""
        accepts, notes = self.accepts, {}
        plain_tools = list(tools)
        if plain_tools and not accepts.tools:
            listed = "You can call these functions:\n" + "\n".join(
                json.dumps(t.get("function", t), ensure_ascii=False) for t in plain_tools
            )
            turns = _into_system(turns, listed)
            plain_tools, notes["tools_in_system"] = [], 1
        if not accepts.system and any(turn.role == "system" for turn in turns):
            turns = _fold_system(turns)
            notes["system_folded"] = 1
        messages: list[dict[str, Any]] = []
        if accepts.needs_system and (not turns or turns[0].role != "system"):
            messages.append({"role": "system", "content": ""})
        open_calls: list[tuple[str | None, str, str]] = []
        numbers = itertools.count()
        for turn in turns:
            if turn.role == "tool":
                self._add_result(messages, turn, open_calls, notes)
                continue
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.name and turn.role == "user":
                message["name"] = turn.name
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
                if not accepts.reasoning:
                    notes["reasoning_not_rendered"] = notes.get("reasoning_not_rendered", 0) + 1
            if turn.tool_calls:
                open_calls = [(call.id, f"call{next(numbers):05d}", call.name) for call in turn.tool_calls]
                if accepts.tool_calls:
                    message["tool_calls"] = [
                        self._call(call, given[1]) for call, given in zip(turn.tool_calls, open_calls, strict=True)
                    ]
                else:
                    written = "\n".join(
                        json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False)
                        for c in turn.tool_calls
                    )
                    message["content"] = f"{turn.content.rstrip()}\n{written}" if turn.content.strip() else written
                    notes["tool_calls_as_text"] = notes.get("tool_calls_as_text", 0) + 1
            messages.append(message)
        for message in messages:
            message.pop("result", None)
        return messages, plain_tools, notes

    def _call(self, call: ToolCall, identity: str) -> dict[str, Any]:
        arguments: Any = (
            json.dumps(call.arguments, ensure_ascii=False) if self.accepts.arguments_as_text else call.arguments
        )
        return {"id": identity, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _add_result(
        self,
        messages: list[dict[str, Any]],
        turn: Turn,
        open_calls: list[tuple[str | None, str, str]],
        notes: dict[str, int],
    ) -> None:
        """A tool's result, matched to its call by identity or else by order."""
        index = next(
            (i for i, call in enumerate(open_calls) if turn.tool_call_id is not None and call[0] == turn.tool_call_id),
            0,
        )
        _, identity, name = open_calls.pop(index) if open_calls else (None, "call00000", turn.name or "")
        if self.accepts.tool_role:
            message = {"role": "tool", "content": turn.content, "tool_call_id": identity}
            messages.append({**message, "name": turn.name or name} if turn.name or name else message)
            return
        notes["tool_results_as_user"] = notes.get("tool_results_as_user", 0) + 1
        if messages and messages[-1].get("result"):
            messages[-1]["content"] += "\n" + turn.content  # Templates that want alternating roles allow one user turn.
        else:
            messages.append({"role": "user", "content": turn.content, "result": True})

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[dict[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
        place: str = "",
    ) -> str:
        """The text of a conversation.  Raises DataError where the template refuses it."""
        messages, plain_tools, _ = self._adapt(turns, tools)
        try:
            return (self._render_prompt if add_generation_prompt else self._render)(messages, plain_tools)
        except _RENDER_ERRORS as error:
            raise self._refusal(error, messages, place) from None

    def _refusal(self, error: Exception, messages: list[dict[str, Any]], place: str) -> DataError:
        return DataError(
            f"{place or 'A conversation'}: the template {self.name} refuses it: {_brief(error)}.",
            f"Correct the row's turns ({' '.join(m['role'] for m in messages[:8])}), or choose another data.template.",
        )

    def _render_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """The text up to where the next answer begins."""
        if self._prompt_from_answer:
            text = self._render([*messages, {"role": "assistant", "content": "Zqanswer"}], tools)
            return text[: text.rfind("Zqanswer")].rstrip(" ")
        prompt = self._render(messages, tools, True)
        return prompt[: -len(self._excess)] if self._excess and prompt.endswith(self._excess) else prompt

    # ------------------------------------------------------------------------------------------------------- spans

    def _spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]], bool, dict[str, int]]:
        """The text, its trained spans, whether the end token must be appended, and notes."""
        turns = conversation.turns
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        kept = turns[: last + 1] if self.loss_on == "assistant" and last >= 0 else turns
        messages, tools, notes = self._adapt(kept, conversation.tools)
        if len(kept) < len(turns):
            notes["trailing_turns_cut"] = len(turns) - len(kept)
        try:
            text = self._render(messages, tools)
        except _RENDER_ERRORS as error:
            raise self._refusal(error, messages, conversation.place) from None
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [turn for turn in kept if turn.role == "assistant"]
        spans: list[tuple[int, int]] = []
        append_end = False
        for index, turn in zip(answers, trained, strict=True):
            final = index == len(messages) - 1
            span, ended = self._span(messages, tools, index, text, final)
            if final and span is not None and not ended:
                text, append_end = text[: span[1]], True
            if not turn.trained:
                continue
            if span is None or (
                turn.reasoning and self.accepts.reasoning and turn.reasoning.strip() not in text[slice(*span)]
            ):
                notes["masked_turns"] = notes.get("masked_turns", 0) + 1
                append_end = append_end and not final
            else:
                spans.append(span)
        if append_end and not trained[-1].trained:
            append_end = False
        return text, spans, append_end, notes

    def _span(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], index: int, text: str, final: bool
    ) -> tuple[tuple[int, int] | None, bool]:
        """Where the assistant turn `index` trains, and whether a token ends it; None where the prefix check fails."""
        if index == 0 or (index == 1 and messages[0]["role"] == "system" and not messages[0]["content"]):
            prompt: str | None = None  # An answer to nothing: most templates cannot render the empty prompt.
        else:
            try:
                prompt = self._render_prompt(messages[:index], tools)
            except _RENDER_ERRORS:
                prompt = None
        if prompt is None or not text.startswith(prompt):
            return None, False
        start = len(prompt)
        until = text if final else self._try(messages[: index + 1], tools=tools)
        if until is not None and text.startswith(until) and len(until) > start:
            stop = len(until.rstrip())
            ended = any(text.endswith(end, start, stop) for end in self._ends)
            if not ended:
                # The last special token of the turn, where only white space follows it.
                ended = any(text.endswith(end, start, stop) for end in self._specials_that_end)
            return ((start, stop), ended) if stop > start else (None, False)
        content = messages[index]["content"].strip()
        begin = start + len(text[start:]) - len(text[start:].lstrip())
        if not content or messages[index].get("tool_calls") or not text.startswith(content, begin):
            return None, False
        stop = begin + len(content)
        rest = text[stop:]
        gap = len(rest) - len(rest.lstrip())
        end = next((end for end in self._ends if rest.startswith(end, gap)), None)
        return (start, stop + (gap + len(end) if end else 0)), end is not None

    # ------------------------------------------------------------------------------------------------------ encoding

    def encode(self, item: Conversation | Document) -> Encoded:
        """The tokens of one item and which of them train.  Raises DataError where the template refuses it."""
        return self.encode_batch([item])[0]

    def encode_batch(
        self, items: Sequence[Conversation | Document], *, refused: dict[int, DataError] | None = None
    ) -> list[Encoded]:
        """The same for many: tokenized together, which is several times faster.

        With `refused`, conversations that the template refuses raise nothing: their errors are put in there by index, and
        they have no tokens.
        """
        done: dict[int, Encoded] = {}
        talks: list[tuple[int, str]] = []
        spans = []
        for i, item in enumerate(items):
            if isinstance(item, Document):
                continue
            try:
                spans.append(self._spans(item))
            except DataError as error:
                if refused is None:
                    raise
                refused[i], done[i] = error, Encoded([], [], place=item.place)
            else:
                talks.append((i, item.place))
        if talks:
            tokens = self.tokenizer(
                [text for text, *_ in spans],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for (i, place), found, ids, offsets in zip(
                talks, spans, tokens["input_ids"], tokens["offset_mapping"], strict=True
            ):
                done[i] = self._mask(ids, offsets, *found, place=place)
        documents = [(i, item) for i, item in enumerate(items) if isinstance(item, Document)]
        for (i, _), encoded in zip(documents, self._encode_documents([item for _, item in documents]), strict=True):
            done[i] = encoded
        return [done[i] for i in range(len(items))]

    def _mask(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        text: str,
        spans: list[tuple[int, int]],
        append_end: bool,
        notes: dict[str, int],
        *,
        place: str,
    ) -> Encoded:
        trained = [self.loss_on == "all"] * len(ids)
        starts, ends = [o[0] for o in offsets], [o[1] for o in offsets]
        if self.loss_on == "assistant":
            for start, end in spans:
                first, after = bisect_left(starts, start), bisect_right(ends, end)
                if first > 0 and starts[first - 1] < start < ends[first - 1]:
                    notes["boundary_merges"] = notes.get("boundary_merges", 0) + 1
                elif first < after and self._hides_space(
                    ids[first], starts[first], ends[first - 1] if first else 0, start, text
                ):
                    notes["boundary_merges"] = notes.get("boundary_merges", 0) + 1
                    first += 1
                for i in range(first, after):
                    trained[i] = True
        if append_end and self.eos_id is not None:
            ids = [*ids, self.eos_id]
            trained.append(True)
        ids, trained = self._fix_bos(ids, trained)
        if trained:
            trained[0] = False
        return Encoded(ids, trained, notes, place=place, text=text)

    def _hides_space(self, token: int, begins: int, previous_end: int, span_start: int, text: str) -> bool:
        """Whether a token's leading space lies before the span: some byte-level tokenizers trim it off the offsets."""
        if begins > span_start or previous_end >= span_start or not text[span_start - 1].isspace():
            return False
        piece: str = self.tokenizer.convert_ids_to_tokens(token)
        return piece.startswith(("Ġ", "▁", " "))

    def _fix_bos(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """Exactly one BOS where the tokenizer adds one, whether or not the template wrote it; never two."""
        bos = self.bos_id
        if bos is None:
            return ids, trained
        extra = 0
        while ids[extra : extra + 2] == [bos, bos]:
            extra += 1
        ids, trained = ids[extra:], trained[extra:]
        if self._adds_bos and ids[:1] != [bos]:
            ids, trained = [bos, *ids], [False, *trained]
        return ids, trained

    def _encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        """Text, then the end token; BOS where the tokenizer adds one.  Every token but the first trains."""
        if not documents:
            return []
        parts = [_parts(document.text) for document in documents]
        tokens: list[list[int]] = []
        for together in _together(itertools.chain.from_iterable(parts)):
            tokens += self.tokenizer(
                together,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        encoded = []
        for document, own in zip(documents, parts, strict=True):
            ids = list(itertools.chain.from_iterable(tokens[: len(own)]))
            tokens = tokens[len(own) :]
            if self.eos_id is not None:
                ids.append(self.eos_id)
            ids, _ = self._fix_bos(ids, [])
            trained = [False] + [True] * (len(ids) - 1)
            encoded.append(Encoded(ids, trained, {}, is_document=True, place=document.place, text=document.text))
        return encoded

    def encode_prompt(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Tokens up to and with the generation prompt: what training saw before the answer's first token."""
        text = self.render(turns, tools, add_generation_prompt=True)
        # Line ends merge differently at the end of a text: tokenized with an answer's beginning, which is then cut off.
        tokens = self.tokenizer(
            text + self._lead + "A", add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        count = sum(1 for _, end in offsets if end <= len(text))
        ids = ids[:count]
        if not count or offsets[count - 1][1] < len(text.rstrip(" ")):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._fix_bos(ids, [False] * len(ids))[0]

    def shown(self, ids: Sequence[int], *, trained: bool) -> str:
        """Text of neighbouring tokens that all train or all do not; here they read the same."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _find_source(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """Name and Jinja text of a recipe's data.template."""
    if template == "auto":
        own: Any = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()), None)
        if own:
            return "base", own
        template = "plain"
    return template, read_template(template)


def read_template(template: str) -> str:
    """The Jinja text of a named template or a file.  Raises RecipeError."""
    if template in NAMED:
        named = files("onlay.data") / "templates" / f"{template}.jinja"
        return named.read_text(encoding="utf-8").removesuffix("\n")
    path = Path(template)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise RecipeError(f"data.template = {template} is not UTF-8 text.", "Give a Jinja file.") from None
    what = "is not a file" if path.suffix == ".jinja" or "/" in template else "is not a template"
    raise RecipeError(
        f"data.template = {template} {what}.", f"Use auto, {', '.join(NAMED)}, or a path to a .jinja file."
    )


def _pin_date(source: str) -> str:
    """Gives a template that asks for today's date its own `strftime_now`, in Jinja: functions cannot be handed in."""
    if "strftime_now" not in source:
        return source
    replaced = "".join(f"|replace('{directive}', '{value}')" for directive, value in _STRFTIME.items())
    # The line end after the block is trimmed by the renderer, and keeps the template's first line a line of its own.
    return "{% macro strftime_now(format='%d %b %Y') %}{{ format" + replaced + " }}{% endmacro %}\n" + source


def _into_system(turns: Sequence[Turn], text: str) -> tuple[Turn, ...]:
    if turns and turns[0].role == "system":
        return (Turn("system", f"{turns[0].content}\n\n{text}" if turns[0].content.strip() else text), *turns[1:])
    return (Turn("system", text), *turns)


def _fold_system(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """System text in front of the first user turn's."""
    text = "\n\n".join(turn.content for turn in turns if turn.role == "system" and turn.content.strip())
    rest = [turn for turn in turns if turn.role != "system"]
    first = next((i for i, turn in enumerate(rest) if turn.role == "user"), None)
    if first is None:
        return (Turn("user", text), *rest) if text else tuple(rest)
    if text:
        rest[first] = Turn("user", f"{text}\n\n{rest[first].content}", name=rest[first].name)
    return tuple(rest)


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200].rstrip(".")


def _together(parts: Iterable[str]) -> Iterator[list[str]]:
    """Parts to tokenize in one call: what the tokenizer keeps on the way takes a hundred times their room."""
    taken: list[str] = []
    characters = 0
    for part in parts:
        if taken and characters + len(part) > 2 * DOCUMENT_CHARACTERS:
            yield taken
            taken, characters = [], 0
        taken.append(part)
        characters += len(part)
    if taken:
        yield taken


def _parts(text: str) -> list[str]:
    """A document in parts of about DOCUMENT_CHARACTERS, cut after line ends where there are any."""
    parts = []
    at = 0
    while len(text) - at > DOCUMENT_CHARACTERS:
        cut = text.rfind("\n", at, at + DOCUMENT_CHARACTERS) + 1 or text.rfind(" ", at, at + DOCUMENT_CHARACTERS) or 0
        cut = cut if cut > at else at + DOCUMENT_CHARACTERS
        parts.append(text[at:cut])
        at = cut
    parts.append(text[at:])
    return parts
