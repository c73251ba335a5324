"""The records that stages hand to each other: frozen, with a digest, JSON both ways.

Each holds in `sources` the digests of what it was made from, so the chain behind any result can be printed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from onlay.errors import OutputError
from onlay.recipe import digest_of


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]
    elsewhere: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where something lies, not what it is: not part of the digest."""
    sources: dict[str, str] = {}
    """Kind of each record (or file) this one was made from, and its digest."""

    @property
    def digest(self) -> str:
        # Without defaults: a field that a later version adds leaves the digests of earlier records as they are.
        return digest_of(self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.elsewhere)))

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def save(self, folder: Path) -> Path:
        """Writes `folder/<kind>.json`, whole or not at all."""
        path = folder / f"{self.kind}.json"
        write_whole(path, self.to_json())
        return path

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `folder/<kind>.json`.  Raises OutputError when it is not there or not this record."""
        path = Path(folder) / f"{cls.kind}.json"
        if not path.is_file():
            raise OutputError(f"{path} does not exist.", "Give a run folder made by onlay; `onlay log` lists them.")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise OutputError(
                f"{path} is not a {cls.kind} record: {field}: {first['msg']}.", "Was it edited?"
            ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves either the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # Where a folder of the path is a file, not even this can be asked.
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} could not be written: {error.strerror}.", "Free disk space, or choose another folder."
        ) from None


class ModelFacts(Record):
    """A base model, read from config.json and safetensors headers alone; no weights are loaded."""

    kind: ClassVar[str] = "model"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"path"})
    name: str
    """As the user wrote it."""
    path: str
    """Local folder that holds the files."""
    revision: str | None
    """Commit on the hub; None for a local folder."""
    licence: str | None
    architecture: str
    """First entry of `architectures` in config.json, such as LlamaForCausalLM."""
    model_type: str
    num_parameters: int
    weight_bytes: int
    vocabulary_size: int
    context_tokens: int | None
    """Longest sequence by the config; None where the architecture has no limit."""
    hidden_size: int
    num_layers: int
    linear_shapes: dict[str, tuple[int, int]]
    """Checkpoint name of each two-dimensional weight (without `.weight`) to (outputs O, inputs I); embeddings left out."""
    weight_fingerprint: str
    """Digest of the safetensors headers and a fixed sample of every tensor (under 64 MiB read)."""


class SplitFacts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int
    """Rows of the sources that have examples in this split."""
    examples: int
    """Token sequences; more than rows where text was split or rows repeat."""
    tokens: int
    trained_tokens: int
    longest_tokens: int


Severity = Literal["error", "warning", "note"]
"""error: not to be trained on as it is; warning: look at it; note: worth knowing."""


class RowAt(BaseModel):
    """Where a row is: the line of a JSONL or CSV file, the 1-based position elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    row: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.row}"


class Finding(BaseModel):
    """Something about the data worth telling: counted, with the first few rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    code: str
    """Such as overlong_dropped, masked_turns, duplicates_exact."""
    severity: Severity = "note"
    count: int
    """Of rows, unless the message names another unit."""
    message: str
    rows: list[RowAt] = []
    """The first few."""
    remedy: str = ""
    """What to do about it; empty where nothing needs doing."""


class Distribution(BaseModel):
    """Of one number over all rows: a histogram and its summary."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    """Such as prompt_characters, answer_tokens, trained_share, cluster_rows."""
    unit: str
    count: int
    least: float
    p05: float
    median: float
    mean: float
    p95: float
    most: float
    edges: list[float]
    """Of the bars, one more than `counts`."""
    counts: list[int]


class Group(BaseModel):
    """Rows that belong together, with their texts side by side: a cluster of duplicates, one prompt with several answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    code: str
    """Of the finding that it is an example of."""
    count: int
    """Rows in the group; `rows` and `texts` hold the first few."""
    prompt: str = ""
    rows: list[RowAt]
    texts: list[str]


class AuditedFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    digest: str
    """SHA-256 of its bytes; of the fingerprint for a hub data set."""
    format: str
    rows: int
    """Readable ones."""
    unreadable: int
    role: Literal["train", "evaluation", "benchmark"]


class Audit(Record):
    """What is wrong with data, where, how bad, and what to do."""

    kind: ClassVar[str] = "audit"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"seconds"})
    files: list[AuditedFile]
    rows: int
    """Readable training rows."""
    unreadable: int
    base: str | None = None
    """Whose tokenizer and template counted tokens; None: nothing was tokenized."""
    tokens: int | None = None
    trained_tokens: int | None = None
    findings: list[Finding]
    """Errors first, then warnings, then notes."""
    distributions: list[Distribution] = []
    shares: dict[str, dict[str, int]] = {}
    """Counts by value: domains, scripts, roles, openings, personal_data (occurrences by type), severities."""
    measures: dict[str, float] = {}
    """Single numbers, such as domain_entropy_bits, near_threshold, duplicate_share."""
    groups: list[Group] = []
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Nothing at level error, and every row could be read."""
        return not self.unreadable and all(finding.severity != "error" for finding in self.findings)


class Dataset(Record):
    """Prepared token sequences on disk, and what was found on the way."""

    kind: ClassVar[str] = "dataset"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"path"})
    path: str
    """Folder with <split>.tokens.npy and the like; see onlay/data/build.py."""
    source: str
    source_digest: str
    format: str
    template: str
    """Name of the chat template: `base`, a named one, or a file."""
    template_digest: str
    tokenizer_digest: str
    max_tokens: int
    stop_token_ids: list[int]
    """Tokens that end an answer; trained at the end of every assistant turn."""
    labels: list[str] = []
    """Method head: the training rows' labels, sorted; a label's number is its place."""
    splits: dict[str, SplitFacts]
    findings: list[Finding]


class PlannedMemory(BaseModel):
    """Bytes on one GPU at the peak of an optimizer step.  The components sum to `peak_bytes`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    peak_bytes: int
    """Likely; what torch's allocator gives at most."""
    low_bytes: int
    high_bytes: int
    needed_bytes: int
    """Of the GPU: the high end and CUDA's own."""
    device_bytes: int
    """What the GPU has."""
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    loss_bytes: int
    working_bytes: int


class PlannedTime(BaseModel):
    """Seconds of a whole run; `training`, `evaluation` and `loading` sum to `seconds`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float
    """Likely."""
    low_seconds: float
    high_seconds: float
    training_seconds: float
    evaluation_seconds: float
    loading_seconds: float
    steps: int
    step_seconds: float
    tokens: int
    """Of all steps."""
    tokens_per_second: float
    """While training, over all GPUs."""
    flops_per_token: float
    verified: bool
    """The speed of this kind of GPU was measured."""


class PlannedCost(BaseModel):
    """USD of a whole run, by the cheapest and the dearest dated offer; None where there is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    usd: float | None
    """On demand, at the cheapest."""
    most_usd: float | None
    spot_usd: float | None
    usd_per_hour: float | None
    provider: str | None
    date: str | None
    source: str | None
    notes: list[str]


class PlannedParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    trainable: int
    total: int
    """Base and adapter."""


class PlannedSettings(BaseModel):
    """What a run takes over from its plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    storage: str
    compute: str
    optimizer: str
    offload_activations: bool
    micro_batch_tokens: int
    levels: list[str]
    """Of each layer, what it keeps for the backward pass: none is recomputed, mlp, blocks, layer, tiles."""
    recompute: str
    """The levels in words."""
    fast_path: bool


class PlannedRung(BaseModel):
    """One step of the ladder: a setting that was tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    setting: str
    """In words."""
    needed_bytes: int
    tokens_per_second: float | None
    """None where it does not fit."""
    verdict: Literal["chosen", "slower", "does not fit", "not unasked"]
    reason: str


