"""Does the fast path train as the ordinary one does, and FP8 as bf16?  The bundled base, 100 steps on real rows, from the same seed.

    python bench/fast_path.py [--gsm8k gsm8k/train.jsonl] [--out bench/results/fast_path.csv] [--steps 100] [--only bf16,nf4]

Each storage is trained on the fast and on the ordinary path: the largest difference of a step's loss, and how far the logits and
the adapter's weights are apart.  Beside that stands how far `allowed` is:

    bf16, nf4            ROUNDINGS times as far as a run of the ordinary path in which each module's result is rounded once more,
                         at random: a block replaces several ops, and rounds elsewhere
    fp8, nf4 in fp8      twice as far as the ordinary path in FP8 is from the products of the same weights in 16 bit; there the
                         distances are of both paths from those products

Then held-out loss, of FP8 against bf16, on the fast path over three seeds: within HELD_OUT_SHARE.  Exits with 1 when
something is farther off.  A row is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from step import append_row
from torch import Tensor, nn

DEMO = Path(__file__).parent.parent / "onlay" / "examples" / "support.jsonl"
STORAGES: dict[str, dict[str, str]] = {
    "bf16": {"storage": "bf16"}, "nf4": {"storage": "nf4"},
    "fp8": {"storage": "fp8", "compute": "fp8"}, "nf4-fp8": {"storage": "nf4", "compute": "fp8"},
}  # fmt: skip
IN_FP8 = ("fp8", "nf4-fp8")
ROUNDINGS = 4.0
HELD_OUT_SHARE = 0.005
SEEDS = (0, 1, 2)
LOGIT_ROWS = 8
Distances = dict[str, float]
Fuse = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    losses: Tensor
    logits: Tensor
    weights: Tensor
    held_out: float
    fused: str
    seconds: float

    def distances(self, other: Result) -> Distances:
        """Of losses the largest of a step, in nats per token; of logits and adapter weights relative to the other's."""
        return {
            "loss": float((self.losses - other.losses).abs().max()),
            "logits": float((self.logits - other.logits).norm() / other.logits.norm()),
            "weights": float((self.weights - other.weights).norm() / other.weights.norm()),
        }


def ordinary(model: nn.Module, **_: Any) -> Any:
    from onlay.model.fuse import Fused

    return Fused()


