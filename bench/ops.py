"""Each op of the training step on a GPU: milliseconds of its kernel, of its plain torch form, and of its floor.

    python bench/ops.py [--ops gated rotate ...] [--tokens 16384] [--out bench/results/kernels.csv]
    python bench/ops.py --tiny      small shapes on a CPU, to try the script: the plain forms alone run there

Shapes are those of an 8B base in bf16: D = 4096, I = 14336, 32 and 8 heads of 128, rank 16, 128,256 classes.  An op's floor is
what it must read and write once over the speed of a copy on this GPU, or its products over that of a large bf16 product, both
measured in the same run; `share_of_floor` is floor / onlay.  The loss is also that of Liger and of cut-cross-entropy, where they
are installed.  Medians; inputs that an op overwrites are made again before each repetition, outside of what is timed.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels import chunked_loss, fp8, fp8_rows, gated, normalise, residual, rotate, softmax_gradient
from onlay.kernels.updates import Update

REPEATS = 15
PEERS = {"liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy"}
"""Column of the table -> package."""
VERSIONS = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
NUMBER = 2
"""Bytes of a bf16 number."""
Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    tokens: int = 16384
    width: int = 4096
    mlp: int = 14336
    queries: int = 32
    groups: int = 8
    head: int = 128
    rank: int = 16
    classes: int = 128256
    chunk: int = 2048
    """Tokens whose logits exist at a time."""


TINY = Sizes(tokens=24, width=32, mlp=48, queries=2, groups=1, head=16, rank=2, classes=99, chunk=8)


@dataclass(kw_only=True)
class Op:
    name: str
    onlay: Work
    eager: Work
    bytes: int
    flops: int = 0
    before: Work = lambda: None
    """Makes again what the op overwrites."""
    peers: dict[str, Work] = field(default_factory=dict)


class Maker:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

    def update(self, tokens: int, rank: int, width: int) -> Update:
        return Update(hidden=self(tokens, rank), b=self(rank, width, scale=rank**-0.5))


def norms(make: Maker, s: Sizes) -> Iterator[Op]:
    x, weight, grad, around = make(s.tokens, s.width), make(s.width), make(s.tokens, s.width), make(s.tokens, s.width)
    given: dict[str, Any] = {"eps": 1e-5, "offset": 0.0}
    r = normalise.reference_normalise(x, weight, **given, plain=True, quantize=False).r
    row = s.tokens * s.width
    for name, quantize, written in (("normalise", False, NUMBER), ("normalise_fp8", True, NUMBER + 1)):
        yield Op(
            name=name, bytes=row * (NUMBER + written),
            onlay=lambda quantize=quantize: normalise.normalise(x, weight, **given, quantize=quantize),
            eager=lambda quantize=quantize: normalise.reference_normalise(x, weight, **given, plain=True, quantize=quantize),
        )  # fmt: skip
    # Queries, keys and values share their input: three adapters' gradients come at once.
    for rank in (0, s.rank, 3 * s.rank):
        more: dict[str, Any] = {"residual": around, "update": make.update(s.tokens, rank, s.width) if rank else None}
        yield Op(
            name=f"normalise_backward_rank_{rank}", bytes=row * 4 * NUMBER + rank * (s.tokens + s.width) * NUMBER,
            onlay=lambda more=more: normalise.normalise_backward(grad, x, weight, r, **more),
            eager=lambda more=more: normalise.reference_normalise_backward(grad, x, weight, r, offset=0.0, **more),
            before=lambda: grad.normal_(),
        )  # fmt: skip


def mlps(make: Maker, s: Sizes) -> Iterator[Op]:
    both, grad = make(s.tokens, 2 * s.mlp), make(s.tokens, s.mlp)
    gate, up = both.chunk(2, 1)
    given: dict[str, Any] = {
        "activation": "silu", "gate_update": make.update(s.tokens, s.rank, s.mlp), "up_update": make.update(s.tokens, s.rank, s.mlp),
    }  # fmt: skip
    later = make.update(s.tokens, s.rank, s.mlp)
    row = s.tokens * s.mlp * NUMBER
    yield Op(
        name="gated", bytes=3 * row,
        onlay=lambda: gated.gated(gate, up, **given), eager=lambda: gated.reference_gated(gate, up, **given),
    )  # fmt: skip
    yield Op(
        name="gated_backward", bytes=6 * row,
        onlay=lambda: gated.gated_backward(gate, up, grad, grad_update=later, **given),
        eager=lambda: gated.reference_gated_backward(gate, up, grad, grad_update=later, **given),
        before=lambda: (both.normal_(), grad.normal_()),
    )  # fmt: skip


def heads(make: Maker, s: Sizes) -> Iterator[Op]:
    cos, sin = make(s.tokens, s.head).cos(), make(s.tokens, s.head).sin()
    for name, norm in (("rotate", None), ("rotate_normed", make(s.head))):
        form = rotate.Heads(queries=s.queries, groups=s.groups, width=s.head, q_norm=norm, k_norm=norm, eps=1e-6)
        y = make(s.tokens, sum(form.sizes))
        updates = tuple(make.update(s.tokens, s.rank, size) for size in form.sizes)
        once = rotate.rotate(y, cos, sin, heads=form, updates=updates)
        grads = tuple(torch.randn_like(part) for part in (once.q, once.k, once.v))
        kept: dict[str, Any] = {"y": y, "r": once.r, "updates": updates}
        if norm is None:
            kept = {"y": None, "r": None, "updates": (None, None, None)}
        size = NUMBER * (2 * y.numel() + 2 * cos.numel())
        yield Op(
            name=name, bytes=size,
            onlay=lambda form=form, y=y, updates=updates: rotate.rotate(y, cos, sin, heads=form, updates=updates),
            eager=lambda form=form, y=y, updates=updates: rotate.reference_rotate(y, cos, sin, heads=form, updates=updates),
        )  # fmt: skip
        yield Op(
            name=f"{name}_backward", bytes=size + (NUMBER * (s.queries + s.groups) * s.head * s.tokens if norm is not None else 0),
            onlay=lambda form=form, grads=grads, kept=kept: rotate.rotate_backward(*grads, cos, sin, heads=form, **kept),
            eager=lambda form=form, grads=grads, kept=kept: rotate.reference_rotate_backward(
                *grads, cos, sin, heads=form, **kept
            ),
        )  # fmt: skip


def residuals(make: Maker, s: Sizes) -> Iterator[Op]:
    y, x, update = make(s.tokens, s.width), make(s.tokens, s.width), make.update(s.tokens, s.rank, s.width)
    row = s.tokens * s.width * NUMBER
    yield Op(
        name="add_update", bytes=3 * row, before=lambda: y.normal_(),
        onlay=lambda: residual.add_update(y, update=update, residual=x),
        eager=lambda: residual.reference_add_update(y, update=update, residual=x),
    )  # fmt: skip
    yield Op(
        name="drop_rows", bytes=2 * row, onlay=lambda: residual.drop_rows(x, seed=7, p=0.05),
        eager=lambda: functional.dropout(x, 0.05),
    )  # fmt: skip
    yield Op(
        name="add_dropped", bytes=3 * row, onlay=lambda: residual.add_dropped(y, x, seed=7, p=0.05),
        eager=lambda: y.add_(functional.dropout(x, 0.05)), before=lambda: y.normal_(),
    )  # fmt: skip


def rows_in_fp8(make: Maker, s: Sizes) -> Iterator[Op]:
    x = make(s.tokens, s.mlp)
    yield Op(
        name="quantize_rows", bytes=x.numel() * (NUMBER + 1), onlay=lambda: fp8.quantize_rows(x),
        eager=lambda: fp8_rows.reference_quantize_rows(x),
    )  # fmt: skip
    weight = fp8_rows.reference_quantize_rows(make(s.mlp, s.width)).numbers
    yield Op(
        name="transpose", bytes=2 * weight.numel(), onlay=lambda: fp8.transpose(weight),
        eager=lambda: weight.view(torch.uint8).t().contiguous(),
    )  # fmt: skip


def losses(make: Maker, s: Sizes) -> Iterator[Op]:
    logits, targets = make(s.chunk, s.classes), torch.randint(s.classes, (s.tokens,), device=make.device)
    some = targets[: s.chunk]
    yield Op(
        name="softmax_gradient", bytes=2 * logits.numel() * NUMBER, before=lambda: logits.normal_(),
        onlay=lambda: softmax_gradient.softmax_gradient_(logits, some),
        eager=lambda: softmax_gradient.reference_softmax_gradient_(logits, some, gradient=True),
    )  # fmt: skip
    hidden, weight = make(s.tokens, s.width).requires_grad_(), make(s.classes, s.width, scale=s.width**-0.5)

    def back(loss: Callable[..., Tensor]) -> Work:
        def run() -> None:
            hidden.grad = None
            loss(hidden, weight, None, targets).backward()

        return run

    def in_chunks(hidden: Tensor, weight: Tensor, bias: None, targets: Tensor) -> Tensor:
        """Whole, the plain form's logits in float32 do not fit."""
        parts = zip(hidden.split(s.chunk), targets.split(s.chunk), strict=True)
        return sum(
            (chunked_loss.reference(h, weight, bias, t) for h, t in parts), hidden.new_zeros((), dtype=torch.float32)
        )

    yield Op(
        name="linear_cross_entropy", bytes=NUMBER * (2 * hidden.numel() + weight.numel()), flops=4 * hidden.numel() * s.classes,
        onlay=back(chunked_loss.linear_cross_entropy), eager=back(in_chunks),
        peers={name: back(PEER_LOSSES[name]) for name, package in PEERS.items() if find_spec(package)},
    )  # fmt: skip


