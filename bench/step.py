"""One configuration of the training step, timed through onlay's own session; what the benchmarks of steps share.

    python bench/step.py '{"shape": "tiny", "device": "cpu", "rows": 2, "tokens": 32}'

A `Case` says what is trained and how.  `measure` makes or loads the base and runs `onlay.training.session.train_adapter` for a
few steps of random tokens: layout, fast paths, loss, recomputation, clipping, optimizer and recovery are those of a run.
Speed and memory do not depend on the weights' values.  The result is printed as JSON behind MARK.

torch is imported by the functions: a peer's library may have to come first.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bases import make_base, wanted_layers

if TYPE_CHECKING:
    from onlay.model.load import Base
    from onlay.recipe import Recipe
    from onlay.records import ModelFacts

MARK = "RESULT "
DRAWN_TOKENS = 256
"""Ids of the random tokens lie below this: every tokenizer has them."""
LENGTHS = Path(__file__).with_name("gsm8k_lengths.json")
"""{tokens: rows} of the 7,473 training rows of GSM8K with the tokenizer of Llama 3."""
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration.  None is the system's own default."""

    name: str = "step"
    system: str = "onlay"
    model: str | None = None
    """Folder of a checkpoint; None: a random base of `shape`, made in memory."""
    shape: str = "8b"
    device: str = "cuda"
    gpus: int = 1
    storage: str = "bf16"
    compute: str = "auto"
    method: str = "lora"
    rank: int = 16
    dropout: float = 0.0
    targets: str = "all-linear"
    precision: str = "fp32"
    """Of the adapter: onlay only."""
    optimizer: str = "adamw"
    """The recipe's word; peers get transformers' name of the same."""
    recompute: str = "auto"
    """auto, none, all or a number of layers; peers: none, all, or offload (Unsloth's)."""
    offload: bool = False
    rows: int = 8
    """Examples in one optimizer step, over all GPUs; packed rows where a peer packs."""
    tokens: int | None = 2048
    """Of each example; None: the lengths of GSM8K."""
    micro_tokens: int | None = None
    """Most tokens in one forward pass; peers: so many rows of `tokens`."""
    pack_tokens: int | None = None
    """Peers: real lengths are packed into rows of so many."""
    limit_gib: float | None = None
    """The allocator's limit: what a smaller GPU would have."""
    steps: int = 4
    warmup: int = 2

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


def tokens_of_rows(case: Case) -> list[list[int]]:
    """Token ids of the examples, in the order of the steps: the same for every system and storage."""
    draw = np.random.default_rng(0)
    lengths = row_lengths(case)
    ids = draw.integers(0, DRAWN_TOKENS, sum(lengths))
    ends = np.cumsum(lengths)
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def row_lengths(case: Case) -> list[int]:
    count = case.rows * case.all_steps
    if case.tokens is not None:
        return [case.tokens] * count
    counts: dict[str, int] = json.loads(LENGTHS.read_text(encoding="utf-8"))
    every = [int(length) for length, rows in counts.items() for _ in range(rows)]
    random.Random(0).shuffle(every)
    if case.pack_tokens is not None:
        # Enough that the last step's rows are full however well they are packed.
        count = int((count + 2) * case.pack_tokens / (sum(every) / len(every)))
    return [every[i % len(every)] for i in range(count)]


# ------------------------------------------------------------------------------------------------- through the session


