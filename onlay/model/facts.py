"""What a base is, read from config.json and the safetensors headers: no weights loaded, no torch, no transformers.

A wrong base is so reported at once, before anything heavy is imported.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from onlay.errors import BaseModelError, RecipeError
from onlay.model.hub import Progress, find_base, read_json, why_no_config
from onlay.model.weight_files import Digesting, StoredTensor, fingerprint, full_digest, read_tensors
from onlay.recipe import ModelSection, digest_of
from onlay.records import ModelFacts

__all__ = ["Digesting", "check_targets", "full_digest", "leaf_names", "read_facts"]

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_TRANSPOSED = {"gpt2", "openai-gpt"}
"""Architectures whose linear layers store their weight as inputs x outputs (transformers' Conv1D)."""


def read_facts(section: ModelSection, *, progress: Progress | None = None) -> ModelFacts:
    """The facts about `section.base`, downloaded first when it is a hub name.

    `progress(bytes_here, bytes_in_all)` is called during a download.  Raises BaseModelError.
    With `weights: random` no weights are needed: parameters, shapes and bytes are then unknown (0 and {}).
    """

    def check(config: dict[str, Any], name: str) -> None:
        _check_config(config, name, section)

    base = find_base(section, check_config=check, progress=progress)
    name, folder = section.base, base.path
    files = {path.name for path in folder.iterdir()}
    if "config.json" not in files:
        raise BaseModelError(*why_no_config(name, files))
    config = read_json(folder / "config.json", name)
    _check_config(config, name, section)
    if not files & set(_TOKENIZER_FILES):
        raise BaseModelError(
            f"{name} has no tokenizer ({folder}).", "Put the base's tokenizer.json beside config.json."
        )
    random = section.weights == "random"
    tensors = [] if random else read_tensors(folder, name)
    stored = _without_tied_copy(tensors, config)
    return ModelFacts(
        name=name,
        path=str(folder),
        revision=base.revision,
        licence=_licence(folder),
        architecture=next(iter(config.get("architectures") or []), ""),
        model_type=str(config.get("model_type", "")),
        num_parameters=sum(tensor.num_elements for tensor in stored),
        weight_bytes=sum(tensor.num_bytes for tensor in stored),
        vocabulary_size=_size(config, name, tensors, ("vocab_size", "n_vocab"), axis=0),
        context_tokens=_context(config),
        hidden_size=_size(config, name, tensors, ("hidden_size", "n_embd", "d_model", "dim"), axis=1),
        num_layers=_num_layers(config, tensors),
        linear_shapes=_linear_shapes(tensors, str(config.get("model_type", ""))),
        weight_fingerprint=digest_of(["random", config]) if random else fingerprint(tensors),
        sources={"config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()},
    )


def check_targets(facts: ModelFacts, targets: str | list[str]) -> None:
    """Early check of a list of module names against the checkpoint.  Raises RecipeError naming the model's own.

    Presets are left to the check against the loaded model, and so are bases with fused experts, whose modules are
    named otherwise in memory than in the files.
    """
    if isinstance(targets, str) or not facts.linear_shapes or has_experts(facts):
        return
    names = list(facts.linear_shapes)
    for target in targets:
        # Checkpoints may lack the outermost prefix that modules have, and name neither tied nor embedding layers.
        if target == "lm_head" or _is_embedding(target):
            continue
        if any(f".{name}".endswith(f".{target}") or target.endswith(f".{name}") for name in names):
            continue
        leaves = leaf_names(facts)
        near = difflib.get_close_matches(target, leaves, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"adapter.targets: {target} is not a module of {facts.name}.{hint}",
            f"Its own: {', '.join(leaves)}. Or use all-linear, attention, mlp or qv.",
        )


def leaf_names(facts: ModelFacts) -> list[str]:
    """The distinct last parts of the linear layers' names, such as q_proj, in the order of the checkpoint."""
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in facts.linear_shapes)
    return [leaf for leaf in leaves if not leaf.isdigit()]


def has_experts(facts: ModelFacts) -> bool:
    return any("experts" in name for name in facts.linear_shapes) or "moe" in facts.model_type.lower()


def _check_config(config: dict[str, Any], name: str, section: ModelSection) -> None:
    architectures = [str(entry) for entry in config.get("architectures") or []]
    if "quantization_config" in config or "compression_config" in config:
        quantization = config.get("quantization_config") or {}
        how = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
        raise BaseModelError(
            f"{name} holds quantized weights{f' ({how})' if how else ''}, which cannot be trained on yet.",
            "Name the 16-bit base that it was made from (its card calls it base model).",
        )
    if not _is_causal(config, architectures):
        raise BaseModelError(
            f"{name} is not a causal language model (architectures: {', '.join(architectures)}).",
            "Name a base whose architecture ends in ForCausalLM, such as Qwen/Qwen3-0.6B.",
        )
    model_type = str(config.get("model_type", ""))
    custom = config.get("auto_map")
    if section.trust_remote_code or (model_type and transformers_knows(model_type)):
        return
    if isinstance(custom, dict) and any(key.startswith("AutoModel") or key == "AutoConfig" for key in custom):
        raise BaseModelError(
            f"{name} comes with Python code of its own ({next(iter(custom.values()))}), which is not run unasked.",
            "Read that code; if you trust it, set model.trust_remote_code: true. Or name another base.",
        )
    raise BaseModelError(
        f"{name}: transformers does not know model_type = {model_type or '(none)'}.",
        "Upgrade transformers, or name another base.",
    )


def _is_causal(config: dict[str, Any], architectures: list[str]) -> bool:
    if config.get("is_encoder_decoder"):
        return False
    if not architectures:
        return True  # Left to transformers, which goes by model_type.
    if any(entry.endswith(_CAUSAL[:2]) for entry in architectures):
        return True
    return "text_config" in config and any(entry.endswith(_CAUSAL[2]) for entry in architectures)


@cache
def _auto_mappings() -> frozenset[str]:
    """Model types that transformers has code for, from the text of its tables (importing it takes seconds)."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    auto = Path(spec.origin).parent / "models" / "auto"
    types: set[str] = set()
    for file in ("auto_mappings.py", "configuration_auto.py", "modeling_auto.py"):
        path = auto / file
        if path.is_file():
            types.update(re.findall(r'^\s*\("([\w.-]+)",', path.read_text(encoding="utf-8"), re.MULTILINE))
    return frozenset(types)


def transformers_knows(model_type: str) -> bool:
    return model_type in _auto_mappings()


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _context(config: dict[str, Any]) -> int | None:
    text = _text_config(config)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _size(config: dict[str, Any], name: str, tensors: list[StoredTensor], keys: tuple[str, ...], *, axis: int) -> int:
    """A size from the config, else from the input embedding's shape (vocabulary x hidden)."""
    text = _text_config(config)
    for key in keys:
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    for tensor in tensors:
        if (
            len(tensor.shape) == 2
            and _is_embedding(tensor.name)
            and "pos" not in tensor.name
            and "wpe" not in tensor.name
        ):
            return tensor.shape[axis]
    raise BaseModelError(f"{name}: config.json has no {keys[0]}.", "Download the base again, or name another one.")


def _num_layers(config: dict[str, Any], tensors: list[StoredTensor]) -> int:
    text = _text_config(config)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    numbers = [int(number) for tensor in tensors for number in re.findall(r"\.(\d+)\.", tensor.name)[:1]]
    return max(numbers, default=-1) + 1


def _is_embedding(name: str) -> bool:
    return any("embed" in part or part in ("wte", "wpe", "wse", "shared") for part in name.split("."))


def _without_tied_copy(tensors: list[StoredTensor], config: dict[str, Any]) -> list[StoredTensor]:
    """The tensors that the loaded model has: a tied output layer that was stored as well is not counted twice."""
    tied = _text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    inputs = {tensor.shape for tensor in tensors if _is_embedding(tensor.name)}
    return [
        tensor for tensor in tensors if not (tied and tensor.name.endswith("lm_head.weight") and tensor.shape in inputs)
    ]


def _linear_shapes(tensors: list[StoredTensor], model_type: str) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        if name == tensor.name or len(tensor.shape) != 2 or _is_embedding(name) or name.split(".")[-1] == "lm_head":
            continue
        rows, columns = tensor.shape
        shapes[name] = (columns, rows) if model_type in _TRANSPOSED else (rows, columns)
    return dict(sorted(shapes.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _licence(folder: Path) -> str | None:
    """From the front matter of README.md, else from the first words of a LICENSE file; None when neither tells."""
    card = folder / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        if len(parts) == 3 and not parts[0].strip():
            try:
                front = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                front = None  # A card is prose for people: one that cannot be read tells no licence.
            if isinstance(front, dict) and front.get("license"):
                # `other` stands for a licence with a name of its own.
                named = front.get("license_name") if front["license"] == "other" else None
                return str(named or front["license"])
    for path in sorted(folder.glob("LICENSE*")):
        start = path.read_text(encoding="utf-8", errors="replace")[:400]
        for words, licence in (("Apache License", "apache-2.0"), ("MIT License", "mit")):
            if words in start:
                return licence
    return None
