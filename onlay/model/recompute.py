"""Less memory for more work: layers that compute their activations again in the backward pass, and inputs that wait for it
in host memory.

Of a layer that is recomputed autograd keeps the input alone, and runs the layer once more when its gradient is due: about a
third more work a step, and the same gradient bit by bit, dropout included.  That is `torch.utils.checkpoint` around a
layer's forward, layer by layer and per instance.  transformers' own `gradient_checkpointing_enable` is not used: it is for
all layers or none, warns about caches on the way, and PEFT adds a hook on the embeddings for it.

With offloading, inputs go to pinned host memory while the next layers compute, and each comes back while the layer after it
goes backward.  All copies run in order on one side stream a device.  GPU memory is handed from stream to stream by waiting,
not by `record_stream`: the host runs ahead of the GPU, and memory that is freed only when a copy is seen to be done would
not be there for the next layer.
Sources: gradient checkpointing (arXiv:1604.06174); torch.utils.checkpoint; torchtune's OffloadActivations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from onlay.errors import RecipeError
from onlay.model.host_embedding import HostEmbedding
from onlay.model.keep import WHOLE, Block, apply_level, describe

LEAST_BYTES = 2**20
"""Smaller tensors stay: a copy takes its time however small it is."""
IN_FLIGHT = 2
"""Inputs on their way to the host; the next one waits for the first of them."""


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in their order: transformers marks them by a class.  None where the code marks none."""
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    root: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    return layers


class Recompute:
    """Recomputation in one base; everything can be put back with `switch_off`.  Steps aside without a gradient to come, and
    in evaluation mode."""

    def __init__(
        self, model: nn.Module, *, offload: bool = False, blocks: Mapping[nn.Module, Sequence[Block]] | None = None
    ) -> None:
        """`offload`: what recomputed layers keep goes to host memory; tensors on a CPU stay where they are.
        `blocks`: the fused blocks of layers, which can keep less without being recomputed whole."""
        self.layers = find_layers(model)
        self._blocks = blocks or {}
        self.levels: list[str] = []
        """Of each layer (onlay/model/keep.py); empty while nothing is recomputed."""
        self._architecture = type(model).__name__
        self._offload = Offload() if offload else None
        self._embedding = HostEmbedding(model) if offload else None
        self._before: dict[nn.Module, Any] = {}

    @property
    def count(self) -> int:
        """Layers that are recomputed whole."""
        return len(self._before)

    @property
    def note(self) -> str:
        """In words, for the Run."""
        inputs = ", their inputs in host memory until then" if self.count and self._offload else ""
        embedding = ", the input embedding in host memory" if self._embedding and self._embedding.is_out else ""
        return f"{describe(self.levels)}{inputs}{embedding}"

    def switch_on(self, count: int | None = None) -> None:
        """The first `count` layers whole, or all, from the next forward on.  Raises RecipeError where there are no such layers."""
        if not self.layers:
            raise RecipeError(
                f"training.recompute: the layers of {self._architecture} are not found in its code.",
                "Set training.recompute to none, and lower training.micro_batch_tokens to save memory.",
            )
        if count is not None and count > len(self.layers):
            raise RecipeError(
                f"training.recompute = {count}, but this base has {len(self.layers)} layers.",
                f"Set it to all, or to at most {len(self.layers)}.",
            )
        count = len(self.layers) if count is None else count
        self.set_levels(["layer"] * count + ["none"] * (len(self.layers) - count))

    def set_levels(self, levels: Sequence[str]) -> None:
        """A level for each layer, from the next forward on.  A layer without blocks is recomputed whole or not at all."""
        levels = [
            level if level in ("none", *WHOLE) or self._blocks.get(layer) else "layer"
            for layer, level in zip(self.layers, levels, strict=True)
        ]
        self._layers_off()
        if self._embedding is not None:
            self._embedding.move_out()
        self.levels = levels
        for layer, level in zip(self.layers, levels, strict=True):
            apply_level(self._blocks.get(layer, ()), level)
            if level in WHOLE:
                # A forward of this instance's own is there on the fast path, and where Accelerate spreads the base over devices.
                self._before[layer] = vars(layer).get("forward")
                layer.forward = partial(self._forward, layer, layer.forward)  # type: ignore[method-assign]

    def save_more(self) -> bool:
        """All layers one level further; False when there is none."""
        if not self.layers:
            return False
        if not self.levels or not set(self.levels) <= set(WHOLE):
            self.switch_on()
            return True
        if set(self.levels) != {"tiles"} and self._blocks:
            self.set_levels(["tiles"] * len(self.layers))
            return True
        return False

    def switch_off(self) -> None:
        """Everything as it was."""
        self._layers_off()
        if self._embedding is not None:
            self._embedding.put_back()

    def _layers_off(self) -> None:
        for layer, before in self._before.items():
            if before is None:
                del layer.forward
            else:
                layer.forward = before
        self._before.clear()
        for blocks in self._blocks.values():
            apply_level(blocks, "none")
        self.levels = []

    def _forward(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        hooks: AbstractContextManager[Any] = nullcontext()
        if self._offload is not None:
            if layer is self.layers[0]:
                self._offload.begin()
            # checkpoint puts hooks of its own around the forward itself: these see the layer's inputs and no more.
            hooks = torch.autograd.graph.saved_tensors_hooks(self._offload.pack, self._offload.unpack)
        with hooks:
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


class _Kept:
    """One tensor, in host memory and for some of the time on its device."""

    def __init__(self, side: _Side, tensor: Tensor, buffer: Tensor, previous: _Kept | None) -> None:
        self.side = side
        self.tensor: Tensor | None = tensor
        self.host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.buffer = buffer
        self.previous = previous
        """Kept before this one in the same forward: the next one that the backward pass will ask for."""
        self.copied = torch.cuda.Event()
        """The last copy, in whichever direction."""
        self.shared = False

    def let_go(self) -> None:
        """Gives the device's memory back to the current stream, once the copy that reads or writes it is done."""
        torch.cuda.current_stream(self.side.device).wait_event(self.copied)
        self.tensor = None

    def __del__(self) -> None:
        # Also of a step that was broken off, with copies still on their way.
        if self.tensor is not None:
            self.let_go()
        self.side.free.append(self.buffer)


class _Side:
    """What belongs to one device: its stream for copies, and pinned memory that is used over and over in its order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.free: list[Tensor] = []
        self.leaving: deque[_Kept] = deque()
        self.latest: _Kept | None = None

    def take_buffer(self, num_bytes: int) -> Tensor:
        """The smallest free one that is large enough; else a new one, in place of a free one that is too small."""
        sizes = {i: len(buffer) for i, buffer in enumerate(self.free)}
        fitting = [i for i, size in sizes.items() if size >= num_bytes]
        if fitting:
            return self.free.pop(min(fitting, key=sizes.__getitem__))
        if sizes:
            self.free.pop(max(sizes, key=sizes.__getitem__))
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, tensor: Tensor) -> _Kept:
        """Starts the copy to the host."""
        kept = _Kept(self, tensor, self.take_buffer(tensor.nbytes), self.latest)
        self._copy(kept.host, tensor, kept.copied)
        self.latest = kept
        self.leaving.append(kept)
        if len(self.leaving) > IN_FLIGHT:
            gone = self.leaving.popleft()
            if not gone.shared:
                gone.let_go()
        return kept

    def fetch(self, kept: _Kept) -> None:
        """Starts the copy back.  The memory is the current stream's, which may be using it until now."""
        kept.tensor = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self.device)
        self._copy(kept.tensor, kept.host, kept.copied)

    def _copy(self, to: Tensor, source: Tensor, copied: torch.cuda.Event) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            copied.record(self.stream)


