"""Importing what every model needs, in one go."""

from __future__ import annotations

import gc
import sys


def import_stack() -> None:
    """Imports torch, transformers' model classes and PEFT, with the garbage collector waiting meanwhile.

    They make more than a million objects that all stay: looking through them for garbage again and again takes about a
    quarter of the time that importing takes.
    """
    if "peft" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        import peft
        import torch
        import transformers.models.auto.modeling_auto
        import transformers.models.auto.tokenization_auto  # noqa: F401
    finally:
        if collecting:
            gc.enable()
