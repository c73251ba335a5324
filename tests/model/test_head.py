"""The classification head against transformers' own classes, and what is written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from onlay.errors import BaseModelError, OutputError
from onlay.model.head import ClassificationHead, SavedHead, attach_head, load_head, read_head, save_head
from onlay.records import ModelFacts
from tests.builders import ARCHITECTURES, VOCABULARY, shake, tiny_model

LABELS = ["cold", "dry", "wet"]
PAD = 256
FACTS = ModelFacts(
    name="tiny", path="tiny", revision=None, licence=None, architecture="LlamaForCausalLM", model_type="llama",
    num_parameters=0, weight_bytes=0, vocabulary_size=VOCABULARY, context_tokens=512, hidden_size=32, num_layers=2,
    linear_shapes={}, weight_fingerprint="f",
)  # fmt: skip


def texts(lengths: tuple[int, ...] = (5, 12, 1, 9)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def logits_of(head: ClassificationHead, rows: list[list[int]]) -> Tensor:
    columns = torch.tensor([len(row) - 1 for row in rows])
    found: Tensor = head(torch.arange(len(rows)), columns, **padded(rows))
    return found


def reference(model: PreTrainedModel, weight: Tensor) -> PreTrainedModel:
    """transformers' class for the same base, with `score.weight` put in by its name."""
    names = {"id2label": {i: str(i) for i in range(len(weight))}, "label2id": {str(i): i for i in range(len(weight))}}
    config = type(model.config).from_dict(model.config.to_dict() | names | {"pad_token_id": PAD})
    # Experts one by one in float64: the grouped kernel, which is the default, has none.
    experts = "eager" if model.dtype == torch.float64 else None
    classifier: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config, dtype=model.dtype, experts_implementation=experts
    )
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("lm_head")}
    missing = classifier.load_state_dict(state | {"score.weight": weight}, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [])
    return classifier.eval()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_logits_are_those_of_transformers_own_class(name: str) -> None:
    """In float32, as near to float64 as transformers' own are."""
    found, expected = {}, {}
    for dtype in (torch.float32, torch.float64):
        model = tiny_model(name, dtype=dtype)
        head = attach_head(model, LABELS)
        shake(head, scale=1.0)
        head.score.weight.data.copy_(head.score.weight.float())
        expected[dtype] = reference(model, head.score.weight.detach())(**padded(texts())).logits
        found[dtype] = logits_of(head, texts())
        assert found[dtype].dtype == dtype
    exact = expected[torch.float64]
    eps = torch.finfo(torch.float64).eps
    assert (found[torch.float64] - exact).norm() <= eps**0.5 * exact.norm()
    assert (found[torch.float32] - exact).norm() <= 2 * (expected[torch.float32] - exact).norm()
    assert exact.std() > 0.1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_body_is_all_but_the_language_models_head(name: str) -> None:
    """Its hidden states through the base's own output layer order the tokens as the base's logits do."""
    model = tiny_model(name)
    head = attach_head(model, LABELS)
    [row] = texts((12,))
    ids = torch.tensor([row])
    output: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.score.weight = torch.nn.Parameter(output.weight[:50].float())
        found, expected = head(torch.zeros(1, dtype=torch.long), torch.tensor([11]), input_ids=ids), model(ids).logits
    assert torch.equal(found[0].argsort(), expected[0, -1, :50].argsort())


def test_only_the_head_trains_and_it_starts_at_zero() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    head = attach_head(model, LABELS)
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"score.weight"}
    assert head.score.weight.dtype == torch.float32
    assert not head.score.weight.any()
    logits = logits_of(head, texts())
    logits.logsumexp(-1).sum().backward()
    assert head.score.weight.grad is not None and bool(head.score.weight.grad.all())
    assert all(p.grad is None for p in model.parameters())


def test_no_activation_of_the_body_is_kept() -> None:
    head = attach_head(tiny_model("llama"), LABELS)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits_of(head, texts())
    assert sum(tensor.numel() for tensor in saved if not isinstance(tensor, torch.nn.Parameter)) <= 4 * 32


