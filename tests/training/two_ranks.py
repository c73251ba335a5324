"""What two ranks do together: run by test_devices.py under torch.distributed.run; rank 0 writes what it found as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from onlay.model.adapter import attach
from onlay.model.attention import choose_layout
from onlay.recipe import LoraAdapter
from onlay.training import devices as devices_module
from onlay.training.batches import Examples
from onlay.training.devices import Devices, find_devices
from onlay.training.loop import Progress, Task, _gradient
from onlay.training.loss import make_loss
from tests.builders import batches_for, random_examples, shake, tiny_model

CPU = torch.device("cpu")
EXAMPLES = random_examples(9, least=20, most=40)


def summed_gradients(devices: Devices) -> list[list[float]]:
    """Several buckets, two precisions, and a weight that rank 1 did not touch."""
    devices_module.BUCKET_BYTES = 24
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in [(5, torch.float32), (4, torch.float32), (3, torch.float64), (2, torch.float32)]]  # fmt: skip
    for i, parameter in enumerate(parameters):
        if i != 1 or devices.rank == 0:
            parameter.grad = torch.full_like(parameter, 10.0 * i + devices.rank + 1)
    devices.sum_gradients(parameters)
    return [cast(Tensor, parameter.grad).tolist() for parameter in parameters]


def step(
    devices: Devices, *, batch_size: int, fails_over: int | None = None, examples: Examples = EXAMPLES
) -> dict[str, Any]:
    """A step's gradient, summed over ranks.  Rank 1 runs out of memory in micro-batches of more than `fails_over` tokens."""
    model = tiny_model("llama", dtype=torch.float64)
    layout = choose_layout(model, packing="off", device=CPU, compute_dtype=torch.float64)
    adapted, _ = attach(model, LoraAdapter(rank=2), seed=0)
    shake(adapted)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    plain = make_loss(adapted, layout, device=CPU, compute_dtype=torch.float64)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if fails_over is not None and devices.rank == 1 and batch.input_ids.numel() > fails_over:
            raise torch.OutOfMemoryError("out of memory")
        return plain(model, batch)

    task = SimpleNamespace(
        model=adapted, seed=0, optimizer=torch.optim.SGD(trainable), loss=loss, devices=devices, metrics=None,
        report=lambda _event: None, save_memory=lambda _progress: None,
        batches=batches_for(examples, packed=False, batch_size=batch_size, rank=devices.rank, world=devices.world),
    )  # fmt: skip
    progress = Progress(budget_tokens=1000)
    mean = _gradient(cast(Task, task), progress, 1)
    devices.sum_gradients(trainable)
    return {
        "loss": mean,
        "norm": float(torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in trainable])),
        "first": cast(Tensor, trainable[0].grad).flatten().tolist(),
        "recoveries": len(progress.recoveries),
        "budget_tokens": progress.budget_tokens,
    }


def found(devices: Devices) -> dict[str, Any]:
    return {
        "sum": devices.sum(devices.rank + 1.5),
        "largest": devices.largest(7 * devices.rank),
        "gradients": summed_gradients(devices),
        "uneven": step(devices, batch_size=3),
        "fewer_than_ranks": step(devices, batch_size=1),
        "out_of_memory": step(devices, batch_size=9, fails_over=100),
    }


if __name__ == "__main__":
    here = find_devices(folder=Path(sys.argv[1]).parent)
    results = found(here)
    if here.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
