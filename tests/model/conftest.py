"""What ran, of the fast path."""

from __future__ import annotations

from typing import Any

import pytest

from onlay.model import blocks
from onlay.model import fuse as fuse_module
from tests.model.fused import Counts


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often each node ran: what is put in place may still step aside at every call."""
    counts: Counts = {}

    def count(module: Any, name: str, kind: str) -> None:
        own = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[kind] = counts.get(kind, 0) + 1
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(blocks, "attention_block", "attentions")
    count(blocks, "mlp_block", "MLPs")
    count(fuse_module, "linear_block", "other linear layers")
    count(fuse_module, "norm_block", "other norms")
    return counts
