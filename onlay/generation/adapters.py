"""Adapters while generating: another one for each row of a batch, or one for the whole model by PEFT's own switching."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onlay.errors import BaseModelError
from onlay.kernels.grouped_lora import grouped_lora_, hidden_of, scale_base_
from onlay.kernels.updates import Update
from onlay.model.quantize import QuantizedLinear

STACKED_RANKS = 512
"""Up to this sum of ranks all adapters of a call are stacked; over it only those in the batch."""
SIDE_TOKENS = 512
"""Up to so many tokens the base's product waits for memory, and the adapters' small one runs beside it for nothing."""


def loaded_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that a model holds; () without any."""
    from peft import PeftModel

    return tuple(model.peft_config) if isinstance(model, PeftModel) else ()


def base_of(model: nn.Module) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def refuse_mixing(model: nn.Module, wanted: set[str | None]) -> None:
    """Adapters with `bias: all` or `lora_only` overwrote the base's own biases, so that nothing else can be asked."""
    for name in loaded_adapters(model):
        config: Any = model.peft_config[name]  # type: ignore[union-attr, index]
        if getattr(config, "bias", "none") != "none" and wanted != {name}:
            other = "another adapter" if wanted - {name, None} else "the base"
            raise BaseModelError(
                f"{other} cannot be asked while adapter {name} is loaded: it was trained with bias = {config.bias}, "
                "and its biases have taken the place of the base's.",
                "Load them one after the other, or train with adapter.bias = none.",
            )


def why_not_by_row(model: nn.Module) -> str | None:
    """What keeps rows of one batch from having different adapters; None when nothing does."""
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name in loaded_adapters(model):
        kind = str(model.peft_config[name].peft_type.value)  # type: ignore[union-attr, index]
        if kind != "LORA":
            return f"adapter {name} is of type {kind}"
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is a whole layer of the adapter"
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        if re.search(r"(^|\.)experts\.\d", name):
            return f"{name} gets the tokens of all rows out of order"
        if type(module) is not Linear:
            return f"{name} is adapted as {type(module).__name__}"
        if layer.merged:
            return f"an adapter is merged into {name}"
        if any(layer.lora_bias.values()):
            return f"the adapter of {name} has a bias of its own"
        odd = [
            v for v in layer.lora_variant.values() if not (v is DoraLinearVariant or isinstance(v, DoraLinearVariant))
        ]
        if odd:
            return f"the adapter of {name} is a {getattr(odd[0], '__name__', type(odd[0]).__name__)}"
    return None


