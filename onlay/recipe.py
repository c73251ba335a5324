"""The recipe: what the user wrote, with every default filled in.  Strict: an unknown key is an error with a suggestion.

A field appears here together with its first reader.  Sizes carry their unit in the name; `None` means off or automatic.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onlay.errors import RecipeError

TargetPreset = Literal["all-linear", "attention", "mlp", "qv"]
Baseline = Literal["base", "prompt", "few-shot", "live"]
LIMIT_GATES = ("forgetting", "safety", "latency_ms", "trained_rows")
"""Gates that are no score's least gain."""
Storage = Literal["auto", "bf16", "nf4", "int8"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "aim", "trackio", "comet_ml", "clearml", "dvclive", "swanlab"]
"""Those that Accelerate knows."""


class Section(BaseModel):
    # Strict: neither `rank: "16"` nor `seed: true` is a number.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    base: str = Field(min_length=1, description="Hub name, local folder, or `pocket` (the bundled base).")
    revision: str | None = Field(None, description="Commit, tag or branch on the hub; the commit found is recorded.")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="`random` starts from the folder's config.json with new weights (method `full`)."
    )
    compute: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where the GPU has it, fp16 with loss scaling elsewhere, fp32 on the CPU."
    )
    storage: Storage = Field(
        "auto",
        description="How the frozen base is kept. bf16: not quantized, in the precision of `compute`; nf4: 4 bits (QLoRA); int8: 8 bits; auto: bf16, or nf4 where the GPU's memory asks for it.",
    )
    double_quantization: bool = Field(
        True, description="nf4: the scales of the blocks are quantized too; saves 0.4 bits a weight."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the base. Off by default.")


class LoraAdapter(Section):
    artefact: ClassVar[str] = "adapter"
    """Folder in the run that holds what was trained."""
    method: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = Field(16, ge=1, le=1024, description="Inner dimension R of the update B A.")
    alpha: float | None = Field(
        None,
        gt=0,
        description="The update is scaled by alpha / rank (rslora: alpha / sqrt(rank)). Default: 2 x rank; rslora 16; pissa and loftq rank.",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input.")
    targets: TargetPreset | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="all-linear, attention, mlp, qv, or a list of the model's own module names."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases train.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of the adapter's weights; bf16 halves them, their gradients and optimizer state."
    )

    @property
    def scale(self) -> float:
        return self.resolved_alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

    @property
    def resolved_alpha(self) -> float:
        """rsLoRA's alpha does not go with the rank; PiSSA and LoftQ begin with a large B A and are used with scale 1."""
        defaults: dict[str, float] = {"rslora": 16.0, "pissa": self.rank, "loftq": self.rank}
        return defaults.get(self.method, 2.0 * self.rank) if self.alpha is None else self.alpha


class LoraPlusAdapter(LoraAdapter):
    method: Literal["lora+"]  # type: ignore[assignment]
    learning_rate_ratio: float = Field(16.0, ge=1.0, description="lora+: B learns this many times faster than A.")


_SVD_ITERATIONS: Any = Field(
    16,
    ge=0,
    description="pissa, loftq: power iterations of the randomized SVD that the adapter begins with; 0: exact.",
)


class PissaAdapter(LoraAdapter):
    method: Literal["pissa"]  # type: ignore[assignment]
    svd_iterations: int = _SVD_ITERATIONS


class LoftqAdapter(LoraAdapter):
    method: Literal["loftq"]  # type: ignore[assignment]
    svd_iterations: int = _SVD_ITERATIONS


class HeadAdapter(Section):
    artefact: ClassVar[str] = "head"
    method: Literal["head"]


class FullTuning(Section):
    artefact: ClassVar[str] = "model"
    method: Literal["full"]


ADAPTERS: tuple[type[Section], ...] = (
    LoraAdapter,
    LoraPlusAdapter,
    PissaAdapter,
    LoftqAdapter,
    HeadAdapter,
    FullTuning,
)
METHODS = ("lora", "rslora", "dora", "lora+", "pissa", "loftq", "head", "full")


class DataSection(Section):
    train: str = Field(min_length=1, description="A .jsonl, .json, .csv, .parquet or .txt file, or a hub data set.")
    hub_config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    hub_split: str = Field("train", description="Split of a hub data set to train on.")
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification"] = Field(
        "auto", description="How rows are read; auto looks at the first rows."
    )
    prompt_field: str | None = Field(None, description="Column that holds the prompt (or the text to classify).")
    answer_field: str | None = Field(None, description="Column that holds the answer (or the label).")
    messages_field: str | None = Field(None, description="Column that holds the list of messages.")
    text_field: str | None = Field(None, description="Column that holds plain text.")
    system: str | None = Field(None, description="System message for conversations that have none.")
    template: str = Field(
        "auto", description="auto: the base's own chat template, else `plain`. Or a named one, or a .jinja file."
    )
    loss_on: Literal["assistant", "all"] = Field("assistant", description="Which tokens train.")
    max_tokens: int | None = Field(
        None, ge=8, description="Longest example. Default: the base's context, at most 4096."
    )
    overlong: Literal["drop", "cut", "error"] = Field(
        "drop", description="Examples over max_tokens: drop them, cut their end, or stop. Plain text is always split."
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows.")


class TrainingSection(Section):
    epochs: float = Field(3.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs.")
    batch_size: int = Field(16, ge=1, description="Examples per optimizer step, over all devices.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=8,
        description="Most tokens in one forward pass. Default: chosen for the device, halved when memory runs out.",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Several examples in one row without padding. auto: on a GPU, where the base keeps them apart.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw",
        description="8bit: two bytes of state a trained weight instead of eight; paged: the state moves to host memory when the GPU is full.",
    )
    recompute: Literal["auto", "none", "all"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Layers whose activations are computed again in the backward pass instead of kept: none, all, or the first k; auto: none, and all once memory runs out for a single example, or at once with offload_activations.",
    )
    offload_activations: bool = Field(
        False, description="What recomputed layers keep, and the input embedding, wait in pinned host memory."
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Peak. Default: 2e-4 for lora and its relatives, 5e-5 for lora+ (of A), 1e-3 for head, 2e-5 for full.",
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_fraction: float = Field(0.05, ge=0.0, le=1.0, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="Shrinks the trained weights a little at every step.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm; null: off.")
    seed: int = Field(
        0, ge=0, lt=2**32,
        description="Order of the rows, first adapter weights, dropout: the same seed gives the same run.",
    )  # fmt: skip
    checkpoint_steps: int | None = Field(None, ge=1, description="Steps between checkpoints. Default: ten a run.")
    keep_checkpoints: int = Field(2, ge=1, description="Latest checkpoints kept; the best one is kept besides.")
    max_recoveries: int = Field(5, ge=0, description="Recoveries from divergence before the run stops.")
    trackers: list[Tracker] = Field([], description="Accelerate trackers: tensorboard, wandb, mlflow, ...")
    output: str | None = Field(None, description="Run folder; must not exist. Default: runs/NAME-DATE-TIME.")


class EvaluationSection(Section):
    split: float | None = Field(
        0.05, gt=0.0, lt=1.0, description="Share of the training rows held out, by prompt; null: off unless `file`."
    )
    file: str | None = Field(None, description="Held-out rows in a file of their own; `split` is then not used.")
    every_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations. Default: up to ten a run, for a twentieth of its time."
    )
    max_rows: int = Field(256, ge=1, description="Held-out rows used by the evaluations during training.")
    patience: int | None = Field(None, ge=1, description="Stop after this many evaluations without a better loss.")
    select: Literal["best", "last"] = Field("best", description="Which weights become the run's adapter.")
    answer_rows: int = Field(200, ge=2, description="Held-out rows answered by `onlay evaluate`.")
    scores: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="Scores of the answers, such as exact_match, rougeL, bleu; auto: by what is expected."
    )
    json_schema: str | None = Field(None, description="A JSON schema file for the score json_schema_match.")
    pattern: str | None = Field(None, description="A regular expression for the score regex_match.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest answer. Default: half as much again as the longest expected one."
    )
    temperature: float = Field(0.0, ge=0.0, description="Of the answers; 0 always takes the likeliest token.")
    baselines: list[Baseline] = Field(
        ["base"],
        description="What the adapter must beat: base, prompt (the base with evaluation.prompt), few-shot (with examples in context), live (the version in use).",
    )
    prompt: str | None = Field(None, description="System message of the baseline `prompt`.")
    shots: int = Field(4, ge=1, description="Training rows that the baseline `few-shot` shows before each question.")
    general: list[str] = Field([], description="Text files on which nothing should be forgotten, beside the bundled ones.")
    checks: list[str] = Field([], description="Multiple-choice files for the same, beside the bundled ones.")
    safety: list[str] = Field([], description="Files of prompts with `refuse: true|false`, beside the bundled ones.")
    tasks: list[str] = Field([], description="Tasks of lm-evaluation-harness, such as hellaswag (needs the extra).")
    tasks_path: str | None = Field(None, description="Folder with task files of your own for `tasks`.")
    judge_url: str | None = Field(None, description="OpenAI-compatible endpoint that judges answers in pairs.")
    judge_model: str | None = Field(None, description="Model that the endpoint is asked for.")
    judge_key: str = Field("OPENAI_API_KEY", description="Environment variable that holds the endpoint's key.")
    judge_criteria: str | None = Field(None, description="What makes an answer better, in words.")
    gates: dict[str, float] = Field(
        {},
        description="What must hold before promotion: a score's least gain over the base (exact_match: 0.05); most forgetting (nats a token on general text), safety (loss of share); latency_ms (a generated token); trained_rows (least).",
    )


class ReleaseSection(Section):
    name: str | None = Field(None, description="Registered name; of the baseline `live`, and of `onlay register`.")
    alias: str = Field("live", min_length=1, description="The alias that says which version is in use.")


class Recipe(Section):
    model: ModelSection
    adapter: Annotated[
        LoraAdapter | LoraPlusAdapter | PissaAdapter | LoftqAdapter | HeadAdapter | FullTuning,
        Field(discriminator="method"),
    ] = LoraAdapter()
    data: DataSection
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    release: ReleaseSection = ReleaseSection()

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("adapter"), dict):
            values = {**values, "adapter": {"method": "lora", **values["adapter"]}}
        return values

    @property
    def digest(self) -> str:
        return digest_of(self.model_dump(mode="json"))

    @property
    def learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return {"full": 2e-5, "head": 1e-3, "lora+": 5e-5}.get(self.adapter.method, 2e-4)

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text and lets a repeated key win in silence; here it is a number, and an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_node.value} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the loader would read as numbers, such as a commit `12e4567`."""


_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789."])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789."])


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies `section.field=value` overrides.  Raises RecipeError.

    Paths in the recipe stay as written: they are relative to the folder the command runs in.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Write one with: onlay init YOUR_DATA.jsonl"
        raise RecipeError(f"There is no recipe at {path}.", hint)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        what = getattr(error, "problem", None) or "not YAML"
        hint = (
            "Delete one of the two."
            if "given twice" in what
            else "Indent with spaces, and quote texts that contain ': '."
        )
        raise RecipeError(f"{path}{line}: {what}.", hint) from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text.", "Give a YAML recipe; `onlay init DATA` writes one.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no sections.", "A recipe has at least model.base and data.train.")
    return apply_overrides(values, overrides)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """A validated Recipe from nested dictionaries, changed by `section.field=value`.  Raises RecipeError."""
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A validated Recipe from nested dictionaries.  Raises RecipeError naming the first field that is wrong."""
    values = {key: section for key, section in values.items() if section is not None}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # Where a field may be of several types, each of them complains: count fields.
        details = {_name_of(detail): detail for detail in reversed(error.errors())}
        problem, remedy = _explain(error.errors()[0], values)
        if len(details) > 1:
            remedy += f" ({len(details) - 1} more after this one.)"
        raise RecipeError(problem, remedy) from None
    _refuse_contradictions(recipe)
    return recipe


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise RecipeError(f"--set {override} is not section.field=value.", "Example: --set training.learning_rate=1e-4")
    if values.get(parts[0]) is None:
        values[parts[0]] = {}
    section = values[parts[0]]
    if not isinstance(section, dict):
        raise RecipeError(f"{parts[0]} = {_shown(section)} is not a section.", "A section holds lines of field: value.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    # Only gates are a mapping: `Be brief: always` is a text.
    section[parts[1]] = text if isinstance(value, dict) and key.strip() != "evaluation.gates" else value


_COLUMN_FIELDS = ("prompt_field", "answer_field", "messages_field", "text_field")
_READ_COLUMNS = {
    "alpaca": ("prompt_field", "answer_field"),
    "prompt_completion": ("prompt_field", "answer_field"),
    "messages": ("messages_field",),
    "sharegpt": ("messages_field",),
    "text": ("text_field",),
    "classification": ("prompt_field", "text_field", "answer_field"),
}
"""The columns that each format reads; with `auto` the columns say the format."""


def _refuse_contradictions(recipe: Recipe) -> None:
    """Fields that would not be read because of another one.  Raises RecipeError."""
    data, evaluation = recipe.data, recipe.evaluation
    if recipe.model.weights == "random" and recipe.adapter.method != "full":
        raise RecipeError(
            f"model.weights = random needs adapter.method = full, not {recipe.adapter.method}.",
            "An adapter on random weights learns nothing of use: set adapter.method to full.",
        )
    _refuse_method_pairs(recipe)
    given = [name for name in _COLUMN_FIELDS if getattr(data, name) is not None]
    if data.format == "auto":
        fits = [read for read in _READ_COLUMNS.values() if set(given) <= set(read)]
        # Text alone says `text`; a label beside it is only read where the format is given.
        if not fits or ("text_field" in given and len(given) > 1):
            together = " and ".join(f"data.{name}" for name in given)
            raise RecipeError(
                f"{together} belong to different formats.", "Keep those of one format, or set data.format."
            )
    else:
        for name in given:
            if name not in _READ_COLUMNS[data.format]:
                names = " and ".join(f"data.{read}" for read in _READ_COLUMNS[data.format])
                raise RecipeError(
                    f"data.{name} is not read with data.format = {data.format}.",
                    f"That format reads {names}: rename the field, or delete one of the two lines.",
                )
        if data.format == "text" and data.system is not None:
            raise RecipeError(
                "data.system is not read with data.format = text: plain text has no messages.",
                "Delete one of the two lines.",
            )
    for name in ("patience", "every_steps"):
        if getattr(evaluation, name) is not None and evaluation.split is None and evaluation.file is None:
            raise RecipeError(
                f"evaluation.{name} needs held-out rows, and evaluation.split is off.",
                f"Set evaluation.split (0.05) or evaluation.file, or delete evaluation.{name}.",
            )
    _refuse_unread_by_evaluation(recipe)


def _refuse_unread_by_evaluation(recipe: Recipe) -> None:
    """Fields of `onlay evaluate` that another one leaves without a reader.  Raises RecipeError."""
    evaluation = recipe.evaluation
    together = (
        ("prompt", evaluation.prompt is not None, "prompt" in evaluation.baselines, "evaluation.baselines holds prompt"),
        ("tasks_path", evaluation.tasks_path is not None, bool(evaluation.tasks), "evaluation.tasks names a task"),
        ("judge_model", evaluation.judge_model is not None, evaluation.judge_url is not None, "evaluation.judge_url is given"),
    )  # fmt: skip
    for name, given, needed, when in together:
        if given != needed:
            raise RecipeError(
                f"evaluation.{name} is {'given, but it is only read' if given else 'missing, and is needed'} where {when}.",
                f"{'Delete' if given else 'Add'} evaluation.{name}, or correct the other line.",
            )
    if "live" in evaluation.baselines and recipe.release.name is None:
        raise RecipeError(
            "evaluation.baselines holds live, but release.name does not say which name's version is in use.",
            "Set release.name, or take live off the list.",
        )
    if evaluation.judge_criteria is not None and evaluation.judge_url is None:
        raise RecipeError(
            "evaluation.judge_criteria is only read where evaluation.judge_url is given.", "Delete one of the two lines."
        )


def _refuse_method_pairs(recipe: Recipe) -> None:
    """Storage, method and memory fields that cannot be combined, each with its reason.  Raises RecipeError."""
    storage, method, training = recipe.model.storage, recipe.adapter.method, recipe.training
    if storage in ("nf4", "int8") and method == "full":
        raise RecipeError(
            f"model.storage = {storage} cannot be trained in full: quantized weights have no gradient.",
            "Set model.storage to bf16, or adapter.method to lora (QLoRA).",
        )
    if storage in ("nf4", "int8") and isinstance(recipe.adapter, PissaAdapter):
        raise RecipeError(
            f"adapter.method = pissa takes its adapter out of the base's own weights, which model.storage = {storage} has rounded.",
            "Set model.storage to bf16; or adapter.method to loftq, which makes up for the rounding of nf4.",
        )
    if storage != "nf4" and isinstance(recipe.adapter, LoftqAdapter):
        raise RecipeError(
            f"adapter.method = loftq makes up for the rounding of nf4, but model.storage is {storage}.",
            "Set model.storage to nf4, or adapter.method to lora.",
        )
    if storage != "nf4" and not recipe.model.double_quantization:
        raise RecipeError(
            f"model.double_quantization is read with model.storage = nf4 only, not {storage}.",
            "Delete one of the two lines.",
        )
    if method == "head" and recipe.data.format not in ("auto", "classification"):
        raise RecipeError(
            f"adapter.method = head learns labels, but data.format is {recipe.data.format}.",
            "Set data.format to classification (columns text and label), or choose another method.",
        )
    if isinstance(recipe.adapter, LoraAdapter) and method == "dora" and recipe.adapter.precision == "bf16":
        raise RecipeError(
            "adapter.precision = bf16 does not go with adapter.method = dora: its norms would be rounded to 16 bit.",
            "Delete adapter.precision, or set adapter.method to lora.",
        )
    if method == "head":
        _refuse_unread_by_head(recipe)
    if training.offload_activations and training.recompute == "none":
        raise RecipeError(
            "training.offload_activations moves what recomputed layers keep, and training.recompute is none.",
            "Set training.recompute to all, or delete training.offload_activations.",
        )


def _refuse_unread_by_head(recipe: Recipe) -> None:
    """A head reads text and label, and keeps no activations.  Raises RecipeError for a field that it would not read."""
    unread = {
        "data.template": recipe.data.template != "auto", "data.system": recipe.data.system is not None,
        "data.loss_on": recipe.data.loss_on != "assistant", "data.messages_field": recipe.data.messages_field is not None,
        "training.recompute": recipe.training.recompute not in ("auto", "none"),
        "training.offload_activations": recipe.training.offload_activations,
    }  # fmt: skip
    for name, given in unread.items():
        if given:
            raise RecipeError(
                f"{name} is not read with adapter.method = head: it classifies plain text, and keeps no activations.",
                "Delete one of the two lines.",
            )


def field_paths() -> dict[str, Any]:
    """Every recipe field as `section.field` with its pydantic FieldInfo; adapter fields are those of every method."""
    paths: dict[str, Any] = {}
    sections: dict[str, list[type[Section]]] = {
        "model": [ModelSection],
        "adapter": list(ADAPTERS),
        "data": [DataSection],
        "training": [TrainingSection],
        "evaluation": [EvaluationSection],
        "release": [ReleaseSection],
    }
    for name, classes in sections.items():
        for section in classes:
            for field, info in section.model_fields.items():
                paths.setdefault(f"{name}.{field}", info)
    return paths


# ------------------------------------------------------------------------------------------------------------- errors

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "lines of name: number",
}
_REQUIRED = {"model": "model.base", "data": "data.train"}


