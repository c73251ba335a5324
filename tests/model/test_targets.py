"""Presets of adapter.targets by the names of modules."""

from __future__ import annotations

import pytest

from onlay.model.targets import is_wanted


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h.0.attn.c_attn", {"all-linear", "attention", "qv"}),
        ("model.layers.3.self_attn.v_proj", {"all-linear", "attention", "qv"}),
        ("model.layers.3.self_attn.o_proj", {"all-linear", "attention"}),
        ("model.layers.3.mlp.gate_proj", {"all-linear", "mlp"}),
        ("encoder.layer.1.attention.self.query", {"all-linear", "attention", "qv"}),
        ("query", {"all-linear", "mlp"}),
    ],
)
def test_presets(name: str, found: set[str]) -> None:
    assert {wanted for wanted in ("all-linear", "attention", "mlp", "qv") if is_wanted(name, wanted)} == found


def test_listed_names_match_whole_words() -> None:
    name = "model.layers.3.mlp.gate_proj"
    assert is_wanted(name, ["q_proj", "gate_proj"]) and is_wanted(name, ["mlp.gate_proj"]) and is_wanted(name, [name])
    assert not is_wanted(name, ["proj"]) and not is_wanted(name, ["gate"])
