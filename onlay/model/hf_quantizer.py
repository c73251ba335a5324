"""Quantizing while loading, through transformers' own interface for it: each weight as it arrives, on the device.

transformers finds out which stored tensors make which weight, converts them and hands the result to `_Pack`; this file puts
`onlay.model.quantize.QuantizedLinear` into the model before that and leaves nothing of transformers' own bookkeeping behind.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from onlay.kernels.fp8 import fits
from onlay.model.quantize import OnQuantized, QuantizedLinear
from onlay.model.storage import bytes_per_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "onlay"
_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linear layers that choose experts: a few numbers, on which everything behind them depends."""


class StorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers calls a quantization config, and what was found while loading with it."""

    def __init__(
        self, storage: str, *, double_quantization: bool, fp8_products: bool, on_quantized: OnQuantized | None
    ) -> None:  # fmt: skip
        self.quant_method = METHOD  # type: ignore[assignment]
        self.storage, self.double_quantization, self.on_quantized = storage, double_quantization, on_quantized
        self.fp8_products = fp8_products
        self.error: BaseException | None = None
        """The first that was raised while packing; transformers turns it into a page of text."""
        self.mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
        """Names of weights, the shapes that arrived and those that were expected."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StorageConfig:
        """transformers copies it with the model's config; what is found must come back to whoever asked."""
        return self


def storage_config(
    storage: str, *, double_quantization: bool, fp8_products: bool = False, on_quantized: OnQuantized | None
) -> StorageConfig:  # fmt: skip
    """What to hand to `from_pretrained` as quantization_config."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(StorageConfig)
        register_quantizer(METHOD)(StorageQuantizer)
    return StorageConfig(
        storage, double_quantization=double_quantization, fp8_products=fp8_products, on_quantized=on_quantized
    )  # fmt: skip


class StorageQuantizer(HfQuantizer):  # type: ignore[misc]
    requires_calibration = False
    quantization_config: StorageConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in quantizable(model, config.storage):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layer = QuantizedLinear(
                linear.in_features, linear.out_features, linear.bias is not None,
                storage=config.storage, double_quantization=config.double_quantization, dtype=linear.weight.dtype,
                fp8_products=config.fp8_products,
            )  # fmt: skip
            model.set_submodule(name, layer)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(owner), QuantizedLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of one weight, by which transformers reserves memory and spreads a model over devices."""
        if self.param_needs_quantization(model, param_name):
            return bytes_per_weight(self.quantization_config.storage, self.quantization_config.double_quantization)
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, tensor in model.state_dict().items():
            expected = self._shapes.get(name)
            owner = model.get_submodule(name.rpartition(".")[0])
            if expected is not None and not isinstance(owner, QuantizedLinear) and tuple(tensor.shape) != expected:
                self.quantization_config.mismatched.add((name, tuple(tensor.shape), expected))
        # From here on it is a model like others, some of whose layers are stored otherwise.
        self.remove_quantization_config(model)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    """Takes weights that arrived, packs those of quantized layers and passes the others on."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **given: Any
    ) -> dict[str, Any]:
        model, missing_keys = given["model"], given["missing_keys"]
        rest: dict[str, Any] = {}
        for name, arrived in input_dict.items():
            owner, _, leaf = name.rpartition(".")
            layer = model.get_submodule(owner)
            if leaf != "weight" or not isinstance(layer, QuantizedLinear):
                rest[name] = arrived
                continue
            missing_keys.discard(name)  # Else it would be made anew, at random.
            if self._config.error is None:
                with _Keeping(self._config):
                    self._pack(owner, arrived[0] if isinstance(arrived, list) else arrived, layer)
        return rest

    def _pack(self, name: str, weight: Tensor, layer: QuantizedLinear) -> None:
        expected = (layer.out_features, layer.in_features)
        if tuple(weight.shape) != expected:
            self._config.mismatched.add((f"{name}.weight", tuple(weight.shape), expected))
            return
        layer.pack(weight)
        # What transformers asks before it draws first weights: of a layer, and of a tensor.
        layer._is_hf_initialized = layer.weight._is_hf_initialized = True  # type: ignore[assignment, attr-defined]
        if self._config.on_quantized is not None:
            self._config.on_quantized(name, weight, layer)


class _Keeping:
    """Keeps the error that passes through, for whoever called transformers."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._config.error = error


def quantizable(model: PreTrainedModel, storage: str) -> list[str]:
    """Names of the linear layers that can be stored in fewer bits.

    Not among them: the output head (and what it is tied to), routers, layers that the architecture wants in float32, and
    layers whose weight the model's code reads itself, as Mamba's does, instead of calling them; and for fp8 layers whose sizes
    are no multiples of 16, which FP8 products do not take.
    """
    head = model.get_output_embeddings()
    exact = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]
    names = []
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if type(module) is not nn.Linear or module is head or leaf in _ROUTERS:
            continue
        if storage == "fp8" and not fits(module.out_features, module.in_features):
            continue
        if f"{name}.weight" in model.all_tied_weights_keys or any(re.search(rf"\b{part}\b", name) for part in exact):
            continue
        if not _reads_weight(type(model.get_submodule(parent)), leaf):
            names.append(name)
    return names


def _reads_weight(parent: type[nn.Module], leaf: str) -> bool:
    """Whether a module's code says `self.LEAF.weight` and so needs numbers there; asking for its dtype or device does not."""
    return (
        re.search(rf"self\.{re.escape(leaf)}\.weight\b(?!\.(dtype|device)\b)", _source(cast(type, parent))) is not None
    )


@cache
def _source(kind: type) -> str:
    """The code of a class and of those it was made from, up to nn.Module."""
    try:
        return "".join(inspect.getsource(part) for part in kind.__mro__[: kind.__mro__.index(nn.Module)])
    except OSError:
        return ""  # Written in an interactive session: no file holds its code.
