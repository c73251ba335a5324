from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from onlay.errors import ProofError
from onlay.evaluation import likelihood
from onlay.evaluation.compare import compare
from onlay.evaluation.likelihood import (
    Example,
    Passage,
    RowNats,
    measured_nats,
    passages_of_examples,
    passages_of_texts,
    row_nats,
    total,
)
from onlay.model.quantize import QuantizedLinear
from tests.builders import ARCHITECTURES, random_examples, tiny_model, tiny_pad_token_id, tiny_tokenizer

PAD = tiny_pad_token_id()


def examples(n: int, *, seed: int = 0) -> list[Example]:
    rows = random_examples(n, seed=seed)
    return [rows.example(i) for i in range(n)]


def passages(n: int, *, seed: int = 0) -> list[Passage]:
    return [Passage((example,), 10) for example in examples(n, seed=seed)]


def transformers_nats(model: Any, example: Example) -> float:
    """Its own loss on one row without padding, from logits that it turns into float32."""
    ids, trained = (torch.as_tensor(np.array(part))[None] for part in example)
    with torch.no_grad():
        loss = model(input_ids=ids.long(), labels=torch.where(trained, ids.long(), -100)).loss
    return float(loss) * int(trained[:, 1:].sum())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nats_are_transformers_own_on_rows_without_padding(name: str) -> None:
    model = tiny_model(name)
    rows = passages(9)
    found = row_nats(model, rows, pad_token_id=PAD, budget_tokens=100)
    np.testing.assert_allclose(found.nats, [transformers_nats(model, row.windows[0]) for row in rows], rtol=3e-5)
    np.testing.assert_array_equal(found.tokens, [int(np.sum(row.windows[0][1][1:])) for row in rows])


def test_perplexity_is_that_of_transformers_in_float64() -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    rows = passages(20)
    record = total(row_nats(model, rows, pad_token_id=PAD), text="held_out", system="base")
    nats = sum(transformers_nats(model, row.windows[0]) for row in rows)
    tokens = sum(int(np.sum(row.windows[0][1][1:])) for row in rows)
    assert record.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert record.nats_per_token == pytest.approx(nats / tokens, rel=1e-7)
    assert record.bits_per_byte == pytest.approx(nats / math.log(2) / 200, rel=1e-7)
    assert (record.rows, record.tokens, record.bytes) == (20, tokens, 200)


