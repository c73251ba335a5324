"""The loss of a micro-batch: the sum of cross-entropy over its trained tokens, with logits nowhere else."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.data.pack import MicroBatch, collate
from onlay.kernels.chunked_loss import linear_cross_entropy
from onlay.model.adapter import attach
from onlay.model.attention import Layout
from onlay.recipe import LoraAdapter
from onlay.training.loss import IN_CHUNKS, ORDINARY, Loss, make_loss
from tests.builders import (
    ARCHITECTURES,
    VOCABULARY,
    AllFloat64,
    ListExamples,
    random_examples,
    relative_error,
    shake,
    tiny_config,
    tiny_model,
)

CPU = torch.device("cpu")
PADDED = Layout(packed=False, mask_padding=False, attention="sdpa", reason="")
MASKED = Layout(packed=False, mask_padding=True, attention="sdpa", reason="")
PACKED = Layout(packed=True, mask_padding=False, attention="sdpa", reason="")


def batch_of(examples: ListExamples, layout: Layout) -> MicroBatch:
    return collate([examples.example(i) for i in range(len(examples))], packed=layout.packed, pad_token_id=256)


def loss_of(model: nn.Module, examples: ListExamples, layout: Layout, dtype: torch.dtype = torch.float64) -> Tensor:
    return make_loss(model, layout, device=CPU, compute_dtype=dtype)(model, batch_of(examples, layout))


def one_by_one(model: nn.Module, examples: ListExamples) -> float:
    nats = 0.0
    for i in range(len(examples)):
        ids, trained = (torch.tensor(array.tolist()) for array in examples.example(i))
        chances = functional.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
        nats -= float(chances[:-1].gather(1, ids[1:, None])[trained[1:]].sum())
    return nats


@pytest.mark.parametrize("layout", [PADDED, MASKED, PACKED], ids=["padded", "masked", "packed"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_sum_of_nats_of_the_trained_tokens(layout: Layout, seed: int) -> None:
    examples = random_examples(5, seed=seed)
    with AllFloat64(), torch.no_grad():
        model = tiny_model("llama", dtype=torch.float64)
        assert float(loss_of(model, examples, layout)) == pytest.approx(one_by_one(model, examples), rel=1e-12)


def test_rows_without_a_trained_token_add_nothing() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    some = ListExamples([[1, 2, 3]], [[False, True, True]])
    more = ListExamples([[1, 2, 3], [7, 8, 9, 10]], [[False, True, True], [False] * 4])
    with torch.no_grad():
        assert float(loss_of(model, more, PADDED)) == pytest.approx(float(loss_of(model, some, PADDED)), rel=1e-12)
        nothing = loss_of(model, ListExamples([[7, 8, 9]], [[False] * 3]), PADDED)
    assert float(nothing) == 0.0


SPARSE = ListExamples(
    [list(range(30)), list(range(20))], [[i in (4, 9, 29) for i in range(30)], [i in (4, 19) for i in range(20)]]
)
"""Five trained tokens, predicted at positions 3, 8 and 28 of the first row, 3 and 18 of the second."""


@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
def test_the_head_is_taken_at_trained_positions_alone(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    loss = make_loss(model, layout, device=CPU, compute_dtype=torch.float32)
    assert loss.note == IN_CHUNKS
    seen: list[int] = []

    def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        seen.extend(targets.tolist())
        assert len(hidden) == len(targets)
        return linear_cross_entropy(hidden, weight, bias, targets)

    monkeypatch.setattr("onlay.training.loss.linear_cross_entropy", watched)
    loss(model, batch_of(SPARSE, layout))
    assert sorted(seen) == [4, 4, 9, 19, 29]


@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
def test_the_ordinary_way_asks_for_the_columns_with_a_trained_token(layout: Layout) -> None:
    model: Any = tiny_model("gemma2")
    loss = make_loss(model, layout, device=CPU, compute_dtype=torch.float32)
    assert loss.note.startswith(ORDINARY)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape))
    loss(model, batch_of(SPARSE, layout))
    assert [shape[:2] for shape in seen] == [(1, 5) if layout.packed else (2, 4)]


class NoChoice(nn.Module):
    """A causal model whose forward has no logits_to_keep, as some outside of transformers have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(
            logits=self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache).logits
        )


@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
def test_a_model_that_computes_all_logits_has_the_same_loss(layout: Layout) -> None:
    model, examples = tiny_model("llama", dtype=torch.float64), random_examples(4)
    with torch.no_grad():
        assert torch.allclose(loss_of(NoChoice(model), examples, layout), loss_of(model, examples, layout), rtol=1e-12)


def test_in_16_bit_the_sum_is_taken_in_float32() -> None:
    examples = random_examples(4)
    model = tiny_model("llama", dtype=torch.bfloat16)
    exact = one_by_one(tiny_model("llama", dtype=torch.float32), examples)
    loss = loss_of(model, examples, PADDED, torch.bfloat16)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(exact, rel=0.02)
    # A sum of bf16 numbers would be a multiple of 2.
    assert math.remainder(float(loss), 1.0) != 0.0