def rounded(model: Any, *, dtype: torch.dtype, **_: Any) -> Any:
    """The ordinary path, each result off by up to half a unit of its last place."""
    half = torch.finfo(dtype).eps / 2
    draw = torch.Generator(next(model.parameters()).device).manual_seed(0)

    def off(module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        noise = 2 * torch.rand(out.shape, generator=draw, device=out.device) - 1
        return (out.float() * (1 + half * noise)).to(out.dtype)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(off)
    return ordinary(model)


class Trainer:
    """Runs of one set of rows."""

    def __init__(self, rows: dict[str, Any], *, steps: int, folder: Path) -> None:
        self._rows, self._steps, self._folder, self._count = rows, steps, folder, 0

    def run(self, model: dict[str, str], path: Fuse | None = None, *, seed: int = 0) -> Result:
        """path: what stands in place of the session's `fuse`; None: its own."""
        from safetensors.torch import load_file

        from onlay import stages
        from onlay.recipe import parse_recipe
        from onlay.training import session
        from onlay.training.metrics_log import read_metrics

        self._count += 1
        folder = self._folder / str(self._count)
        steps = self._steps
        recipe = parse_recipe({
            "model": {"base": "pocket"} | model, "data": self._rows["data"], "adapter": {"rank": 16},
            "training": self._rows["training"] | {
                "max_steps": steps, "checkpoint_steps": steps, "seed": seed, "output": str(folder),
            },
            "evaluation": {"split": 0.1, "max_rows": 128, "every_steps": steps, "select": "last"},
        })  # fmt: skip
        trained: list[Any] = []
        own = session.fuse

        def fuse(model: Any, **options: Any) -> Any:
            trained.append((model, options["dtype"]))
            return (own if path is None else path)(model, **options)

        session.fuse = fuse
        try:
            run = stages.train(recipe)
        finally:
            session.fuse = own
        assert (run.status, run.steps, run.recoveries) == ("finished", steps, []), run
        assert run.evaluation_loss is not None
        [(adapted, dtype)] = trained
        examples = stages.prepare(recipe).split("train")
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        return Result(
            torch.tensor([e["loss"] for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "step"]).double(),
            logits_of(adapted, [examples.example(i)[0] for i in range(LOGIT_ROWS)], dtype=dtype),
            torch.cat([value.flatten().double() for _, value in sorted(weights.items())]),
            run.evaluation_loss, run.fast_paths["fused"], run.seconds,
        )  # fmt: skip


@torch.no_grad()
def logits_of(model: Any, rows: list[Any], *, dtype: torch.dtype) -> Tensor:
    """(all tokens, V), of what was trained, on the ordinary path."""
    for module in model.modules():
        module._forward_hooks.clear()
    model.eval()
    device = next(model.parameters()).device
    found = []
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for row in rows:
            ids = torch.tensor(row, dtype=torch.int64, device=device)[None]
            found.append(model(input_ids=ids, use_cache=False).logits[0].double().cpu())
    return torch.cat(found)


def compare(trainer: Trainer, name: str, seen: dict[str, Result]) -> dict[str, Any]:
    """One row: the fast path against the ordinary one."""
    section = STORAGES[name]
    fast, plain = trainer.run(section), trainer.run(section, ordinary)
    seen |= {f"{name} fast": fast, f"{name} ordinary": plain}
    if name in IN_FP8:
        # The same weights in 16 bit: rebuilt for each product.
        wide = trainer.run(section | {"compute": "bf16" if torch.cuda.is_available() else "fp32"}, ordinary)
        found, limits, times = fast.distances(wide), plain.distances(wide), 2.0
    else:
        found, limits, times = fast.distances(plain), trainer.run(section, rounded).distances(plain), ROUNDINGS
    allowed = {what: times * limit for what, limit in limits.items()}
    return {
        "what": "fast and ordinary path", "storage": name, "seed": 0, "fused": fast.fused,
        **{f"{what}_distance": f"{value:.3e}" for what, value in found.items()},
        **{f"{what}_allowed": f"{value:.3e}" for what, value in allowed.items()},
        "held_out_loss": f"{fast.held_out:.5f}", "other_held_out_loss": f"{plain.held_out:.5f}",
        "loop_seconds": f"{fast.seconds:.2f}", "other_loop_seconds": f"{plain.seconds:.2f}",
        "passed": all(found[what] <= allowed[what] for what in found),
    }  # fmt: skip


def held_out(trainer: Trainer, name: str, seen: dict[str, Result]) -> dict[str, Any]:
    """One row: held-out loss in FP8 against bf16, both on the fast path, mean over SEEDS.

    Beside it, how far rounding alone moves it: bf16 on the fast against the ordinary path, with one seed.
    """

    def loss(storage: str, seed: int) -> float:
        key = f"{storage} fast" if seed == 0 else f"{storage} fast, seed {seed}"
        if key not in seen:
            seen[key] = trainer.run(STORAGES[storage], seed=seed)
        return seen[key].held_out

    ours, wide = ([loss(storage, seed) for seed in SEEDS] for storage in (name, "bf16"))
    mean, other = sum(ours) / len(ours), sum(wide) / len(wide)
    share = (mean - other) / other
    if "bf16 ordinary" not in seen:
        seen["bf16 ordinary"] = trainer.run(STORAGES["bf16"], ordinary)
    noise = seen["bf16 fast"].held_out / seen["bf16 ordinary"].held_out - 1
    return {
        "what": "held-out loss against bf16", "storage": name, "seed": " ".join(map(str, SEEDS)),
        "held_out_loss": f"{mean:.5f}", "other_held_out_loss": f"{other:.5f}", "share": f"{share:+.4%}",
        "share_allowed": f"{HELD_OUT_SHARE:.2%}", "share_by_rounding": f"{noise:+.4%}",
        "shares": " ".join(f"{(a - b) / b:+.3%}" for a, b in zip(ours, wide, strict=True)), "passed": abs(share) <= HELD_OUT_SHARE,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", type=Path, help="train.jsonl of GSM8K; without it the demo's rows alone")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default=",".join(STORAGES))
    parser.add_argument("--no-demo", action="store_true", help="GSM8K alone")
    parser.add_argument("--commit", default="", help="what is written into the rows")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    sets: dict[str, dict[str, Any]] = {}
    if not arguments.no_demo:
        data = {"train": str(DEMO), "format": "messages"}
        sets["demo"] = {"data": data, "training": {"batch_size": 8, "learning_rate": 3e-3}}
    if arguments.gsm8k is not None:
        data = {"train": str(arguments.gsm8k), "format": "prompt_completion"}
        sets["gsm8k"] = {"data": data, "training": {"batch_size": 16, "learning_rate": 1e-3}}
    cuda = torch.cuda.is_available()
    same = {
        "commit": arguments.commit, "device": torch.cuda.get_device_name(0) if cuda else f"CPU, {platform.machine()}",
        "steps": arguments.steps, "torch": version("torch"), "transformers": version("transformers"), "peft": version("peft"),
    }  # fmt: skip
    began = time.perf_counter()
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        for label, rows in sets.items():
            trainer = Trainer(rows, steps=arguments.steps, folder=Path(folder) / label)
            seen: dict[str, Result] = {}
            jobs = [(compare, name) for name in names]
            jobs += [(held_out, name) for name in names if name in IN_FP8]
            for job, name in jobs:
                row = {"data": label} | job(trainer, name, seen)
                passed = passed and row["passed"]
                print(
                    f"{time.perf_counter() - began:6.1f} s  " + ", ".join(f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
                if arguments.out is not None:
                    append_row(arguments.out, row | same)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