@contextmanager
def switched(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """The whole model with this adapter, or none; as it was before on leaving."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield
        return
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    before = list(model.active_adapters)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.base_model.set_adapter(adapter)  # type: ignore[operator]
    try:
        yield
    finally:
        model.base_model.set_adapter(before)  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


class RowAdapters:
    """Gives each row of the batch its own adapter; a context manager that puts every layer's forward back on leaving.

    While it is on, an adapted layer computes its base's product once for all rows and adds what
    onlay/kernels/grouped_lora.py computes for the stacked adapters.  Layers that share an input (`groups`) share one
    product with their A below one another.
    """

    def __init__(self, model: nn.Module, *, groups: Sequence[tuple[nn.Module, ...]] = ()) -> None:
        from peft.tuners.lora import Linear

        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear)]
        self._group_layers = [tuple(layer for layer in group if isinstance(layer, Linear)) for group in groups]
        self._groups: dict[int, _Group] = {}
        base = base_of(model)
        embedding = base.get_input_embeddings().weight
        self._dtype, self._device = embedding.dtype, next(model.parameters()).device
        self._before: list[Any] = []
        self._rows: list[str | None] = []
        self._wanted: tuple[str, ...] = ()
        self._mixed = False
        self._stacks: dict[int, _Stack] = {}
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.names: tuple[str, ...] | None = None
        """The adapters that are stacked now."""

    def __enter__(self) -> RowAdapters:
        self._before = [vars(layer).get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.forward = partial(_forward, layer, self)
        return self

    def __exit__(self, *exception: object) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
        self._before = []
        self._stacks, self._groups = {}, {}
        self.names = None

    def expect(self, adapters: Sequence[str | None]) -> None:
        """What the rows of this call will have, all of them together."""
        wanted = set(adapters)
        self._mixed = len(wanted) > 1
        self._wanted = tuple(sorted(name for name in wanted if name is not None))
        self.names = None

    @property
    def all_stacked(self) -> bool:
        """Whether the adapters of this call are few enough to be stacked together."""
        return sum(self._rank(name) for name in self._wanted) <= STACKED_RANKS

    def put(self, rows: Sequence[str | None]) -> bool:
        """The adapter of each row of the batch from here on.  True: other weights are stacked than before."""
        active = tuple(sorted({name for name in rows if name is not None}))
        names = self._wanted if self.all_stacked else active
        changed = names != self.names
        if changed:
            self._stacks = {
                id(layer): stack for layer in self._layers if (stack := self._stack(layer, names)) is not None
            }
            self.names = names
            self._group()
        if changed or list(rows) != self._rows:
            self._rows = list(rows)
            self._mask()
        return changed

    @contextmanager
    def only(self, rows: Sequence[str | None]) -> Iterator[None]:
        """These rows instead of the batch's, for a prefill."""
        before = {key: (stack.mask, stack.gain) for key, stack in self._stacks.items()}
        groups = {key: group.mask for key, group in self._groups.items()}
        batch = self._rows
        self._rows = list(rows)
        self._mask(new=True)
        try:
            yield
        finally:
            self._rows = batch
            for key, (mask, gain) in before.items():
                self._stacks[key].mask, self._stacks[key].gain = mask, gain
            for key, mask in groups.items():
                self._groups[key].mask = mask

    def _rank(self, name: str) -> int:
        return max((layer.r[name] for layer in self._layers if name in layer.lora_A), default=0)

    def _stack(self, layer: Any, names: tuple[str, ...]) -> _Stack | None:
        own = tuple(name for name in names if name in layer.lora_A)
        if not own:
            return None
        a, b, gains, dora = [], [], {}, False
        for name in own:
            scaled = layer.lora_B[name].weight.detach().t() * layer.scaling[name]
            if name in layer.lora_variant:
                gains[name] = _dora_gain(layer, name)
                scaled = scaled * gains[name]
                dora = True
            a.append(layer.lora_A[name].weight.detach())
            b.append(scaled)
        outputs = b[0].shape[1]
        table = None
        if dora:
            ones = torch.ones(outputs, dtype=self._dtype, device=self._device)
            table = torch.stack([ones, *(gains.get(name, ones).to(ones) for name in own)])
        return _Stack(
            a=torch.cat(a).to(device=self._device, dtype=self._dtype),
            b=torch.cat(b).to(device=self._device, dtype=self._dtype),
            columns=tuple((name, layer.r[name]) for name in own), table=table,
        )  # fmt: skip

    def _group(self) -> None:
        """Puts the A of layers that share an input below one another; the layers' own become views of that."""
        self._groups = {}
        for layers in self._group_layers:
            stacks = [self._stacks[id(layer)] for layer in layers if id(layer) in self._stacks]
            if len(stacks) < 2:
                continue
            a = torch.cat([stack.a for stack in stacks])
            group = _Group(a=a, stacks=stacks)
            start = 0
            for stack in stacks:
                stack.a = a[start : start + len(stack.a)]
                start += len(stack.a)
            self._groups.update((id(layer), group) for layer in layers)

    def _mask(self, *, new: bool = False) -> None:
        """Writes each row's own columns; into the same memory where the number of rows is the same, unless `new`."""
        masks: dict[tuple[tuple[str, int], ...], Tensor] = {}
        picks: dict[tuple[str, ...], Tensor] = {}
        for stack in self._stacks.values():
            if stack.columns not in masks:
                host = torch.zeros(len(self._rows), sum(rank for _, rank in stack.columns), dtype=self._dtype)
                start = 0
                for name, rank in stack.columns:
                    host[[i for i, row in enumerate(self._rows) if row == name], start : start + rank] = 1
                    start += rank
                same = not new and stack.mask is not None and stack.mask.shape == host.shape
                masks[stack.columns] = stack.mask.copy_(host) if same else host.to(self._device)  # type: ignore[union-attr]
            # Where every row has the adapter there is nothing to mask.
            alone = not self._mixed and len(stack.columns) == 1
            stack.mask = None if alone else masks[stack.columns]
            if stack.table is not None:
                names = tuple(name for name, _ in stack.columns)
                if names not in picks:
                    places = {name: i + 1 for i, name in enumerate(names)}
                    picks[names] = torch.tensor([places.get(row or "", 0) for row in self._rows], device=self._device)
                gain = stack.table[picks[names]]
                same = not new and stack.gain is not None and stack.gain.shape == gain.shape
                stack.gain = stack.gain.copy_(gain) if same else gain  # type: ignore[union-attr]

        for group in {id(group): group for group in self._groups.values()}.values():
            parts = [stack.mask for stack in group.stacks if stack.mask is not None]
            if not parts:
                group.mask = None
                continue
            joined = torch.cat(parts, 1)
            same = not new and group.mask is not None and group.mask.shape == joined.shape
            group.mask = group.mask.copy_(joined) if same else joined  # type: ignore[union-attr]

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        [(y, update)] = self.project((layer,), x)
        if update is not None:
            y.view(-1, y.shape[-1]).addmm_(update.hidden, update.b)
        return y

    def project(self, layers: Sequence[Any], x: Tensor) -> list[tuple[Tensor, Update | None]]:
        """Of each layer the base's product (N, ..., O), and what the adapters add to it, left to the caller.

        `layers` share the input x (N, ..., I): they are one of the groups, or one layer.
        """
        stacks = [self._stacks.get(id(layer)) for layer in layers]
        if all(stack is None or stack.a.dtype != x.dtype for stack in stacks):
            return [(self._whole(layer, stack, x), None) for layer, stack in zip(layers, stacks, strict=True)]
        side = self._side if x.numel() // x.shape[-1] <= SIDE_TOKENS else None
        if side is None:
            hidden = self._hidden(layers, stacks, x)
            outputs = [_base(layer)(x) for layer in layers]
        else:
            main = torch.cuda.current_stream(self._device)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                hidden = self._hidden(layers, stacks, x)
            outputs = [_base(layer)(x) for layer in layers]
            main.wait_stream(side)
        found: list[tuple[Tensor, Update | None]] = []
        for layer, stack, y, h in zip(layers, stacks, outputs, hidden, strict=True):
            if stack is None or h is None:
                found.append((y, None))
                continue
            if stack.gain is not None:
                y = scale_base_(y, gain=stack.gain, bias=layer.base_layer.bias)
            if y.dtype == h.dtype:
                found.append((y, Update(hidden=h, b=stack.b)))
            else:
                found.append((y + (h @ stack.b).view(y.shape).to(y.dtype), None))
        return found

    def _hidden(self, layers: Sequence[Any], stacks: Sequence[_Stack | None], x: Tensor) -> list[Tensor | None]:
        """(tokens, S) of each layer: parts of one product where they are a group."""
        group = self._groups.get(id(layers[0])) if len(layers) > 1 else None
        if group is None:
            return [None if stack is None else hidden_of(x, a=stack.a, mask=stack.mask) for stack in stacks]
        every = hidden_of(x, a=group.a, mask=group.mask)
        parts: list[Tensor | None] = []
        start = 0
        for stack in stacks:
            parts.append(None if stack is None else every[:, start : start + len(stack.a)])
            start += 0 if stack is None else len(stack.a)
        return parts

    def _whole(self, layer: Any, stack: _Stack | None, x: Tensor) -> Tensor:
        """A layer whose input is in other bits than the adapters: the base keeps some layers in more bits than the others."""
        y: Tensor = _base(layer)(x)
        if stack is None:
            return y
        if stack.gain is not None:
            y = scale_base_(y, gain=stack.gain, bias=layer.base_layer.bias)
        part = torch.zeros(y.shape, dtype=stack.a.dtype, device=y.device)
        return y + grouped_lora_(part, x.to(part.dtype), a=stack.a, b=stack.b, mask=stack.mask).to(y.dtype)


def _base(layer: Any) -> Any:
    """PEFT's layer holds the base's; a layer without adapters is the base's."""
    return getattr(layer, "base_layer", layer)


class _Group:
    """Layers that share an input."""

    __slots__ = ("a", "mask", "stacks")

    def __init__(self, *, a: Tensor, stacks: list[_Stack]) -> None:
        self.a, self.stacks = a, stacks
        """(sum of the layers' S, I), the layers' own A below one another."""
        self.mask: Tensor | None = None


class _Stack:
    """The adapters of one layer below one another."""

    __slots__ = ("a", "b", "columns", "gain", "mask", "table")

    def __init__(self, *, a: Tensor, b: Tensor, columns: tuple[tuple[str, int], ...], table: Tensor | None) -> None:
        self.a, self.b = a, b
        self.columns = columns
        """Adapter and rank, in the order of the rows of `a`."""
        self.table = table
        """DoRA: (1 + adapters, O) factors of the base's output, the first for rows without an adapter."""
        self.mask: Tensor | None = None
        self.gain: Tensor | None = None


def _forward(layer: Any, adapters: RowAdapters, x: Tensor) -> Tensor:
    return adapters.forward(layer, x)


def _dora_gain(layer: Any, name: str) -> Tensor:
    """(O,) magnitude over the norm of each row of W + s B A, which does not change while nothing trains."""
    base = layer.get_base_layer()
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    wide = torch.promote_types(a.dtype, torch.float32)
    if isinstance(base, QuantizedLinear):
        weight = base.dequantize(wide)
    else:
        weight = base.weight.detach().to(wide)
        weight = weight.t() if layer.fan_in_fan_out else weight
    norm = torch.linalg.vector_norm(weight + layer.scaling[name] * (b.to(wide) @ a.to(wide)), dim=1)
    gain: Tensor = layer.lora_magnitude_vector[name].weight.detach().to(wide) / norm
    return gain