@pytest.mark.parametrize(
    ("layout", "given"), [(PADDED, False), (MASKED, True), (PACKED, False)], ids=["padded", "masked", "packed"]
)
def test_a_mask_is_given_only_where_the_layout_says_so(layout: Layout, given: bool) -> None:
    model, seen = tiny_model("llama"), []

    def watch(_module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        seen.append(arguments)

    model.register_forward_pre_hook(watch, with_kwargs=True)
    loss_of(model, random_examples(3), layout, torch.float32)
    assert (seen[0].get("attention_mask") is not None) == given
    assert ("position_ids" in seen[0]) == layout.packed
    assert seen[0]["use_cache"] is False


def test_nats_of_a_flat_model_are_the_logarithm_of_its_vocabulary() -> None:
    model: Any = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = random_examples(3)
    assert float(loss_of(model, examples, PADDED)) == pytest.approx(
        int(examples.trained_counts.sum()) * math.log(VOCABULARY)
    )


# ------------------------------------------------------------------------------------------------- which of the two ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_that_alone_makes_the_logits_is_taken_in_chunks(name: str, dtype: torch.dtype) -> None:
    caps = name in ("gemma2", "recurrent_gemma")
    note = make_loss(tiny_model(name, dtype=dtype), MASKED, device=CPU, compute_dtype=dtype).note
    assert note == (f"{ORDINARY}, because it changes logits after its output head" if caps else IN_CHUNKS)


def scaled_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Families that divide or multiply their logits by a number of their own, and one whose head is its embedding."""
    import transformers

    sizes = tiny_config("llama").to_dict()
    common = {key: sizes[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "initializer_range")}  # fmt: skip
    config: Any = {
        "granite": lambda: transformers.GraniteConfig(**common, logits_scaling=8.0),
        "cohere": lambda: transformers.CohereConfig(**common, logit_scale=0.0625),
        "tied llama": lambda: transformers.LlamaConfig(**common, tie_word_embeddings=True),
    }[name]()
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize(("name", "in_chunks"), [("granite", False), ("cohere", False), ("tied llama", True)])
def test_logits_that_are_scaled_are_left_to_the_model(name: str, in_chunks: bool) -> None:
    model, examples = scaled_model(name, torch.float64), random_examples(4)
    with AllFloat64(), torch.no_grad():
        loss = make_loss(model, PADDED, device=CPU, compute_dtype=torch.float64)
        assert (loss.note == IN_CHUNKS) == in_chunks
        assert float(loss(model, batch_of(examples, PADDED))) == pytest.approx(one_by_one(model, examples), rel=1e-12)


def test_what_happens_around_the_head_is_noticed() -> None:
    """In code that comes with a base anything may."""

    def note(change: Any) -> str:
        model: Any = tiny_model("llama")
        change(model)
        return make_loss(model, PADDED, device=CPU, compute_dtype=torch.float32).note

    def shrink_hidden(model: Any) -> None:
        model.lm_head.register_forward_pre_hook(lambda _module, given: (given[0] * 0.999,))

    def twice(model: Any) -> None:
        model.lm_head = nn.Sequential(model.lm_head, nn.Identity())

    assert "changes hidden states before its output head" in note(shrink_hidden)
    assert "its output head is a Sequential" in note(twice)


def test_a_head_that_trains_is_left_to_autograd() -> None:
    model: Any = tiny_model("llama")
    model.requires_grad_(True)
    loss = make_loss(model, PADDED, device=CPU, compute_dtype=torch.float32)
    assert loss.note == f"{ORDINARY}, because its output head is trained"
    loss(model, batch_of(random_examples(3), PADDED)).backward()
    assert bool(model.lm_head.weight.grad.any())


@pytest.mark.parametrize("layout", [PADDED, MASKED, PACKED], ids=["padded", "masked", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "mamba", "falcon_h1"])
def test_both_ways_give_the_same_loss_and_gradient(name: str, layout: Layout) -> None:
    if layout.packed and name in ("mamba", "falcon_h1"):
        pytest.skip("does not keep packed rows apart")
    with AllFloat64():
        model, _ = attach(tiny_model(name, dtype=torch.float64), LoraAdapter(rank=4), seed=0)
        shake(model)
        batch = batch_of(random_examples(5, most=20), layout)
        chunked = Loss(model, layout, device=CPU, compute_dtype=torch.float64)
        assert chunked.note == IN_CHUNKS

        def gradients(nats: Tensor) -> dict[str, Tensor]:
            model.zero_grad()
            (nats / 7).backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        ours, theirs = chunked(model, batch), chunked._ordinary(model, batch)
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
        assert relative_error(gradients(ours), gradients(theirs)) < 1e-12
