"""`synthesize`: new rows from seed tasks, by a local model or one behind an endpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import OutputError, RecipeError, SetupError
from onlay.recipe import DataSection, ModelSection, apply_overrides
from onlay.stages.events import Loading, Report, silent
from onlay.stages.places import is_adapter, is_reference

if TYPE_CHECKING:
    from onlay.data.synthesis.replies import Reply
    from onlay.data.synthesis.rounds import Made, Settings
    from onlay.data.template import ChatTemplate
    from onlay.evaluation.endpoint import Endpoint
    from onlay.generation.engine import Engine

READING = (
    "data.format", "data.prompt_field", "data.answer_field", "data.messages_field", "data.text_field", "data.hub_config",
    "data.hub_split", "data.max_rows",
)  # fmt: skip
LOCAL_PROMPTS_AT_ONCE = 16
"""Replies of a local model that an interruption may cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaker:
    """A model that is asked."""

    model: str
    """A base, a run folder or a registered version; with `endpoint` the model's name there."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as https://host/v1."""
    key_variable: str | None = None
    """Environment variable that holds the API key."""
    concurrency: int = 4
    """Requests at once, of an endpoint."""
    timeout_seconds: float = 300.0
    """Of an endpoint: longest wait for a whole reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthesis:
    """What was made, what was refused, and what it took."""

    path: str
    rejected_path: str
    replies_path: str
    model: str
    judge: str | None
    seeds: int
    rows: int
    asked: int
    """Rows that were wanted."""
    rounds: int
    requests: dict[str, int]
    """Made by this call, by kind: tasks, answers, judge."""
    kept_replies: int
    """That an earlier call had asked for."""
    prompt_tokens: int
    """Of this call's requests, the judge's included; 0 where a server does not say."""
    answer_tokens: int
    usd: float | None
    """By the prices given; None without."""
    rejected: dict[str, int]
    """Refused ones by reason."""
    notes: tuple[str, ...]
    stopped: str | None
    """Why there are fewer rows than asked for."""

    def values(self) -> dict[str, Any]:
        return asdict(self)


def synthesize(
    seeds: str,
    *,
    model: Speaker,
    judge: Speaker | None = None,
    rows: int = 100,
    output: str | Path | None = None,
    settings: Settings | None = None,
    prices: tuple[float, float] | None = None,
    overrides: Sequence[str] = (),
    report: Report = silent,
) -> Synthesis:
    """Writes `rows` new rows like the seeds to `output` (JSON lines), what was refused and the model's replies beside it.

    The same call goes on where an interrupted one stopped.  `prices`: USD for a million tokens of prompts and of answers;
    of the model, not of the judge.  `overrides`: fields of the data section, such as data.prompt_field=question.
    Raises OnlayError.
    """
    from onlay.data.synthesis.prompts import template_digest
    from onlay.data.synthesis.replies import Replies, check_writable
    from onlay.data.synthesis.rounds import Asking, make_rows
    from onlay.data.synthesis.rounds import Settings as Defaults
    from onlay.data.synthesis.seeds import read_seeds
    from onlay.evaluation.overlap import longest_common
    from onlay.evaluation.text import words

    settings = settings or Defaults()
    _check_prices(prices)
    path, rejected_path, replies_path = _paths(seeds, output)
    section = reading_section(seeds, overrides)
    found = read_seeds(seeds, section)
    _refuse_what_is_there(path, rejected_path, replies_path, rows)
    speakers = _Speakers(settings, report)
    asked = speakers.open(model, "model")
    grading = speakers.open(judge, "judge") if judge is not None else None
    replies = Replies(
        replies_path,
        settings={
            **asdict(settings), "model": asked.name, "judge": grading.name if grading else None,
            "seeds": found.digest, "template": template_digest()[:12], **_reading(section),
        },
    )  # fmt: skip
    check_writable(path, rejected_path, replies_path)
    for note in found.notes:
        report(note)
    asking = Asking(model=asked, judge=grading, words=words, longest_common=longest_common)
    made = make_rows(
        found, settings=settings, rows=rows, asking=asking, replies=replies, output=path, rejected=rejected_path,
        tell=_told(report, rows),
    )  # fmt: skip
    notes = list(found.notes)
    if made.shortened:
        notes.append(
            f"{made.shortened:,} prompts show fewer than {settings.shown} tasks, for want of room in the context"
        )
    return Synthesis(
        path=str(path), rejected_path=str(rejected_path), replies_path=str(replies_path), model=asked.name,
        judge=grading.name if grading else None, seeds=len(found.tasks), rows=len(made.rows), asked=rows,
        rounds=made.rounds, requests=dict(replies.asked), kept_replies=replies.kept, rejected=made.reasons,
        prompt_tokens=speakers.tokens()[0], answer_tokens=speakers.tokens()[1], usd=_usd(asked, prices),
        notes=tuple(notes), stopped=made.stopped,
    )  # fmt: skip


def reading_section(source: str, overrides: Sequence[str]) -> DataSection:
    """How a file is read without a recipe.  Raises RecipeError for fields that decide something else."""
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name not in READING:
            raise RecipeError(f"--set {name} is not about reading a file.", f"Here: {', '.join(READING)}.")
    return apply_overrides({"model": {"base": "pocket"}, "data": {"train": source}}, overrides).data


def _reading(section: DataSection) -> dict[str, Any]:
    """Fields of READING that are not as they are by default."""
    fields = {name: name.removeprefix("data.") for name in READING}
    return {
        name: getattr(section, field)
        for name, field in fields.items()
        if getattr(section, field) != DataSection.model_fields[field].default
    }


def bare_name(file: str | Path) -> str:
    """A file's name without the suffixes that say what it holds: `d.v1` of folder/d.v1.jsonl.gz."""
    from onlay.data.sources import SUFFIXES

    name = Path(file).name
    for suffixes in ((".gz",), SUFFIXES):
        suffix = Path(name).suffix
        if suffix.lower() in suffixes:
            name = name.removesuffix(suffix)
    return name


