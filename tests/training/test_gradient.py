"""The gradient of a step: plain transformers + PEFT, example by example, in float64; and the same however a step is cut.

The reference below shares no code with onlay but the adapter's initial weights.  It reads the rows by itself, renders
them with the tokenizer's own chat template, finds the trained tokens by the template's marks, runs one example at a time
without padding, takes cross-entropy over all logits, and divides by the trained tokens of the step.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from onlay import stages
from onlay.errors import BaseModelError
from onlay.hardware import Hardware
from onlay.model.adapter import attach
from onlay.model.attention import Layout, choose_layout, use_attention
from onlay.model.load import load_base
from onlay.recipe import LoraAdapter, Recipe
from tests.builders import (
    FORMATS,
    AllFloat64,
    StepGradient,
    random_examples,
    recipe_for,
    relative_error,
    save_tiny_base,
    shake,
    step_gradient,
    tiny_model,
    write_rows,
)

CPU = torch.device("cpu")
NO_GPU = Hardware(devices=[], cpu_cores=2, host_memory_bytes=2**33, platform="test")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 7
BUDGETS = (1, 200, 400, 100_000)
FLOAT64_LIMIT = 1e-9
FLOAT32_LOSS_LIMIT = 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"), "llama")


@dataclass(frozen=True, slots=True)
class Prepared:
    recipe: Recipe
    prepared: stages.Prepared
    rows: Path


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))
    rows = write_rows(tmp_path / "rows.jsonl", ROWS, request.param)
    recipe = recipe_for(base, rows, training={"batch_size": ROWS})
    prepared = stages.prepare(recipe)
    assert prepared.dataset.format == request.param
    return Prepared(recipe, prepared, rows)


# --------------------------------------------------------------------------------------------------------- reference


def read_examples(base: Path, rows: Path) -> list[tuple[list[int], list[bool]]]:
    """Token ids and which of them are trained, of every row of the file, found without onlay."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages, tools = read_messages(row)
        if messages is None:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            examples.append((ids, [False] + [True] * (len(ids) - 1)))
            continue
        ids = tokenizer(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        trained, inside = [], False
        for i, token in enumerate(ids):
            inside = inside or ids[max(0, i - len(header)) : i] == header
            trained.append(inside)
            inside = inside and token != end
        examples.append((ids, trained))
    return examples


def read_messages(row: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, Any]:
    if "instruction" in row:
        row = {
            "prompt": "\n\n".join(text for text in (row["instruction"], row["input"]) if text),
            "completion": row["output"],
        }
    if "label" in row:
        row = {"prompt": row["text"], "completion": row["label"]}
    if "prompt" in row:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}], None
    if "conversations" in row:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]], None
    if "messages" not in row:
        return None, None
    for message in row["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return row["messages"], [
        {"type": "function", "function": tool} for tool in row["tools"]
    ] if "tools" in row else None


def plain_model(base: Path, adapter: dict[str, Tensor], dtype: torch.dtype) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    )
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable.keys() == adapter.keys()
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(adapter[name])
    adapted.train()
    return adapted  # type: ignore[return-value]


def plain_gradient(model: nn.Module, examples: list[tuple[list[int], list[bool]]]) -> StepGradient:
    total = sum(sum(trained) for _, trained in examples)
    nats = 0.0
    for ids, trained in examples:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        targets = torch.tensor([token if flag else -100 for token, flag in zip(ids[1:], trained[1:], strict=True)])
        loss = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / total
        loss.backward()
        nats += float(loss.detach())
    return StepGradient(
        nats, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(examples)
    )


# ------------------------------------------------------------------------------------------------- against the reference


