"""The recipe: what the user wrote, with every default filled in.  Strict: an unknown key is an error with a suggestion.

A field appears here together with its first reader.  Sizes carry their unit in the name; `None` means off or automatic.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onlay.errors import RecipeError

FORMATS = ("auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification")
TARGET_PRESETS = ("all-linear", "attention", "mlp", "qv")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSection(Section):
    base: str = Field(min_length=1, description="Hub name, local folder, or `pocket` (the bundled base).")
    revision: str | None = Field(None, description="Commit, tag or branch on the hub; the commit found is recorded.")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="`random` starts from the folder's config.json with new weights (method `full`)."
    )
    compute: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where the GPU has it, fp16 with loss scaling elsewhere, fp32 on the CPU."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the base. Off by default.")


class LoraAdapter(Section):
    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024, description="Inner dimension R of the update B A.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank. Default: 2 x rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input.")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear, attention, mlp, qv, or a list of the model's own module names."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases train.")

    @property
    def scale(self) -> float:
        return self.resolved_alpha / self.rank

    @property
    def resolved_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


class FullTuning(Section):
    method: Literal["full"]


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
    max_tokens: int | None = Field(None, ge=8, description="Longest example. Default: the base's context, at most 4096.")
    overlong: Literal["drop", "cut", "error"] = Field(
        "drop", description="Examples over max_tokens: drop them, cut their end, or stop. Plain text is always split."
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows.")


class TrainingSection(Section):
    epochs: float = Field(3.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs.")
    batch_size: int = Field(16, ge=1, description="Examples per optimizer step, over all devices.")
    micro_batch_tokens: int | None = Field(
        None, ge=8, description="Most tokens in one forward pass. Default: chosen for the device, halved when memory runs out."
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="Several examples in one row without padding. auto: on a GPU, where the base keeps them apart."
    )
    learning_rate: float | None = Field(None, gt=0, lt=1, description="Peak. Default: 2e-4 for lora, 2e-5 for full.")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_fraction: float = Field(0.05, ge=0.0, le=1.0, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm; null: off.")
    seed: int = Field(0, ge=0, lt=2**32)
    checkpoint_steps: int | None = Field(None, ge=1, description="Steps between checkpoints. Default: ten a run.")
    keep_checkpoints: int = Field(2, ge=1, description="Latest checkpoints kept; the best one is kept besides.")
    max_recoveries: int = Field(5, ge=0, description="Recoveries from divergence before the run stops.")
    trackers: list[str] = Field([], description="Accelerate trackers: tensorboard, wandb, mlflow, ...")
    output: str | None = Field(None, description="Run folder; must not exist. Default: runs/NAME-DATE-TIME.")


class EvaluationSection(Section):
    split: float | None = Field(
        0.05, gt=0.0, lt=1.0, description="Share of the training rows held out, by prompt; null: off unless `file`."
    )
    file: str | None = Field(None, description="Held-out rows in a file of their own; `split` is then not used.")
    every_steps: int | None = Field(None, ge=1, description="Steps between evaluations. Default: at each checkpoint.")
    max_rows: int = Field(256, ge=1, description="Held-out rows used by the evaluations during training.")
    patience: int | None = Field(None, ge=1, description="Stop after this many evaluations without a better loss.")
    select: Literal["best", "last"] = Field("best", description="Which weights become the run's adapter.")


class Recipe(Section):
    model: ModelSection
    adapter: Annotated[LoraAdapter | FullTuning, Field(discriminator="method")] = LoraAdapter()
    data: DataSection
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()

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
        return 2e-4 if self.adapter.method == "lora" else 2e-5

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text and lets a repeated key win in silence; here it is a number, and an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise RecipeError(f"{key_node.value} is given twice (line {line}).", "Delete one of the two lines.")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
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
        raise RecipeError(f"{path}{line}: {what}.", "Indent with spaces, and quote texts that contain ': '.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text.", "Give a YAML recipe; `onlay init DATA` writes one.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no sections.", "A recipe has at least model.base and data.train.")
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A validated Recipe from nested dictionaries.  Raises RecipeError naming the first field that is wrong."""
    values = {key: section for key, section in values.items() if section is not None}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        problem, remedy = _explain(details[0])
        if len(details) > 1:
            remedy += f" ({len(details) - 1} more after this one.)"
        raise RecipeError(problem, remedy) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2:
        raise RecipeError(f"--set {override} is not section.field=value.", "Example: --set training.learning_rate=1e-4")
    section = values.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise RecipeError(f"{parts[0]} is not a section.", f"Sections: {', '.join(Recipe.model_fields)}.")
    try:
        section[parts[1]] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        section[parts[1]] = text


