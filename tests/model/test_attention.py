"""Which layout a base gets: packed where it keeps packed examples apart, else padded, with the reason."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.errors import BaseModelError
from onlay.model import attention
from onlay.model.attention import (
    PACKED_ATTENTION,
    Layout,
    choose_layout,
    packed_arguments,
    packed_attention,
    use_attention,
)
from tests.builders import ARCHITECTURES, SLIDING_WINDOW_TOKENS, VOCABULARY, AllFloat64, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
APART = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral", "qwen3_moe")
"""Keep packed rows apart, by positions that start anew; Gemma's with sliding windows."""
TOGETHER = ("bloom", "mamba", "recurrent_gemma", "falcon_h1", "opt")
"""ALiBi, recurrent layers, and positions that are counted along the row."""
LENGTHS = (50, SLIDING_WINDOW_TOKENS, 1, 37)
EXACT = 1e-12


def choose(model: nn.Module, packing: str, *, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Layout:
    return choose_layout(model, packing=packing, device=device, compute_dtype=dtype)


def random_rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@torch.no_grad()
def alone(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]


def test_every_tiny_architecture_is_on_one_of_the_lists() -> None:
    assert sorted(APART + TOGETHER) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", APART)
def test_packed_rows_have_the_logits_of_each_row_alone(name: str) -> None:
    rows = random_rows()
    with AllFloat64(), torch.no_grad():
        model = tiny_model(name, dtype=torch.float64)
        native = model.config._attn_implementation
        layout = choose(model, "on")
        assert layout == Layout(
            packed=True, mask_padding=False, attention=native, reason=f"packed rows, {native} attention"
        )
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        logits = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
        assert furthest(list(logits.split(LENGTHS)), alone(model, rows)) < EXACT


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_influence_each_other_are_not_packed(name: str) -> None:
    with AllFloat64():
        model = tiny_model(name, dtype=torch.float64)
        with pytest.raises(BaseModelError, match=r"packing = on, but packed examples influence each other") as caught:
            choose(model, "on")
        assert "logits of row 2 differ by" in caught.value.problem
        assert "packing to auto" in caught.value.remedy
        assert not choose(model, "auto", device=CUDA, dtype=torch.float32).packed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_needs_no_mask(name: str) -> None:
    rows = random_rows()
    with AllFloat64(), torch.no_grad():
        model = tiny_model(name, dtype=torch.float64)
        layout = choose(model, "off")
        assert not layout.packed
        assert not layout.mask_padding
        assert re.fullmatch("rows padded by length buckets.* because packing is off in the recipe", layout.reason)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5)
        logits = model(input_ids=padded, use_cache=False).logits
        assert furthest([logits[i, :n] for i, n in enumerate(LENGTHS)], alone(model, rows)) < EXACT


