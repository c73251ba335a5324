"""`generate` and `chat`: a finished run, opened to answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import DataError, OutputError
from onlay.model.stack import import_stack
from onlay.recipe import ModelSection, Recipe, Storage, read_recipe
from onlay.records import Dataset, ModelFacts, Run
from onlay.stages.events import Loading, Report, silent, while_loading
from onlay.stages.places import find_place

if TYPE_CHECKING:
    from onlay.data.labels import LabelledText
    from onlay.data.read import Turn
    from onlay.data.template import ChatTemplate
    from onlay.generation.engine import Engine, Sampling
    from onlay.model.head import ClassificationHead


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A finished run, its base and adapter in memory, ready to answer."""

    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    model: Any
    tokenizer: Any
    template: ChatTemplate

    @cached_property
    def pad_token_id(self) -> int:
        from onlay.model.tokenizer import pad_token_id

        return pad_token_id(self.tokenizer)

    @cached_property
    def engine(self) -> Engine:
        from onlay.generation.engine import Engine

        return Engine(
            self.model, stop_token_ids=self.dataset.stop_token_ids, pad_token_id=self.pad_token_id,
            context_tokens=self.facts.context_tokens,
        )  # fmt: skip

    @cached_property
    def _told(self) -> set[str]:
        """What the engine does the slower way, and was said already."""
        return set()

    def answer(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        sampling: Sampling,
        use_adapter: bool = True,
        on_text: Callable[[str], None] | None = None,
        report: Report = silent,
    ) -> list[str]:
        """The next assistant turn of each conversation; never longer than the base's context leaves room for."""
        from onlay.generation.engine import Request

        prompts = [self.template.encode_prompt(turns) for turns in conversations]
        longest, context = max(map(len, prompts), default=0), self.facts.context_tokens
        if context is not None and longest >= context:
            raise DataError(
                f"The prompt has {longest:,} tokens; the context of {self.facts.name} is {context:,}, answer included.",
                "Shorten it, or start a new conversation.",
            )
        stream = _TextStream(self.tokenizer, on_text) if on_text is not None else None
        adapter = self.engine.adapters[0] if use_adapter and self.engine.adapters else None
        answers = self.engine.generate(
            [Request(prompt, adapter) for prompt in prompts],
            sampling=sampling,
            on_token=(lambda _, token: stream.add(token)) if stream is not None else None,
            progress=lambda done, total: report(Loading("answering", done, total)),
        )
        for note in self.engine.notes.values():
            if note not in self._told:
                self._told.add(note)
                report(note)
        if stream is not None:
            stream.finish()
        return [self.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]


class _TextStream:
    """Passes text on as it becomes whole: a character may take several tokens."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._said = ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._say(text)

    def finish(self) -> None:
        """What is left when the answer ended within a character."""
        self._say(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _say(self, text: str) -> None:
        if text != self._said:
            self._on_text(text[len(self._said) :])
            self._said = text


def open_run(folder: str | Path, *, compare: bool = False, report: Report = silent) -> LoadedRun:
    """Loads a finished run's base and adapter (or its tuned model), or a registered version's.  Raises OnlayError.

    `folder`: a run folder, `name@4`, or the folder of a version.  `compare`: the base will be asked too, so an adapter is needed.
    """
    what, place = folder, find_place(folder)
    folder, trained = place.records, place.artefact
    run = Run.load(folder)
    recipe = read_recipe(folder / "recipe.yaml")
    if recipe.adapter.method == "head":
        raise OutputError(
            f"{what} is a classification head: it says a label for a text, and writes nothing.",
            f"onlay generate {what} --prompt 'a text'",
        )
    if compare and recipe.adapter.method == "full":
        raise OutputError(
            f"{folder} was tuned in full: there is no adapter to leave out, so no base to compare with.",
            "Leave --compare out.",
        )
    full = recipe.adapter.method == "full"
    if not trained.is_dir():
        raise OutputError(f"{folder} is {run.status}: it has no adapter yet.", f"onlay train --resume {folder}")

    from onlay.data.template import ChatTemplate

    section, adapters = recipe.model, {}
    if full:
        section = section.model_copy(update={"base": str(trained), "weights": "pretrained", "revision": None})
    else:
        adapters = {"default": trained}
        if section.storage == "auto":
            section = section.model_copy(update={"storage": trained_storage(trained, section)})
    # A version brings the template of its training, whose file need not be there any more.
    brought = folder / "chat_template.jinja"
    template = str(brought) if place.is_version and brought.is_file() else recipe.data.template
    opened = open_model(section, adapters, report=report)
    return LoadedRun(
        recipe=recipe, facts=opened.facts, dataset=Dataset.load(folder), model=opened.model, tokenizer=opened.tokenizer,
        template=ChatTemplate(opened.tokenizer, template=template, loss_on=recipe.data.loss_on),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A base in memory, with adapters on it or none."""

    facts: ModelFacts
    model: Any
    tokenizer: Any


