"""Every Triton kernel compiled ahead of time for every common GPU, and its shared memory held against what the chip has.

The wrappers are called as training calls them, with tensors that have no memory; their launches are recorded instead of run and
compiled from there, so what is compiled is what they choose.  No GPU is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.kernels import nf4
from onlay.kernels.rotate import Heads
from onlay.kernels.updates import HeadNorm, Update
from tests.kernels.compare import INTERPRETED

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled"),
]

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Of one block, by compute capability: CUDA C++ programming guide, "Technical specifications per compute capability"."""
FP8_SINCE = 89
TOKENS, WIDTH, MLP, QUERIES, GROUPS, HEAD, CLASSES = 512, 4096, 14336, 32, 8, 128, 128256
"""Those of an 8B base.  The number of tokens changes nothing that is compiled."""
RANKS = (16, 128)
"""The usual one, and one whose tiles take the most shared memory; more ranks are a longer loop."""
CASES = [*((capability, max(RANKS)) for capability in SHARED_KIB), (90, min(RANKS))]
FOLDER = Path(__file__).parent.parent.parent / "onlay/kernels"
DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def kernels() -> dict[str, Any]:
    """Every function for Triton in onlay/kernels, by module and name."""
    from triton.runtime.jit import JITFunction

    files = [path for path in FOLDER.glob("*.py") if "@triton.jit" in path.read_text(encoding="utf-8")]
    modules = [importlib.import_module(f"onlay.kernels.{path.stem}") for path in files]
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }


