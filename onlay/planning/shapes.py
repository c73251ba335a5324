"""The shape of a base: its sizes and linear layers, as far as memory, time and parameter counts go by them.

Three ways to one, none of which reads weights or imports torch for a family whose structure is known:
a name of bases.json; a config.json by the family's rule (onlay/planning/families.py); a folder's safetensors headers, which
tell the layers themselves.  Any other family is built on torch's meta device, which takes seconds; `how` says which.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

from onlay.errors import BaseModelError
from onlay.model.weight_files import read_tensors
from onlay.planning.families import Linear, Outline, outline
from onlay.records import ModelFacts

How = Literal["closed form", "meta device"]

PLAIN_FAMILIES = (
    "arcee", "bitnet", "bloom", "codegen", "cohere", "cohere2", "diffllama", "doge", "ernie4_5", "exaone4", "falcon",
    "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gptj", "granite", "granite_swa", "helium", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "lfm2", "llama", "minicpm3", "ministral3", "mistral", "mpt", "nanochat", "olmo", "olmo2", "olmo3",
    "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "recurrent_gemma", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip
"""Families whose linear layers in memory are one by one the two-dimensional weights of their files, each held to that by a
test.  Others fuse experts, rename layers or read weights without calling their module."""
_VARIANT = re.compile(r"-(hf|base|pt|it|chat|instruct)$")
_NUMBERED = re.compile(r"^(?:.*?\.)?\d+\.")
_BUFFERS = ("inv_freq", "masked_bias")
"""Last words of the names of tensors that old files hold and that are no parameters."""
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseShape:
    """What of a base decides how much memory and work it takes.  Sizes are numbers of elements."""

    name: str
    """As it was asked for."""
    architecture: str
    """transformers' model_type, such as llama."""
    vocabulary_size: int
    hidden_size: int
    num_layers: int
    num_heads: int | None
    """Of queries; None where the config tells none, as of a base without attention."""
    num_key_heads: int | None
    head_width: int | None
    context_tokens: int | None
    """Longest sequence by the config; of a well-known name the shortest among its variants."""
    tied_head: bool
    """The output head is the token embedding."""
    head_inputs: int
    """What the output head reads: the hidden size, but for OPT-350M and its like."""
    linears: tuple[Linear, ...]
    """Every linear layer but the output head, grouped by name and shape; fused experts are one layer each."""
    embedding_parameters: int
    """Of tokens and of positions."""
    head_parameters: int
    """Weight of the output head; 0 where it is tied."""
    head_bias_parameters: int
    """Its bias, which `bias_parameters` counts too."""
    bias_parameters: int
    """Every bias, those of norms and of the head included."""
    other_parameters: int
    """Weights of norms, routers, convolutions."""
    how: How
    """meta device: the numbers were read off the model itself, built without weights."""
    folder: str | None = None
    """Holds its config.json; None for a well-known name."""
    trust_remote_code: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers and experts, without biases and without the output head."""
        return sum(linear.num_parameters for linear in self.linears)

    @property
    def num_parameters(self) -> int:
        """All parameters of the base."""
        return (
            self.linear_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.bias_parameters
            + self.other_parameters
        )


# ---------------------------------------------------------------------------------------------------- well-known names


def known_names() -> list[str]:
    """The well-known bases, family by family."""
    return list(_known())


def is_known(name: str) -> bool:
    """Whether `find_shape` takes the name."""
    return _key(name) in _keys()


def find_shape(name: str) -> BaseShape:
    """The shape of a well-known base, from a table: no network, no files.

    Case, dashes, the organisation of the hub name and endings such as -instruct do not matter: llama-3.1-8b,
    Llama3.1-8B and meta-llama/Llama-3.1-8B-Instruct are one.  Raises BaseModelError.
    """
    found = _keys().get(_key(name))
    if found is None:
        near = difflib.get_close_matches(_key(name), _keys(), n=1)
        hint = f" Did you mean {_keys()[near[0]]}?" if near else ""
        raise BaseModelError(
            f"{name} is not a well-known base.{hint}",
            f"Give a folder with its config.json, or one of: {', '.join(_known())}.",
        )
    config = _known()[found]["config"]
    given = outline(config["model_type"], config)
    assert given is not None, f"bases.json: {found} has no rule"
    return _from_outline(given, name=found, config=config, folder=None)


@cache
def _known() -> dict[str, dict[str, Any]]:
    bases: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("bases.json").read_text("utf-8"))
    return bases


@cache
def _keys() -> dict[str, str]:
    """Every spelling, reduced to its key, to the name in the table."""
    keys: dict[str, str] = {}
    for name, base in _known().items():
        for spelling in (name, *base["hub"], *base.get("aliases", ())):
            keys[_key(spelling)] = name
            if "/" in spelling:
                keys[_key(spelling.partition("/")[2])] = name
    return keys


def _key(name: str) -> str:
    """Without case, separators and endings that change no shape; dots stay, as they tell 3.1-8b from 3-1.8b."""
    plain = re.sub(r"[_\s-]+", "-", name.strip().lower())
    while _VARIANT.search(plain):
        plain = _VARIANT.sub("", plain)
    return plain.replace("-", "")


# --------------------------------------------------------------------------------------------------- config and headers


def read_shape(path: str | Path, *, trust_remote_code: bool = False) -> BaseShape:
    """The shape of a base by its config.json alone: `path` is that file or its folder.  Raises BaseModelError."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    config = _read_config(file)
    model_type = str(config.get("model_type", ""))
    given = outline(model_type, config)
    if given is not None:
        return _from_outline(given, name=str(path), config=config, folder=str(file.parent))
    if file.name != "config.json":
        raise BaseModelError(
            f"{file}: there is no rule for model_type = {model_type or '(none)'}, and only a config.json can be built.",
            "Put it in a folder of its own under the name config.json.",
        )
    return _on_meta(_stand_in(str(path), file.parent), config, trust_remote_code=trust_remote_code)


