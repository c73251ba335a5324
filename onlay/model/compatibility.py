"""Whether an adapter and a base belong together, told by headers alone, before anything large is loaded.

An adapter of onlay's own names its base by a fingerprint of the weights, which decides; what else is known only tells what
the difference is.  One of plain PEFT names no weights: its matrices must fit the base's linear layers, and what cannot be
checked is said.  Modules and stored tensors may be called differently in front of the layers (`model.`,
`language_model.`), so names are compared from the numbered layer on; what is renamed within a layer, as fused experts
are, cannot be looked up in a header and is checked once the base is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlay.errors import BaseModelError, OutputError
from onlay.model.facts import has_experts, leaf_names
from onlay.records import ModelFacts

WEIGHTS_FILE, CONFIG_FILE, NOTES_FILE = "adapter_model.safetensors", "adapter_config.json", "onlay.json"
CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
"""Starts of PEFT's `init_lora_weights` for which loading the adapter also subtracts from the base's weights."""
_LAYER = re.compile(r"(?:^|\.)([^.\d][^.]*)\.(\d+)\.(.+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFacts:
    """An adapter folder, read from its JSON files and the header of its weights."""

    folder: Path
    shapes: dict[str, tuple[int, int]]
    """Module name, as in the model, to the (outputs O, inputs I) of the layer that it was trained on; experts left out."""
    num_experts_modules: int
    tensors: tuple[str, ...]
    """Names as stored."""
    config: dict[str, Any]
    """adapter_config.json."""
    notes: dict[str, Any] | None
    """onlay.json; None for an adapter of plain PEFT."""

    @property
    def base(self) -> str:
        named = self.notes["base"] if self.notes else self.config.get("base_model_name_or_path")
        return str(named or "a base that it does not name")

    @property
    def remedy(self) -> str:
        revision = self.notes["base_revision"] if self.notes else self.config.get("revision")
        named = self.notes or self.config.get("base_model_name_or_path")
        base = f"{self.base} at revision {revision}" if revision else self.base
        return f"Use {base}, or train again on this one." if named else "Use its own base, or train again on this one."


def read_adapter(folder: Path) -> AdapterFacts:
    """Raises OutputError when the folder holds no adapter, or one that cannot be read."""
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    if config is None:
        raise OutputError(f"{folder} holds no adapter.", "Finish the run first: onlay train --resume RUN.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise OutputError(f"{folder} has no {WEIGHTS_FILE}.", "Save the adapter in the safetensors format.")
    stored = _stored_shapes(folder / WEIGHTS_FILE)
    shapes: dict[str, tuple[int, int]] = {}
    experts: set[str] = set()
    for key, shape in stored.items():
        name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not found:
            continue
        other = stored.get(key.replace(".lora_A.weight", ".lora_B.weight"))
        if other is None or len(shape) != 2 or len(other) != 2 or other[1] != shape[0]:
            raise OutputError(f"{folder}: {name} has no A and B that go together.", "Save the adapter again.")
        if name.removesuffix(".base_layer").endswith(".experts") or ".experts." in name:
            experts.add(name)
        else:
            shapes[name] = (other[0], shape[1])
    notes = _read_json(folder / NOTES_FILE) if (folder / NOTES_FILE).is_file() else None
    return AdapterFacts(
        folder=folder, shapes=shapes, num_experts_modules=len(experts), tensors=tuple(stored), config=config, notes=notes
    )  # fmt: skip


def check(folder: Path, facts: ModelFacts, *, storage: str | None = None) -> list[str]:
    """Refuses a base that the adapter was not trained on; returns in words what could not be checked or is not as it was.

    `storage` is how the base is kept (bf16: not quantized, nf4, int8, fp8); None leaves that out.
    Raises BaseModelError naming what differs and the right base, and OutputError for a folder that is no adapter.
    """
    adapter = read_adapter(folder)
    if adapter.notes is None:
        return _check_plain(adapter, facts)
    if adapter.notes["base_weight_fingerprint"] != facts.weight_fingerprint:
        differences = _differences(adapter, adapter.notes, facts)
        if differences:
            raise BaseModelError(
                f"{folder} was trained on {adapter.base}, not on {facts.path}: {'; '.join(differences)}.",
                adapter.remedy,
            )
        raise BaseModelError(
            f"{folder} was trained on {adapter.base} with other weights than {facts.path}.", adapter.remedy
        )
    return _check_storage(adapter, adapter.notes, storage)


def _differences(adapter: AdapterFacts, notes: dict[str, Any], facts: ModelFacts) -> list[str]:
    """In words, the most telling first; what earlier versions did not note is left out."""
    found = []
    if notes["base_architecture"] != facts.architecture:
        found.append(f"its base is a {notes['base_architecture']}, this one a {facts.architecture}")
    found += _other_shapes(adapter, facts)[:1]
    for key, here, what in (
        ("base_num_layers", facts.num_layers, "layers"),
        ("base_vocabulary_size", facts.vocabulary_size, "tokens in its vocabulary"),
    ):
        if notes.get(key) not in (None, here):
            found.append(f"its base has {notes[key]:,} {what}, this one {here:,}")
    return found


def _check_storage(adapter: AdapterFacts, notes: dict[str, Any], storage: str | None) -> list[str]:
    trained_on = notes.get("storage")
    if storage is None or trained_on in (None, storage):
        return []
    if notes.get("method") == "loftq":
        raise BaseModelError(
            f"{adapter.folder} makes up for what {trained_on} rounds away (loftq), and this base is kept in {storage}.",
            f"Load the base with model.storage = {trained_on}.",
        )
    return [f"the adapter was trained on its base in {trained_on} and is used on it in {storage}: answers may differ"]


def _check_plain(adapter: AdapterFacts, facts: ModelFacts) -> list[str]:
    how = adapter.config.get("init_lora_weights")
    if isinstance(how, str) and how.startswith(CHANGES_THE_BASE):
        raise BaseModelError(
            f"{adapter.folder} changes the weights of its base when it is loaded (init_lora_weights = {how}).",
            "Convert it: PEFT's save_pretrained with path_initial_model_for_weight_conversion.",
        )
    unknown = "which weights it was trained on"
    if not facts.linear_shapes:
        return [f"the adapter has no {NOTES_FILE}: {unknown} and their shapes cannot be checked"]
    differences = _other_shapes(adapter, facts) or _other_layers(adapter, facts) or _other_modules(adapter, facts)
    if differences:
        raise BaseModelError(f"{adapter.folder} does not fit {facts.path}: {differences[0]}.", adapter.remedy)
    tails = {_tail(name) for name in facts.linear_shapes}
    checked = sum(_tail(name) in tails for name in adapter.shapes)
    every = len(adapter.shapes) + adapter.num_experts_modules
    return [
        f"the adapter has no {NOTES_FILE}: the shapes of {checked} of its {every} modules fit; {unknown} cannot be checked"
    ]


def _other_shapes(adapter: AdapterFacts, facts: ModelFacts) -> list[str]:
    """Modules whose layer has another shape in this base."""
    by_tail: dict[str, list[tuple[int, int]]] = {}
    for name, shape in facts.linear_shapes.items():
        by_tail.setdefault(_tail(name), []).append(shape)
    found = []
    for name, expected in adapter.shapes.items():
        stored = facts.linear_shapes.get(name)
        shapes = [stored] if stored is not None else by_tail.get(_tail(name), [])
        if shapes and expected not in shapes:
            found.append(
                f"{name} is {_words(expected)} (outputs x inputs) in its base, {_words(shapes[0])} in this one"
            )
    return found


def _other_layers(adapter: AdapterFacts, facts: ModelFacts) -> list[str]:
    """Layers that the adapter has and the base has not, or that the base has and the adapter would leave alone."""
    own = _last_layers(adapter.shapes)
    beyond = max(own.values(), default=-1)
    if beyond >= facts.num_layers > 0:
        return [f"it has adapters up to layer {beyond}, and this base has {facts.num_layers} layers"]
    named = adapter.config.get("target_modules")
    chosen = any(adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if not isinstance(named, list) or chosen or not set(own) <= set(named):
        return []  # Its names say which layers it wants; they may be some only.
    tails = {_tail(name) for name in adapter.shapes}
    prefixes = {_prefix(name) for name in facts.linear_shapes if _tail(name) in tails}
    here = _last_layers(name for name in facts.linear_shapes if _prefix(name) in prefixes)
    if own and all(here.get(leaf, -1) > last for leaf, last in own.items()):
        return [
            f"it has adapters up to layer {beyond} of all that its config names, and this base has {facts.num_layers} layers"
        ]
    return []


def _other_modules(adapter: AdapterFacts, facts: ModelFacts) -> list[str]:
    """An adapter of which no module is in this base by any name."""
    tails, leaves = {_tail(name) for name in facts.linear_shapes}, set(leaf_names(facts))
    if not adapter.shapes or has_experts(facts):
        return []
    if any(_tail(name) in tails or name.rpartition(".")[2] in leaves for name in adapter.shapes):
        return []
    return [f"this base has no {next(iter(adapter.shapes))}; its linear layers are {', '.join(sorted(leaves))}"]


def _last_layers(names: Iterable[str]) -> dict[str, int]:
    """Last part of each numbered module's name to the highest number of a layer that has it."""
    last: dict[str, int] = {}
    for name in names:
        if match := _LAYER.search(name):
            leaf = match[3].rpartition(".")[2]
            last[leaf] = max(int(match[2]), last.get(leaf, -1))
    return last


def _tail(name: str) -> str:
    """`layers.0.self_attn.q_proj`, whatever stands before it."""
    match = _LAYER.search(name)
    return name[match.start(1) :] if match else name


def _prefix(name: str) -> str:
    """What stands before the layer's number: `model.layers`."""
    match = _LAYER.search(name)
    return name[: match.end(1)] if match else ""


def _words(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} x {shape[1]:,}"


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Copy the adapter again.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Copy the adapter again.") from None
    return values