@pytest.mark.parametrize(
    ("packing", "device", "dtype", "why"),
    [
        ("auto", CPU, torch.float32, "padding by length is faster than packing on a CPU"),
        ("off", CUDA, torch.bfloat16, "packing is off in the recipe"),
        ("auto", CUDA, torch.float32, "there is no packed attention kernel for torch.float32 on cuda"),
        ("auto", CUDA, torch.bfloat16, f"{PACKED_ATTENTION}: "),
    ],
)
def test_the_reason_for_padding_is_told(packing: str, device: torch.device, dtype: torch.dtype, why: str) -> None:
    """The model lies on the CPU, where the packed kernel fails: as on a GPU that has none."""
    model = tiny_model("llama")
    layout = choose(model, packing, device=device, dtype=dtype)
    assert re.match(f"rows padded by length buckets.* because {re.escape(why)}", layout.reason)
    assert not layout.packed
    assert layout.attention == model.config._attn_implementation == ("onlay_blocks" if device.type == "cpu" else "sdpa")


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_model("bloom").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    choose(model, "auto", device=CUDA, dtype=torch.bfloat16)
    assert model.training is training
    assert model.config._attn_implementation == "eager"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Averaging(nn.Module):
    """No transformer: each token sees the mean of those that the mask lets it see, to its right as well."""

    def __init__(self, *, heeds_mask: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.heeds_mask = heeds_mask

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        seen = torch.ones_like(input_ids) if attention_mask is None or not self.heeds_mask else attention_mask
        states = self.embedding(input_ids)
        mean = (states * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        return SimpleNamespace(logits=states + mean)


def test_a_base_that_looks_to_the_right_gets_a_mask() -> None:
    assert choose(Averaging(heeds_mask=True), "off", dtype=torch.float32).mask_padding


def test_a_base_that_no_layout_fits_is_refused() -> None:
    with pytest.raises(BaseModelError, match=r"Neither packed nor padded rows .*logits of row 2 differ by"):
        choose(Averaging(heeds_mask=False), "off", dtype=torch.float32)


def test_running_out_of_memory_is_no_finding_about_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: Any, **_kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "_logits", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        choose(tiny_model("llama"), "auto")


# -------------------------------------------------------------------------------------------------- packed attention


def attention_in_float64(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: list[int],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """query (T, H, D), key and value (T, G, D) -> (T, H, D): the definition, one example and head at a time."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    for begin, end in itertools.pairwise(borders):
        n = end - begin
        distance = torch.arange(n, device=query.device)[:, None] - torch.arange(n, device=query.device)[None]
        hidden = (distance < 0) | (distance >= (window or n))
        for head in range(query.shape[1]):
            scores = query[begin:end, head] @ key[begin:end, head // groups].T * (scale or query.shape[2] ** -0.5)
            out[begin:end, head] = (
                functional.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value[begin:end, head // groups]
            )
    return out


def fake_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn by its documentation, computed in float64 on the CPU."""
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == int(cu_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0  # causal
    exact = attention_in_float64(query, key, value, cu_q.tolist(), scale=scale, window=None if left < 0 else left + 1)
    return exact.to(query.dtype)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_packed_attention_hands_the_kernel_what_the_model_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders, scale, grouped heads, sliding windows: with a kernel made from the definition, logits are those of each row alone."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen_attn)
    rows = random_rows()
    with AllFloat64(), torch.no_grad():
        model = tiny_model(name, dtype=torch.float64)
        expected = alone(model, rows)
        use_attention(model, PACKED_ATTENTION)
        borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        extra = packed_arguments(model, borders, max(LENGTHS))
        logits = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **extra).logits[0]
    assert furthest(list(logits.split(LENGTHS)), expected) < EXACT


def test_with_a_kernel_16_bit_training_on_cuda_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen_attn)
    model = tiny_model("llama", initializer_range=0.05)
    layout = choose(model, "auto", device=CUDA, dtype=torch.bfloat16)
    assert layout.packed
    assert layout.reason == f"packed rows, {PACKED_ATTENTION} attention"
    assert model.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("name", ["bloom", "mamba", "recurrent_gemma", "falcon_h1"])
@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_a_leak_below_the_rounding_of_16_bit_is_found(
    name: str, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh random weights mix rows so weakly that bf16 logits hardly tell; training would make the leak grow."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen_attn)
    model = tiny_model(name, initializer_range=spread)
    assert not choose(model, "auto", device=CUDA, dtype=torch.bfloat16).packed


def test_a_kernel_that_leaks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attention_in_float64(query, key, value, [0, len(query)]).to(query.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", leaking)
    layout = choose(tiny_model("llama", initializer_range=0.05), "auto", device=CUDA, dtype=torch.bfloat16)
    assert not layout.packed
    assert f"{PACKED_ATTENTION}: logits of row 2" in layout.reason


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "masks"),
        ({"module": SimpleNamespace(is_causal=False)}, "bidirectionality"),
        ({"cu_seq_lens_q": None}, "borders"),
    ],
)
def test_packed_attention_refuses_what_the_kernel_does_not_have(arguments: dict[str, Any], what: str) -> None:
    states = torch.zeros(1, 2, 3, 8)
    given: dict[str, Any] = {
        "module": SimpleNamespace(is_causal=True), "query": states, "key": states, "value": states,
        "attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3,
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match=what):
        packed_attention(**given | arguments)


def test_borders_are_given_to_packed_attention_alone() -> None:
    model = tiny_model("llama")
    borders = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert packed_arguments(model, borders, 3) == {}
    use_attention(model, PACKED_ATTENTION)
    given = packed_arguments(model, borders, 3)
    assert given["cu_seq_lens_q"] is borders
    assert given["max_length_q"] == 3
