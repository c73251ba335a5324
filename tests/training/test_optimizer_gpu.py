"""Paged optimizers on a GPU: their state is paged, and is so again after a checkpoint or a good state was gone back to.

Run by hand where there is one: pytest tests/training/test_optimizer_gpu.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onlay.training.checkpoint import Checkpoints
from onlay.training.optimizer import hold, make_optimizer
from onlay.training.watch import Snapshots, restore
from tests.builders import recipe_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


class Weights:
    """Of more than 100,000 values, which is when state is paged; of a few thousand; and a vector."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        pytest.importorskip("bitsandbytes")
        generator = torch.Generator().manual_seed(7)
        shapes = {"large": (512, 400), "middle": (64, 128), "vector": (6,)}
        self.named = {n: nn.Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for n, s in shapes.items()}
        self.optimizer: Any = make_optimizer(self.named, recipe_for("b", "d", training={"optimizer": kind}))
        self.updates = 0

    def update(self, times: int) -> Weights:
        for _ in range(times):
            self.updates += 1
            generator = torch.Generator().manual_seed(self.updates)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2
            for parameter in self.named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            self.optimizer.step()
        return self

    @property
    def paged(self) -> set[str]:
        names = {id(p): name for name, p in self.named.items()}
        return {
            names[id(p)]
            for p, state in self.optimizer.state.items()
            for value in state.values()
            if isinstance(value, torch.Tensor) and getattr(value, "is_paged", False)
        }

    def assert_same(self, other: Weights) -> None:
        assert all(torch.equal(self.named[name], other.named[name]) for name in self.named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_bit_by_bit_and_paged(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    whole, first, second = Weights(kind, dtype).update(7), Weights(kind, dtype).update(3), Weights(kind, dtype)
    paged = {"large"} if kind.startswith("paged") else set()
    assert whole.paged == paged
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, trainable=first.named, optimizer=first.optimizer, progress={}, best_step=None)
    checkpoints.load(3, trainable=second.named, optimizer=second.optimizer)
    assert second.paged == paged
    second.updates = 3
    second.update(4).assert_same(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_state_is_gone_back_to_in_the_same_memory(kind: str) -> None:
    weights, expected = Weights(kind).update(3), Weights(kind).update(6)
    snapshots = Snapshots(every_steps=1)
    snapshots.take(3, trainable=weights.named, optimizer=weights.optimizer, state={})
    paged = weights.paged
    addresses = [s["state1"].data_ptr() for s in weights.optimizer.state.values()] if paged else []
    for _ in range(2):
        weights.update(5)
        snapshot = snapshots.before(3)
        assert snapshot is not None
        restore(snapshot, trainable=weights.named, optimizer=weights.optimizer)
        weights.updates = 3
        weights.update(3).assert_same(expected)
        assert weights.paged == paged
        if paged:
            assert [s["state1"].data_ptr() for s in weights.optimizer.state.values()] == addresses


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_moves_as_adamw_and_holds_what_is_held(kind: str) -> None:
    exact, found = Weights("adamw").update(20), Weights(kind)
    start = found.named["large"].detach().clone()
    held = found.named["middle"]
    value = held.detach()[:, :3].clone()
    hold(found.optimizer, {held: ((slice(None), slice(0, 3)), value)})
    found.update(20)
    moved = exact.named["large"] - start
    assert (found.named["large"] - exact.named["large"]).norm() < 0.1 * moved.norm()
    assert torch.equal(held[:, :3], value)
