"""The functions behind the verbs: each brings the parts of the lower layers together and returns one record.

What is cheap to check is checked before torch is imported, so a wrong recipe, file or base is reported at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.doctor import install_line
from onlay.errors import DataError, OnlayError, OutputError, RecipeError, SetupError
from onlay.recipe import LoftqAdapter, LoraAdapter, PissaAdapter, Recipe, read_recipe
from onlay.records import RECORDS, Dataset, Merge, ModelFacts, Record, Run, write_whole

if TYPE_CHECKING:
    from onlay.data.build import Split
    from onlay.data.labels import LabelledText
    from onlay.data.read import Conversation, Scan, Turn
    from onlay.data.template import ChatTemplate
    from onlay.generation.engine import Sampling
    from onlay.model.head import ClassificationHead
    from onlay.model.initialize import LoftqFactors

Report = Callable[[Any], None]
"""Gets StepReport, Recovery, Loading and plain text, as they happen."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Something that is counted while it goes on: rows prepared, bytes fetched."""

    what: str
    done: int
    total: int


def _silent(_event: Any) -> None:
    pass


def _while_loading(report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(Loading("loading the base", done, total))


# ------------------------------------------------------------------------------------------------------------ prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A recipe whose data and base were looked at, without anything heavy."""

    recipe: Recipe
    scan: Scan
    held_out_scan: Scan | None
    facts: ModelFacts
    labels: list[str]
    """What a classification head tells apart; empty for the other methods."""


def look(recipe: Recipe, *, report: Report = _silent) -> Source:
    """Reads every row once and the base's headers.  Raises OnlayError, within seconds, for all that shows without torch."""
    from onlay.data.build import hold_out, resolve_max_tokens
    from onlay.data.labels import find_labels
    from onlay.data.read import scan
    from onlay.data.template import read_template
    from onlay.model.facts import check_targets, read_facts

    _check_trackers(recipe)
    if recipe.data.template != "auto":
        read_template(recipe.data.template)
    head = recipe.adapter.method == "head"
    # A head reads texts and labels, whatever else the columns could be taken for.
    section = recipe.data.model_copy(update={"format": "classification"}) if head else recipe.data
    scanned = scan(section.train, section, limit=section.max_rows)
    held_out = scan(recipe.evaluation.file, section, limit=None) if recipe.evaluation.file else None
    held_out_rows = hold_out(recipe, scanned, held_out)
    facts = read_facts(recipe.model, progress=lambda done, total: report(Loading("fetching the base", done, total)))
    if isinstance(recipe.adapter, LoraAdapter):
        check_targets(facts, recipe.adapter.targets)
    resolve_max_tokens(recipe, facts.context_tokens)
    labels = (
        find_labels(recipe, scanned, held_out_rows, held_out, vocabulary_size=facts.vocabulary_size) if head else []
    )
    return Source(recipe=recipe, scan=scanned, held_out_scan=held_out, facts=facts, labels=labels)


def _check_device(recipe: Recipe) -> None:
    """Fields of `training` that this machine has no use for.  The data can be prepared without it, so `look` does not ask."""
    from onlay.hardware import find_hardware_light

    training = recipe.training
    if training.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            f"training.optimizer = {training.optimizer} needs bitsandbytes, which is not installed.",
            f"{install_line('bitsandbytes')}, or delete the line to get adamw.",
        )
    wants_gpu = [f"training.optimizer = {training.optimizer}"] if training.optimizer.startswith("paged") else []
    wants_gpu += ["training.offload_activations"] if training.offload_activations else []
    if wants_gpu and not find_hardware_light().has_cuda:
        raise RecipeError(
            f"{wants_gpu[0]} needs a GPU: it moves what the GPU has no room for to the host, and here is no GPU.",
            "Delete the line, or train on a machine with a CUDA GPU (onlay doctor tells what this one has).",
        )