def open_model(section: ModelSection, adapters: Mapping[str, Path], *, report: Report = silent) -> Opened:
    """Loads a base and puts adapters on it, each under its name, after their headers were compared.  Raises OnlayError."""
    import_stack()
    from onlay.hardware import find_hardware
    from onlay.model.adapter import load_adapters
    from onlay.model.compatibility import check
    from onlay.model.facts import read_facts
    from onlay.model.load import load_base
    from onlay.model.tokenizer import load_tokenizer

    facts = read_facts(section)
    for folder in adapters.values():
        check(folder, facts)  # Before anything large is read.
    report(f"loading {facts.name}")
    tokenizer = load_tokenizer(facts, trust_remote_code=section.trust_remote_code)
    base = load_base(facts, section, find_hardware(), progress=while_loading(report), spread=True)
    if "placement" in base.notes:
        report(f"{facts.name} is larger than the first GPU: {base.notes['placement']}")
    model: Any = base.model
    for folder in adapters.values():
        for note in check(folder, facts, storage=base.storage):
            report(note)
    if adapters:
        model = load_adapters(model, adapters, facts=facts, storage=base.storage)
    return Opened(facts=facts, model=model, tokenizer=tokenizer)


def trained_storage(adapter: Path, section: ModelSection) -> Storage:
    """How the base was kept in training, where `auto` was decided then: noted beside the adapter."""
    path = adapter / "onlay.json"
    notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    storage: Storage = notes.get("storage") or section.storage
    # Adapters from before there was a choice say nothing; their bases were not quantized.
    return "bf16" if storage == "auto" else storage


