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
from onlay.model.attention import Layout
from onlay.training.loss import make_loss
from tests.builders import VOCABULARY, AllFloat64, ListExamples, random_examples, tiny_model

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


@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
def test_the_head_runs_at_trained_positions_alone(layout: Layout) -> None:
    model: Any = tiny_model("llama")
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape))
    examples = ListExamples(
        [list(range(30)), list(range(20))], [[i in (4, 29) for i in range(30)], [i in (4, 19) for i in range(20)]]
    )
    loss_of(model, examples, layout, torch.float32)
    assert seen[0][:2] == ((1, 4) if layout.packed else (2, 3))


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