class PlannedDecision(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    what: str
    """Such as model.storage."""
    chosen: str
    why: str
    rejected: list[str] = []


class Plan(Record):
    """What a run will take, before it runs: memory, time and cost, and the settings that make it fit."""

    kind: ClassVar[str] = "plan"
    base: str
    gpu: str | None
    gpus: int
    rows: int
    """That train."""
    mean_tokens: float
    data: str
    """Where rows and lengths come from, in words."""
    parameters: PlannedParameters
    memory: PlannedMemory
    time: PlannedTime
    cost: PlannedCost
    settings: PlannedSettings
    decisions: list[PlannedDecision]
    rungs: list[PlannedRung]
    refused: str | None = None
    """What the recipe asks for and does not fit; the plan is then the nearest that does."""
    notes: list[str] = []


class ForecastCheck(BaseModel):
    """What was forecast beside what was measured, of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    planned_peak_bytes: int
    peak_bytes: int | None
    planned_step_seconds: float
    step_seconds: float | None
    """Median of the steps after the first ones; None for a run that was too short."""
    planned_training_seconds: float
    corrected_training_seconds: float | None
    """As forecast anew after the first steps."""
    training_seconds: float | None
    """None for a run that did not finish."""


class Recovery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    reason: str
    """out_of_memory, not_finite or loss_spike."""
    detail: str
    action: str


class Checkpoint(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    path: str


class Run(Record):
    """One training run: what came out, how, and what was proven about it."""

    kind: ClassVar[str] = "run"
    path: str
    method: str = "lora"
    """adapter.method: lora leaves adapter/ in the folder, full leaves model/."""
    storage: str = "bf16"
    """How the base was kept: bf16 (not quantized), nf4, int8, fp8; what `auto` came to."""
    status: str
    """running, finished, interrupted, failed."""
    started: str
    """UTC, ISO 8601."""
    seconds: float
    """Wall clock of the training loop, over all resumptions."""
    steps: int
    total_steps: int
    examples: int
    trained_tokens: int
    first_loss: float | None = None
    last_loss: float | None = None
    """Mean over the last tenth of the steps, nats per trained token."""
    base_evaluation_loss: float | None = None
    """Before the first step, on the held-out rows."""
    evaluation_loss: float | None = None
    """Of the adapter that was kept."""
    scores: dict[str, float] = {}
    """Method head, over all held-out rows: rows, accuracy, majority_accuracy, macro_f1 of the weights that were kept."""
    trainable_parameters: int = 0
    selected_step: int | None = None
    """Step whose weights are in adapter/."""
    checkpoints: list[Checkpoint] = []
    recoveries: list[Recovery] = []
    fast_paths: dict[str, str] = {}
    """What was used; where one was not, the reason."""
    proofs: dict[str, Any] = {}
    environment: dict[str, str] = {}
    peak_memory_bytes: int | None = None
    forecast: ForecastCheck | None = None
    """None where nothing was planned, as on a CPU."""
    base_weight_digest: str | None = None
    """Full SHA-256 over the base's safetensors files; computed beside training."""
    error: str | None = None


class MergeCheck(BaseModel):
    """A merged model compared with base and adapter as they were trained, at trained tokens of the run's rows.

    A number that is not finite, which JSON does not have, is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    into: str
    """original or quantized: the weights that the adapter was merged into."""
    split: str
    """evaluation, or train for a run without held-out rows."""
    rows: int
    tokens: int
    max_logit_difference: float | None
    mean_logit_difference: float | None
    """Mean of the absolute differences, over the whole vocabulary."""
    top1_agreement: float
    """Share of the tokens at which both find the same one likeliest."""
    perplexity: dict[str, float | None]
    """exp(nats per trained token) of `adapter`, `merged` and `base`."""
    base_mean_logit_difference: float | None
    """Between the merged model and the weights that it was merged into."""
    proven_max_difference: float | None
    """Like max_logit_difference, but to the adapter on the very weights that it was merged into; another number only when
    a run on a quantized base is merged into the original weights."""
    proven_mean_difference: float | None
    rounding_max_difference: float | None
    """What rounding does to the logits: of the changed weights to the files' dtype, of the adapter to that of the work."""
    rounding_mean_difference: float | None
    limit: float | None
    """Largest mean difference (proven_mean_difference) that rounding explains; --max-difference: of max_logit_difference."""
    passed: bool
    reason: str | None = None
    """Why it did not pass."""

    def told(self) -> dict[str, str]:
        """What to show of it: label to number, for a table."""
        numbers = {
            "largest logit difference": self.max_logit_difference,
            "mean logit difference": self.mean_logit_difference,
            "mean by rounding alone": self.rounding_mean_difference,
            "perplexity, base and adapter": self.perplexity["adapter"],
            "perplexity, merged": self.perplexity["merged"],
        }
        return {
            "rows compared": f"{self.rows:,} ({self.split})",
            "tokens compared": f"{self.tokens:,}",
            **{label: "not finite" if value is None else f"{value:.4g}" for label, value in numbers.items()},
            "same likeliest token": f"{self.top1_agreement:.2%}",
            "proven": "yes" if self.passed else f"no: {self.reason}",
        }


class Merge(Record):
    """A base with an adapter merged into it, as a plain transformers model, and what was proven about it."""

    kind: ClassVar[str] = "merge"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"path"})
    path: str
    status: str
    """merged, or rejected: the folder then has another name than was asked for."""
    base: str
    base_revision: str | None
    method: str
    storage: str
    """How the base was kept in training: bf16 (not quantized), nf4, int8, fp8."""
    into: str
    seconds: float
    weight_bytes: int
    changed_tensors: int
    """Stored tensors that merging changed; all others are byte for byte the base's."""
    verification: MergeCheck
    candidates: dict[str, MergeCheck] = {}
    """Every choice of weights that was measured; more than one for a run on a quantized base."""
    error: str | None = None