def shape_of_facts(facts: ModelFacts, *, trust_remote_code: bool = False) -> BaseShape:
    """The shape of a base whose facts were read: its linear layers are those of the files.  Raises BaseModelError.

    Where files and memory hold the layers differently, as those with fused experts do, and where there are no weights,
    the rule of the family says what they are.
    """
    config = _read_config(Path(facts.path) / "config.json")
    given = outline(facts.model_type, config)
    if facts.linear_shapes and facts.model_type in PLAIN_FAMILIES:
        shapes = {tensor.name: tensor.shape for tensor in read_tensors(Path(facts.path), facts.name)}
        return _from_files(facts, shapes, config, given)
    if given is not None:
        return _from_outline(given, name=facts.name, config=config, folder=facts.path)
    return _on_meta(facts, config, trust_remote_code=trust_remote_code)


def group_linears(layers: Mapping[str, tuple[int, int]], *, biased: Iterable[str] = ()) -> tuple[Linear, ...]:
    """Groups linear layers, full name to (outputs O, inputs I), by what follows the layer's number and by shape."""
    with_bias = set(biased)
    groups: dict[tuple[str, int, int, bool], list[str]] = defaultdict(list)
    for full, (outputs, inputs) in layers.items():
        groups[_NUMBERED.sub("", full), inputs, outputs, full in with_bias].append(full)
    return tuple(
        Linear(name=name, names=tuple(names), inputs=inputs, outputs=outputs, bias=bias)
        for (name, inputs, outputs, bias), names in groups.items()
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BaseModelError(f"{file} cannot be read: {error}.", "Give a base's config.json or its folder.") from None
    if not isinstance(config, dict):
        raise BaseModelError(f"{file} holds no JSON object.", "Give a base's config.json or its folder.")
    return config


def _context(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _attention(config: Mapping[str, Any], hidden: int) -> tuple[int | None, int | None, int | None]:
    """Heads, heads of keys and width of a head, where the config tells them."""
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config

    def size(*keys: str) -> int | None:
        return next((text[key] for key in keys if type(text.get(key)) is int), None)

    heads = size("num_attention_heads", "n_head", "num_heads", "n_heads")
    if heads is None:
        return None, None, None
    return heads, size("num_key_value_heads", "num_kv_heads") or heads, size("head_dim") or hidden // heads


def _from_outline(given: Outline, *, name: str, config: Mapping[str, Any], folder: str | None) -> BaseShape:
    biases = sum(linear.count * linear.outputs for linear in given.linears if linear.bias)
    return BaseShape(
        name=name, architecture=str(config["model_type"]), vocabulary_size=given.vocabulary_size,
        hidden_size=given.hidden_size, num_layers=given.num_layers, num_heads=given.num_heads,
        num_key_heads=given.num_key_heads, head_width=given.head_width, context_tokens=_context(config),
        tied_head=given.tied_head, head_inputs=given.hidden_size, linears=given.linears,
        embedding_parameters=given.embedding_parameters,
        head_parameters=0 if given.tied_head else given.vocabulary_size * given.hidden_size,
        head_bias_parameters=given.head_biases,
        bias_parameters=biases + given.norm_biases + given.head_biases, other_parameters=given.other_parameters,
        how="closed form", folder=folder,
    )  # fmt: skip


def _from_files(
    facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], given: Outline | None
) -> BaseShape:
    """shapes: of every stored tensor, by name."""
    stored = {name for name in shapes if name.rpartition(".")[2] not in _BUFFERS}
    heads = {name for name in stored if name.rpartition(".weight")[0].rpartition(".")[2] in _HEADS}
    said = config.get("tie_word_embeddings")
    tied = given.tied_head if given is not None else bool(said) if said is not None else not heads
    linears = {f"{name}.weight" for name in facts.linear_shapes} - heads
    # Some old files hold a mask of four dimensions under the name of a bias.
    named_bias = {name for name in stored if name.endswith(".bias")}
    biases = {name for name in named_bias if len(shapes[name]) == 1}
    left = stored - heads - linears - named_bias
    embeddings = {name for name in left if name.endswith(".weight") and len(shapes[name]) == 2}
    num_heads, key_heads, width = (
        _attention(config, facts.hidden_size)
        if given is None
        else (given.num_heads, given.num_key_heads, given.head_width)
    )

    def elements(names: Iterable[str]) -> int:
        return sum(prod(shapes[name]) for name in names)

    layers = {name: shape for name, shape in facts.linear_shapes.items() if f"{name}.weight" in linears}
    return BaseShape(
        name=facts.name, architecture=facts.model_type, vocabulary_size=facts.vocabulary_size,
        hidden_size=facts.hidden_size, num_layers=facts.num_layers, num_heads=num_heads, num_key_heads=key_heads,
        head_width=width, context_tokens=facts.context_tokens, tied_head=tied,
        head_inputs=max((shapes[name][1] for name in heads | embeddings if shapes[name][0] == facts.vocabulary_size), default=facts.hidden_size),
        linears=group_linears(layers, biased={name.removesuffix(".bias") for name in biases}),
        embedding_parameters=elements(embeddings), head_parameters=0 if tied else elements(heads),
        head_bias_parameters=elements(name for name in biases if name.split(".")[-2] in _HEADS),
        bias_parameters=elements(biases), other_parameters=elements(left - embeddings),
        how="closed form", folder=facts.path,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- meta device


def _stand_in(name: str, folder: Path) -> ModelFacts:
    """Facts that name a folder and tell nothing else: all that building a model without weights reads."""
    return ModelFacts(
        name=name, path=str(folder), revision=None, licence=None, architecture="", model_type="", num_parameters=0,
        weight_bytes=0, vocabulary_size=0, context_tokens=None, hidden_size=0, num_layers=0, linear_shapes={},
        weight_fingerprint="",
    )  # fmt: skip


def build_on_meta(shape: BaseShape) -> Any:
    """The model of a shape with `how` meta device, without weights, not trainable yet.  Raises BaseModelError."""
    assert shape.folder is not None
    return _build(_stand_in(shape.name, Path(shape.folder)), trust_remote_code=shape.trust_remote_code)


def _build(facts: ModelFacts, *, trust_remote_code: bool) -> Any:
    from onlay.model.stored_names import model_without_weights

    return model_without_weights(facts, trust_remote_code=trust_remote_code).requires_grad_(False)


def _on_meta(facts: ModelFacts, config: Mapping[str, Any], *, trust_remote_code: bool) -> BaseShape:
    from torch import nn

    from onlay.model.adapter import find_targets

    model = _build(facts, trust_remote_code=trust_remote_code)
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    targets = find_targets(model, "all-linear")
    layers: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        if module is not head and (name in targets.modules or isinstance(module, nn.Linear)):
            # GPT-2's Conv1D, the one kind of target that is no nn.Linear, holds I x O.
            rows, columns = module.weight.shape
            layers[name] = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
    biases = {name for name in parameters if name.rpartition(".")[2] == "bias"}
    linears = group_linears(layers, biased={name.rpartition(".")[0] for name in biases})
    experts = tuple(_expert(name, tuple(parameters[name].shape)) for name in targets.parameters)
    tied = isinstance(head, nn.Module) and head.weight is model.get_input_embeddings().weight
    embeddings = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Embedding)}
    counted = {f"{name}.weight" for name in layers} | set(targets.parameters) | biases | embeddings
    head_names = {name for name, weight in parameters.items() if head is not None and weight is head.weight}
    hidden = int(text.hidden_size)
    num_heads, key_heads, width = _attention(text.to_dict(), hidden)

    def elements(names: Iterable[str]) -> int:
        return sum(parameters[name].numel() for name in set(names) & set(parameters))

    return BaseShape(
        name=facts.name, architecture=str(model.config.model_type), vocabulary_size=int(text.vocab_size),
        hidden_size=hidden, num_layers=int(text.num_hidden_layers), num_heads=num_heads, num_key_heads=key_heads,
        head_width=width, context_tokens=_context(config), tied_head=tied,
        head_inputs=hidden if head is None else int(head.weight.shape[-1]), linears=linears + experts,
        embedding_parameters=elements(embeddings), head_parameters=elements(head_names - embeddings),
        head_bias_parameters=0 if head is None or getattr(head, "bias", None) is None else head.bias.numel(),
        bias_parameters=elements(biases), other_parameters=elements(set(parameters) - counted - head_names),
        how="meta device", folder=facts.path, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _expert(name: str, shape: tuple[int, ...]) -> Linear:
    """Which of the two sizes is the output differs by family and changes no count."""
    experts, outputs, inputs = shape
    return Linear(name=_NUMBERED.sub("", name), names=(name,), inputs=inputs, outputs=outputs, experts=experts)
