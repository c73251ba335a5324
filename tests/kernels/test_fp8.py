"""FP8 rows and products against their definition: the nearest numbers, derived bounds, and one weight in both directions.

Without a GPU the fast kernels run where Triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onlay.kernels import fp8, nf4
from onlay.kernels.fp8_rows import FP8, LARGEST, Fp8Rows, reference_quantize_rows
from onlay.model.storage import FP8_STEP
from tests.kernels.compare import INTERPRETED, fp8_rounds  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("fp8_rounds")
needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or Triton's interpreter: test_interpreter.py"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HALF_ULP = 2.0**-4
"""Of a number with three bits of mantissa, relative to it."""
HALF_STEP = 2.0**-10
"""Of the smallest numbers, in units of the scale."""
EPS = torch.finfo(torch.float32).eps
SHAPES = [(1, 16), (3, 48), (5, 80), (7, 300), (2, 1), (4, 0), (0, 4)]
NF4_SHAPES = [(16, 64), (33, 192), (130, 128), (1, 576), (48, 80), (5, 16)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal, but for rows that are a million times smaller or larger than others and some zeros."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if drawn.numel():
        drawn[::3] *= 1e-6
        drawn[1::3] *= 1e6
        drawn[:, ::5] *= 1e-4
        drawn[-1, : shape[1] // 2] = 0
    return drawn


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(found: Fp8Rows, expected: Fp8Rows) -> bool:
    return torch.equal(found.scales, expected.scales) and torch.equal(bits(found.numbers), bits(expected.numbers))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_number_is_the_nearest_that_e4m3_has(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = numbers(*shape).clamp(-6e4, 6e4).to(dtype)
    rows = reference_quantize_rows(x)
    assert (rows.numbers.dtype, rows.numbers.shape, rows.scales.shape) == (FP8, shape, shape[:1])
    for row, scale in zip(x.float(), rows.scales, strict=True):
        largest = row.abs().max() if len(row) else torch.zeros(())
        assert scale == (largest.clamp_min(1e-12) / LARGEST if len(row) else 0)
    every = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    every = every[every.isfinite()]
    relative = x.double() / rows.scales.double()[:, None]
    distance = (rows.numbers.double() - relative).abs()
    nearest = (relative[..., None] - every).abs().amin(-1) if x.numel() else distance
    # Exactly nearest, but for numbers so near the middle of two that float32 cannot tell the sides.
    assert bool((distance - nearest <= 4 * EPS * relative.abs()).all())
    error = (rows.wide(torch.float64) - x.double()).abs()
    bound = torch.maximum(x.double().abs() * HALF_ULP, HALF_STEP * rows.scales.double()[:, None])
    assert bool((error <= bound * (1 + 8 * EPS)).all())


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    rows = fp8.quantize_rows(torch.zeros(2, 16))
    assert not rows.wide().any()
    assert bool(rows.scales.gt(0).all())
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 16)
        x[1, 3] = bad
        wide = fp8.quantize_rows(x).wide()
        assert bool(wide[0].isfinite().all())
        assert bool(wide[1, 3].isnan())


def test_columns_are_multiplied_first() -> None:
    x, columns = numbers(6, 48).bfloat16(), torch.rand(48, generator=torch.Generator().manual_seed(1))
    assert same(fp8.quantize_rows(x, columns=columns), reference_quantize_rows(x.float() * columns))


def test_rows_may_lie_apart() -> None:
    wide = numbers(6, 96)
    assert same(fp8.quantize_rows(wide[:, 16:64]), reference_quantize_rows(wide[:, 16:64].contiguous()))
    assert same(fp8.quantize_rows(wide.t()), reference_quantize_rows(wide.t().contiguous()))


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 16), (5, 48, 32), (33, 16, 160), (0, 32, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_scales", [False, True])
def test_a_product_is_the_wide_product_of_the_same_numbers(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, has_bias: bool, has_scales: bool
) -> None:
    x, weight = (
        reference_quantize_rows(numbers(rows, inputs)),
        reference_quantize_rows(numbers(outputs, inputs, seed=1)),
    )
    bias = numbers(1, outputs, seed=2)[0] if has_bias else None
    scales = weight.scales if has_scales else None
    found = fp8.product(x, weight.numbers, scales, bias=bias, dtype=dtype)
    assert (found.dtype, found.shape) == (dtype, (rows, outputs))
    meant = weight.wide(torch.float64) if has_scales else weight.numbers.double()
    exact = x.wide(torch.float64) @ meant.T + (0 if bias is None else bias.double())
    # Sums of float32: each of the terms rounded `inputs` times at most, and the result to its own type.
    steps = inputs * (torch.finfo(torch.float64).eps if dtype == torch.float64 else EPS)
    size = x.wide(torch.float64).abs() @ meant.abs().T + (0 if bias is None else bias.double().abs())
    assert bool(((found.double() - exact).abs() <= steps * size + torch.finfo(dtype).eps * exact.abs()).all())


def test_the_transposed_numbers_are_the_same_weight() -> None:
    """dx = (dy s) Q: with rows of the identity it is W itself, as x W^T is with columns of it."""
    weight = reference_quantize_rows(numbers(48, 32))
    forward = fp8.product(fp8.quantize_rows(torch.eye(32)), weight.numbers, weight.scales, dtype=torch.float32)
    transposed = fp8.transpose(weight.numbers)
    assert transposed.is_contiguous()
    assert torch.equal(bits(transposed), bits(weight.numbers.t()))
    dy = fp8.quantize_rows(torch.eye(48), columns=weight.scales)
    backward = fp8.product(dy, transposed, None, dtype=torch.float32)
    meant = weight.wide(torch.float64)
    assert bool(((forward.T - meant).abs() <= 3 * EPS * meant.abs()).all())
    assert bool(((backward - meant).abs() <= 3 * EPS * meant.abs()).all())


def test_what_fits() -> None:
    assert fp8.STEP == FP8_STEP
    assert fp8.fits(16, 32)
    assert not any(fp8.fits(*shape) for shape in ((8, 32), (32, 8), (17, 16), (0, 16)))


# ----------------------------------------------------------------------------------------------------------- from NF4


def weights(*shape: int) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", NF4_SHAPES, ids=str)
@pytest.mark.parametrize("double_quantization", [False, True])
def test_rows_from_nf4_are_those_of_the_weight_that_nf4_stands_for(
    shape: tuple[int, int], double_quantization: bool
) -> None:
    packed = nf4.quantize(weights(*shape), double_quantization=double_quantization)
    expected = reference_quantize_rows(nf4.reference_dequantize(packed, torch.float32))
    assert torch.equal(fp8.nf4_row_scales(packed), expected.scales)
    assert same(Fp8Rows(*fp8.rows_from_nf4(packed)), expected)
    columns, scales = fp8.columns_from_nf4(packed, scales=expected.scales)
    assert columns.is_contiguous()
    assert same(Fp8Rows(columns.t(), scales), expected)


@pytest.mark.parametrize("shape", NF4_SHAPES, ids=str)
def test_rows_from_nf4_may_go_into_a_larger_tensor(shape: tuple[int, int]) -> None:
    packed = nf4.quantize(weights(*shape), double_quantization=True)
    expected = bits(fp8.rows_from_nf4(packed)[0])
    outputs, inputs = shape
    whole, turned = torch.zeros(outputs + 5, inputs).to(FP8), torch.zeros(inputs, outputs + 5).to(FP8)
    fp8.rows_from_nf4(packed, out=whole[2 : 2 + outputs])
    fp8.columns_from_nf4(packed, out=turned[:, 2 : 2 + outputs])
    for found in (bits(whole), bits(turned.t())):
        assert torch.equal(found[2 : 2 + outputs], expected)
        assert not found[:2].any()
        assert not found[2 + outputs :].any()


def test_a_block_of_zeros_never_makes_a_scale_too_small() -> None:
    weight = weights(16, 256)
    weight[:, 64:128] = 0
    weight[3] = 0
    packed = nf4.quantize(weight, double_quantization=True)
    exact = nf4.reference_dequantize(packed, torch.float32)
    numbers_, scales = fp8.rows_from_nf4(packed)
    assert bool((scales >= exact.abs().amax(1) / LARGEST).all())
    error = (Fp8Rows(numbers_, scales).wide() - exact).abs()
    assert bool((error <= torch.maximum(exact.abs() * HALF_ULP, HALF_STEP * scales[:, None]) * (1 + 8 * EPS)).all())


# ------------------------------------------------------------------------------------------------------------- kernels


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widest", [64, 2**15])
def test_the_kernel_quantizes_as_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onlay.kernels import fp8_triton

    monkeypatch.setattr(fp8_triton, "WIDEST_ROW", widest)
    monkeypatch.setattr(fp8_triton, "PIECE", 64)
    x = numbers(*shape).to(DEVICE, dtype)
    columns = torch.rand(shape[1], device=DEVICE) + 0.5
    for given in (x, numbers(shape[0], 2 * shape[1]).to(DEVICE, dtype)[:, shape[1] :]):
        assert same(fp8.quantize_rows(given), reference_quantize_rows(given))
        found, expected = (make(given, columns=columns) for make in (fp8.quantize_rows, reference_quantize_rows))
        assert same(found, expected)


@needs_kernels
@pytest.mark.parametrize("shape", [(16, 16), (33, 200), (130, 257), (1, 5)], ids=str)
def test_the_kernel_transposes(shape: tuple[int, int]) -> None:
    given = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(bits(fp8.transpose(given.view(FP8))), given.t().contiguous())


@needs_kernels
@pytest.mark.parametrize("shape", [shape for shape in NF4_SHAPES if shape[1] % 64 == 0], ids=str)
@pytest.mark.parametrize("double_quantization", [False, True])
def test_the_kernel_turns_nf4_to_fp8_as_the_reference(shape: tuple[int, int], double_quantization: bool) -> None:
    packed = nf4.quantize(weights(*shape).to(DEVICE), double_quantization=double_quantization)
    expected = fp8.reference_rows_from_nf4(packed)
    assert same(Fp8Rows(*fp8.rows_from_nf4(packed)), expected)
    columns, scales = fp8.columns_from_nf4(packed)
    assert same(Fp8Rows(columns.t(), scales), expected)
    wide = torch.zeros(shape[1], shape[0] + 16, device=DEVICE).to(FP8)
    fp8.columns_from_nf4(packed, scales=scales, out=wide[:, 16:])
    assert torch.equal(bits(wide)[:, 16:], bits(columns))
    assert not bits(wide)[:, :16].any()


@pytest.mark.skipif(not INTERPRETED, reason="of Triton's interpreter")
def test_the_interpreters_own_rounding_is_still_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, the fixture fp8_rounds can go."""
    monkeypatch.undo()
    x = torch.tensor([[448.0, 1.97, 1.03, 0.3]]).repeat(1, 4)
    assert not same(fp8.quantize_rows(x), reference_quantize_rows(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 16), (7, 48, 160), (300, 4096, 2048)])