@pytest.mark.parametrize("budget_tokens", [1, 37, 100_000])
def test_neither_the_budget_nor_the_chunks_change_anything(budget_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama", dtype=torch.float64), passages(12)
    whole = row_nats(model, rows, pad_token_id=PAD)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", 4 * 272 * 3)  # three tokens a chunk
    np.testing.assert_allclose(
        row_nats(model, rows, pad_token_id=PAD, budget_tokens=budget_tokens).nats, whole.nats, rtol=1e-12
    )


def spied_widths(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that the output head is asked for at a time."""
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, given, _out: widths.append(given[0].numel() // given[0].shape[-1])
    )
    return widths


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("gpt2", {}),
    ],
)
def test_logits_never_exist_whole(name: str, changes: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name, **changes)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", 4 * 272 * 8)
    widths = spied_widths(model, monkeypatch)
    found = row_nats(model, passages(9), pad_token_id=PAD)
    assert max(widths[2:]) == 8, "but for the two probes, eight tokens at a time"
    assert found.note.startswith("logits from hidden states")


def test_a_model_that_does_something_unknown_to_logits_is_run_whole() -> None:
    model = tiny_model("llama")
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2 + out.logits.roll(1, -1)
        return out

    rows = passages(6)
    plain = row_nats(model, rows, pad_token_id=PAD)
    model.forward = doubled
    found = row_nats(model, rows, pad_token_id=PAD)
    assert "own forward, because" in found.note
    for row, nats in zip(rows, found.nats, strict=True):
        ids, trained = (torch.as_tensor(np.array(part)) for part in row.windows[0])
        logs = model(input_ids=ids[None].long()).logits[0, :-1].log_softmax(-1)
        assert nats == pytest.approx(
            -float(logs[torch.arange(len(ids) - 1), ids[1:].long()][trained[1:]].sum()), rel=1e-5
        )
    assert not np.allclose(found.nats, plain.nats)


def adapted(model: Any, targets: list[str]) -> Any:
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    return wrapped.eval()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_with_and_without_the_adapter(targets: list[str]) -> None:
    rows = passages(6)
    base = row_nats(tiny_model("llama"), rows, pad_token_id=PAD)
    model = adapted(tiny_model("llama"), targets)
    on = row_nats(model, rows, pad_token_id=PAD)
    off = row_nats(model, rows, pad_token_id=PAD, within=model.disable_adapter)
    np.testing.assert_allclose(on.nats, [transformers_nats(model, row.windows[0]) for row in rows], rtol=3e-5)
    np.testing.assert_allclose(off.nats, base.nats, rtol=1e-6)
    assert not np.allclose(on.nats, off.nats, rtol=1e-2)


@pytest.mark.parametrize("storage", ["bfloat16", "nf4"])
def test_sixteen_bit_and_nf4_bases_with_a_float32_adapter(storage: str) -> None:
    base: Any = tiny_model("llama", dtype=torch.bfloat16)
    if storage == "nf4":
        for layer in base.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                stored = QuantizedLinear.from_linear(
                    layer.mlp.get_submodule(name), storage="nf4", double_quantization=True
                )
                setattr(layer.mlp, name, stored)
    rows = passages(6)
    model = adapted(base, ["q_proj", "v_proj"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = row_nats(model, rows, pad_token_id=PAD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [transformers_nats(model, row.windows[0]) for row in rows]
    np.testing.assert_allclose(found.nats, expected, rtol=0.02)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    seen: list[tuple[int, int]] = []
    row_nats(model, passages(5), pad_token_id=PAD, progress=lambda done, of: seen.append((done, of)))
    assert model.training and seen[-1] == (5, 5)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = math.nan
    with pytest.raises(ProofError, match="The loss of 3 of 3 rows is not a finite number; the first is row 1"):
        row_nats(model, passages(3), pad_token_id=PAD)


# ------------------------------------------------------------------------------------------------------------ what is scored


@pytest.fixture(scope="module")
def coders() -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    tokenizer = tiny_tokenizer()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


Coders = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


def test_bytes_are_those_of_the_trained_text(coders: Coders) -> None:
    encode, decode = coders
    question, answer = encode("wie?"), encode("schön")
    ids = [*question, *answer, 257, *question, *answer]  # 257 ends a turn: trained, but no text
    trained = [False] * 4 + [True] * 7 + [False] * 4 + [True] * 6
    [found] = passages_of_examples([(ids, trained)], decode=decode)
    assert found.bytes == 2 * len("schön".encode()) == 12
    # The first token has nothing before it.
    assert passages_of_examples([(answer, [True] * 6)], decode=decode)[0].bytes == 5


@pytest.mark.parametrize("window_tokens", [2, 3, 7, 500])
@pytest.mark.parametrize("bos_id", [None, 258])
def test_every_token_of_a_text_is_scored_once(coders: Coders, window_tokens: int, bos_id: int | None) -> None:
    encode, decode = coders
    text = "Der Fluß läuft unter 7 Brücken."
    [found, empty] = passages_of_texts(
        [text, ""], encode=encode, decode=decode, window_tokens=window_tokens, bos_id=bos_id
    )
    scored = [int(token) for ids, trained in found.windows for token, flag in zip(ids, trained, strict=True) if flag]
    assert scored == encode(text)[bos_id is None :]
    assert found.bytes == len(text.encode()) - (bos_id is None)
    assert all(2 <= len(ids) <= window_tokens and not trained[0] for ids, trained in found.windows)
    if bos_id is not None:
        assert all(ids[0] == bos_id for ids, _ in found.windows)
    else:
        assert [ids[0] for ids, _ in found.windows[1:]] == [ids[-1] for ids, _ in found.windows[:-1]]
    assert empty == Passage((), 0) or (empty.windows, empty.bytes) == ((), 0)


def test_windows_of_one_text_are_one_row(coders: Coders) -> None:
    encode, decode = coders
    model = tiny_model("llama", dtype=torch.float64)
    texts = ["seven green boats wait for rain", "", "the river"]
    rows = passages_of_texts(texts, encode=encode, decode=decode, window_tokens=8, bos_id=None)
    found = row_nats(model, rows, pad_token_id=PAD, budget_tokens=20)
    by_window = [sum(transformers_nats(model, window) for window in row.windows) for row in rows]
    np.testing.assert_allclose(found.nats, by_window, rtol=1e-7)
    assert found.tokens.tolist() == [len(text) - 1 if text else 0 for text in texts]
    record = total(found, text="general", system="base")
    assert (record.rows, record.bytes) == (2, sum(len(text) - 1 for text in texts if text))


def test_a_window_needs_two_tokens(coders: Coders) -> None:
    with pytest.raises(ValueError, match="window_tokens = 1"):
        passages_of_texts(["a"], encode=coders[0], decode=coders[1], window_tokens=1, bos_id=None)


def numbers(nats: list[float], tokens: list[int]) -> RowNats:
    return RowNats(np.array(nats), np.array(tokens), np.array(tokens) * 2, np.ones(len(nats), dtype=bool), "")


def test_rows_weigh_by_their_tokens() -> None:
    ours, theirs = numbers([90.0, 1.0, 0.0], [90, 2, 0]), numbers([180.0, 1.0, 0.0], [90, 2, 0])
    record = total(ours, text="x", system="a")
    assert (record.rows, record.tokens, record.nats_per_token) == (2, 92, 91 / 92)
    assert record.perplexity == math.exp(91 / 92)
    found = measured_nats(ours)
    assert found.rows == 2 and found.value == 91 / 92
    compared = compare(found, measured_nats(theirs), system="a", against="b")
    assert compared is not None
    assert (compared.rows, compared.difference) == (2, pytest.approx((91 - 181) / 92))
    assert not compared.higher_is_better
    with pytest.raises(ValueError, match="nothing to tell"):
        total(numbers([0.0], [0]), text="x", system="a")


def test_a_model_that_forgot_is_worse() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 200, 60)
    before = draw.normal(2.5, 0.5, 60) * tokens
    after = before + draw.normal(0.1, 0.1, 60) * tokens
    ours, theirs = (measured_nats(numbers(nats.tolist(), tokens.tolist())) for nats in (after, before))
    found = compare(ours, theirs, system="adapter", against="base")
    assert found is not None and found.verdict.startswith("worse by 0.1") and found.verdict.count("nats a token") == 1
