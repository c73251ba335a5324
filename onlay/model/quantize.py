"""Linear layers whose frozen weight is stored in 4 or 8 bits, and rebuilt or multiplied in FP8 where it is used.

nf4   4 bits and a scale for each block of 64 weights: onlay/kernels/nf4.py.
int8  8 bits and a scale for each output: scale = max |row| / 127, numbers rounded to the nearest.  Only the weights are 8-bit:
      activations and products stay in the precision of the work, so this saves memory, not time.
fp8   8 bits of floating point (e4m3) and a scale for each output: onlay/kernels/fp8_rows.py.

With `fp8_products` a layer in nf4 or fp8 is multiplied in FP8: onlay/kernels/fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onlay.kernels import fp8, nf4
from onlay.kernels.fp8_rows import FP8
from onlay.kernels.frozen import Fp8, Fp8FromNf4, frozen_product
from onlay.kernels.frozen_linear import frozen_linear

STORAGES = ("nf4", "int8", "fp8")
FP8_STORAGES = ("nf4", "fp8")
"""Those that can be multiplied in FP8."""
_STATE = ("scales", "scale_scales", "scale_mean")
_LARGEST = 127


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a packed weight.  x (..., I) -> (..., O).

    `weight` holds numbers, not weights: (ceil(O I / 2),) uint8 with nf4, (O, I) int8 with int8, (O, I) uint8 with fp8, which are
    the bytes of e4m3 numbers (`numbers`).  The scales are buffers beside it: they move with the module, but no cast of the
    module reaches them, as none reaches the integers.
    Before `pack` it is a layer without memory, whose weight (O, I) on the meta device only says what is awaited.
    """

    scales: Tensor
    scale_scales: Tensor | None
    scale_mean: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, storage: str, double_quantization: bool, dtype: torch.dtype,
        fp8_products: bool = False,
    ) -> None:  # fmt: skip
        """dtype: of the bias, and of the weight that `pack` will be given."""
        assert storage in STORAGES and (not fp8_products or storage in FP8_STORAGES)
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.requires_grad_(False)
        self.storage = storage
        self.fp8_products = fp8_products and fp8.fits(out_features, in_features)
        self.double_quantization = double_quantization and storage == "nf4"
        for name in _STATE:
            self.register_buffer(name, None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, storage: str, double_quantization: bool = True, fp8_products: bool = False
    ) -> QuantizedLinear:  # fmt: skip
        """The quantized form of a layer that is in memory; shares its bias."""
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features, linear.out_features, False,
            storage=storage, double_quantization=double_quantization, dtype=weight.dtype, fp8_products=fp8_products,
        )  # fmt: skip
        layer.bias = linear.bias
        layer.pack(weight)
        return layer.train(linear.training)

    @property
    def is_packed(self) -> bool:
        return not self.weight.is_floating_point()

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed weight under the name that PEFT's DoRA looks for."""
        return self.weight

    @property
    def numbers(self) -> Tensor:
        """With fp8: the weight's numbers (O, I) float8_e4m3fn, in the memory of `weight`."""
        return self.weight.detach().view(FP8)

    @property
    def packed(self) -> nf4.Nf4:
        """With nf4: the packed weight."""
        shape = (self.out_features, self.in_features)
        return nf4.Nf4(self.weight.detach(), self.scales, self.scale_scales, self.scale_mean, shape)

    def pack(self, weight: Tensor) -> None:
        """Takes the numbers of `weight` (O, I), whose memory is free to go afterwards.

        Raises SetupError when bitsandbytes is missing (nf4).
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"weight {tuple(weight.shape)} for {self.out_features} outputs, {self.in_features} inputs")
        if self.storage == "nf4":
            packed = nf4.quantize(weight.detach(), double_quantization=self.double_quantization)
            numbers, state = packed.codes, (packed.scales, packed.scale_scales, packed.scale_mean)
        elif self.storage == "fp8":
            rows = fp8.quantize_rows(weight.detach())
            numbers, state = rows.numbers.view(torch.uint8), (rows.scales, None, None)
        else:
            numbers, scales = _quantize_int8(weight.detach())
            state = (scales, None, None)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        for name, tensor in zip(_STATE, state, strict=True):
            setattr(self, name, tensor)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I) that is meant, rounded once to `dtype` (default: float32; exact in float64)."""
        dtype = dtype or torch.float32
        if self.storage == "nf4":
            return nf4.dequantize(self.packed, dtype)
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        return self.dequantize_into(out)

    def dequantize_into(self, out: Tensor) -> Tensor:
        """The same, written into `out` (O, I), contiguous, in its dtype."""
        if self.storage == "nf4":
            return nf4_into(self.packed, out)
        return _scaled(self.weight if self.storage == "int8" else self.numbers, self.scales, out)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fp8_products or x.dtype == torch.float64:
            return frozen_linear(x, self.dequantize, self.bias)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if self.storage == "fp8":
            return frozen_product(x, Fp8(self.numbers, self.scales, None, dtype=dtype), self.bias)
        return frozen_product(x, Fp8FromNf4((self.packed,), None, dtype=dtype), self.bias)

    def extra_repr(self) -> str:
        products = ", fp8_products=True" if self.fp8_products else ""
        return f"{super().extra_repr()}, storage={self.storage}{products}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Everything that moves or casts a module comes through here."""
        state = {name: getattr(self, name) for name in _STATE}
        super()._apply(fn, recurse)
        for name, before in state.items():
            after = getattr(self, name)
            if after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


