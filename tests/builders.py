"""Small things that tests are built from: tiny random bases, a byte-level tokenizer, rows of every format, recipes.

Nothing is downloaded; everything is a function of its arguments, so two tests that ask for the same get the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from onlay.data.pack import MicroBatch, collate, plan_micro_batches
from onlay.model.attention import Layout, use_attention
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Run
from onlay.training.batches import Batches, Examples
from onlay.training.loop import Progress, Task, _gradient
from onlay.training.loss import make_loss

torch.set_num_threads(1)  # For matrices this small, waiting for the other threads takes longer than the work.

VOCABULARY = 272
"""Embeddings of the tiny bases: 256 bytes, the special tokens, and a few that nothing uses."""
CONTEXT_TOKENS = 512
SLIDING_WINDOW_TOKENS = 16
FORMATS = ("alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification")
ARCHITECTURES = (
    "llama", "qwen3", "gpt2", "bloom", "opt", "phi3", "gemma2", "gemma3",
    "mixtral", "qwen3_moe", "mamba", "recurrent_gemma", "falcon_h1",
)  # fmt: skip
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WORDS = (
    "the",
    "river",
    "runs",
    "under",
    "a",
    "stone",
    "bridge",
    "while",
    "seven",
    "green",
    "boats",
    "wait",
    "for",
    "rain",
)


# ------------------------------------------------------------------------------------------------------------- bases


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The config of a base with a few thousand weights; `name` is one of ARCHITECTURES, `changes` are config fields.

    Weights are drawn wider than usual (0.2 instead of 0.02), so that attention is not flat and errors are not hidden.
    """
    import transformers

    heads = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 257,
    }  # fmt: skip
    own = {k: heads[k] for k in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")}
    experts = {"num_experts_per_tok": 2}
    windows = {"head_dim": 8, "sliding_window": SLIDING_WINDOW_TOKENS}
    fields: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", heads),
        "qwen3": ("Qwen3Config", heads | {"head_dim": 8}),
        "gpt2": ("GPT2Config", own | {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT_TOKENS,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }),
        "bloom": ("BloomConfig", own | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        "opt": ("OPTConfig", own | {
            "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "dropout": 0.0,
            "max_position_embeddings": CONTEXT_TOKENS, "word_embed_proj_dim": 32, "init_std": 0.2,
        }),
        "phi3": ("Phi3Config", heads),
        "gemma2": ("Gemma2Config", heads | windows),
        "gemma3": ("Gemma3TextConfig", heads | windows),
        "mixtral": ("MixtralConfig", heads | experts | {"num_local_experts": 4}),
        "qwen3_moe": ("Qwen3MoeConfig", heads | experts | {
            "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16,
        }),
        "mamba": ("MambaConfig", own | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        "recurrent_gemma": ("RecurrentGemmaConfig", heads | {
            "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64,
        }),
        "falcon_h1": ("FalconH1Config", heads | {
            "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        }),
    }  # fmt: skip
    kind, values = fields[name]
    config: PretrainedConfig = getattr(transformers, kind)(**(values | changes))
    return config


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A frozen random base in evaluation mode, as `onlay.model.load.load_base` leaves one."""
    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Experts one by one: the grouped kernel, which is the default, has no float64.
        experts = "eager" if dtype == torch.float64 else None
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    model.to(dtype).requires_grad_(False).eval()  # type: ignore[arg-type]
    model.config.use_cache = False
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `</s>`, `<unk>` and two turn marks; with CHAT_TEMPLATE.  No BOS, and padding is not its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ("<unk>", "</s>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def save_tiny_base(folder: Path, name: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Writes a base that `model.base` can name: config.json, model.safetensors, tokenizer.json with a chat template."""
    tiny_model(name, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shake(model: nn.Module, *, seed: int = 1, scale: float = 0.1) -> None:
    """Draws every trainable weight anew, adapters' B too: at B = 0 the gradient of A is zero and shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((scale * noise).to(parameter))


# -------------------------------------------------------------------------------------------------------------- rows


def write_rows(path: Path, n: int, format: str = "prompt_completion", *, seed: int = 0) -> Path:
    """`n` JSON lines in one of FORMATS, of uneven lengths (about 20 to 130 bytes), every prompt another."""
    draw = random.Random(seed)
    path.write_text("".join(json.dumps(_row(format, i, draw)) + "\n" for i in range(n)), encoding="utf-8")
    return path


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def _row(format: str, i: int, draw: random.Random) -> dict[str, Any]:
    question, answer = f"{i}: {_words(draw, 1, 6)}?", _words(draw, 1, 8)
    if format == "alpaca":
        return {"instruction": question, "input": _words(draw, 2, 4) if i % 2 else "", "output": answer}
    if format == "prompt_completion":
        return {"prompt": question, "completion": answer}
    if format == "text":
        return {"text": f"{question} {answer}."}
    if format == "classification":
        return {"text": question, "label": draw.choice(["wet", "dry"])}
    if format == "sharegpt":
        turns = [
            ("system", "Be brief."),
            ("human", question),
            ("gpt", answer),
            ("human", "And?"),
            ("gpt", _words(draw, 1, 3)),
        ]
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}
    if format != "messages":
        raise ValueError(f"{format} is none of {', '.join(FORMATS)}")
    if i % 3 == 0:
        call = {"id": f"c{i}", "type": "function", "function": {"name": "boats", "arguments": json.dumps({"on": i})}}
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": str(i * 7), "tool_call_id": f"c{i}"},
                {"role": "assistant", "content": answer},
            ],
            "tools": [{"name": "boats", "description": "count", "parameters": {"type": "object", "properties": {}}}],
        }
    turns = [("system", "Be brief."), ("user", question), ("assistant", answer)]
    turns += [("user", "And?"), ("assistant", _words(draw, 1, 3))] * (i % 3 - 1)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


class ListExamples:
    """`onlay.training.batches.Examples` over lists: token ids, and which of them are targets (default: all but the first)."""

    def __init__(self, rows: Sequence[Sequence[int]], trained: Sequence[Sequence[bool]] | None = None) -> None:
        flags = trained if trained is not None else [[False] + [True] * (len(row) - 1) for row in rows]
        self._rows = [np.asarray(row, dtype=np.int32) for row in rows]
        self._trained = [np.asarray(row, dtype=bool) for row in flags]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self._rows], dtype=np.int32)

    @property
    def trained_counts(self) -> np.ndarray:
        return np.array([int(flags.sum()) for flags in self._trained], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rows[index], self._trained[index]


def random_examples(
    n: int, *, least: int = 2, most: int = 40, vocabulary: int = VOCABULARY, seed: int = 0
) -> ListExamples:
    """`n` sequences of random tokens and lengths in which about half of the tokens are targets, at least one each."""
    draw = np.random.default_rng(seed)
    rows, flags = [], []
    for _ in range(n):
        length = int(draw.integers(least, most + 1))
        trained = draw.random(length) < 0.5
        trained[0], trained[-1] = False, True
        rows.append(draw.integers(0, vocabulary, length).tolist())
        flags.append(trained.tolist())
    return ListExamples(rows, flags)


# ----------------------------------------------------------------------------------------------------------- recipes


def recipe_for(base: Path | str, data: Path | str, **overrides: Any) -> Recipe:
    """A recipe on a base folder and a data file; each keyword is a section: `training={"max_steps": 3}`.

    Defaults that keep tests short: rank 4, 4 examples a step, no held-out rows.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(base)},
        "adapter": {"rank": 4},
        "data": {"train": str(data)},
        "training": {"batch_size": 4, "epochs": 1},
        "evaluation": {"split": None},
    }
    for section, fields in overrides.items():
        values[section] = values.get(section, {}) | fields
    if values["adapter"].get("method") == "full":
        values["adapter"] = {"method": "full"}
    return parse_recipe(values)


# ---------------------------------------------------------------------------------------------------- one step's gradient


class AllFloat64(TorchFunctionMode):
    """While it is on, float32 means float64: norms, rotary tables and scans that models compute in float32 are exact too."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wider = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **wider)


@dataclass(frozen=True, slots=True)
class StepGradient:
    loss: float
    """Nats per trained token of the step, over all ranks' tokens but this rank's share only."""
    gradients: dict[str, Tensor]
    micro_batches: int


def batches_for(examples: Examples, *, packed: bool, batch_size: int | None = None, seed: int = 0, rank: int = 0, world: int = 1,
                seen: Callable[[MicroBatch], None] | None = None) -> Batches:  # fmt: skip
    """`Batches` as `onlay.training.session` makes them; `batch_size` None takes all examples in one step."""

    def collated(group: list[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
        batch = collate(group, packed=packed, pad_token_id=tiny_pad_token_id())
        if seen is not None:
            seen(batch)
        return batch

    return Batches(
        examples, batch_size=batch_size or len(examples), seed=seed, rank=rank, world=world, collate=collated,
        plan=lambda lengths, budget: plan_micro_batches(lengths, budget_tokens=budget, packed=packed),
    )  # fmt: skip


def tiny_pad_token_id() -> int:
    return 256  # <unk>


def step_gradient(
    model: nn.Module,
    layout: Layout,
    examples: Examples,
    *,
    budget_tokens: int,
    compute_dtype: torch.dtype,
    batch_size: int | None = None,
    step: int = 1,
    rank: int = 0,
    world: int = 1,
) -> StepGradient:
    """What the training loop's own step leaves in .grad of the trainable weights, on the device that the model is on."""
    micro_batches: list[MicroBatch] = []
    device = next(model.parameters()).device
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = SimpleNamespace(
        model=model, seed=0, optimizer=torch.optim.SGD(trainable.values()),
        loss=make_loss(model, layout, device=device, compute_dtype=compute_dtype),
        devices=SimpleNamespace(rank=rank, device=device, largest=lambda value: value, sum=lambda value: value),
        batches=batches_for(examples, packed=layout.packed, batch_size=batch_size, rank=rank, world=world, seen=micro_batches.append),
    )  # fmt: skip
    use_attention(model.get_base_model() if isinstance(model, PeftModel) else model, layout.attention)
    loss = _gradient(cast(Task, parts), Progress(budget_tokens=budget_tokens), step)
    gradients = {name: p.grad.detach().clone() for name, p in trainable.items() if p.grad is not None}
    return StepGradient(loss, gradients, len(micro_batches))


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the expected one, all weights together."""
    assert found.keys() == expected.keys()
    assert expected
    difference = sum(
        float((found[name].double().cpu() - expected[name].double().cpu()).norm()) ** 2 for name in expected
    )
    return float((difference / sum(float(value.double().norm()) ** 2 for value in expected.values())) ** 0.5)


def proofs_of(run: Run) -> dict[str, Any]:
    """What a run proved, without the digests of its files: onlay.json names the recipe, and so the run's folder."""
    return {name: value for name, value in run.proofs.items() if name != "artefact_sha256"}