def liger(hidden: Tensor, weight: Tensor, bias: None, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets, bias)
    return loss


def cut_cross_entropy(hidden: Tensor, weight: Tensor, bias: None, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum")
    return loss


PEER_LOSSES = {"liger": liger, "cut_cross_entropy": cut_cross_entropy}
GROUPS = (norms, mlps, heads, residuals, rows_in_fp8, losses)


def milliseconds(work: Work, before: Work, device: torch.device) -> float:
    """Median.  On a GPU by its own events, all queued before the first is waited for."""
    for _ in range(3):
        before()
        work()
    if device.type != "cuda":
        seconds = []
        for _ in range(REPEATS):
            before()
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return 1e3 * median(seconds)
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for begins, ends in events:
        before()
        begins.record()
        work()
        ends.record()
    torch.cuda.synchronize()
    return median(begins.elapsed_time(ends) for begins, ends in events)


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and FLOP/s of a bf16 product, of random numbers."""
    megabytes, side = (1024, 8192) if device.type == "cuda" else (16, 256)
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), lambda: None, device)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b, lambda: None, device)
    return 2 * source.numel() / copy * 1e3, 2 * side**3 / product * 1e3


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cpu" if arguments.tiny else "cuda")
    sizes = TINY if arguments.tiny else Sizes(tokens=arguments.tokens)
    bandwidth, rate = ceilings(device)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "tokens": sizes.tokens, "copy_gb_per_second": round(bandwidth / 1e9), "product_tflops": round(rate / 1e12, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} cpu",
        **{name: installed(name) for name in VERSIONS},
        "commit": arguments.commit or commit.stdout.strip(), "command": " ".join(["bench/ops.py", *sys.argv[1:]]),
    }  # fmt: skip
    for name, package in PEERS.items():
        if not find_spec(package):
            print(f"{name}: not installed, its column stays empty", flush=True)
    found = []
    for group in GROUPS:
        for op in group(Maker(device, torch.bfloat16), sizes):
            if arguments.ops and op.name not in arguments.ops:
                continue
            onlay, eager = (milliseconds(work, op.before, device) for work in (op.onlay, op.eager))
            floor = 1e3 * max(op.bytes / bandwidth, op.flops / rate)
            row: dict[str, Any] = {"op": op.name, "onlay_ms": onlay, "eager_ms": eager}
            row |= {
                f"{name}_ms": milliseconds(op.peers[name], op.before, device) if name in op.peers else None
                for name in PEERS
            }
            row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            row |= {"floor_ms": round(floor, 4), "share_of_floor": round(floor / onlay, 3)}
            print(row, flush=True)
            found.append(row | about)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", help="names in the first column; all of them without")
    parser.add_argument("--tokens", type=int, default=Sizes.tokens)
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU, to try the script")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if not rows:
        parser.error(f"--ops {' '.join(arguments.ops)}: no op has such a name")
    if arguments.out:
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