@pytest.mark.parametrize("has_scales", [False, True])
def test_a_gpus_product_is_that_of_the_same_numbers(rows: int, outputs: int, inputs: int, has_scales: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    x, weight = (fp8.quantize_rows(numbers(n, inputs, seed=n).cuda().bfloat16()) for n in (rows, outputs))
    bias = numbers(1, outputs, seed=2)[0].cuda().bfloat16()
    scales = weight.scales if has_scales else None
    found = fp8.product(x, weight.numbers, scales, bias=bias, dtype=torch.bfloat16).double()
    exact = fp8.reference_product(x, weight.numbers, scales, bias=bias, dtype=torch.float64)
    absolute = replace_signs(x), replace_signs(weight)
    size = fp8.reference_product(
        absolute[0], absolute[1].numbers, scales, bias=bias.abs(), dtype=torch.float64
    )  # fmt: skip
    # Tensor cores add 32 products at a time to a sum that keeps 13 bits; two roundings to bfloat16, with the bias after one.
    steps = -(-inputs // 32) * 2.0**-13 + 2 * torch.finfo(torch.bfloat16).eps
    assert bool(((found - exact).abs() <= steps * size).all())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_the_tensors_are() -> None:
    x = numbers(5, 128).cuda(1)
    assert same(fp8.quantize_rows(x), reference_quantize_rows(x))
    packed = nf4.quantize(weights(16, 128).cuda(1), double_quantization=True)
    expected = fp8.reference_rows_from_nf4(packed)
    assert same(Fp8Rows(*fp8.rows_from_nf4(packed)), expected)
    assert torch.equal(bits(fp8.transpose(expected.numbers)), bits(expected.numbers.t()))


def replace_signs(rows: Fp8Rows) -> Fp8Rows:
    return replace(rows, numbers=(bits(rows.numbers) & 127).view(FP8))