def generate(
    run: str | Path,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    compare: bool = False,
    on_text: Callable[[str], None] | None = None,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Answers to prompts: {"prompt", "answer"} each, and "base" (the base's answer) with `compare`.

    Of a classification head the answer is a label, and "probabilities" has that of every label.
    """
    from onlay.generation.engine import Sampling as Settings

    if Run.load(find_place(run).records).method == "head":
        _refuse_writing_options(run, compare=compare, system=system, samples=sampling not in (None, Settings()))
        results = open_head(run, report=report).classify(prompts)
        if on_text is not None:
            on_text(results[0]["answer"])
        return results
    loaded = open_run(run, compare=compare, report=report)
    sampling = sampling or Settings()
    conversations = [_turns(prompt, system or loaded.recipe.data.system) for prompt in prompts]
    answers = loaded.answer(conversations, sampling=sampling, on_text=on_text, report=report)
    results = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    if compare:
        base = loaded.answer(conversations, sampling=sampling, use_adapter=False, report=report)
        results = [result | {"base": text} for result, text in zip(results, base, strict=True)]
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedHead:
    """A finished classification head on its base, ready to answer."""

    facts: ModelFacts
    model: ClassificationHead
    encoding: LabelledText

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """{"prompt", "answer" (the likeliest label), "probabilities" (of each label)} for each text.  Raises DataError."""
        encoded = self.encoding.encode_texts(texts)
        longest, context = max(map(len, encoded), default=0), self.facts.context_tokens
        if context is not None and longest > context:
            raise DataError(
                f"The text has {longest:,} tokens; the context of {self.facts.name} is {context:,}.", "Shorten it."
            )
        if not all(encoded):
            raise DataError("A text has no token, so there is nothing to read a label from.", "Give some text.")
        results = []
        for text, shares in zip(texts, self.model.probabilities(encoded), strict=True):
            probabilities = dict(zip(self.encoding.labels, shares, strict=True))
            answer = self.encoding.labels[shares.index(max(shares))]
            results.append({"prompt": text, "answer": answer, "probabilities": probabilities})
        return results


def open_head(folder: str | Path, *, report: Report = silent) -> LoadedHead:
    """Loads the base and classification head of a finished run or a registered version.  Raises OnlayError."""
    import_stack()
    from onlay.data.labels import LabelledText
    from onlay.hardware import find_hardware
    from onlay.model.facts import read_facts
    from onlay.model.head import load_head, read_head
    from onlay.model.load import load_base
    from onlay.model.tokenizer import load_tokenizer

    place = find_place(folder)
    folder, saved_in = place.records, place.artefact
    run = Run.load(folder)
    section = read_recipe(folder / "recipe.yaml").model
    if not saved_in.is_dir():
        raise OutputError(f"{folder} is {run.status}: it has no head yet.", f"onlay train --resume {folder}")
    facts = read_facts(section)
    saved = read_head(saved_in, facts=facts)
    # As it was in training, also where the storage `auto` would be another on this device.
    section = section.model_copy(update={"storage": saved.storage})
    report(f"loading {facts.name}")
    tokenizer = load_tokenizer(facts, trust_remote_code=section.trust_remote_code)
    model = load_head(
        load_base(facts, section, find_hardware(), progress=while_loading(report)).model, saved_in, facts=facts
    )
    return LoadedHead(facts=facts, model=model, encoding=LabelledText(tokenizer, saved.labels))


def _refuse_writing_options(run: str | Path, *, compare: bool, system: str | None, samples: bool) -> None:
    """A classification head reads one text and says a label: what goes with writing would be left unread."""
    refused = {"--compare": compare, "--system": bool(system), "Sampling and a length": samples}
    for name in (name for name, given in refused.items() if given):
        raise OutputError(
            f"{name} cannot be used with {run}: a classification head says a label for a text, and writes nothing.",
            f"onlay generate {run} --prompt 'a text'; with --json also every label's probability.",
        )


def _turns(prompt: str, system: str | None) -> list[Turn]:
    from onlay.data.read import Turn

    return ([Turn("system", system)] if system else []) + [Turn("user", prompt)]


@dataclass(slots=True)
class Chat:
    """A conversation with a run; `base_turns` is the base's own side of it, kept when comparing."""

    loaded: LoadedRun
    sampling: Sampling
    turns: list[Turn]
    base_turns: list[Turn] | None

    def say(self, text: str, *, on_text: Callable[[str], None] | None = None) -> tuple[str, str | None]:
        """The adapter's answer, and the base's when comparing."""
        from onlay.data.read import Turn

        self.turns.append(Turn("user", text))
        [answer] = self.loaded.answer([self.turns], sampling=self.sampling, on_text=on_text)
        self.turns.append(Turn("assistant", answer))
        if self.base_turns is None:
            return answer, None
        self.base_turns.append(Turn("user", text))
        [base] = self.loaded.answer([self.base_turns], sampling=self.sampling, use_adapter=False)
        self.base_turns.append(Turn("assistant", base))
        return answer, base


def chat(
    run: str | Path,
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    compare: bool = False,
    report: Report = silent,
) -> Chat:
    """Opens a conversation with a run."""
    from onlay.data.read import Turn
    from onlay.generation.engine import Sampling as Settings

    loaded = open_run(run, compare=compare, report=report)
    system = system or loaded.recipe.data.system
    first = [Turn("system", system)] if system else []
    return Chat(loaded, sampling or Settings(), list(first), list(first) if compare else None)
