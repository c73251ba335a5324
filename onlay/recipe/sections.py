"""The sections of a recipe and their fields.  A field appears here together with its first reader."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from onlay.recipe.numbers import Dumper

TargetPreset = Literal["all-linear", "attention", "mlp", "qv"]
Baseline = Literal["base", "prompt", "few-shot", "live"]
LIMIT_GATES = ("forgetting", "safety", "latency_ms", "trained_rows")
"""Gates that are no score's least gain."""
Storage = Literal["auto", "bf16", "nf4", "int8", "fp8"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "aim", "trackio", "comet_ml", "clearml", "dvclive", "swanlab"]
"""Those that Accelerate knows."""
PersonalKind = Literal[
    "email", "phone", "card", "iban", "national_id", "ip", "url", "url_credentials", "key", "address", "name"
]


class Section(BaseModel):
    # Strict: neither `rank: "16"` nor `seed: true` is a number.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    base: str = Field(min_length=1, description="Hub name, local folder, or `pocket` (the bundled base).")
    revision: str | None = Field(None, description="Commit, tag or branch on the hub; the commit found is recorded.")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="`random` starts from the folder's config.json with new weights (method `full`)."
    )
    compute: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = Field(
        "auto",
        description="auto: bf16 where the GPU has it, fp16 with loss scaling elsewhere, fp32 on the CPU; fp8: as auto, with the products of an nf4 or fp8 base in FP8 (storage fp8 does so with auto too, on a GPU).",
    )
    storage: Storage = Field(
        "auto",
        description="How the frozen base is kept. bf16: not quantized, in the precision of `compute`; nf4: 4 bits (QLoRA); int8: 8 bits; fp8: 8 bits, multiplied in FP8 by GPUs that have it; auto: bf16, or nf4 where the GPU's memory asks for it.",
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


class WeightedSource(Section):
    """One of several sources of training rows."""

    file: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, le=1000)
    """How often each row trains in an epoch, on average."""


_Name = Annotated[str, Field(min_length=1)]


def _source_kind(value: Any) -> str:
    """Decides which type a value is held against, so that an error is told of that type only."""
    if isinstance(value, list):
        return "several"
    return "weighted" if isinstance(value, dict | WeightedSource) else "name"


def listed_sources(train: str | list[str | WeightedSource]) -> tuple[WeightedSource, ...]:
    """What data.train holds, as a list in any case."""
    given = [train] if isinstance(train, str) else train
    return tuple(WeightedSource(file=one) if isinstance(one, str) else one for one in given)