class Offload:
    """Hooks for saved tensors that keep them in host memory: `pack` in the forward, `unpack` in the backward pass."""

    def __init__(self) -> None:
        self._sides: dict[torch.device, _Side] = {}
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, ref[_Kept]]] = {}

    @property
    def buffer_bytes(self) -> int:
        """Pinned memory that is free at the moment, to be used again."""
        return sum(len(buffer) for side in self._sides.values() for buffer in side.free)

    def begin(self) -> None:
        """A new forward: nothing of an earlier one is part of it."""
        self._seen.clear()
        for side in self._sides.values():
            side.latest = None
            side.leaving.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        worth_it = tensor.is_cuda and tensor.nbytes >= LEAST_BYTES and tensor.is_contiguous()
        if not worth_it or isinstance(tensor, nn.Parameter):
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.dtype, tensor._version)
        if key in self._seen:
            kept = self._seen[key][1]()
            if kept is not None:  # Several layers use it: it is kept once, and stays on the device once it is back.
                kept.shared = True
                return kept
        if tensor.device not in self._sides:
            self._sides[tensor.device] = _Side(tensor.device)
        kept = self._sides[tensor.device].send(tensor.detach())
        # The weak reference keeps the storage's address from being used for another one.
        self._seen[key] = storage, ref(kept)
        return kept

    def unpack(self, packed: Tensor | _Kept) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        side = packed.side
        side.latest = None
        side.leaving.clear()
        if packed.tensor is None:
            side.fetch(packed)
        tensor = packed.tensor
        assert tensor is not None
        torch.cuda.current_stream(side.device).wait_event(packed.copied)
        if not packed.shared:
            packed.tensor = None
        if packed.previous is not None and packed.previous.tensor is None:
            side.fetch(packed.previous)
        return tensor
