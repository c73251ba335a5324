"""How many tokens a micro-batch has, and what its layers keep, so that a step fits the GPU and computes nothing twice that it need not.

A GPU is busy from a few thousand tokens on, and the gradient does not depend on how a step is cut: so micro-batches are made smaller
first, down to FEWEST_TOKENS or the longest example, and only then do layers keep less (onlay/model/keep.py).
A guess, from shapes and free memory: what it gets wrong, out-of-memory recovery in the loop puts right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from onlay.kernels.chunked_loss import CHUNK_BYTES
from onlay.model.fuse import Fused
from onlay.model.keep import Shape, choose_levels, needed_bytes, shape_of

FEWEST_TOKENS = 4096
"""Of a micro-batch that is made smaller to save memory."""
STEP_TOKENS = 1024
SPARE_SHARE = 0.04
"""Of the GPU's memory, left for what the allocator cannot use."""
LOSS_SHARE = 1.25
"""Of a chunk of logits: with what its gradient needs."""
HIDDEN_COPIES = 3
"""Of the last hidden states, in the loss."""


@dataclass(frozen=True, slots=True)
class Fit:
    tokens: int
    levels: list[str]
    """Of each layer; empty where nothing is known of the layers."""


def fit(
    fused: Fused, layers: list[nn.Module], *, device: torch.device, wanted_tokens: int, longest_tokens: int, state_bytes: int,
    item_bytes: int, least: Callable[[int], int],
) -> Fit:  # fmt: skip
    """The micro-batch of at most `wanted_tokens`, or of the longest example, and a level for each layer.

    state_bytes: what gradients and optimizer will take, which is not allocated yet.  least: the smallest number of all ranks', so that
    they decide alike.
    """
    known = [fused.layers.get(layer, []) for layer in layers]
    if device.type != "cuda" or not layers or any(len(blocks) < 2 for blocks in known):
        return Fit(wanted_tokens, [])
    shapes = [shape_of(blocks, item_bytes=item_bytes) for blocks in known]
    return fit_into(
        shapes,
        room_bytes=least(free_bytes(device)) - state_bytes,
        wanted_tokens=wanted_tokens,
        longest_tokens=longest_tokens,
    )


def fit_into(shapes: list[Shape], *, room_bytes: int, wanted_tokens: int, longest_tokens: int) -> Fit:
    """As `fit`, for layers of these shapes and so much memory."""
    nothing = ["none"] * len(shapes)
    least = max(longest_tokens, min(FEWEST_TOKENS, wanted_tokens))
    for tokens in range(max(wanted_tokens, least), least - 1, -STEP_TOKENS):
        if needed_bytes(shapes, nothing, tokens=tokens) <= room_bytes - loss_bytes(shapes[0], tokens):
            return Fit(tokens, nothing)
    room = room_bytes - loss_bytes(shapes[0], least)
    return Fit(least, choose_levels(shapes, tokens=least, room_bytes=room))


def loss_bytes(shape: Shape, tokens: int) -> int:
    return int(LOSS_SHARE * CHUNK_BYTES) + HIDDEN_COPIES * shape.input * tokens


def free_bytes(device: torch.device) -> int:
    """What may still be allocated: free on the GPU or in this process's pool, within its share of the GPU, less the spare."""
    # Accelerate's device has no number, and not every function of torch takes the current one for it.
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    pool = torch.cuda.memory_reserved(device) - allocated
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(min(free + pool, share * total - allocated) - SPARE_SHARE * total * share)
