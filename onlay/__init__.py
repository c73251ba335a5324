"""onlay: LoRA fine-tuning of open language models, from a data file to a proven adapter.

The names below are loaded on first use, so that `import onlay` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Recipe", "advise", "audit", "chat", "demo", "evaluate", "generate", "merge", "plan", "prepare", "promote", "register", "rollback",
    "show", "train",
]  # fmt: skip

if TYPE_CHECKING:
    from onlay.recipe import Recipe
    from onlay.stages import (
        advise,
        audit,
        chat,
        demo,
        evaluate,
        generate,
        merge,
        plan,
        prepare,
        promote,
        register,
        rollback,
        show,
        train,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'onlay' has no attribute {name!r}")
    from importlib import import_module

    module = "onlay.recipe" if name == "Recipe" else "onlay.stages"
    return getattr(import_module(module), name)