def _check_prices(prices: tuple[float, float] | None) -> None:
    if prices is not None and not all(math.isfinite(price) and price >= 0 for price in prices):
        raise SetupError(
            f"--prices {prices[0]:g} {prices[1]:g} are not two prices.",
            "Give USD for a million tokens of prompts and of answers: two numbers from 0 up.",
        )


def _paths(seeds: str, output: str | Path | None) -> tuple[Path, Path, Path]:
    path = Path(output) if output is not None else Path(f"{bare_name(seeds)}-synthetic.jsonl")
    if path.suffix != ".jsonl":
        raise OutputError(f"--output {path} does not end in .jsonl.", "The rows are written as JSON lines.")
    return path, path.with_suffix(".rejected.jsonl"), path.with_suffix(".replies.jsonl")


def _refuse_what_is_there(path: Path, rejected: Path, replies: Path, rows: int) -> None:
    """Raises OutputError for files that this synthesis has not begun, and for one that has more rows than are wanted."""
    for one in (path, rejected):
        if one.exists() and not replies.exists():
            raise OutputError(f"{one} exists already.", "Choose another name with --output.")
    if path.exists():
        with path.open("rb") as file:
            there = sum(1 for _ in file)
        if there > rows:
            raise OutputError(
                f"{path} holds {there:,} rows already, more than the {rows:,} asked for.",
                f"Ask for --rows {there} or more.",
            )


def _told(report: Report, rows: int) -> Callable[[Made], None]:
    def tell(made: Made) -> None:
        report(Loading("rows made", len(made.rows), rows))

    return tell


def _usd(asked: _Remote | _Local, prices: tuple[float, float] | None) -> float | None:
    if prices is None:
        return None
    return sum(count * price for count, price in zip(asked.tokens(), prices, strict=True)) / 1e6


# ------------------------------------------------------------------------------------------------------- who is asked


