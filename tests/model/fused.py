"""What tests of the fast path share: small adapted bases in float64, and whether two of them are the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from onlay.model.adapter import attach
from onlay.model.attention import PACKED_ATTENTION, Layout, packed_arguments
from onlay.model.fuse import Fused, fuse
from onlay.recipe import ADAPTERS, LoraAdapter
from tests.builders import VOCABULARY, shake, tiny_config, tiny_model

IDS = torch.arange(48).view(2, 24) * 37 % VOCABULARY
LENGTHS = (7, 1, 25, 15)
PADDED = Layout(packed=False, mask_padding=False, attention="sdpa", reason="")
PACKED = Layout(packed=True, mask_padding=False, attention=PACKED_ATTENTION, reason="")
ROUNDING = 1e-12
"""Of a whole model in float64, relative; what only float32 would give differs by 1e-7."""
Counts = dict[str, int]


def section_of(method: str, **fields: Any) -> LoraAdapter:
    for kind in ADAPTERS:
        if issubclass(kind, LoraAdapter) and method in str(kind.model_fields["method"].annotation):
            return kind(**{"method": method, "rank": 2, **fields})
    raise ValueError(method)


def with_adapter(base: Any, method: str = "lora", **fields: Any) -> Any:
    model, _ = attach(base, section_of(method, **fields), seed=0)
    shake(model)
    return model.eval()


def adapted(name: str = "llama", method: str = "lora", dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    return with_adapter(another_base(name, dtype), method, **fields)


OTHERS = {"qwen2": "Qwen2Config", "mistral": "MistralConfig", "granite": "GraniteConfig", "glm": "GlmConfig"}


def another_base(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """One of the builders', or a base that is like Llama but for its kind."""
    if name not in OTHERS:
        return tiny_model(name, dtype=dtype, **changes)
    values = {key: value for key, value in tiny_config("llama").to_dict().items() if key in KEPT} | changes
    config = getattr(transformers, OTHERS[name])(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    # Biases begin at zero, where an error with them would not show.
    shake(model)
    model.to(dtype).requires_grad_(False).eval()
    model.config.use_cache = False
    return model


KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def rows_apart(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def rows_packed(model: Any) -> Tensor:
    ids = (torch.arange(sum(LENGTHS)) * 37 % VOCABULARY)[None]
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    told = packed_arguments(model.get_base_model(), borders, max(LENGTHS))
    logits: Tensor = model(input_ids=ids, position_ids=places, use_cache=False, **told).logits
    return logits


def run(model: nn.Module, rows: Callable[[Any], Tensor] = rows_apart) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of everything that trains."""
    model.zero_grad()
    logits = rows(model)
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def covered(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def assert_same_function(
    model: Any, called: Counts, *, layout: Layout = PADDED, rows: Callable[[Any], Tensor] = rows_apart
) -> Fused:
    """Fused, the logits and every gradient are what they were, and everything that is said to be fused runs once a pass."""
    logits, gradients = run(model, rows)
    fused = fuse(model, layout=layout, dtype=torch.float64)
    called.clear()
    fast, fast_gradients = run(model, rows)
    assert fused.notes["fused"] == said(called)
    assert fast.dtype == logits.dtype
    assert distance(fast, logits) <= ROUNDING
    assert fast_gradients.keys() == gradients.keys() != set()
    for name, expected in gradients.items():
        assert float(expected.norm()) > 0, name
        assert distance(fast_gradients[name], expected) <= ROUNDING, name
    return fused


def said(called: Counts) -> str:
    kinds = ("attentions", "MLPs", "other linear layers", "other norms")
    found = ", ".join(f"{called[kind]} {kind}" for kind in kinds if kind in called)
    return f"{found}, each one node" if found else "nothing"