class Comparison(BaseModel):
    """One score of two systems on the same rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    score: str
    system: str
    against: str
    """Another system, such as base, prompt, few-shot, live."""
    rows: int
    value: float
    other: float
    difference: float
    """value - other, in the score's own unit."""
    low: float
    high: float
    """95 % interval of the difference: paired bootstrap over the rows."""
    p_value: float
    """Two-sided: exact McNemar for yes/no scores, otherwise paired approximate randomization."""
    higher_is_better: bool
    verdict: str
    """In words, such as `better by 12.4 points, 95 % 9.1 to 15.8`."""


class Likelihood(BaseModel):
    """How likely a system finds a text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    """held_out (trained tokens only), general, or a file's name."""
    system: str
    rows: int
    tokens: int
    bytes: int
    """UTF-8 bytes of what was scored."""
    nats_per_token: float
    perplexity: float
    """exp(nats_per_token)."""
    bits_per_byte: float


class Gate(BaseModel):
    """One condition of evaluation.gates, and what was found."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    limit: float
    found: float | None
    """None: not measured, which does not pass."""
    passed: bool
    reason: str


class Judged(BaseModel):
    """Pairwise judgements.  A model is asked each pair in both orders, and a disagreement between them is a tie."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    judge: str
    system: str
    against: str
    rows: int
    wins: int
    losses: int
    ties: int
    consistency: float | None
    """Share of the pairs on which both orders agreed; None: no pair was asked in both (a person is asked once)."""
    first_slot_wins: float | None
    """Share of decided judgements won by the answer shown first; 0.5 is fair; None: nothing was decided."""
    unreadable: int
    """Judgements that named no winner, counted as ties."""
    p_value: float
    """Exact two-sided sign test of wins against losses."""