OnQuantized = Callable[[str, Tensor, QuantizedLinear], None]
"""Gets a module's name, its weight (O, I) before it goes, and the packed module."""


def round_trip(weight: Tensor, *, storage: str, double_quantization: bool = True) -> Tensor:
    """What the quantized form of `weight` (O, I) stands for, float32 on the same device.

    Equal bit for bit to `dequantize()` of the layer that was packed from the same numbers on the same kind of device.
    Raises SetupError when bitsandbytes is missing (nf4).
    """
    if storage == "nf4":
        return nf4.dequantize(nf4.quantize(weight, double_quantization=double_quantization), torch.float32)
    exact = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if storage == "fp8":
        rows = fp8.quantize_rows(weight.detach())
        return _scaled(rows.numbers, rows.scales, exact)
    assert storage == "int8"
    return _scaled(*_quantize_int8(weight), exact)


def nf4_into(packed: nf4.Nf4, out: Tensor) -> Tensor:
    """The weight that `packed` stands for, written into `out`, contiguous, of its shape."""
    count = out.numel()
    if not out.is_cuda or out.dtype == torch.float64 or count % 2 or not count:
        return out.copy_(nf4.dequantize(packed, out.dtype))
    nf4.bitsandbytes_kernels().dequantize_4bit.out(
        packed.codes, nf4.block_scales(packed), nf4.BLOCK, "nf4", (count,), out.dtype, out=out.view(-1)
    )
    return out


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) -> int8 (O, I) and float32 scales (O,)."""
    exact = weight.detach().float()
    scales = exact.abs().amax(1) / _LARGEST if weight.shape[1] else exact.new_zeros(weight.shape[0])
    # A row of zeros has no scale to divide by.
    numbers = (exact / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return numbers.clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def _scaled(numbers: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """numbers (O, I) times scales (O,), rounded once into `out`."""
    if out.dtype == torch.float64:
        return torch.mul(numbers.double(), scales.double()[:, None], out=out)
    if numbers.dtype == FP8:
        # torch multiplies no FP8; its numbers are exact in 16 bits, so nothing wider than needed is made.
        numbers = numbers.to(torch.bfloat16)
    # Multiplied in float32 and rounded on the way out, without a float32 copy of the weight.
    return torch.mul(numbers, scales[:, None], out=out)
