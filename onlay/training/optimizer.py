"""AdamW over the trainable weights in four forms, what it may not touch, and the learning rate as a function of the step.

adamw is torch's.  The others are bitsandbytes': adamw_8bit keeps its two averages in one byte each, by blocks of 256 values
with a scale of their own; paged ones keep them in memory that the driver moves to the host when the GPU is full.  Small
weights, under 4096 values, have float32 averages in all of them.
Sources: AdamW (arXiv:1711.05101), 8-bit optimizers (arXiv:2110.02861), paging (QLoRA, arXiv:2305.14314), LoRA+
(arXiv:2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onlay.errors import OutputError, RecipeError, SetupError
from onlay.recipe import LoraPlusAdapter, Recipe, TrainingSection

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""torch's own, for all of them."""
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}
QUANTIZED_STATE = "__bnb_optimizer_quant_state__"
"""bitsandbytes puts a weight's averages one level deeper under this key in its state_dict."""
KIND = "optimizer"
"""Key under which a stored state says which optimizer made it."""


def make_optimizer(trainable: Mapping[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that `training.optimizer` names; its rate is set before every step, times a group's `rate_ratio`.

    Weight decay pulls matrices only: biases, norms and other vectors are left out of it, as is usual.  With LoRA+ the
    matrices B learn `learning_rate_ratio` times as fast.  Raises RecipeError for a paged one without a GPU, and
    SetupError without bitsandbytes.
    """
    groups = _groups(trainable, recipe)
    on_gpu = all(p.is_cuda for p in trainable.values())
    kind = recipe.training.optimizer
    if kind == "adamw":
        # fused on the GPU: one launch instead of one a tensor.
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=on_gpu or None)
    if kind.startswith("paged") and not on_gpu:
        raise needs_gpu(f"optimizer = {kind}", "its state moves between the memories of GPU and host")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise SetupError(
            f"training.optimizer = {kind} needs bitsandbytes, which cannot be imported: {str(error).splitlines()[0]}.",
            "python -m pip install 'onlay[quantized]'",
        ) from None
    optimizer: torch.optim.Optimizer = getattr(optim, BITSANDBYTES[kind])(groups, lr=0.0, betas=BETAS, eps=EPSILON)
    return optimizer


def _groups(trainable: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    adapter = recipe.adapter
    ratio = adapter.learning_rate_ratio if isinstance(adapter, LoraPlusAdapter) else 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        decay = recipe.training.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, ratio if ".lora_B." in name else 1.0), []).append(parameter)
    return [{"params": some, "weight_decay": decay, "rate_ratio": ratio} for (decay, ratio), some in groups.items()]


def needs_gpu(field: str, why: str) -> RecipeError:
    """Of a field of `training` that is of no use on a CPU."""
    return RecipeError(
        f"training.{field} needs a GPU: {why}, and this run is on a CPU.",
        "Delete the line, or train where torch can use a CUDA GPU (onlay doctor tells what this machine has).",
    )


def hold(optimizer: torch.optim.Optimizer, parts: Mapping[nn.Parameter, tuple[tuple[slice, ...], Tensor]]) -> None:
    """Keeps a part of each of these weights at a value, exactly: {weight: (where, value)}.

    Its gradient is zeroed as soon as it is complete, so that neither the gradient's norm nor the optimizer's averages know
    it; after every step the value is put back, so that weight decay does not count either.  For the life of the weights.
    """
    kept = [(parameter, where, value.to(parameter)) for parameter, (where, value) in parts.items()]
    for parameter, where, _ in kept:

        def clear(weight: Tensor, where: tuple[slice, ...] = where) -> None:
            assert weight.grad is not None
            weight.grad[where] = 0.0

        parameter.register_post_accumulate_grad_hook(clear)

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for parameter, where, value in kept:
            parameter[where] = value

    optimizer.register_step_post_hook(put_back)


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a number; those in 16 bit are squared and added up in float32."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms: list[Tensor] = []
    for (_, dtype), some in kinds.items():
        norms += torch._foreach_norm(some, 2.0, dtype=torch.promote_types(dtype, torch.float32))
    if not norms:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm


# ------------------------------------------------------------------------------------------------------- stored states


def optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    """As in `torch.AdamW` or `bitsandbytes.PagedAdamW8bit`: states of different kinds do not fit each other."""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict with its kind.  The tensors are the optimizer's own: copy what is to outlive the next step."""
    return optimizer.state_dict() | {KIND: optimizer_kind(optimizer)}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], *, where: str) -> None:
    """Puts a copy of a stored state into the optimizer, each tensor where that optimizer keeps it.

    `where` names the state in the OutputError that is raised when another kind of optimizer made it.
    """
    kind = optimizer_kind(optimizer)
    if state[KIND] != kind:
        raise OutputError(
            f"{where} holds the state of {state[KIND]}, but training.optimizer of this run is {kind}.",
            "A run keeps its optimizer: put training.optimizer in its recipe.yaml back, or start a new run.",
        )
    if kind.startswith("bitsandbytes.Paged"):
        _load_paged(optimizer, state)
    else:
        optimizer.load_state_dict(state)


def _load_paged(optimizer: Any, state: dict[str, Any]) -> None:
    """bitsandbytes would load all of it into the GPU's memory, where it is no longer paged, and may not have room."""
    before = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    optimizer.load_state_dict(state, move_to_device=False)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if name not in ("state1", "state2"):
                values[name] = value.to(parameter.device)
                continue
            # Paged memory is never given back, so what there is is used again.
            buffer = before.get(parameter, {}).get(name)
            if buffer is None:
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
            torch.cuda.synchronize(
                parameter.device
            )  # Paged memory looks like the host's; the GPU may still write to it.
            values[name] = buffer.copy_(value)


# --------------------------------------------------------------------------------------------------------------- rates


def learning_rate_at(step: int, *, peak: float, total_steps: int, section: TrainingSection) -> float:
    """Rate of optimizer step `step` (1 is the first, which already moves).  Cosine and linear end at zero after the last."""
    warmup_steps = math.ceil(section.warmup_fraction * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    if section.scheduler == "constant":
        return peak
    if section.scheduler == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
