"""Slots against a forward of each row alone: padded, in pieces, admitted late, moved, with windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from onlay.generation.prove import prove_slots
from onlay.generation.slots import SLOT_ATTENTION, MaskForm, Slots, attention
from tests.builders import SLIDING_WINDOW_TOKENS, tiny_model

SLOTTED = ("llama", "qwen3", "gpt2", "opt", "phi3", "gemma2", "gemma3", "mixtral", "qwen3_moe")


def row(length: int, seed: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", SLOTTED)
def test_rows_are_what_they_are_alone(name: str) -> None:
    """Longer than the window of those that have one; one row comes late, longer than the others, and columns run out."""
    model = tiny_model(name, dtype=torch.float64)
    proven = prove_slots(model, context_tokens=512)
    assert proven.failure is None
    rows = {0: row(50, 0), 1: row(40, 1), 2: row(60, 2)}
    begun = {0: 9, 1: 20, 2: 45}
    expected = {i: alone(model, ids) for i, ids in rows.items()}
    worst = 0.0
    with torch.inference_mode(), attention(model, proven.attention):
        slots = Slots(model, rows=3, columns=62, longest=512, piece_tokens=16, graphs=False)

        def compare(i: int, at: int, logits: Tensor) -> None:
            nonlocal worst
            worst = max(worst, float((logits - expected[i][at]).abs().max()))

        first = slots.admit([0, 1], [rows[0][:9], rows[1][:20]], active=[])
        compare(0, 8, first[0])
        compare(1, 19, first[1])
        active, moved = [0, 1], 0
        for step in range(40):
            if step == 12:
                compare(2, 44, slots.admit([2], [rows[2][:45]], active=active)[0])
                active.append(2)
            active = [i for i in active if begun[i] < len(rows[i])]
            ids = torch.tensor([rows[i][begun[i]] if i in active else 0 for i in range(3)])
            before = slots.column
            logits = slots.step(ids, active=active)
            moved += slots.column <= before
            for i in active:
                compare(i, begun[i], logits[i])
                begun[i] += 1
            if not any(begun[i] < len(rows[i]) for i in active):
                break
    assert begun == {0: 49, 1: 40, 2: 60} or begun == {0: 50, 1: 40, 2: 60}
    assert moved >= 1, "the columns ran out"
    # The tiny models' norms and rotary tables are float32 inside.
    assert worst < (1e-10 if name in ("gpt2", "opt") else 2e-5)


def test_keeping_rows_drops_the_others() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    rows = [row(30, i) for i in range(3)]
    with torch.inference_mode():
        slots = Slots(model, rows=3, columns=64, longest=512, piece_tokens=64, graphs=False)
        slots.admit([0, 1, 2], [ids[: 8 + 4 * i] for i, ids in enumerate(rows)], active=[])
        slots.keep([1, 0])
        assert slots.rows == 2
        assert slots.column == 12
        logits = slots.step(torch.tensor([rows[1][12], rows[0][8]]), active=[0, 1])
    assert torch.allclose(logits[0], alone(model, rows[1])[12], atol=2e-5)
    assert torch.allclose(logits[1], alone(model, rows[0])[8], atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_masks_are_the_models_own(name: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    tokens, starts = 2 * SLIDING_WINDOW_TOKENS + 3, torch.tensor([0, 7])
    padding = (torch.arange(tokens) >= starts[:, None]).long()
    theirs = create_masks_for_generate(
        model.config, inputs_embeds=torch.zeros(2, tokens, 32), attention_mask=padding, past_key_values=DynamicCache()
    )
    ours = MaskForm(model.config).make(torch.arange(tokens), starts, end=tokens, dtype=torch.float32)
    assert isinstance(theirs, dict) == isinstance(ours, dict)
    pairs = [(ours[kind], theirs[kind]) for kind in theirs] if isinstance(theirs, dict) else [(ours, theirs)]
    for our, their in pairs:
        real = padding.bool()[:, None, :, None]
        assert torch.equal((our == 0) & real, (their == 0) & real)
    if isinstance(ours, dict):
        assert not torch.equal(ours["full_attention"], ours["sliding_attention"])
    assert MaskForm(model.config).reaches(tokens) == (name == "gemma2")


def test_attention_is_put_back_on_an_exception() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation

    def fail() -> None:
        with attention(model, SLOT_ATTENTION):
            assert model.config._attn_implementation == SLOT_ATTENTION
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("name", "why"), [("bloom", "positions"), ("mamba", "state"), ("falcon_h1", "state")])
def test_what_cannot_be_slots_says_why(name: str, why: str) -> None:
    proven = prove_slots(tiny_model(name), context_tokens=512)
    assert proven.failure is not None
    assert why in proven.failure


def test_a_base_that_reads_its_columns_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that takes the place in memory for the position: each row is right alone, wrong as a slot."""
    model = tiny_model("llama")
    inner: nn.Module = model.model
    plain = type(inner).forward

    def by_column(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["position_ids"] = None
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(inner), "forward", by_column)
    proven = prove_slots(model, context_tokens=512)
    assert proven.failure is not None
    assert "differ" in proven.failure or "Error" in proven.failure


def test_softcapped_attention_is_left_to_the_base() -> None:
    assert prove_slots(tiny_model("gemma2"), context_tokens=512).attention is None
    assert prove_slots(tiny_model("gemma3"), context_tokens=512).attention == SLOT_ATTENTION


def test_rotary_frequencies_that_follow_the_longest_row_are_known() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert prove_slots(tiny_model("llama", rope_parameters=rope), context_tokens=512).alone_over == 512
    assert prove_slots(tiny_model("llama"), context_tokens=512).alone_over is None