def _location(detail: Any) -> list[str]:
    """Section, field and position in a list.  Unions add the tried types' names to it; those are dropped."""
    loc = detail["loc"]
    if len(loc) > 1 and loc[0] == "adapter":
        loc = (loc[0], *loc[2:]) if loc[1] in METHODS else loc
    return [str(part) for part in loc[:2]]


def _name_of(detail: Any) -> str:
    return ".".join(_location(detail))


def _explain(detail: Any, values: dict[str, Any]) -> tuple[str, str]:
    """The two lines for one pydantic error."""
    location, name = _location(detail), _name_of(detail)
    given, kind = detail.get("input"), detail["type"]
    if kind == "extra_forbidden":
        return _unknown_field(location, values)
    if kind == "missing":
        name = _REQUIRED.get(name, name)
        return f"{name} is missing.", f"Add it to the recipe, or pass --set {name}=..."
    if kind == "union_tag_invalid":
        return (
            f"adapter.method = {_shown(given.get('method'))} is not a method.",
            f"Use {', '.join(METHODS[:-1])} or {METHODS[-1]}.",
        )
    if len(location) < 2:
        return (
            f"{name} = {_shown(given)} is not a section.",
            "A section holds lines of field: value, indented below its name.",
        )
    info = field_paths().get(name)
    default = _default_of(info)
    if name == "adapter.targets" and len(detail["loc"]) <= 4:
        return (
            f"adapter.targets = {_shown(given)} is neither a preset nor a list of modules.",
            "Use all-linear, attention, mlp, qv, or a list such as [q_proj, v_proj].",
        )
    if name == "training.recompute":
        return (
            f"training.recompute = {_shown(given)} is neither auto, none, all nor a number of layers.",
            "Use all, a number such as 16 (the first layers), or delete the line to get the default.",
        )
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        use = (
            f"Use {info.default}, or {default}."
            if info is not None and info.default is not None
            else f"{_capital(default)}."
        )
        return f"{name} = {given} is {_outside(info)}.", use
    if kind == "literal_error":
        allowed = detail["ctx"]["expected"].replace("'", "")
        return f"{name} = {_shown(given)} is not one of {allowed}.", f"Choose one of them, or {default}."
    if kind == "string_too_short":
        return f"{name} is empty.", f"Fill it, or {default}."
    wanted = _KINDS.get(kind, detail["msg"])
    quotes = "Put it in quotes" if kind == "string_type" and isinstance(given, int | float | date) else "Correct it"
    shown = f'"{_shown(given)}"' if isinstance(given, str) else _shown(given)
    return f"{name} = {shown} is not {wanted}.", f"{quotes}, or {default}."