class SeedGain(BaseModel):
    """A score's gain over runs that differ in nothing but the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    score: str
    against: str
    gains: dict[str, float]
    """Seed to gain, in the score's own unit."""
    mean: float
    standard_error: float
    low: float
    high: float
    """95 %, Student's t over the seeds."""
    p_value: float
    verdict: str


class Report(Record):
    """What an evaluation found: whether to ship, against what, at what risk."""

    kind: ClassVar[str] = "report"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"path"})
    path: str
    """Folder with report.json, report.html, answers.jsonl and failures.jsonl."""
    system: str
    """The one that is judged."""
    systems: dict[str, str]
    """Name to what it is: a path, `the base with the recipe's prompt`, ..."""
    base: str
    base_revision: str | None
    data: str
    data_digest: str
    rows: int
    """Rows answered by every system."""
    left_out: dict[str, int] = {}
    """Why to how many rows were not asked."""
    scores: dict[str, dict[str, float | None]]
    """System to score to value; None where no row has what the score needs."""
    comparisons: list[Comparison]
    """Task scores of `system` against every other."""
    smallest_difference: dict[str, float]
    """Per score: the least true difference that these rows would show in four trials of five."""
    likelihood: list[Likelihood]
    forgetting: list[Comparison]
    """General text (nats_per_token) and general checks (accuracy), against the base."""
    safety: list[Comparison]
    """refused_harmful, refused_harmless, against the base."""
    judged: list[Judged]
    seeds: list[SeedGain] = []
    latency_ms: float | None = None
    """Milliseconds a generated token of `system`, one row at a time; measured where a gate asks for it."""
    gates: list[Gate]
    gate_edits: list[str] = []
    """What was changed in evaluation.gates after training began; the gates are those from before."""
    verdict: str
    """ship, do not ship, or no gates."""
    reasons: list[str]
    """Sentences for a team lead: what decided."""
    risks: list[str]
    failures: int
    """Rows in failures.jsonl."""
    likely_causes: list[str]
    """Of repetition or answers that never stop, in order, with the evidence; empty when neither is a problem."""
    notes: dict[str, str] = {}
    """How it was done where there was a choice: how rows were batched, how logits were computed."""
    seconds: float
    environment: dict[str, str]


class AdapterVersion(Record):
    """One immutable version of an adapter.  Two with the same digest are the same content, whatever they are called."""

    kind: ClassVar[str] = "version"
    elsewhere: ClassVar[frozenset[str]] = frozenset(
        {"name", "version", "path", "origin", "registered_at", "registered_by"}
    )
    name: str = ""
    """Empty in the manifest of a version folder, which knows its content only."""
    version: int = 0
    path: str = ""
    """Folder with the files; adapter_config.json and the weights lie at its top."""
    origin: str = ""
    """Run folder or pushed folder that it was registered from."""
    registered_at: str = ""
    """UTC, ISO 8601."""
    registered_by: str = ""
    """user@host."""
    method: str
    files: dict[str, str]
    """Path in the folder to the SHA-256 of the file."""
    weight_digest: str
    """SHA-256 of the weights' file."""
    rank: int | None
    """Of the adapter; None for a classification head."""
    base: str
    base_revision: str | None
    base_weight_fingerprint: str
    storage: str
    """How the base was kept in training: bf16 (not quantized), nf4, int8, fp8."""
    tokenizer_digest: str
    template_digest: str
    evaluation_loss: float | None
    """Nats per trained token on the run's held-out rows."""
    scores: dict[str, float | None]
    """Of the Report's judged system; empty without a Report."""
    gates: list[Gate]
    verdict: str | None
    """The Report's: ship, do not ship, no gates.  None without a Report."""

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


RECORDS: dict[str, type[Record]] = {
    record.kind: record for record in (ModelFacts, Audit, Dataset, Plan, Run, Merge, Report, AdapterVersion)
}
