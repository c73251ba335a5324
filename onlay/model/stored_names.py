"""Where each weight of a model lies in its safetensors files.

transformers renames weights while it loads them and fuses the experts of many mixtures: a parameter (E, 2I, H) is made
of 2 E stored matrices.  Its own tables tell which; here they are asked about names alone, on a model without weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onlay.errors import BaseModelError
from onlay.model.weight_files import StoredTensor
from onlay.records import ModelFacts

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which part of a parameter a stored tensor holds."""

    parameter: str
    """As in `model.named_parameters()`."""
    expert: int | None = None
    """The stored tensor is (a part of) parameter[expert]; None: the parameter as a whole."""
    start: int = 0
    """First row of parameter[expert] that it holds."""
    stop: int | None = None
    """One past its last row; None: all."""


def model_without_weights(facts: ModelFacts, *, trust_remote_code: bool = False) -> Any:
    """The model of `facts` on torch's meta device: modules, names and shapes, in float32.  Raises BaseModelError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(facts.path, local_files_only=True, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM  # Its annotations miss the keyword arguments.
            return auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"{facts.name} cannot be built: {first}", "Name another base.") from None


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Each parameter that is another one under a second name, to that other name, both ways."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: group[i - 1] for group in names.values() if len(group) > 1 for i, name in enumerate(group)}


def find_places(model: Any, tensors: Sequence[StoredTensor], wanted: Iterable[str]) -> dict[str, Place]:
    """Name of each stored tensor that holds one of the `wanted` parameters, or a part of it, to its place.

    `model` is one without weights.  Raises BaseModelError, naming the parameter, where the files hold it otherwise than
    whole, by experts, or by experts and rows.
    """
    groups, converters = _plan(model, [tensor.name for tensor in tensors])
    stored = {tensor.name: tensor for tensor in tensors}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places: dict[str, Place] = {}
    for name in wanted:
        sources = groups.get(name)
        if not sources:
            raise BaseModelError(f"{name} is not in the files of this base under a name of its own.", _UNKNOWN)
        pattern = next(iter(sources))
        if pattern is None:
            [key] = sources[None]
            found = {key: Place(parameter=name)}
        else:
            found = _by_experts(name, sources, converters[pattern], stored)
        _check_shapes(name, found, stored, tuple(parameters[name].shape))
        places |= found
    return places


_UNKNOWN = "Serve the adapter beside its base instead of merging it."


def _plan(model: Any, names: Sequence[str]) -> tuple[dict[str, dict[str | None, list[str]]], dict[str, Any]]:
    """Parameter to {pattern of its conversion, or None: stored names in order}; pattern to conversion.

    As `transformers.core_model_loading.convert_and_load_state_dict_in_model` sorts them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    plan: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # A checkpoint whose names need the prefix alone.
            name, pattern = rename_source_key(key, [], [], prefix, state)
        plan.setdefault(name, {}).setdefault(pattern, []).append(key)
    return plan, by_pattern


def _by_experts(
    name: str, sources: Mapping[str | None, list[str]], converter: Any, stored: Mapping[str, StoredTensor]
) -> dict[str, Place]:
    """Places of matrices that are stacked on a first axis, and, where there are several kinds, joined along the rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    known = [
        (type(step), step.dim) for step in converter.operations if isinstance(step, (MergeModulelist, Concatenate))
    ]
    stacked = (MergeModulelist, 0)
    if len(known) != len(converter.operations) or known not in ([stacked], [stacked, (Concatenate, 1)]):
        said = ", ".join(type(step).__name__ for step in converter.operations)
        raise BaseModelError(f"The files of this base hold {name} in a form that is not undone yet ({said}).", _UNKNOWN)
    places: dict[str, Place] = {}
    start = 0
    for pattern in converter.source_patterns:
        keys = sources.get(pattern, [])
        rows = stored[keys[0]].shape[0] if keys else 0
        for expert, key in enumerate(keys):
            places[key] = Place(parameter=name, expert=expert, start=start, stop=start + rows)
        start += rows
    return places


def _check_shapes(
    name: str, places: Mapping[str, Place], stored: Mapping[str, StoredTensor], shape: tuple[int, ...]
) -> None:
    """The parts have the shapes that the parameter needs, and make up all of it."""
    elements = 0
    for key, place in places.items():
        tensor = stored[key]
        wanted = shape
        if place.expert is not None:
            assert place.stop is not None
            wanted = (place.stop - place.start, *shape[2:])
        if tensor.shape != wanted:
            raise BaseModelError(f"{key} is stored as {tensor.shape}; {name} needs {wanted}.", _UNKNOWN)
        elements += tensor.num_elements
    total = 1
    for size in shape:
        total *= size
    if elements != total:
        raise BaseModelError(f"The files hold {elements:,} of the {total:,} weights of {name}.", _UNKNOWN)
