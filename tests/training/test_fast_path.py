"""Fast and ordinary path from the same seed, through the real session: they differ as much as rounding does.

How much that is, is measured: runs of the ordinary path in which each module's result is rounded once more, at random, to the
precision of the work.  The fast path rounds elsewhere, and so it may depart from the ordinary one as far as those do.  bench/fast_path.py does the same with a real base
and real rows, over 100 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onlay.model.fuse import Fused, fuse
from onlay.training import session
from tests.training.conftest import Workshop

STEPS = 25
CONTROLS = 2
ROUNDINGS = 4.0
"""Of a block, where a module of the ordinary path has one: so many times as far off as the farthest control it may be."""
IDS = torch.arange(65, 77)[None]
SECTIONS: dict[str, dict[str, str]] = {
    "fp32": {"compute": "fp32"},
    "bf16": {"compute": "bf16"},
    "nf4": {"storage": "nf4"},
    "fp8": {"storage": "fp8"},
    "fp8 products": {"storage": "fp8", "compute": "fp8"},
    "fp8 products of nf4": {"storage": "nf4", "compute": "fp8"},
}
TWINS = {"fp8 products": "fp8", "fp8 products of nf4": "nf4"}
Fuse = Callable[..., Fused]


@dataclass(frozen=True)
class Result:
    losses: Tensor
    logits: Tensor
    weights: Tensor
    notes: dict[str, str]

    def distances(self, other: Result) -> dict[str, float]:
        """Of losses the largest of a step; of logits and adapter weights relative to the other's."""
        return {
            "losses": float((self.losses - other.losses).abs().max()),
            "logits": float((self.logits - other.logits).norm() / other.logits.norm()),
            "weights": float((self.weights - other.weights).norm() / other.weights.norm()),
        }


def ordinary(model: nn.Module, **_: Any) -> Fused:
    return Fused()


def rounding(seed: int, *, times: float = 1.0) -> Fuse:
    """The ordinary path, each result off by up to half a unit of its last place, `times` so much."""

    def put(model: Any, *, dtype: torch.dtype, **_: Any) -> Fused:
        draw = torch.Generator().manual_seed(seed)
        half = times * torch.finfo(dtype).eps / 2

        def off(module: nn.Module, args: Any, out: Any) -> Any:
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return out
            noise = 2 * torch.rand(out.shape, generator=draw) - 1
            return (out.float() * (1 + half * noise)).to(out.dtype)

        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(off)
        return Fused()

    return put


@pytest.fixture(scope="module")
def result_of(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[[str, str, Fuse], Result]:
    """A run with a fuse of its own, of a section of SECTIONS; each made once."""
    workshop = Workshop(tmp_path_factory.mktemp("runs"), tiny_base)
    done: dict[tuple[str, str], Result] = {}

    def result(section: str, name: str, path: Fuse) -> Result:
        if (section, name) not in done:
            done[section, name] = _run(workshop, f"{section}, {name}", SECTIONS[section], path)
        return done[section, name]

    return result


def _run(workshop: Workshop, name: str, section: dict[str, str], path: Fuse) -> Result:
    models: list[nn.Module] = []
    recipe = workshop.recipe(
        model=section, training={"max_steps": STEPS, "checkpoint_steps": STEPS}, evaluation={"select": "last", "every_steps": STEPS},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "fuse", path)
        run = workshop.train(name, recipe, change=lambda task: models.append(task.model) or task)
    assert (run.status, run.steps, run.recoveries) == ("finished", STEPS, [])
    for module in models[0].modules():
        module._forward_hooks.clear()
    losses = workshop.losses(name)
    with torch.no_grad():
        logits = models[0].eval()(input_ids=IDS, use_cache=False).logits
    weights = torch.cat([value.flatten() for _, value in sorted(workshop.weights(name).items())])
    return Result(
        torch.tensor([losses[step] for step in range(1, STEPS + 1)]).double(), logits.double(), weights.double(), run.fast_paths,
    )  # fmt: skip


def test_a_run_takes_the_fast_path_without_being_asked(result_of: Callable[[str, str, Fuse], Result]) -> None:
    for section in SECTIONS:
        notes = result_of(section, "fast", fuse).notes
        assert notes["fused"].startswith("2 attentions, 2 MLPs")
        assert "ordinary" not in notes
        assert result_of(section, "ordinary", ordinary).notes["fused"] == "nothing"


@pytest.mark.parametrize("section", [section for section in SECTIONS if section not in TWINS])
def test_they_differ_by_rounding(section: str, result_of: Callable[[str, str, Fuse], Result]) -> None:
    plain = result_of(section, "ordinary", ordinary)
    assert plain.losses[-1] < 0.5 * plain.losses[0], "it learned, and rounding had its effect on what comes after"
    found = result_of(section, "fast", fuse).distances(plain)
    controls = [result_of(section, f"rounded {seed}", rounding(seed)).distances(plain) for seed in range(CONTROLS)]
    for what, distance in found.items():
        assert 0 < distance <= ROUNDINGS * max(control[what] for control in controls), what


@pytest.mark.parametrize("section", TWINS)
def test_in_fp8_they_differ_by_its_rounding(section: str, result_of: Callable[[str, str, Fuse], Result]) -> None:
    """Both are off from the products of the same weights in float32; the fast path by at most twice as much.

    It quantizes the gradients of layers that share an input together, so that it rounds to FP8 elsewhere.
    """
    wide = result_of(TWINS[section], "ordinary", ordinary)
    found, own = (
        result_of(section, name, path).distances(wide) for name, path in (("fast", fuse), ("ordinary", ordinary))
    )
    for what in found:
        assert 0 < found[what] <= 2 * own[what], what


def test_a_path_that_rounds_more_coarsely_would_be_seen(result_of: Callable[[str, str, Fuse], Result]) -> None:
    """What the tests above would find."""
    plain = result_of("fp32", "ordinary", ordinary)
    coarse = result_of("fp32", "coarse", rounding(0, times=100.0)).distances(plain)
    controls = [result_of("fp32", f"rounded {seed}", rounding(seed)).distances(plain) for seed in range(CONTROLS)]
    for what, distance in coarse.items():
        assert distance > ROUNDINGS * max(control[what] for control in controls), what
