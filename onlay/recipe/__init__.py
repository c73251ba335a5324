"""The recipe: what the user wrote, with every default filled in.  Strict: an unknown key is an error with a suggestion.

A field appears here together with its first reader.  Sizes carry their unit in the name; `None` means off or automatic.
"""

from __future__ import annotations

from onlay.recipe.reading import apply_overrides, parse_recipe, read_recipe
from onlay.recipe.sections import (
    ADAPTERS,
    LIMIT_GATES,
    METHODS,
    Baseline,
    DataSection,
    EvaluationSection,
    FullTuning,
    HeadAdapter,
    LoftqAdapter,
    LoraAdapter,
    LoraPlusAdapter,
    ModelSection,
    PissaAdapter,
    Recipe,
    ReleaseSection,
    Section,
    Storage,
    TargetPreset,
    Tracker,
    TrainingSection,
    WeightedSource,
    digest_of,
    field_paths,
)  # fmt: skip

__all__ = [
    "ADAPTERS", "LIMIT_GATES", "METHODS", "Baseline", "DataSection", "EvaluationSection", "FullTuning", "HeadAdapter",
    "LoftqAdapter", "LoraAdapter", "LoraPlusAdapter", "ModelSection", "PissaAdapter", "Recipe", "ReleaseSection", "Section",
    "Storage", "TargetPreset", "Tracker", "TrainingSection", "WeightedSource", "apply_overrides", "digest_of", "field_paths", "parse_recipe",
    "read_recipe",
]  # fmt: skip