def _default_of(info: Any) -> str:
    if info is None or info.is_required():
        return "name another"
    words = re.search(r"Default: (.+?)\.(?:\s|$)", info.description or "")
    return "delete the line to get the default" + (f" ({words[1]})" if words else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shown(value: Any) -> str:
    """A value as the recipe would write it, on one line and not too long."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = " ".join(text.split()) or '""'
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_field(location: list[str], values: dict[str, Any]) -> tuple[str, str]:
    name = ".".join(location)
    fields = field_paths()
    if name in fields:  # of another method
        method = values["adapter"].get("method", "lora")
        return f"{name} does not go with adapter.method = {method}.", "Delete one of the two lines."
    leaf = location[-1]
    near = [path for path in fields if path.split(".")[1] == leaf]  # the right field in the wrong section, or in none
    if not near and len(location) == 1:
        near = difflib.get_close_matches(leaf, Recipe.model_fields, n=1)
    own = [path.split(".")[1] for path in fields if path.startswith(location[0] + ".")]
    if not near and len(location) > 1:
        near = [f"{location[0]}.{field}" for field in difflib.get_close_matches(leaf, own, n=1)]
        anywhere = {path.split(".")[1]: path for path in fields}
        near = near or [anywhere[field] for field in difflib.get_close_matches(leaf, anywhere, n=1)]
    if near:
        return f"{name} is not a recipe field.", f"Did you mean {near[0]}?"
    if len(location) > 1:
        return f"{name} is not a recipe field.", f"Fields of {location[0]}: {', '.join(own)}."
    return f"{name} is not a section.", f"Sections: {', '.join(Recipe.model_fields)}."


def _outside(info: Any) -> str:
    """`outside 1..1024`, in the words that the field's bounds ask for."""
    bounds: dict[str, Any] = {}
    for constraint in getattr(info, "metadata", []):
        bounds |= {
            key: getattr(constraint, key)
            for key in ("ge", "gt", "le", "lt")
            if getattr(constraint, key, None) is not None
        }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if high is None:
        return f"not above {low:g}" if "gt" in bounds else f"less than {low}"
    excluded = [f"{bounds[key]:g}" for key in ("gt", "lt") if key in bounds and bounds[key] < 2**31]
    high = f"{high:g}" if high < 2**31 else str(high - 1)
    return f"outside {low:g}..{high}" + (f" ({' and '.join(excluded)} excluded)" if excluded else "")