class Rows:
    """Examples that come in the given order: placed where the session's shuffle will look for them."""

    def __init__(self, rows: list[list[int]], *, batch_size: int) -> None:
        from onlay.training.batches import Batches

        self._rows: list[np.ndarray] = [np.asarray(row, dtype=np.int32) for row in rows]
        batches = Batches(self, batch_size=batch_size, seed=0, plan=_unused, collate=_unused)
        order = np.concatenate([batches.indices(step) for step in range(1, len(rows) // batch_size + 1)])
        placed = dict(zip(order.tolist(), self._rows, strict=True))
        self._rows = [placed[i] for i in range(len(rows))]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self._rows], dtype=np.int32)

    @property
    def trained_counts(self) -> np.ndarray:
        return self.lengths - 1

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        row = self._rows[index]
        return row, np.arange(len(row)) > 0


def _unused(*_: Any) -> Any:
    raise AssertionError("only the order is asked for")


def recipe_of(case: Case) -> Recipe:
    from onlay.recipe import parse_recipe

    training: dict[str, Any] = {
        "optimizer": case.optimizer, "offload_activations": case.offload, "batch_size": case.rows, "max_steps": case.all_steps,
        "recompute": int(case.recompute) if case.recompute.isdigit() else case.recompute, "checkpoint_steps": case.all_steps,
        "micro_batch_tokens": case.micro_tokens,
    }  # fmt: skip
    adapter = {
        "method": case.method, "rank": case.rank, "dropout": case.dropout, "targets": case.targets, "precision": case.precision,
    }  # fmt: skip
    return parse_recipe({
        "model": {"base": case.model or "random", "storage": case.storage, "compute": case.compute},
        "data": {"train": "random"}, "adapter": adapter, "training": training, "evaluation": {"split": None},
    })  # fmt: skip


def get_base(case: Case, recipe: Recipe, device: Any) -> tuple[ModelFacts, Base]:
    """From the checkpoint as `onlay train` reads it, or random."""
    from onlay.hardware import find_hardware
    from onlay.model.facts import read_facts
    from onlay.model.load import load_base

    if case.model is not None:
        facts = read_facts(recipe.model)
        return facts, load_base(facts, recipe.model, find_hardware(), device=device)
    import torch

    from onlay.model.load import Base
    from onlay.model.storage import multiplies_in_fp8
    from onlay.records import ModelFacts

    fp8_products = multiplies_in_fp8(recipe.model, case.storage, on_gpu=device.type == "cuda")
    model = make_base(case.shape, case.storage, fp8_products=fp8_products, device=device.type)
    config = wanted_layers(case.shape)
    facts = ModelFacts(
        name=f"random {case.shape}", path="random", revision=None, licence=None, architecture="LlamaForCausalLM",
        model_type="llama", num_parameters=sum(p.numel() for p in model.parameters()), weight_bytes=0,
        vocabulary_size=config["vocab_size"], context_tokens=config["max_position_embeddings"],
        hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"], linear_shapes={}, weight_fingerprint="random",
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return facts, Base(
        model=model, compute_dtype=dtype, weight_dtype=dtype, attention=str(model.config._attn_implementation),
        storage=case.storage, notes={"storage": f"{case.storage}: random weights"},
    )  # fmt: skip


def measure(case: Case) -> dict[str, Any]:
    """Runs the steps and returns what a row needs.  Raises OnlayError as a run does."""
    recipe = recipe_of(case)
    from onlay.data.pack import collate, plan_micro_batches
    from onlay.model.stack import import_stack
    from onlay.records import Dataset
    from onlay.training.devices import find_devices
    from onlay.training.loop import StepReport
    from onlay.training.session import Parts, train_adapter

    import_stack()
    folder = Path(tempfile.mkdtemp(prefix="step-"))
    devices = find_devices(folder=folder)
    limit_memory(case.limit_gib)
    began = time.perf_counter()
    facts, base = get_base(case, recipe, devices.device)
    loaded = time.perf_counter() - began
    base_gib = allocated_gib()
    steps: list[StepReport] = []
    ends: list[float] = []

    def report(event: Any) -> None:
        if isinstance(event, StepReport):
            steps.append(event)
            ends.append(time.time())
        elif devices.is_main:
            print(event, file=sys.stderr, flush=True)  # Recoveries above all: what a step had to be repeated for.

    dataset = Dataset(
        path="", source="random", source_digest="", format="text", template="", template_digest="", tokenizer_digest="",
        max_tokens=max(row_lengths(case)), stop_token_ids=[], splits={}, findings=[],
    )  # fmt: skip
    parts = Parts(
        recipe=recipe, facts=facts, dataset=dataset, base=base, held_out_examples=None, plan=plan_micro_batches,
        train_examples=Rows(tokens_of_rows(case), batch_size=case.rows), collate=collate, pad_token_id=0,
        folder=Path(devices.agree(str(folder))), devices=devices, report=report, base_weight_digest=lambda: None,
        save_tokenizer=lambda path: None,
    )  # fmt: skip
    try:
        run = train_adapter(parts, resume=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "step_seconds": [step.seconds for step in steps], "step_tokens": [step.tokens for step in steps],
        "losses": [step.loss for step in steps], "load_seconds": loaded, "first_step_at": ends[0],
        "peak_gib": run.peak_memory_bytes / 2**30, "base_gib": base_gib, "notes": run.fast_paths, "versions": versions(),
        "trainable": run.trainable_parameters, **device_facts(),
    }  # fmt: skip


def limit_memory(limit_gib: float | None) -> None:
    """From here on the allocator gives no more than this on the first GPU."""
    import torch

    if limit_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_gib * 2**30 / total)


def allocated_gib() -> float:
    import torch

    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def device_facts() -> dict[str, Any]:
    """The device, the most that the allocator held, and what CUDA takes besides."""
    import torch

    if not torch.cuda.is_available():
        name = f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
        return {"device": name, "reserved_gib": None, "context_gib": None}
    free, total = torch.cuda.mem_get_info()
    return {
        "device": torch.cuda.get_device_name(), "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "context_gib": (total - free - torch.cuda.memory_reserved()) / 2**30,
    }  # fmt: skip


def versions(*more: str) -> dict[str, str]:
    """Of the packages that are there."""
    found: dict[str, str] = {}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a CSV file; columns that the file did not have are empty in its older rows."""
    older: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            older = list(csv.DictReader(file))
    columns = list(dict.fromkeys([*(older[0] if older else ()), *row]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows([*older, row])


def main() -> None:
    from onlay.errors import OnlayError

    case = Case(**json.loads(sys.argv[1]))
    try:
        result = measure(case)
    except OnlayError as error:
        sys.exit(f"{type(error).__name__}: {error.problem}")
    if int(os.environ.get("RANK", "0")) == 0:
        print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