def adapted_base(case: Prepared, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The base as a run loads it, in `dtype`, and with a run's adapter, whose weights are shaken."""
    loaded = load_base(case.prepared.source.facts, case.recipe.model, NO_GPU).model.to(dtype)  # type: ignore[arg-type]
    assert isinstance(case.recipe.adapter, LoraAdapter)
    adapted, _ = attach(loaded, case.recipe.adapter, seed=0)
    shake(adapted)
    return loaded, adapted


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_gradient_of_a_step_is_that_of_plain_transformers_and_peft(base: Path, case: Prepared) -> None:
    with AllFloat64():
        loaded, adapted = adapted_base(case, torch.float64)
        expected = plain_gradient(plain_model(base, weights_of(adapted), torch.float64), read_examples(base, case.rows))
        for packing in ("on", "off"):
            layout = choose_layout(loaded, packing=packing, device=CPU, compute_dtype=torch.float64)
            assert layout.packed == (packing == "on")
            for budget in BUDGETS:
                found = step_gradient(
                    adapted, layout, case.prepared.split("train"), budget_tokens=budget, compute_dtype=torch.float64
                )
                assert relative_error(found.gradients, expected.gradients) < FLOAT64_LIMIT
                assert found.loss == pytest.approx(expected.loss, rel=FLOAT64_LIMIT)
            assert found.micro_batches == 1


def test_the_loss_of_a_step_is_transformers_own_in_float32(base: Path, case: Prepared) -> None:
    loaded, adapted = adapted_base(case, torch.float32)
    plain = plain_model(base, weights_of(adapted), torch.float32)
    examples = read_examples(base, case.rows)
    nats = tokens = 0.0
    with torch.no_grad():
        for ids, trained in examples:
            labels = torch.tensor([[token if flag else -100 for token, flag in zip(ids, trained, strict=True)]])
            count = int((labels[0, 1:] != -100).sum())
            nats += float(plain(input_ids=torch.tensor([ids]), labels=labels).loss) * count
            tokens += count
    for packing in ("on", "off"):
        layout = choose_layout(loaded, packing=packing, device=CPU, compute_dtype=torch.float32)
        found = step_gradient(
            adapted, layout, case.prepared.split("train"), budget_tokens=150, compute_dtype=torch.float32
        )
        assert found.micro_batches > 1
        assert found.loss == pytest.approx(nats / tokens, rel=FLOAT32_LOSS_LIMIT)


# -------------------------------------------------------------------------------------------- however the step is cut

PACKS = {
    "llama": True,
    "qwen3": True,
    "mixtral": True,
    "bloom": False,
    "mamba": False,
    "recurrent_gemma": False,
    "falcon_h1": False,
}
"""Architectures, and whether they keep packed examples apart."""
CUTS = {320: 1, 160: 2, 80: 4, 40: 8}
"""Budgets in tokens, and the micro-batches that they cut 8 examples of 31 to 40 tokens into, packed or padded."""


def layouts_of(model: nn.Module, *, packs: bool) -> list[Layout]:
    def choose(packing: str) -> Layout:
        return choose_layout(model, packing=packing, device=CPU, compute_dtype=torch.float64)

    if packs:
        layouts = [choose("on")]
        assert layouts[0].packed
        use_attention(model, "sdpa")
    else:
        layouts = []
        with pytest.raises(
            BaseModelError, match=r"packed examples influence each other in this base .*logits of row 2"
        ):
            choose("on")
    padded = choose("auto")
    assert not padded.packed
    assert re.fullmatch("rows padded by .* because padding by length is faster than packing on a CPU", padded.reason)
    return [*layouts, padded]


@pytest.mark.parametrize(("name", "packs"), PACKS.items())
def test_every_cut_of_a_step_gives_the_same_gradient(name: str, packs: bool) -> None:
    examples = random_examples(8, least=31, most=40)
    with AllFloat64():
        model = tiny_model(name, dtype=torch.float64)
        layouts = layouts_of(model, packs=packs)
        adapted, _ = attach(model, LoraAdapter(rank=4), seed=0)
        if name == "mixtral":
            assert adapted.peft_config["default"].target_parameters
        shake(adapted)
        trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
        whole = None
        for layout in layouts:
            for budget, cuts in CUTS.items():
                found = step_gradient(adapted, layout, examples, budget_tokens=budget, compute_dtype=torch.float64)
                whole = whole or found
                assert found.micro_batches == cuts
                assert found.gradients.keys() == trainable
                assert relative_error(found.gradients, whole.gradients) < FLOAT64_LIMIT
                assert found.loss == pytest.approx(whole.loss, rel=FLOAT64_LIMIT)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_the_shares_of_all_ranks_add_up_to_the_gradient_of_one(world: int) -> None:
    examples = random_examples(8, least=5, most=40)
    model = tiny_model("llama", dtype=torch.float64)
    layout = choose_layout(model, packing="off", device=CPU, compute_dtype=torch.float64)
    adapted, _ = attach(model, LoraAdapter(rank=4), seed=0)
    shake(adapted)
    with AllFloat64():
        alone = step_gradient(adapted, layout, examples, budget_tokens=80, compute_dtype=torch.float64)
        shares = [
            step_gradient(
                adapted, layout, examples, budget_tokens=80, compute_dtype=torch.float64, rank=rank, world=world
            )
            for rank in range(world)
        ]
    added = {
        name: sum(
            (share.gradients[name] for share in shares if share.gradients), torch.zeros_like(alone.gradients[name])
        )
        for name in alone.gradients
    }
    assert relative_error(added, alone.gradients) < FLOAT64_LIMIT
    assert sum(share.loss for share in shares) == pytest.approx(alone.loss, rel=FLOAT64_LIMIT)