class DataSection(Section):
    train: Annotated[
        Annotated[_Name, Tag("name")]
        | Annotated[list[Annotated[Annotated[_Name, Tag("name")] | Annotated[WeightedSource, Tag("weighted")],
                                   Discriminator(_source_kind)]], Field(min_length=1), Tag("several")],
        Discriminator(_source_kind),
    ] = Field(
        description="A .jsonl, .json, .csv, .parquet or .txt file, or a hub data set; or a list of them, each a name or {file: NAME, weight: 2.0} (each row trains twice; 0.5: half of the rows, drawn by the seed)."
    )  # fmt: skip
    hub_config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    hub_split: str = Field("train", description="Split of a hub data set to train on.")
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification"] = Field(
        "auto", description="How rows are read; auto looks at the first rows of each source."
    )
    prompt_field: str | None = Field(None, description="Column that holds the prompt (or the text to classify).")
    answer_field: str | None = Field(None, description="Column that holds the answer (or the label).")
    messages_field: str | None = Field(None, description="Column that holds the list of messages.")
    text_field: str | None = Field(None, description="Column that holds plain text.")
    domain_field: str | None = Field(
        None,
        min_length=1,
        description="Column that says what a row is about. Default: a usual name, such as domain or category.",
    )
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
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows of each source in `train`.")
    duplicates: Literal["keep", "drop_exact", "drop_near"] = Field(
        "keep",
        description="Rows that repeat another: keep them; drop_exact: up to case, punctuation and white space; drop_near: also those in one cluster of near-duplicates. The row with the longest answer stays.",
    )
    near_threshold: float = Field(
        0.8, ge=0.5, le=1.0, description="Jaccard similarity of shingles from which two rows are near-duplicates."
    )
    balance: Literal["none", "cap", "equal"] = Field(
        "none",
        description="Rows of large domains are dropped, drawn by the seed: cap: until no domain has more than domain_cap; equal: until all have as many as the smallest.",
    )
    domain_cap: float | None = Field(
        None, gt=0.0, lt=1.0, description="cap: the largest share of the training rows that one domain may have."
    )
    general: str | None = Field(
        None, min_length=1, description="General examples to mix in against forgetting: a file or a hub data set."
    )
    general_share: float | None = Field(
        None, gt=0.0, lt=1.0, description="general: its share of the resulting training examples. Default: 0.05."
    )
    anonymise: Literal["off", "pseudonyms", "redact"] = Field(
        "off",
        description="Personal data in the rows becomes consistent tokens that the key gives back (pseudonyms), or marks such as [EMAIL] (redact).",
    )
    anonymise_key: str | None = Field(
        None,
        min_length=1,
        description="pseudonyms: the file with the key, made where there is none, or env:NAME for an environment variable. Keep it apart from the data.",
    )
    anonymise_kinds: list[PersonalKind] | None = Field(
        None,
        min_length=1,
        description="Kinds that are replaced: email, phone, card, iban, national_id, ip, url, url_credentials, key, address, name. Default: all but url.",
    )
    anonymise_names: str | None = Field(
        None,
        min_length=1,
        description="A spaCy model, installed or a folder, that finds names where the built-in rules do not (needs the extra `privacy`).",
    )
    terms: str | None = Field(
        None, min_length=1, description="A file of terms, one a line; rows that hold one are listed by the audit."
    )
    licence: str | None = Field(
        None, description="Licence of the rows, such as cc-by-4.0, or `own`; read by `onlay check`."
    )

    @property
    def train_sources(self) -> tuple[WeightedSource, ...]:
        """The sources of training rows, one or several."""
        return listed_sources(self.train)

    @property
    def train_told(self) -> str:
        """The sources' names, for a sentence."""
        return ", ".join(source.file for source in self.train_sources)


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
        description="Layers whose activations are computed again in the backward pass instead of kept: none, all, or the first k; auto: as few and as little of each as the GPU's memory asks for, all once it runs out for a single example, or at once with offload_activations.",
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
        0.05,
        gt=0.0,
        lt=1.0,
        description="Share of the training rows held out, in groups (`split_by`); null: off unless `file`.",
    )
    split_by: Literal["cluster", "prompt"] = Field(
        "cluster",
        description="What stays on one side of the split: near-duplicates of each other, or rows with one prompt.",
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
    general: list[str] = Field(
        [], description="Text files on which nothing should be forgotten, beside the bundled ones."
    )
    checks: list[str] = Field([], description="Multiple-choice files for the same, beside the bundled ones.")
    safety: list[str] = Field([], description="Files of prompts with `refuse: true|false`, beside the bundled ones.")
    tasks: list[str] = Field([], description="Tasks of lm-evaluation-harness, such as hellaswag (needs the extra).")
    tasks_path: str | None = Field(None, description="Folder with task files of your own for `tasks`.")
    judge_url: str | None = Field(None, description="OpenAI-compatible endpoint that judges answers in pairs.")
    judge_model: str | None = Field(None, description="Model that the endpoint is asked for.")
    judge_key: str | None = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the endpoint's key; null: it takes none."
    )
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
        # Without defaults: a field that a later version adds leaves the digests of earlier recipes as they are.
        return digest_of(self.model_dump(mode="json", exclude_defaults=True))

    @property
    def learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return {"full": 2e-5, "head": 1e-3, "lora+": 5e-5}.get(self.adapter.method, 2e-4)

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