def field_paths() -> dict[str, Any]:
    """Every recipe field as `section.field` with its pydantic FieldInfo; adapter fields are those of every method."""
    paths: dict[str, Any] = {}
    sections: dict[str, list[type[Section]]] = {
        "model": [ModelSection],
        "adapter": [LoraAdapter, FullTuning],
        "data": [DataSection],
        "training": [TrainingSection],
        "evaluation": [EvaluationSection],
    }
    for name, classes in sections.items():
        for section in classes:
            paths.update({f"{name}.{field}": info for field, info in section.model_fields.items()})
    return paths


def _explain(detail: Any) -> tuple[str, str]:
    """The two lines for one pydantic error."""
    # A discriminated union adds the chosen method's name to the location: drop it.
    location = [str(part) for part in detail["loc"] if part not in ("lora", "full")]
    name = ".".join(location[:2])
    given, kind, context = detail.get("input"), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_field(name, location)
    if kind == "missing":
        return f"{name} is missing.", f"Add it to the recipe, or pass --set {name}=..."
    if kind == "union_tag_invalid":
        return f"adapter.method = {given.get('method')} is not a method.", "Use lora or full."
    info = field_paths().get(name)
    default = "delete the line to get the default" if info is not None and not info.is_required() else "change it"
    bounds = _bounds(info)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        use = f"Use {info.default}, or {default}." if info is not None and info.default is not None else f"{default.capitalize()}."
        return f"{name} = {given} is outside {bounds}.", use
    if kind == "literal_error":
        return f"{name} = {given} is not one of {context.get('expected', '')}.", f"Choose one of them, or {default}."
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{name} = {given!r} has the wrong type: it should be {message}.", f"Correct it, or {default}."


def _unknown_field(name: str, location: list[str]) -> tuple[str, str]:
    known = list(field_paths()) if len(location) > 1 else list(Recipe.model_fields)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near and len(location) > 1:
        same_name = [path for path in known if path.split(".")[1] == location[1]]
        near = same_name[:1] or difflib.get_close_matches(location[1], [path.split(".")[1] for path in known], n=1)
        near = [next(path for path in known if path == n or path.split(".")[1] == n) for n in near]
    if near:
        return f"{name} is not a recipe field.", f"Did you mean {near[0]}?"
    section = location[0] if len(location) > 1 else ""
    names = [path.split(".")[1] for path in known if path.startswith(section + ".")] if section else known
    return f"{name} is not a recipe field.", f"Known here: {', '.join(names)}."


def _bounds(info: Any) -> str:
    low, high, low_open, high_open = "", "", False, False
    for constraint in getattr(info, "metadata", []):
        low = str(getattr(constraint, "ge", None) if hasattr(constraint, "ge") else low)
        if hasattr(constraint, "gt"):
            low, low_open = str(constraint.gt), True
        if hasattr(constraint, "le"):
            high = str(constraint.le)
        if hasattr(constraint, "lt"):
            high, high_open = str(constraint.lt), True
    if not high:
        return f"numbers above {low}" if low_open else f"{low} and up"
    return f"{low}..{high}" + (" (end excluded)" if high_open or low_open else "")