def _check_trackers(recipe: Recipe) -> None:
    """Accelerate leaves a tracker that is not installed out without a word."""
    for tracker in recipe.training.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise SetupError(
                f"training.trackers: {tracker} is not installed.", f"{install_line(tracker)}, or take it off the list."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    source: Source
    tokenizer: Any
    template: ChatTemplate | LabelledText
    dataset: Dataset

    def split(self, name: str) -> Split:
        from onlay.data.build import open_split

        return open_split(self.dataset, name)


def prepare_source(source: Source, *, report: Report = _silent) -> Prepared:
    """Tokenizes, or finds what was tokenized before from the same rows, recipe and tokenizer."""
    from onlay.data.build import prepare_dataset
    from onlay.data.labels import LabelledText
    from onlay.data.template import ChatTemplate
    from onlay.model.tokenizer import load_tokenizer, tokenizer_digest

    recipe, facts = source.recipe, source.facts
    tokenizer = load_tokenizer(facts, trust_remote_code=recipe.model.trust_remote_code)
    template = (
        LabelledText(tokenizer, source.labels)
        if recipe.adapter.method == "head"
        else ChatTemplate(tokenizer, template=recipe.data.template, loss_on=recipe.data.loss_on)
    )
    dataset = prepare_dataset(
        recipe,
        source.scan,
        template,
        tokenizer_digest=tokenizer_digest(facts.path),
        context_tokens=facts.context_tokens,
        cache_folder=ledger.home() / "prepared",
        progress=lambda done, total: report(Loading("preparing rows", done, total)),
        evaluation_scan=source.held_out_scan,
    )
    return Prepared(source=source, tokenizer=tokenizer, template=template, dataset=dataset)


def prepare(recipe: str | Path | Recipe, *, overrides: Sequence[str] = (), report: Report = _silent) -> Prepared:
    """Reads, checks, templates and tokenizes what a recipe names; cached by content.  Raises OnlayError."""
    prepared = prepare_source(look(_recipe(recipe, overrides), report=report), report=report)
    ledger.append(prepared.source.facts, prepared.source.facts.path)
    ledger.append(prepared.dataset, prepared.dataset.path)
    return prepared


def _recipe(recipe: str | Path | Recipe, overrides: Sequence[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return read_recipe(recipe, overrides)
    if overrides:
        raise ValueError("overrides go with a recipe file; change a Recipe itself with model_copy")
    return recipe


# -------------------------------------------------------------------------------------------------------------- train


def train(
    recipe: str | Path | Recipe | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
    report: Report = _silent,
) -> Run:
    """Trains the adapter that a recipe describes, or goes on with an interrupted run folder.  Raises OnlayError."""
    if (recipe is None) == (resume is None):
        raise RecipeError("train needs a recipe or --resume RUN, one of the two.", "onlay train support.yaml")
    if resume is not None:
        return _resume(Path(resume), overrides, report)
    assert recipe is not None
    name = Path(recipe).stem if not isinstance(recipe, Recipe) else "run"
    parsed = _recipe(recipe, overrides)
    folder = Path(parsed.training.output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if _rank() == 0:
        _check_free(folder)
    _check_device(parsed)
    return _train(look(parsed, report=report), folder, resume=False, report=report)


def _resume(folder: Path, overrides: Sequence[str], report: Report) -> Run:
    if overrides:
        raise RecipeError("--set does not go with --resume: a run keeps its recipe.", "Start a new run to change it.")
    run = Run.load(folder)
    if run.status == "finished":
        raise OutputError(f"{folder} is finished.", f"onlay generate {folder} --prompt '...', or train anew for more.")
    recipe = read_recipe(folder / "recipe.yaml")
    _check_device(recipe)
    source = look(recipe, report=report)
    trained_on = ModelFacts.load(folder)
    if source.facts.weight_fingerprint != trained_on.weight_fingerprint:
        raise OutputError(
            f"{folder} was begun on other weights of {trained_on.name} than {source.facts.path} holds now.",
            "Put the base back as it was, or start a new run.",
        )
    return _train(source, folder, resume=True, report=report)


def _check_free(folder: Path) -> None:
    # A run killed while it began has these files and no run.json yet: there is nothing in it to keep.
    began = {"recipe.yaml", "model.json", "dataset.json"}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - began):
        unfinished = (folder / "run.json").is_file() and Run.load(folder).status != "finished"
        remedy = (
            f"Go on with it: onlay train --resume {folder}"
            if unfinished
            else "Choose another training.output, or move it away."
        )
        raise OutputError(f"training.output = {folder} exists already.", remedy)


def _train(source: Source, folder: Path, *, resume: bool, report: Report) -> Run:
    from onlay.data.pack import collate, plan_micro_batches
    from onlay.evaluation.scores import label_scores
    from onlay.hardware import find_hardware
    from onlay.model.facts import Digesting
    from onlay.model.load import load_base
    from onlay.model.tokenizer import pad_token_id
    from onlay.training.devices import find_devices
    from onlay.training.session import Parts, train_adapter

    recipe, facts = source.recipe, source.facts
    devices = find_devices(trackers=recipe.training.trackers, folder=folder)
    folder = Path(devices.agree(str(folder)))
    report = report if devices.is_main else _silent
    with devices.accelerator.main_process_first():
        prepared = prepare_source(source, report=report)
    if resume and Dataset.load(folder).digest != prepared.dataset.digest:
        raise OutputError(
            f"The rows of {recipe.data.train} are no longer those that {folder} was begun with.",
            "Put the file back, or start a new run.",
        )
    hardware = find_hardware()
    digesting = Digesting(facts, ledger.home()) if devices.is_main else None
    report(f"loading {facts.name}")
    loftq = _loftq_factors(recipe, folder, resume=resume)
    base = load_base(
        facts, recipe.model, hardware, device=devices.device, seed=recipe.training.seed,
        trains_weights=recipe.adapter.method == "full", needs_16_bit=isinstance(recipe.adapter, PissaAdapter),
        on_quantized=loftq, progress=_while_loading(report),
    )  # fmt: skip
    if devices.is_main and not resume:
        _begin_folder(folder, recipe, prepared)
    devices.wait()
    splits = prepared.dataset.splits
    parts = Parts(
        recipe=recipe, facts=facts, dataset=prepared.dataset, base=base,
        train_examples=prepared.split("train"),
        held_out_examples=prepared.split("evaluation") if "evaluation" in splits else None,
        plan=plan_micro_batches, collate=collate, pad_token_id=pad_token_id(prepared.tokenizer), folder=folder,
        devices=devices, report=report, base_weight_digest=digesting.result if digesting else lambda: None,
        save_tokenizer=lambda path: prepared.tokenizer.save_pretrained(str(path)), label_scores=label_scores,
        loftq=loftq,
    )  # fmt: skip
    try:
        run = train_adapter(parts, resume=resume)
    except OnlayError:
        # The folder then holds a Run that says why: it belongs into the log too.
        if devices.is_main and (folder / "run.json").is_file():
            ledger.append(Run.load(folder), folder)
        raise
    if devices.is_main:
        ledger.append(run, folder)
    return run


def _loftq_factors(recipe: Recipe, folder: Path, *, resume: bool) -> LoftqFactors | None:
    """What makes a LoftQ adapter's first weights while the base is quantized; where a checkpoint holds later ones, nothing."""
    from onlay.model.adapter import is_wanted
    from onlay.model.initialize import LoftqFactors
    from onlay.training.checkpoint import Checkpoints

    section = recipe.adapter
    if not isinstance(section, LoftqAdapter) or (resume and Checkpoints(folder / "checkpoints", keep=1).steps()):
        return None
    return LoftqFactors(section, seed=recipe.training.seed, wanted=lambda name: is_wanted(name, section.targets))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _begin_folder(folder: Path, recipe: Recipe, prepared: Prepared) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.", "Choose another training.output.") from None
    write_whole(folder / "recipe.yaml", recipe.to_yaml())
    facts = prepared.source.facts
    facts.save(folder)
    prepared.dataset.save(folder)
    text = json.dumps(recipe.model_dump(mode="json"))
    ledger.Ledger().append_json("recipe", recipe.digest, text, folder)
    ledger.append(facts, folder)
    ledger.append(prepared.dataset, folder)


# ----------------------------------------------------------------------------------------------------------- generate


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

    def answer(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        sampling: Sampling,
        use_adapter: bool = True,
        on_text: Callable[[str], None] | None = None,
        report: Report = _silent,
    ) -> list[str]:
        """The next assistant turn of each conversation; never longer than the base's context leaves room for."""
        from onlay.generation.engine import generate as run_engine

        prompts = [self.template.encode_prompt(turns) for turns in conversations]
        longest, context = max(map(len, prompts), default=0), self.facts.context_tokens
        if context is not None and longest >= context:
            raise DataError(
                f"The prompt has {longest:,} tokens; the context of {self.facts.name} is {context:,}, answer included.",
                "Shorten it, or start a new conversation.",
            )
        stream = _TextStream(self.tokenizer, on_text) if on_text is not None else None
        ids = run_engine(
            self.model,
            prompts,
            sampling=sampling,
            stop_token_ids=self.dataset.stop_token_ids,
            pad_token_id=self.pad_token_id,
            context_tokens=context,
            use_adapter=use_adapter,
            on_token=stream.add if stream is not None else None,
            progress=lambda done, total: report(Loading("answering", done, total)),
        )
        if stream is not None:
            stream.finish()
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]


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


def open_run(folder: str | Path, *, compare: bool = False, report: Report = _silent) -> LoadedRun:
    """Loads a finished run's base and adapter (or its tuned model).  Raises OnlayError.

    `compare`: the base will be asked too, so an adapter is needed.
    """
    folder = Path(folder)
    run = Run.load(folder)
    recipe = read_recipe(folder / "recipe.yaml")
    if recipe.adapter.method == "head":
        raise OutputError(
            f"{folder} is a classification head: it says a label for a text, and writes nothing.",
            f"onlay generate {folder} --prompt 'a text'",
        )
    if compare and recipe.adapter.method == "full":
        raise OutputError(
            f"{folder} was tuned in full: there is no adapter to leave out, so no base to compare with.",
            "Leave --compare out.",
        )
    full = recipe.adapter.method == "full"
    if not (folder / ("model" if full else "adapter")).is_dir():
        raise OutputError(f"{folder} is {run.status}: it has no adapter yet.", f"onlay train --resume {folder}")

    from onlay.data.template import ChatTemplate
    from onlay.hardware import find_hardware
    from onlay.model.adapter import load_adapter
    from onlay.model.compatibility import check
    from onlay.model.facts import read_facts
    from onlay.model.load import load_base
    from onlay.model.tokenizer import load_tokenizer

    section = recipe.model
    if full:
        section = section.model_copy(update={"base": str(folder / "model"), "weights": "pretrained", "revision": None})
    facts = read_facts(section)
    if not full:
        check(folder / "adapter", facts)  # Before anything large is read.
    report(f"loading {facts.name}")
    tokenizer = load_tokenizer(facts, trust_remote_code=section.trust_remote_code)
    base = load_base(facts, section, find_hardware(), progress=_while_loading(report), spread=True)
    if "placement" in base.notes:
        report(f"{facts.name} is larger than the first GPU: {base.notes['placement']}")
    model: Any = base.model
    if not full:
        for note in check(folder / "adapter", facts, storage=base.storage):
            report(note)
        model = load_adapter(model, folder / "adapter", facts=facts, storage=base.storage)
    return LoadedRun(
        recipe=recipe, facts=facts, dataset=Dataset.load(folder), model=model, tokenizer=tokenizer,
        template=ChatTemplate(tokenizer, template=recipe.data.template, loss_on=recipe.data.loss_on),
    )  # fmt: skip


def generate(
    run: str | Path,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    compare: bool = False,
    on_text: Callable[[str], None] | None = None,
    report: Report = _silent,
) -> list[dict[str, Any]]:
    """Answers to prompts: {"prompt", "answer"} each, and "base" (the base's answer) with `compare`.

    Of a classification head the answer is a label, and "probabilities" has that of every label.
    """
    from onlay.generation.engine import Sampling as Settings

    if Run.load(Path(run)).method == "head":
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


def open_head(folder: str | Path, *, report: Report = _silent) -> LoadedHead:
    """Loads a finished run's base and classification head.  Raises OnlayError."""
    from onlay.data.labels import LabelledText
    from onlay.hardware import find_hardware
    from onlay.model.facts import read_facts
    from onlay.model.head import load_head, read_head
    from onlay.model.load import load_base
    from onlay.model.tokenizer import load_tokenizer

    folder = Path(folder)
    run = Run.load(folder)
    section = read_recipe(folder / "recipe.yaml").model
    if not (folder / "head").is_dir():
        raise OutputError(f"{folder} is {run.status}: it has no head yet.", f"onlay train --resume {folder}")
    facts = read_facts(section)
    saved = read_head(folder / "head", facts=facts)
    # As it was in training, also where the storage `auto` would be another on this device.
    section = section.model_copy(update={"storage": saved.storage})
    report(f"loading {facts.name}")
    tokenizer = load_tokenizer(facts, trust_remote_code=section.trust_remote_code)
    model = load_head(
        load_base(facts, section, find_hardware(), progress=_while_loading(report)).model, folder / "head", facts=facts
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
    report: Report = _silent,
) -> Chat:
    """Opens a conversation with a run."""
    from onlay.data.read import Turn
    from onlay.generation.engine import Sampling as Settings

    loaded = open_run(run, compare=compare, report=report)
    system = system or loaded.recipe.data.system
    first = [Turn("system", system)] if system else []
    return Chat(loaded, sampling or Settings(), list(first), list(first) if compare else None)


# -------------------------------------------------------------------------------------------------------------- merge


def merge(
    run: str | Path,
    out: str | Path,
    *,
    into: str = "auto",
    max_difference: float | None = None,
    rows: int = 32,
    report: Report = _silent,
) -> Merge:
    """Merges a finished run's adapter into its base and proves the result; `out` is then a plain transformers model.

    `into`, for a run on a quantized base: `original` weights, `quantized` ones as trained against, or `auto`, the nearer.
    `rows` are compared; `max_difference` takes the place of the derived limit and bounds the largest logit difference.
    Raises OnlayError; ProofError when the result is not what base and adapter are: it is then kept under another name.
    """
    folder = _run_folder(Path(run))
    done = Run.load(folder)
    recipe = read_recipe(folder / "recipe.yaml")
    _check_mergeable(folder, done, recipe, out=Path(out), into=into, rows=rows)

    from onlay.data.build import open_split
    from onlay.hardware import find_hardware
    from onlay.model.facts import read_facts
    from onlay.release.merge import Job, merge_adapter, rejection

    dataset = Dataset.load(folder)
    split = "evaluation" if "evaluation" in dataset.splits else "train"
    facts = read_facts(recipe.model, progress=lambda so_far, total: report(Loading("fetching the base", so_far, total)))
    job = Job(
        run=done, recipe=recipe, facts=facts, dataset=dataset, adapter=folder / "adapter", out=Path(out), into=into,
        storage=_trained_storage(folder, recipe), examples=open_split(dataset, split), split=split, rows=rows,
        max_difference=max_difference, hardware=find_hardware(),
        report=lambda what, so_far, total: report(Loading(what, so_far, total)),
    )  # fmt: skip
    merged = merge_adapter(job)
    ledger.append(merged, merged.path)
    if merged.status != "merged":
        raise rejection(merged)
    return merged


def _run_folder(given: Path) -> Path:
    """The run folder, where its adapter/ was named."""
    return given.parent if given.name == "adapter" and not (given / "run.json").is_file() else given


def _check_mergeable(folder: Path, run: Run, recipe: Recipe, *, out: Path, into: str, rows: int) -> None:
    if out.exists():
        raise OutputError(f"{out} exists already.", "Choose another OUT, or move it away.")
    if recipe.adapter.artefact != "adapter":
        why = {"model": "there is no adapter: model/ is the whole model", "head": "a classification head is no update"}
        raise OutputError(
            f"{folder} was trained with method {recipe.adapter.method}: {why[recipe.adapter.artefact]}.",
            f"Use {folder / recipe.adapter.artefact} as it is.",
        )
    if run.status != "finished" or not (folder / "adapter").is_dir():
        raise OutputError(f"{folder} is {run.status}: it has no adapter yet.", f"onlay train --resume {folder}")
    if into not in ("auto", "original", "quantized"):
        raise OutputError(f"--into {into} is none of auto, original, quantized.", "Leave it out for auto.")
    if rows < 1:
        raise OutputError(f"--rows {rows} compares nothing.", "Give at least 1.")


def _trained_storage(folder: Path, recipe: Recipe) -> str:
    """How the base was kept in training: noted beside the adapter, since `auto` was decided there."""
    path = folder / "adapter" / "onlay.json"
    notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    storage = notes.get("storage") or recipe.model.storage
    # Runs from before there was a choice say nothing; theirs was not quantized.
    return "bf16" if storage == "auto" else str(storage)


# --------------------------------------------------------------------------------------------------------------- show


def show(what: str | Path) -> tuple[Record | dict[str, Any], list[ledger.Row]]:
    """The record of a run folder, or the one whose digest starts with `what`; and the chain of records behind it."""
    folder = Path(what)
    if folder.is_dir():
        run = Run.load(folder)
        return run, list(ledger.chain(run))
    if not set(str(what).lower()) <= set("0123456789abcdef"):
        raise OutputError(f"{what} is neither a run folder nor the start of a digest.", "`onlay log` lists the runs.")
    row = ledger.find(str(what))
    return (row.record() if row.kind in RECORDS else row.values | {"digest": row.digest}), list(ledger.chain(row))


def log() -> list[ledger.Row]:
    """The latest record of every run on this machine, newest first."""
    return ledger.runs()


# --------------------------------------------------------------------------------------------------------------- demo


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What the demo measured on rows that were held out of its training."""

    run: str
    train_seconds: float
    rows: int
    base: dict[str, float | None]
    adapter: dict[str, float | None]
    examples: list[dict[str, str]]
    """Three held-out rows: prompt, expected, base, adapter."""


def demo(*, output: str | None = None, report: Report = _silent) -> Demo:
    """Trains the bundled base on the bundled support desk and compares both on held-out rows."""
    from onlay.evaluation.scores import exact_match, valid_json
    from onlay.generation.engine import Sampling as Settings

    package = resources.files("onlay")
    with resources.as_file(package / "examples") as examples:
        recipe = read_recipe(examples / "demo.yaml", [f"data.train={examples / 'support.jsonl'}"])
        folder = output or str(Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}")
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"output": folder})})
        began = time.perf_counter()
        run = train(recipe, report=report)
        train_seconds = time.perf_counter() - began
    loaded = open_run(run.path, report=report)
    rows = held_out_rows(loaded.dataset)
    prompts = [row.turns[:-1] for row in rows]
    expected = [row.turns[-1].content for row in rows]
    longest = max(len(loaded.tokenizer(text)["input_ids"]) for text in expected)
    sampling = Settings(max_new_tokens=longest + 8)
    texts = {
        name: loaded.answer(prompts, sampling=sampling, use_adapter=name == "adapter", report=report)
        for name in ("base", "adapter")
    }
    scores: dict[str, dict[str, float | None]] = {
        name: {"exact_match": exact_match(answers, expected), "valid_json": valid_json(answers, expected)}
        for name, answers in texts.items()
    }
    kinds = _one_of_each_kind(expected)
    return Demo(
        run=run.path, train_seconds=round(train_seconds, 2), rows=len(rows),
        base=scores["base"] | {"evaluation_loss": run.base_evaluation_loss},
        adapter=scores["adapter"] | {"evaluation_loss": run.evaluation_loss},
        examples=[
            {"prompt": prompts[i][-1].content, "expected": expected[i], "base": texts["base"][i], "adapter": texts["adapter"][i]}
            for i in kinds
        ],
    )  # fmt: skip


def held_out_rows(dataset: Dataset) -> list[Conversation]:
    from onlay.data.build import open_split
    from onlay.data.read import Conversation

    return [row for row in open_split(dataset, "evaluation").rows() if isinstance(row, Conversation)]


def _one_of_each_kind(expected: Sequence[str]) -> list[int]:
    """Three rows to show, as different as there are: first those that begin differently, such as tool calls."""
    chosen: list[int] = []
    for characters in (8, 24, None):
        seen = {expected[index][:characters] for index in chosen}
        for index, text in enumerate(expected):
            if len(chosen) < 3 and index not in chosen and text[:characters] not in seen:
                seen.add(text[:characters])
                chosen.append(index)
    return chosen


# --------------------------------------------------------------------------------------------------------------- init


def init(data: str | Path, *, output: str | Path | None = None) -> tuple[Path, list[str]]:
    """Looks at the data and the device and writes a commented recipe; returns its path and a summary in sentences."""
    from onlay.hardware import find_hardware_light
    from onlay.starter import propose

    path = Path(output) if output else Path(Path(data).stem + ".yaml")
    if path.exists():
        raise OutputError(f"{path} exists already.", f"Use it (onlay prepare {path}), move it away, or give --output.")
    text, summary = propose(data, find_hardware_light())
    write_whole(path, text)
    return path, summary


def schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return Recipe.model_json_schema()
