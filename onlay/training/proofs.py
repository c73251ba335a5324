"""What every run proves about itself: the adapter moved where tokens went, is finite, and the base did not change.

B starts at zero, so the first update moves B and leaves A (its gradient is a product with B); the second moves A too.
DoRA's magnitudes may be so large that the first steps of a long warm-up are lost in rounding: they must have moved by
then, or have a gradient.  What a method holds where it began, as PiSSA does with half of its adapter, must not move.
A module that received tokens and did not move means a cut graph, a frozen weight or a silent no-op, all of which have
happened to peers without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onlay.errors import ProofError
from onlay.model.adapter import adapted_modules


class MovementProof:
    """Watches the first two updates.  `results` is what the Run records."""

    def __init__(
        self, model: nn.Module, trainable: dict[str, nn.Parameter], *, done: bool, owners: Mapping[nn.Module, nn.Module] | None = None
    ) -> None:  # fmt: skip
        """`done`: a resumed run whose first two updates were watched before.  `owners`: of adapted modules that the fast path does
        not call by themselves, the module that is called for them (onlay/model/fuse.py).  First weights wait in host memory."""
        self._pairs = adapted_modules(model)
        self._trainable = trainable
        self._before = {} if done else {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
        self._received: set[str] = set()
        self._hooks = []
        for name in () if done else self._pairs:
            module = model.get_submodule(name)
            called = (owners or {}).get(module, module)
            self._hooks.append(called.register_forward_hook(self._hook(name), with_kwargs=True))
        self._names = {id(p): name for name, p in trainable.items()}

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], _output: Any) -> None:
            rows = inputs[0] if inputs else named.get("hidden_states")
            if torch.is_grad_enabled() and isinstance(rows, Tensor) and rows.numel():
                self._received.add(name)

        return note

    def observe(self, updates: int) -> dict[str, Any] | None:
        """Call after each update.  Returns the results after the second; raises ProofError when a module did not move."""
        if not self._before:
            return None
        if not self._pairs:  # full tuning: every weight with a gradient must have moved at once
            stuck = [n for n, p in self._trainable.items() if _has_gradient(p) and not self._moved(p)]
            return self._finish("weights", len(self._trainable), stuck, [])
        part = "B" if updates == 1 else "A"
        idle = [name for name in self._pairs if name not in self._received]
        received = {name: parts for name, parts in self._pairs.items() if name in self._received}
        stuck = [name for name, parts in received.items() if not self._moved(parts[part])]
        if updates == 2:
            stuck += [
                name
                for name, parts in received.items()
                if "magnitude" in parts and not (self._moved(parts["magnitude"]) or _has_gradient(parts["magnitude"]))
            ]
        if updates == 1:
            if stuck:
                self._finish("modules", len(self._pairs), stuck, idle)
            return None
        return self._finish("modules", len(self._pairs), stuck, idle)

    def _moved(self, parameter: nn.Parameter) -> bool:
        return not torch.equal(parameter.detach().cpu(), self._before[self._names[id(parameter)]])

    def _finish(self, what: str, count: int, stuck: list[str], idle: list[str]) -> dict[str, Any]:
        for hook in self._hooks:
            hook.remove()
        self._before = {}
        if stuck:
            raise ProofError(
                f"{len(stuck)} of {count} adapted {what} received tokens but did not move: {', '.join(stuck[:3])}.",
                "Is learning_rate too small for the weights' precision? If not, this base is not trained correctly: report it.",
            )
        return {f"moved_{what}": count - len(idle), f"{what}_without_tokens": idle}


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def prove_finite(trainable: dict[str, nn.Parameter]) -> bool:
    """True; raises ProofError naming a weight with a value that is not finite."""
    for name, parameter in trainable.items():
        if not bool(torch.isfinite(parameter).all()):
            raise ProofError(
                f"{name} holds values that are not finite.", "Lower training.learning_rate and train again."
            )
    return True


def prove_held(
    trainable: Mapping[str, nn.Parameter], held: Mapping[nn.Parameter, tuple[tuple[slice, ...], Tensor]]
) -> bool:
    """True; raises ProofError naming a weight of which the part that was to stay has changed by a bit."""
    for name, parameter in trainable.items():
        if parameter in held:
            part, value = held[parameter]
            if not torch.equal(parameter.detach()[part], value):
                raise ProofError(
                    f"{name} changed in the half that PiSSA holds where it began.",
                    "The adapter does not stand for what was trained: do not use it; report this.",
                )
    return True


def prove_unchanged(before: dict[str, int], after: dict[str, int]) -> bool:
    """True; raises ProofError naming a frozen weight of the base that changed during training."""
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        raise ProofError(
            f"{len(changed)} frozen weights of the base changed during training, first {changed[0]}.",
            "The adapter belongs to a base that no longer exists: do not use it; report this.",
        )
    return True