class _Speakers:
    """Opens each model once."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        self._opened: dict[Speaker, _Remote | _Local] = {}

    def open(self, speaker: Speaker, part: str) -> _Remote | _Local:
        if speaker not in self._opened:
            if speaker.endpoint is not None:
                found: _Remote | _Local = _Remote(speaker, part, self._settings, self._report)
            elif speaker.key_variable is not None:
                raise SetupError(
                    f"{speaker.key_variable} is named for the key, but the {part} {speaker.model} is a local one.",
                    "Give the server's address too, or leave the key's variable out.",
                )
            else:
                found = _Local(speaker.model, self._settings, self._report)
            self._opened[speaker] = found
        return self._opened[speaker]

    def tokens(self) -> tuple[int, int]:
        """Of prompts and of answers, over all models."""
        counts = [one.tokens() for one in self._opened.values()]
        return sum(prompt for prompt, _ in counts), sum(answer for _, answer in counts)


class _Remote:
    """A model behind an endpoint, at each temperature that is asked for."""

    def __init__(self, speaker: Speaker, part: str, settings: Settings, report: Report) -> None:
        assert speaker.endpoint is not None
        self._speaker, self._part, self._settings, self._report = speaker, part, settings, report
        self._endpoints: dict[float, Endpoint] = {}
        list(self._at(0.0).ask(()))  # Nothing is asked, but a wrong address or a missing key shows.
        self.name = self._at(0.0).name

    def _at(self, temperature: float) -> Endpoint:
        from onlay.evaluation.endpoint import Endpoint

        if temperature not in self._endpoints:
            self._endpoints[temperature] = Endpoint(
                base_url=str(self._speaker.endpoint), model=self._speaker.model, temperature=temperature, part=self._part,
                key_variable=self._speaker.key_variable, max_tokens=self._settings.max_new_tokens,
                concurrency=self._speaker.concurrency, timeout_seconds=self._speaker.timeout_seconds, keep_refusals=True,
                tell=self._report,
            )  # fmt: skip
        return self._endpoints[temperature]

    def ask(self, temperature: float) -> Callable[[Sequence[str]], Iterator[tuple[int, Reply]]]:
        from onlay.data.synthesis.replies import Reply

        endpoint = self._at(temperature)
        return lambda prompts: (
            (place, Reply(one.text, one.cut, None if one.refused is None else f"HTTP {one.refused}"))
            for place, one in endpoint.complete(prompts)
        )

    def fits(self, prompt: str) -> bool:
        """Its context is not known here; a server refuses what is too long."""
        return True

    def tokens(self) -> tuple[int, int]:
        used = self._endpoints.values()
        return sum(one.prompt_tokens for one in used), sum(one.answer_tokens for one in used)


class _Local:
    """A base, a run or a registered version on this machine, loaded when it is first asked."""

    def __init__(self, what: str, settings: Settings, report: Report) -> None:
        from onlay.model.facts import read_facts
        from onlay.stages.places import find_place

        self.name, self._settings, self._report = what, settings, report
        self._prompt_tokens = self._answer_tokens = 0
        # What is not there is told before anything heavy is loaded or a file is begun.
        if _is_trained(what):
            find_place(what)
        else:
            read_facts(ModelSection(base=what))

    @cached_property
    def _opened(self) -> _Opened:
        return _open(self.name, self._report)

    def _encode(self, prompt: str) -> list[int]:
        from onlay.data.read import Turn

        ids: list[int] = self._opened.template.encode_prompt([Turn("user", prompt)])
        return ids

    def fits(self, prompt: str) -> bool:
        context = self._opened.context_tokens
        return context is None or len(self._encode(prompt)) + self._settings.max_new_tokens <= context

    def ask(self, temperature: float) -> Callable[[Sequence[str]], Iterator[tuple[int, Reply]]]:
        def ask(prompts: Sequence[str]) -> Iterator[tuple[int, Reply]]:
            for start in range(0, len(prompts), LOCAL_PROMPTS_AT_ONCE):
                for place, reply in enumerate(self._reply(prompts[start : start + LOCAL_PROMPTS_AT_ONCE], temperature)):
                    yield start + place, reply

        return ask

    def _reply(self, prompts: Sequence[str], temperature: float) -> list[Reply]:
        from onlay.data.synthesis.replies import Reply
        from onlay.generation.engine import Request, Sampling

        encoded = [self._encode(prompt) for prompt in prompts]
        # Groups draw from streams of their own, whatever was asked before them.
        mixed = hashlib.sha256(f"{self._settings.seed}\0{prompts[0]}".encode("utf-8", "surrogatepass")).digest()
        sampling = Sampling(
            max_new_tokens=self._settings.max_new_tokens, temperature=temperature, seed=int.from_bytes(mixed[:4], "big")
        )
        engine = self._opened.engine
        adapter = engine.adapters[0] if engine.adapters else None
        answers = engine.generate([Request(ids, adapter) for ids in encoded], sampling=sampling)
        self._prompt_tokens += sum(map(len, encoded))
        self._answer_tokens += sum(len(answer.ids) for answer in answers)
        return [
            Reply(self._opened.tokenizer.decode(answer.ids, skip_special_tokens=True), not answer.stopped)
            for answer in answers
        ]

    def tokens(self) -> tuple[int, int]:
        return self._prompt_tokens, self._answer_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    engine: Engine
    template: ChatTemplate
    tokenizer: Any
    context_tokens: int | None


def _is_trained(what: str) -> bool:
    """Whether it is a run, a registered version or a version's folder, and no base."""
    return is_reference(what) or (Path(what) / "run.json").is_file() or is_adapter(Path(what))


def _open(what: str, report: Report) -> _Opened:
    from onlay.stages.answering import open_model, open_run

    if _is_trained(what):
        run = open_run(what, report=report)
        return _Opened(
            engine=run.engine, template=run.template, tokenizer=run.tokenizer, context_tokens=run.facts.context_tokens
        )
    opened = open_model(ModelSection(base=what), {}, report=report)
    from onlay.data.template import ChatTemplate
    from onlay.generation.engine import Engine
    from onlay.model.tokenizer import pad_token_id

    template = ChatTemplate(opened.tokenizer)
    engine = Engine(
        opened.model, stop_token_ids=template.stop_token_ids, pad_token_id=pad_token_id(opened.tokenizer),
        context_tokens=opened.facts.context_tokens,
    )  # fmt: skip
    return _Opened(
        engine=engine, template=template, tokenizer=opened.tokenizer, context_tokens=opened.facts.context_tokens
    )