@dataclass(frozen=True)
class Launch:
    function: Any
    given: tuple[Any, ...]
    named: dict[str, Any]

    def source(self) -> tuple[Any, dict[str, Any]]:
        """What Triton compiles for these arguments, and the options: as its own launch finds them."""
        from triton.compiler import ASTSource

        values = dict(zip(self.function.arg_names, self.given, strict=False))
        values |= {name: value for name, value in self.named.items() if name in self.function.arg_names}
        options = {name: value for name, value in self.named.items() if name not in self.function.arg_names}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: dict[tuple[int], Any] = {}
        for place, parameter in enumerate(self.function.params):
            value = values[parameter.name]
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or one:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = "*" + DTYPES[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            whole = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
            if whole and not parameter.do_not_specialize:
                aligned[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(self.function, signature, constants, aligned), options


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches on a GPU of this capability are listed instead."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert all(1 <= number < 2**31 for number in grid[:1]) and all(number < 2**16 for number in grid[1:])
        launches.append(Launch(self, given, named))

    def slow(y: Tensor) -> bool:
        return y.element_size() > 2 or capability < 80

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        for name in {name.split(".")[0] for name in kernels()}:
            module = importlib.import_module(f"onlay.kernels.{name}")
            if hasattr(module, "multiplies_slowly"):
                patch.setattr(module, "multiplies_slowly", slow)
        yield launches


class Arguments:
    """Tensors without memory, in the dtype of the work."""

    def __init__(self, dtype: torch.dtype, rank: int) -> None:
        self.dtype, self.rank = dtype, rank

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def update(self, width: int) -> Update:
        """The middle one of three that share an input."""
        hidden = self.rows(TOKENS, 3 * self.rank)[:, self.rank : 2 * self.rank]
        return Update(hidden=hidden, b=self.rows(self.rank, width))


def train(made: Arguments, *, fp8: bool) -> None:
    """What a training step launches, and with what."""
    from onlay.kernels import gated_triton, normalise_triton, residual_triton, rotate_triton, softmax_gradient_triton

    x, weight, r = made.rows(TOKENS, WIDTH), made.rows(WIDTH), made.rows(TOKENS, dtype=torch.float32)
    normalise_triton.normalise(x, weight, eps=1e-5, offset=0.0, plain=True, quantize=fp8)
    for update in (None, made.update(WIDTH)):
        normalise_triton.normalise_backward(x, x, weight, r, offset=0.0, update=update, residual=x)
    gate, up = made.rows(TOKENS, 2 * MLP).chunk(2, 1)
    both = {"gate_update": made.update(MLP), "up_update": made.update(MLP)}
    gated_triton.gated(gate, up, activation="silu", **both)
    gated_triton.gated_backward(
        gate, up, made.rows(TOKENS, MLP), activation="silu", grad_update=made.update(MLP), **both
    )
    # With norms by head: without them a part of this is compiled.
    norm = made.rows(HEAD)
    heads = Heads(queries=QUERIES, groups=GROUPS, width=HEAD, q_norm=norm, k_norm=norm, eps=1e-6)
    updates = tuple(made.update(size) for size in heads.sizes)
    y, turns = made.rows(TOKENS, sum(heads.sizes)), (made.rows(TOKENS, HEAD), made.rows(TOKENS, HEAD))
    q, k, v, r = rotate_triton.rotate(y, *turns, heads=heads, updates=updates)
    rotate_triton.rotate_backward(q, k, v, *turns, heads=heads, y=y, r=r, updates=updates)
    residual_triton.add_update(x, update=made.update(WIDTH), residual=x)
    residual_triton.drop_rows(x, seed=7, p=0.05)
    residual_triton.add_dropped(x, x, seed=7, p=0.05)
    softmax_gradient_triton.softmax_gradient_(
        made.rows(TOKENS, CLASSES), made.rows(TOKENS, dtype=torch.int64), gradient=True
    )


def other_activations(made: Arguments) -> None:
    from onlay.kernels import gated_triton

    y = made.rows(TOKENS, MLP)
    for activation in ("gelu", "gelu_tanh"):
        gated_triton.gated_backward(
            y, y, y, activation=activation, gate_update=made.update(MLP), up_update=None, grad_update=None
        )


def decode(made: Arguments) -> None:
    """What a step of decoding 128 rows launches."""
    from onlay.kernels import decode_triton

    rows = 128
    q, k = made.rows(rows, QUERIES * HEAD), made.rows(rows, GROUPS * HEAD)
    cache, turn = made.rows(rows, GROUPS, 64, HEAD), made.rows(rows, HEAD)
    norm = HeadNorm(weight=made.rows(HEAD), eps=1e-6)
    updates = made.update(QUERIES * HEAD), made.update(GROUPS * HEAD), made.update(GROUPS * HEAD)
    decode_triton.rotate_and_store(
        q, k, k, cos=turn, sin=turn, keys=cache, values=cache, column=made.rows(1, dtype=torch.int64), updates=updates,
        norms=(norm, norm),
    )  # fmt: skip
    gate = made.rows(rows, MLP)
    decode_triton.swiglu(gate, gate, updates=(made.update(MLP), made.update(MLP)))
    x = made.rows(rows, WIDTH)
    decode_triton.add_residual(x, x, update=made.update(WIDTH))


def quantize(made: Arguments) -> None:
    """What FP8 bases launch."""
    from onlay.kernels import fp8_triton

    fp8_triton.quantize_rows(made.rows(TOKENS, WIDTH), columns=made.rows(WIDTH, dtype=torch.float32))
    numbers = made.rows(MLP, WIDTH, dtype=torch.float8_e4m3fn)
    fp8_triton.transpose(numbers)
    blocks = MLP * WIDTH // 64
    packed = nf4.Nf4(
        codes=made.rows(32 * blocks, dtype=torch.uint8), scales=made.rows(blocks, dtype=torch.uint8),
        scale_scales=made.rows(blocks // 256, dtype=torch.float32), scale_mean=made.rows(dtype=torch.float32),
        shape=(MLP, WIDTH),
    )  # fmt: skip
    scales = made.rows(MLP, dtype=torch.float32)
    fp8_triton.from_nf4(packed, scales, numbers, transposed=False)
    fp8_triton.from_nf4(packed, scales, fp8_triton.transpose(numbers), transposed=True)


def launches_of(capability: int, rank: int) -> list[Launch]:
    made = Arguments(torch.bfloat16 if capability >= 80 else torch.float16, rank)
    has_fp8 = capability >= FP8_SINCE
    with recorded(capability) as launches:
        train(made, fp8=has_fp8)
        decode(made)
        if has_fp8:
            quantize(made)
        if rank == min(RANKS):
            other_activations(made)
    return launches


def test_every_kernel_is_launched_or_part_of_one() -> None:
    every = kernels()
    launched = {launch.function for rank in RANKS for launch in launches_of(90, rank)}
    text = {name: function.src for name, function in every.items()}
    for name, function in every.items():
        called = any(f"{name.split('.')[1]}(" in source for other, source in text.items() if other != name)
        assert function in launched or called, f"{name} is never compiled: launch it here"


@pytest.mark.parametrize(("capability", "rank"), CASES)
def test_kernels_compile_and_fit(capability: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    # What an earlier run compiled would hide what this one cannot.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = set()
    for launch in launches_of(capability, rank):
        source, options = launch.source()
        if source.hash() in done:
            continue
        done.add(source.hash())
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        name = launch.function.fn.__name__
        assert compiled.asm["cubin"], name
        assert compiled.metadata.shared <= SHARED_KIB[capability] * 2**10, (name, compiled.metadata.shared)
    assert len(done) >= 12