def test_a_frozen_bodys_dropout_stays_off() -> None:
    head = attach_head(tiny_model("gpt2", resid_pdrop=0.5), LABELS)
    shake(head)
    head.train()
    assert torch.equal(logits_of(head, texts()), logits_of(head, texts()))


def test_probabilities_are_each_texts_alone_in_the_given_order() -> None:
    head = attach_head(tiny_model("bloom"), LABELS)
    shake(head, scale=1.0)
    rows = texts((7, 3, 7, 12, 3))
    together, alone = head.probabilities(rows), [head.probabilities([row])[0] for row in rows]
    exact = ClassificationHead(tiny_model("bloom", dtype=torch.float64), num_labels=3)
    exact.score.weight.data.copy_(head.score.weight)
    expected = torch.tensor(exact.probabilities(rows), dtype=torch.float64)
    error = (torch.tensor(alone, dtype=torch.float64) - expected).abs().max()
    assert (torch.tensor(together, dtype=torch.float64) - expected).abs().max() <= 2 * error
    assert error < (expected[0] - expected[2]).abs().max()  # rows of one length are not mixed up
    assert head.probabilities([]) == []


# --------------------------------------------------------------------------------------------------------- save, load


def test_what_is_saved_loads_here_and_in_transformers(tmp_path: Path) -> None:
    head = attach_head(tiny_model("llama"), LABELS)
    shake(head, scale=1.0)
    save_head(head, tmp_path / "head", facts=FACTS, labels=LABELS, storage="nf4", extra={"step": 7})
    again = load_head(tiny_model("llama"), tmp_path / "head", facts=FACTS)
    assert read_head(tmp_path / "head", facts=FACTS) == SavedHead(labels=LABELS, storage="nf4")
    assert not again.score.weight.requires_grad
    weight = load_file(tmp_path / "head" / "head.safetensors")["score.weight"]
    assert torch.equal(weight, head.score.weight)
    expected = reference(tiny_model("llama"), weight)(**padded(texts())).logits
    exact_head = attach_head(tiny_model("llama", dtype=torch.float64), LABELS)
    exact_head.score.weight.data.copy_(weight)
    exact = logits_of(exact_head, texts())
    assert (logits_of(again, texts()) - exact).norm() <= 2 * (expected - exact).norm()
    notes = json.loads((tmp_path / "head" / "head.json").read_text())
    assert (notes["labels"], notes["hidden_size"], notes["step"], notes["base"]) == (LABELS, 32, 7, "tiny")


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_head(attach_head(tiny_model("llama"), LABELS), tmp_path, facts=FACTS, labels=LABELS, storage="nf4", extra={})
    with pytest.raises(BaseModelError, match="was trained on tiny with other weights"):
        load_head(tiny_model("llama"), tmp_path, facts=FACTS.model_copy(update={"weight_fingerprint": "g"}))
    wider = tiny_model("llama", hidden_size=64)
    with pytest.raises(BaseModelError, match=r"is 3 x 32; 3 labels on tiny need 3 x 64"):
        load_head(wider, tmp_path, facts=FACTS)


def test_what_is_not_there_or_broken_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no head"):
        read_head(tmp_path, facts=FACTS)
    save_head(attach_head(tiny_model("llama"), LABELS), tmp_path, facts=FACTS, labels=LABELS, storage="nf4", extra={})
    (tmp_path / "head.safetensors").write_bytes(b"no")
    with pytest.raises(OutputError, match=r"head\.safetensors cannot be read"):
        load_head(tiny_model("llama"), tmp_path, facts=FACTS)
    save_file({"other": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(OutputError, match=r"cannot be read: 'score\.weight'"):
        load_head(tiny_model("llama"), tmp_path, facts=FACTS)


def test_a_base_without_a_plain_output_layer_has_no_place_for_a_head() -> None:
    base: Any = SimpleNamespace(get_decoder=lambda: None, get_output_embeddings=lambda: None)
    with pytest.raises(BaseModelError, match="no place for a head"):
        ClassificationHead(cast(PreTrainedModel, base), num_labels=2)
