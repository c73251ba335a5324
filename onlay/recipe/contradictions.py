"""Fields that cannot go together, or that another one would leave without a reader; each with its reason."""

from __future__ import annotations

from onlay.errors import RecipeError
from onlay.recipe.sections import LoftqAdapter, LoraAdapter, PissaAdapter, Recipe, listed_sources

_COLUMN_FIELDS = ("prompt_field", "answer_field", "messages_field", "text_field")
_READ_COLUMNS = {
    "alpaca": ("prompt_field", "answer_field"),
    "prompt_completion": ("prompt_field", "answer_field"),
    "messages": ("messages_field",),
    "sharegpt": ("messages_field",),
    "text": ("text_field",),
    "classification": ("prompt_field", "text_field", "answer_field"),
}
"""The columns that each format reads; with `auto` the columns say the format."""


def refuse_contradictions(recipe: Recipe) -> None:
    """Fields that would not be read because of another one.  Raises RecipeError."""
    data, evaluation = recipe.data, recipe.evaluation
    if recipe.model.weights == "random" and recipe.adapter.method != "full":
        raise RecipeError(
            f"model.weights = random needs adapter.method = full, not {recipe.adapter.method}.",
            "An adapter on random weights learns nothing of use: set adapter.method to full.",
        )
    _refuse_method_pairs(recipe)
    given = [name for name in _COLUMN_FIELDS if getattr(data, name) is not None]
    if data.format == "auto":
        fits = [read for read in _READ_COLUMNS.values() if set(given) <= set(read)]
        # Text alone says `text`; a label beside it is only read where the format is given.
        if not fits or ("text_field" in given and len(given) > 1):
            together = " and ".join(f"data.{name}" for name in given)
            raise RecipeError(
                f"{together} belong to different formats.", "Keep those of one format, or set data.format."
            )
    else:
        for name in given:
            if name not in _READ_COLUMNS[data.format]:
                names = " and ".join(f"data.{read}" for read in _READ_COLUMNS[data.format])
                raise RecipeError(
                    f"data.{name} is not read with data.format = {data.format}.",
                    f"That format reads {names}: rename the field, or delete one of the two lines.",
                )
        if data.format == "text" and data.system is not None:
            raise RecipeError(
                "data.system is not read with data.format = text: plain text has no messages.",
                "Delete one of the two lines.",
            )
    _refuse_unread_by_prepare(recipe)
    for name in ("patience", "every_steps"):
        if getattr(evaluation, name) is not None and evaluation.split is None and evaluation.file is None:
            raise RecipeError(
                f"evaluation.{name} needs held-out rows, and evaluation.split is off.",
                f"Set evaluation.split (0.05) or evaluation.file, or delete evaluation.{name}.",
            )
    _refuse_unread_by_evaluation(recipe)


def _refuse_unread_by_prepare(recipe: Recipe) -> None:
    """Fields of the selection of rows that another one leaves without a reader, or without a meaning.  Raises RecipeError."""
    data, evaluation = recipe.data, recipe.evaluation
    replaces_names = data.anonymise != "off" and (data.anonymise_kinds is None or "name" in data.anonymise_kinds)
    needs = (
        ("data.general_share", data.general_share is not None, data.general is not None, "data.general names a source"),
        ("data.domain_cap", data.domain_cap is not None, data.balance == "cap", "data.balance is cap"),
        ("data.anonymise_key", data.anonymise_key is not None, data.anonymise == "pseudonyms", "data.anonymise is pseudonyms"),
        ("data.anonymise_kinds", data.anonymise_kinds is not None, data.anonymise != "off", "data.anonymise is pseudonyms or redact"),
        ("data.anonymise_names", data.anonymise_names is not None, replaces_names, "names are replaced (data.anonymise)"),
        ("evaluation.split_by", evaluation.split_by != "cluster", evaluation.split is not None and evaluation.file is None,
         "rows are held out by evaluation.split"),
    )  # fmt: skip
    for name, given, read, when in needs:
        if given and not read:
            raise RecipeError(
                f"{name} is given, but it is only read where {when}.", f"Delete {name}, or set the other."
            )
    if data.balance == "cap" and data.domain_cap is None:
        raise RecipeError(
            "data.balance = cap does not say how large a domain may be.", "Set data.domain_cap, such as 0.3."
        )
    if data.anonymise == "pseudonyms" and data.anonymise_key is None:
        raise RecipeError(
            "data.anonymise = pseudonyms needs a key, and data.anonymise_key names no file for it.",
            "Set data.anonymise_key to a file apart from the data (it is made where there is none), or data.anonymise to redact.",
        )
    files = [source.file for source in listed_sources(data.train)] + ([data.general] if data.general else [])
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"{twice} is named twice as a source of training rows.", "Name it once in data.train, with a weight."
        )


