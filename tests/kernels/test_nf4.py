"""NF4 against the paper and against float64: the table, the nearest level, both forms of the scales, all shapes."""

from __future__ import annotations

import builtins
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from onlay.errors import SetupError
from onlay.kernels import nf4

CPU = torch.device("cpu")
SHAPES = [
    (1,),
    (7,),
    (64,),
    (65,),
    (80,),
    (1, 1),
    (3, 5),
    (1, 200),
    (128, 96),
    (96, 16),
    (33, 64),
    (257, 130),
    (4, 0),
    (0, 4),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers_of(packed: nf4.Nf4) -> Tensor:
    return torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[: math.prod(packed.shape)].long()


def test_the_table_is_the_papers() -> None:
    """Appendix E: quantiles at 9 and 8 evenly spaced probabilities on either side, divided by the largest."""
    normal, offset = NormalDist(), 0.9677083
    upper = [0.5 + (offset - 0.5) * i / 8 for i in range(1, 9)]
    lower = [0.5 + (offset - 0.5) * i / 7 for i in range(1, 8)]
    largest = normal.inv_cdf(offset)
    exact = [-normal.inv_cdf(p) for p in reversed(lower)] + [0.0] + [normal.inv_cdf(p) for p in upper]
    assert len(exact) == len(nf4.CODE) == 16
    half_step = 2.0**-24  # of float32, in which the table was made, at probabilities in [0.5, 1)
    steepest = 1 / normal.pdf(largest)
    for found, quantile in zip(nf4.CODE, exact, strict=True):
        expected = quantile / largest
        moved = half_step * (1 / normal.pdf(quantile) + abs(expected) * steepest) / largest
        assert abs(found - expected) <= moved + half_step
        assert torch.tensor(found, dtype=torch.float32).item() == found


def test_tables_are_those_of_bitsandbytes() -> None:
    nf4.bitsandbytes_kernels()
    from bitsandbytes import functional

    assert functional.get_4bit_type("nf4", device="cpu").tolist() == list(nf4.CODE)
    assert torch.equal(functional.create_dynamic_map(signed=True), nf4.dynamic_map(CPU))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_each_weight_gets_the_nearest_level(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weights(*shape).to(dtype)
    packed = nf4.quantize(weight, double_quantization=False)
    flat, code = weight.double().view(-1), torch.tensor(nf4.CODE, dtype=torch.float64)
    assert packed.codes.shape == ((flat.numel() + 1) // 2,)
    assert packed.codes.dtype == torch.uint8
    assert packed.scales.shape == (-(-flat.numel() // 64),)
    for block, scale in enumerate(packed.scales.tolist()):
        assert scale == flat[64 * block : 64 * (block + 1)].abs().max().float()
    distances = (flat / packed.scales.double().repeat_interleave(64)[: flat.numel()])[:, None].sub(code).abs()
    chosen = distances.gather(1, numbers_of(packed)[:, None]) if flat.numel() else flat.new_zeros(0, 1)
    nearest = distances.min(1).values if flat.numel() else flat.new_zeros(0)
    # Exactly nearest, but for weights so near the middle of two levels that float32 cannot tell the sides.
    assert bool((chosen[:, 0] - nearest <= 4 * torch.finfo(torch.float32).eps).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("piece", [64, 128, 2**18])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], piece: int) -> None:
    monkeypatch.setattr(nf4, "_PIECE", piece)
    found, whole = nf4.quantize(weights(*shape), double_quantization=False), nf4.reference_quantize(weights(*shape))
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.scales, whole.scales)


@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rebuilt_weights_are_the_product_rounded_once(
    shape: tuple[int, ...], dtype: torch.dtype, double_quantization: bool
) -> None:
    packed = nf4.quantize(weights(*shape).to(dtype), double_quantization=double_quantization)
    exact = nf4.dequantize(packed, torch.float64)
    assert exact.shape == shape
    scales = nf4.block_scales(packed).double().repeat_interleave(64)[: exact.numel()]
    assert torch.equal(exact.view(-1), torch.tensor(nf4.CODE, dtype=torch.float64)[numbers_of(packed)] * scales)
    single = nf4.dequantize(packed, torch.float32)
    assert torch.equal(single, exact.float())
    for other in DTYPES:
        rebuilt = nf4.dequantize(packed, other)
        assert rebuilt.dtype == other
        assert torch.equal(rebuilt, single.to(other))
        assert torch.equal(rebuilt, nf4.reference_dequantize(packed, other))


def test_widths_that_the_bundled_cpu_kernel_mixes_up() -> None:
    """The reason for the flat shape: with this one bitsandbytes' own call gives other weights."""
    weight = weights(128, 96)
    packed = nf4.quantize(weight, double_quantization=False)
    assert torch.equal(nf4.dequantize(packed, torch.float32), nf4.reference_dequantize(packed, torch.float32))


@pytest.mark.parametrize("shape", [(64,), (64, 64), (128, 96), (300, 512)], ids=str)
@pytest.mark.parametrize("double_quantization", [False, True])
def test_what_is_stored_is_what_bitsandbytes_stores(shape: tuple[int, ...], double_quantization: bool) -> None:
    from bitsandbytes import functional

    weight = weights(*shape, seed=1)
    packed = nf4.quantize(weight, double_quantization=double_quantization)
    codes, state = functional.quantize_4bit(weight, compress_statistics=double_quantization, quant_type="nf4")
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.scales, state.absmax)
    if double_quantization:
        assert packed.scales.dtype == torch.uint8
        assert torch.equal(packed.scale_scales, state.state2.absmax)
        assert torch.equal(packed.scale_mean, state.offset)
        theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(nf4.block_scales(packed), theirs)


def test_double_quantization_takes_the_nearest_of_256_levels() -> None:
    weight = weights(640, 300, seed=2)
    exact = nf4.quantize(weight, double_quantization=False).scales.double()
    packed = nf4.quantize(weight, double_quantization=True)
    assert packed.scale_mean is not None
    assert packed.scale_scales is not None
    largest = packed.scale_scales.double().repeat_interleave(nf4.SCALE_BLOCK)[: exact.numel()]
    relative = (exact - packed.scale_mean.double()) / largest
    assert bool(relative.abs().max() <= 1 + 4 * torch.finfo(torch.float32).eps)
    distances = (relative[:, None] - nf4.dynamic_map(CPU).double()).abs()
    chosen = distances.gather(1, packed.scales.long()[:, None])[:, 0]
    # On a CPU bitsandbytes looks the level up in a table with 2^16 places, so it is off by half a place at most.
    assert bool((chosen - distances.min(1).values <= 2 * 2.0**-16 + 8 * torch.finfo(torch.float32).eps).all())
    rebuilt = nf4.dynamic_map(CPU).double()[packed.scales.long()] * largest + packed.scale_mean.double()
    rounding = 2 * torch.finfo(torch.float32).eps * (largest + packed.scale_mean.double())
    assert bool(((nf4.block_scales(packed).double() - rebuilt).abs() <= rounding).all())


def test_zeros_stay_zeros() -> None:
    for double_quantization in (False, True):
        packed = nf4.quantize(torch.zeros(3, 70), double_quantization=double_quantization)
        assert not nf4.dequantize(packed, torch.float32).any()


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    nf4.bitsandbytes_kernels.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SetupError, match=r"onlay\[quantized\]") as caught:
        nf4.quantize(weights(4, 4), double_quantization=False)
    assert len(str(caught.value).splitlines()) == 2
    monkeypatch.undo()
    nf4.quantize(weights(4, 4), double_quantization=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (512, 4096)], ids=str)
@pytest.mark.parametrize("double_quantization", [False, True])
def test_a_gpu_stores_and_rebuilds_the_same(shape: tuple[int, ...], double_quantization: bool) -> None:
    weight = weights(*shape).bfloat16()
    here = nf4.quantize(weight, double_quantization=False)
    packed = nf4.quantize(weight.cuda(), double_quantization=double_quantization)
    assert torch.equal(numbers_of(packed).cpu(), numbers_of(here))
    if not double_quantization:
        assert torch.equal(packed.scales.cpu(), here.scales)
    moved = nf4.Nf4(*(part.cpu() if isinstance(part, Tensor) else part for part in (
        packed.codes, packed.scales, packed.scale_scales, packed.scale_mean)), packed.shape)  # fmt: skip
    for dtype in (*DTYPES, torch.float64):
        found, expected = nf4.dequantize(packed, dtype).cpu(), nf4.dequantize(moved, dtype)
        if double_quantization:
            # A GPU multiplies and adds with one rounding where a CPU has two: scales differ in float32's last bit, and
            # values by at most one rounding of their own type.
            most = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * expected.double().abs()
            assert bool(((found.double() - expected.double()).abs() <= most).all())
        else:
            assert torch.equal(found, expected)
