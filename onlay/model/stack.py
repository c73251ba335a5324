"""Importing what every model needs, in one go."""

from __future__ import annotations

import gc
from importlib import import_module

_STACK = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft")


def import_stack() -> None:
    """Imports torch, transformers' model classes and PEFT, with the garbage collector waiting meanwhile.

    They make more than a million objects that all stay: looking through them for garbage again and again takes about a
    quarter of the time that importing takes.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in _STACK:
            import_module(name)
    finally:
        if collecting:
            gc.enable()