def _refuse_unread_by_evaluation(recipe: Recipe) -> None:
    """Fields of `onlay evaluate` that another one leaves without a reader.  Raises RecipeError."""
    evaluation = recipe.evaluation
    together = (
        ("prompt", evaluation.prompt is not None, "prompt" in evaluation.baselines, "evaluation.baselines holds prompt"),
        ("judge_model", evaluation.judge_model is not None, evaluation.judge_url is not None, "evaluation.judge_url is given"),
    )  # fmt: skip
    for name, given, needed, when in together:
        if given != needed:
            raise RecipeError(
                f"evaluation.{name} is {'given, but it is only read' if given else 'missing, and is needed'} where {when}.",
                f"{'Delete' if given else 'Add'} evaluation.{name}, or correct the other line.",
            )
    if evaluation.tasks_path is not None and not evaluation.tasks:
        raise RecipeError(
            "evaluation.tasks_path is given, but it is only read where evaluation.tasks names a task.",
            "Delete evaluation.tasks_path, or name a task.",
        )
    if "live" in evaluation.baselines and recipe.release.name is None:
        raise RecipeError(
            "evaluation.baselines holds live, but release.name does not say which name's version is in use.",
            "Set release.name, or take live off the list.",
        )
    if evaluation.judge_criteria is not None and evaluation.judge_url is None:
        raise RecipeError(
            "evaluation.judge_criteria is only read where evaluation.judge_url is given.",
            "Delete one of the two lines.",
        )


def _refuse_method_pairs(recipe: Recipe) -> None:
    """Storage, method and memory fields that cannot be combined, each with its reason.  Raises RecipeError."""
    storage, method, training = recipe.model.storage, recipe.adapter.method, recipe.training
    quantized = storage in ("nf4", "int8", "fp8")
    if quantized and method == "full":
        raise RecipeError(
            f"model.storage = {storage} cannot be trained in full: quantized weights have no gradient.",
            "Set model.storage to bf16, or adapter.method to lora (QLoRA).",
        )
    if quantized and isinstance(recipe.adapter, PissaAdapter):
        raise RecipeError(
            f"adapter.method = pissa takes its adapter out of the base's own weights, which model.storage = {storage} has rounded.",
            "Set model.storage to bf16; or adapter.method to loftq, which makes up for the rounding of nf4.",
        )
    if storage != "nf4" and isinstance(recipe.adapter, LoftqAdapter):
        raise RecipeError(
            f"adapter.method = loftq makes up for the rounding of nf4, but model.storage is {storage}.",
            "Set model.storage to nf4, or adapter.method to lora.",
        )
    if storage != "nf4" and not recipe.model.double_quantization:
        raise RecipeError(
            f"model.double_quantization is read with model.storage = nf4 only, not {storage}.",
            "Delete one of the two lines.",
        )
    if recipe.model.compute == "fp8" and storage not in ("nf4", "fp8"):
        raise RecipeError(
            f"model.compute = fp8 multiplies weights that are kept in nf4 or fp8, but model.storage is {storage}.",
            "Set model.storage to fp8 or nf4, or delete model.compute.",
        )
    if method == "head" and recipe.data.format not in ("auto", "classification"):
        raise RecipeError(
            f"adapter.method = head learns labels, but data.format is {recipe.data.format}.",
            "Set data.format to classification (columns text and label), or choose another method.",
        )
    if isinstance(recipe.adapter, LoraAdapter) and method == "dora" and recipe.adapter.precision == "bf16":
        raise RecipeError(
            "adapter.precision = bf16 does not go with adapter.method = dora: its norms would be rounded to 16 bit.",
            "Delete adapter.precision, or set adapter.method to lora.",
        )
    if method == "head":
        _refuse_unread_by_head(recipe)
    if training.offload_activations and training.recompute == "none":
        raise RecipeError(
            "training.offload_activations moves what recomputed layers keep, and training.recompute is none.",
            "Set training.recompute to all, or delete training.offload_activations.",
        )


def _refuse_unread_by_head(recipe: Recipe) -> None:
    """A head reads text and label, and keeps no activations.  Raises RecipeError for a field that it would not read."""
    unread = {
        "data.template": recipe.data.template != "auto", "data.system": recipe.data.system is not None,
        "data.loss_on": recipe.data.loss_on != "assistant", "data.messages_field": recipe.data.messages_field is not None,
        "data.general": recipe.data.general is not None,
        "training.recompute": recipe.training.recompute not in ("auto", "none"),
        "training.offload_activations": recipe.training.offload_activations,
    }  # fmt: skip
    for name, given in unread.items():
        if given:
            raise RecipeError(
                f"{name} is not read with adapter.method = head: it classifies plain text, and keeps no activations.",
                "Delete one of the two lines.",
            )
