from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from onlay.errors import RecipeError
from onlay.recipe import (
    ADAPTERS,
    METHODS,
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
    TrainingSection,
    field_paths,
    parse_recipe,
    read_recipe,
)

PACKAGE = Path(__file__).parent.parent / "onlay"
SECTIONS: dict[str, tuple[type[Section], ...]] = {
    "model": (ModelSection,),
    "adapter": ADAPTERS,
    "data": (DataSection,),
    "training": (TrainingSection,),
    "evaluation": (EvaluationSection,),
    "release": (ReleaseSection,),
}


def parsed(**sections: Any) -> Recipe:
    """A recipe with only the required fields, and what a test adds."""
    values: dict[str, Any] = {"model": {"base": "pocket"}, "data": {"train": "rows.jsonl"}}
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields if isinstance(fields, dict) else fields
    return parse_recipe(values)


def refused(**sections: Any) -> tuple[str, str]:
    with pytest.raises(RecipeError) as caught:
        parsed(**sections)
    assert "\n" not in caught.value.problem + caught.value.remedy
    return caught.value.problem, caught.value.remedy


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


MINIMAL = "model: {base: pocket}\ndata: {train: rows.jsonl}\n"


# ----------------------------------------------------------------------------------------------------------- defaults


def test_two_fields_are_a_recipe() -> None:
    recipe = parsed()
    assert isinstance(recipe.adapter, LoraAdapter)
    assert (recipe.adapter.rank, recipe.adapter.resolved_alpha, recipe.adapter.scale) == (16, 32.0, 2.0)
    assert recipe.adapter.targets == "all-linear"
    assert recipe.learning_rate == 2e-4
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.scheduler) == (3.0, 16, "cosine")
    assert (recipe.data.loss_on, recipe.data.overlong, recipe.evaluation.split) == ("assistant", "drop", 0.05)


def test_the_default_learning_rate_depends_on_the_method() -> None:
    rates = {"lora": 2e-4, "rslora": 2e-4, "dora": 2e-4, "lora+": 5e-5, "pissa": 2e-4, "head": 1e-3, "full": 2e-5}
    for method, rate in rates.items():
        assert parsed(adapter={"method": method}).learning_rate == rate
    assert parsed(adapter={"method": "full"}, training={"learning_rate": 0.1}).learning_rate == 0.1


def test_alpha_is_what_was_given_or_twice_the_rank() -> None:
    adapter = parsed(adapter={"rank": 8, "alpha": 4}).adapter
    assert isinstance(adapter, LoraAdapter)
    assert (adapter.scale, adapter.resolved_alpha) == (0.5, 4)


@pytest.mark.parametrize(
    ("method", "alpha", "scale"),
    [("lora", 32, 2), ("dora", 32, 2), ("lora+", 32, 2), ("rslora", 16, 4), ("pissa", 16, 1), ("loftq", 16, 1)],
)
def test_the_default_scale_depends_on_the_method(method: str, alpha: float, scale: float) -> None:
    adapter = parsed(
        adapter={"method": method, "rank": 16}, model={"storage": "nf4"} if method == "loftq" else {}
    ).adapter
    assert isinstance(adapter, LoraAdapter)
    assert (adapter.resolved_alpha, adapter.scale) == (alpha, scale)


def test_the_method_chooses_the_fields() -> None:
    classes = {"lora": LoraAdapter, "rslora": LoraAdapter, "dora": LoraAdapter, "lora+": LoraPlusAdapter,
               "pissa": PissaAdapter, "loftq": LoftqAdapter, "head": HeadAdapter, "full": FullTuning}  # fmt: skip
    assert tuple(classes) == METHODS
    for method, expected in classes.items():
        nf4 = {"storage": "nf4"} if method == "loftq" else {}
        assert type(parsed(adapter={"method": method}, model=nf4).adapter) is expected
    assert type(parsed(adapter={"rank": 4}).adapter) is LoraAdapter
    assert refused(adapter={"method": "lora", "svd_iterations": 4}) == (
        "adapter.svd_iterations does not go with adapter.method = lora.",
        "Delete one of the two lines.",
    )
    assert refused(adapter={"method": "full", "rank": 4}) == (
        "adapter.rank does not go with adapter.method = full.",
        "Delete one of the two lines.",
    )
    assert refused(adapter={"method": "qlora"}) == (
        "adapter.method = qlora is not a method.",
        "Use lora, rslora, dora, lora+, pissa, loftq, head or full.",
    )


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"model": {"storage": "nf4"}, "adapter": {"method": "full"}}, "quantized weights have no gradient"),
        ({"model": {"storage": "int8"}, "adapter": {"method": "pissa"}}, "int8 has rounded"),
        ({"model": {"storage": "fp8"}, "adapter": {"method": "full"}}, "fp8 cannot be trained in full"),
        ({"model": {"storage": "fp8"}, "adapter": {"method": "pissa"}}, "fp8 has rounded"),
        ({"model": {"storage": "fp8"}, "adapter": {"method": "loftq"}}, "model.storage is fp8"),
        ({"model": {"storage": "fp8", "double_quantization": False}}, "nf4 only, not fp8"),
        ({"model": {"compute": "fp8"}}, "kept in nf4 or fp8, but model.storage is auto"),
        ({"model": {"compute": "fp8", "storage": "bf16"}}, "kept in nf4 or fp8, but model.storage is bf16"),
        ({"model": {"compute": "fp8", "storage": "int8"}}, "kept in nf4 or fp8, but model.storage is int8"),
        ({"adapter": {"method": "loftq"}}, "model.storage is auto"),
        ({"model": {"storage": "int8"}, "adapter": {"method": "loftq"}}, "model.storage is int8"),
        ({"model": {"double_quantization": False}}, "read with model.storage = nf4 only"),
        ({"adapter": {"method": "head"}, "data": {"format": "messages"}}, "learns labels"),
        ({"training": {"recompute": "none", "offload_activations": True}}, "training.recompute is none"),
        ({"adapter": {"method": "dora", "precision": "bf16"}}, "does not go with adapter.method = dora"),
        ({"adapter": {"method": "head"}, "data": {"template": "plain"}}, "data.template is not read"),
        ({"adapter": {"method": "head"}, "training": {"recompute": "all"}}, "training.recompute is not read"),
        ({"training": {"recompute": 0}}, "neither auto, none, all nor a number of layers"),
        ({"training": {"recompute": "some"}}, "neither auto, none, all nor a number of layers"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_its_reason(sections: dict[str, Any], problem: str) -> None:
    said, remedy = refused(**sections)
    assert problem in said and remedy


# ---------------------------------------------------------------------------------------------------------------- yaml


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "0.0001"])
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, MINIMAL + f"training: {{learning_rate: {text}}}\n")
    assert read_recipe(path).training.learning_rate == pytest.approx(1e-4)
    path = written(tmp_path, MINIMAL)
    assert read_recipe(path, [f"training.learning_rate={text}"]).training.learning_rate == pytest.approx(1e-4)


def test_a_name_that_looks_like_a_number_only_in_part_stays_a_name(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {base: pocket, revision: 1e4f}\ndata: {train: 5e.jsonl}\n")
    recipe = read_recipe(path)
    assert (recipe.model.revision, recipe.data.train) == ("1e4f", "5e.jsonl")


@pytest.mark.parametrize("text", [MINIMAL + "model: {base: other}\n", "model:\n  base: a\n  base: b\n"])
def test_a_key_that_is_given_twice_is_an_error(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml, line 3: (model|base) is given twice\."):
        read_recipe(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c\n",
        "- a\n- b\n",
        "",
        "{",
        "a: [1\n",
        "? [a, b]\n: c\n",
        "x: !!python/object:os.system {}\n",
        "--- 1\n--- 2\n",
    ],
)
def test_what_is_no_recipe_is_told_in_two_lines(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(path) in caught.value.problem
    assert "\n" not in caught.value.problem + caught.value.remedy


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at .*none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "support.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"Did you mean .*support\.yaml"):
        read_recipe(tmp_path / "suport.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(tmp_path / "binary.yaml")


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_yaml_values_of_fields(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "training:\nadapter: {rank: 4}\n")
    overrides = ["training.learning_rate=1e-3", "adapter.targets=[q_proj, v_proj]", "evaluation.split=null"]
    overrides += ["data.system=Be brief: always.", "adapter.rank=8", "training.output=a=b"]
    recipe = read_recipe(path, overrides)
    assert recipe.training.learning_rate == 1e-3
    assert isinstance(recipe.adapter, LoraAdapter)
    assert (recipe.adapter.targets, recipe.adapter.rank) == (["q_proj", "v_proj"], 8)
    assert recipe.evaluation.split is None
    assert recipe.data.system == "Be brief: always."
    assert recipe.training.output == "a=b"


@pytest.mark.parametrize("override", ["rank", "rank=4", "a.b.c=4", "=4", ".x=4", "training.=4", ""])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, MINIMAL), [override])
    assert caught.value.problem == f"--set {override} is not section.field=value."
    assert caught.value.remedy == "Example: --set training.learning_rate=1e-4"


def test_overrides_are_checked_like_fields(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    with pytest.raises(RecipeError, match=r"adapter\.rnak is not a recipe field"):
        read_recipe(path, ["adapter.rnak=4"])
    with pytest.raises(RecipeError, match=r"outside 1\.\.1024"):
        read_recipe(path, ["adapter.rank=0"])
    with pytest.raises(RecipeError, match="training = 5 is not a section"):
        read_recipe(written(tmp_path, MINIMAL + "training: 5\n"), ["training.seed=1"])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sections", "problem", "remedy"),
    [
        ({"adapter": {"rnak": 16}}, "adapter.rnak is not a recipe field.", "Did you mean adapter.rank?"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat is not a recipe field.", "Did you mean training.learning_rate?"),
        ({"training": {"rank": 16}}, "training.rank is not a recipe field.", "Did you mean adapter.rank?"),
        ({"model": {"zzz": 1}}, "model.zzz is not a recipe field.", "Fields of model: base, revision, weights, compute, storage, double_quantization, trust_remote_code."),
        ({"trainig": {"seed": 1}}, "trainig is not a recipe field.", "Did you mean training?"),
        ({"rank": 4}, "rank is not a recipe field.", "Did you mean adapter.rank?"),
        ({"zzz": {}}, "zzz is not a section.", "Sections: model, adapter, data, training, evaluation, release."),
    ],
)  # fmt: skip
def test_unknown_names_come_with_what_was_meant(sections: dict[str, Any], problem: str, remedy: str) -> None:
    assert refused(**sections) == (problem, remedy)


@pytest.mark.parametrize(
    ("sections", "problem", "remedy"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank = 0 is outside 1..1024.", "Use 16, or delete the line to get the default."),
        ({"adapter": {"dropout": 1.0}}, "adapter.dropout = 1.0 is outside 0..1 (1 excluded).", "Use 0.0, or delete the line to get the default."),
        ({"adapter": {"alpha": 0}}, "adapter.alpha = 0 is not above 0.", "Delete the line to get the default (2 x rank; rslora 16; pissa and loftq rank)."),
        ({"training": {"learning_rate": 2}}, "training.learning_rate = 2 is outside 0..1 (0 and 1 excluded).",
         "Delete the line to get the default (2e-4 for lora and its relatives, 5e-5 for lora+ (of A), 1e-3 for head, 2e-5 for full)."),
        ({"training": {"batch_size": 0}}, "training.batch_size = 0 is less than 1.", "Use 16, or delete the line to get the default."),
        ({"training": {"seed": 2**32}}, "training.seed = 4294967296 is outside 0..4294967295.", "Use 0, or delete the line to get the default."),
        ({"training": {"warmup_fraction": 1.5}}, "training.warmup_fraction = 1.5 is outside 0..1.", "Use 0.05, or delete the line to get the default."),
        ({"data": {"max_tokens": 3}}, "data.max_tokens = 3 is less than 8.", "Delete the line to get the default (the base's context, at most 4096)."),
    ],
)  # fmt: skip
def test_values_out_of_range_come_with_the_range_and_a_good_one(
    sections: dict[str, Any], problem: str, remedy: str
) -> None:
    assert refused(**sections) == (problem, remedy)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"adapter": {"rank": "16"}}, 'adapter.rank = "16" is not a whole number.'),
        ({"adapter": {"rank": True}}, "adapter.rank = true is not a whole number."),
        ({"adapter": {"rank": 1.5}}, "adapter.rank = 1.5 is not a whole number."),
        ({"adapter": {"targets": "qkv"}}, "adapter.targets = qkv is neither a preset nor a list of modules."),
        ({"adapter": {"targets": []}}, "adapter.targets = [] is neither a preset nor a list of modules."),
        ({"training": {"learning_rate": "fast"}}, 'training.learning_rate = "fast" is not a number.'),
        ({"training": {"epochs": float("inf")}}, "training.epochs = Infinity is not a finite number."),
        ({"training": {"epochs": float("nan")}}, "training.epochs = NaN is not a finite number."),
        ({"training": {"scheduler": "cos"}}, "training.scheduler = cos is not one of cosine, linear or constant."),
        ({"training": {"trackers": "wandb"}}, 'training.trackers = "wandb" is not a list.'),
        ({"training": 5}, "training = 5 is not a section."),
        ({"model": {"trust_remote_code": "yes"}}, 'model.trust_remote_code = "yes" is not true or false.'),
        ({"model": {"base": None}}, "model.base = null is not text."),
        ({"model": {"base": ""}}, "model.base is empty."),
        ({"model": {"revision": 1e4}}, "model.revision = 10000.0 is not text."),
    ],
)
def test_values_of_the_wrong_type_say_what_is_wanted(sections: dict[str, Any], problem: str) -> None:
    assert refused(**sections)[0] == problem


def test_a_revision_that_yaml_reads_as_a_number_wants_quotes() -> None:
    assert refused(model={"revision": 12345678})[1].startswith("Put it in quotes")


def test_what_is_missing_is_named_as_a_field() -> None:
    with pytest.raises(RecipeError, match=r"^model\.base is missing"):
        parse_recipe({"data": {"train": "x"}})
    with pytest.raises(RecipeError, match=r"^data\.train is missing\.\n.*--set data\.train="):
        parse_recipe({"model": {"base": "x"}, "data": {}})


def test_several_errors_are_counted() -> None:
    assert refused(adapter={"rnak": 1, "alhpa": 1}, training={"epochs": 0})[1].endswith("(2 more after this one.)")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"weights": "random"}}, "model.weights = random needs adapter.method = full"),
        ({"data": {"prompt_field": "q", "messages_field": "m"}}, "data.prompt_field and data.messages_field"),
        ({"data": {"answer_field": "a", "text_field": "t"}}, "data.answer_field and data.text_field"),
        ({"data": {"format": "text", "prompt_field": "q"}}, "data.prompt_field is not read with data.format = text"),
        (
            {"data": {"format": "messages", "text_field": "q"}},
            "data.text_field is not read with data.format = messages",
        ),
        ({"data": {"format": "text", "system": "Be brief."}}, "data.system is not read with data.format = text"),
        ({"evaluation": {"split": None, "patience": 2}}, "evaluation.patience needs held-out rows"),
        ({"evaluation": {"split": None, "every_steps": 2}}, "evaluation.every_steps needs held-out rows"),
        (
            {"evaluation": {"prompt": "Be kind."}},
            "evaluation.prompt is given, but it is only read where evaluation.baselines",
        ),
        (
            {"evaluation": {"baselines": ["prompt"]}},
            "evaluation.prompt is missing, and is needed where evaluation.baselines",
        ),
        (
            {"evaluation": {"tasks_path": "mine"}},
            "evaluation.tasks_path is given, but it is only read where evaluation.tasks",
        ),
        (
            {"evaluation": {"judge_model": "j"}},
            "evaluation.judge_model is given, but it is only read where evaluation.judge_url",
        ),
        ({"evaluation": {"judge_url": "http://h/v1"}}, "evaluation.judge_model is missing, and is needed where"),
        (
            {"evaluation": {"judge_criteria": "Short."}},
            "evaluation.judge_criteria is only read where evaluation.judge_url",
        ),
        ({"evaluation": {"baselines": ["live"]}}, "release.name does not say which name's version is in use"),
        ({"data": {"general_share": 0.1}}, "data.general_share is given, but it is only read where data.general names"),
        ({"data": {"domain_cap": 0.2}}, "data.domain_cap is given, but it is only read where data.balance is cap"),
        ({"data": {"domain_cap": 0.2, "balance": "equal"}}, "data.domain_cap is given, but it is only read where"),
        ({"data": {"balance": "cap"}}, "data.balance = cap does not say how large a domain may be"),
        ({"data": {"anonymise": "pseudonyms"}}, "data.anonymise = pseudonyms needs a key"),
        ({"data": {"anonymise": "redact", "anonymise_key": "k"}}, "data.anonymise_key is given, but it is only read"),
        ({"data": {"anonymise_kinds": ["email"]}}, "data.anonymise_kinds is given, but it is only read where"),
        ({"data": {"train": ["a", "b", "a"]}}, "a is named twice as a source"),
        ({"data": {"general": "rows.jsonl"}}, "rows.jsonl is named twice as a source"),
        (
            {"evaluation": {"split_by": "prompt", "split": None}},
            "evaluation.split_by is given, but it is only read where",
        ),
        (
            {"evaluation": {"split_by": "prompt", "file": "b"}},
            "evaluation.split_by is given, but it is only read where",
        ),
        (
            {"data": {"general": "g"}, "adapter": {"method": "head"}},
            "data.general is not read with adapter.method = head",
        ),
    ],
)
def test_fields_that_another_one_would_silence_are_refused(sections: dict[str, Any], named: str) -> None:
    assert named in refused(**sections)[0]


def test_fields_that_belong_together_are_taken() -> None:
    parsed(data={"prompt_field": "q", "answer_field": "a"})
    parsed(data={"format": "classification", "text_field": "t", "answer_field": "label"})
    parsed(model={"weights": "random"}, adapter={"method": "full"})
    parsed(evaluation={"split": None, "file": "held.jsonl", "patience": 2})
    parsed(evaluation={"tasks": ["hellaswag"]})
    parsed(evaluation={"baselines": ["base", "prompt", "live"], "prompt": "Be kind."}, release={"name": "boats"})
    parsed(evaluation={"judge_url": "http://h/v1", "judge_model": "j", "judge_criteria": "Short."})
    parsed(evaluation={"tasks": ["own"], "tasks_path": "mine"})
    parsed(data={"train": [{"file": "a", "weight": 2.0}], "balance": "equal"})
    parsed(data={"general": "g.jsonl", "general_share": 0.1, "balance": "cap", "domain_cap": 0.3})
    parsed(data={"anonymise": "pseudonyms", "anonymise_key": "key", "anonymise_kinds": ["email", "name"]})
    parsed(data={"anonymise": "redact"}, evaluation={"split_by": "prompt"})


# -------------------------------------------------------------------------------------------------------------- sources


def test_training_rows_come_from_one_source_or_several() -> None:
    assert [(one.file, one.weight) for one in parsed().data.train_sources] == [("rows.jsonl", 1.0)]
    recipe = parsed(data={"train": ["a.jsonl", {"file": "b.csv", "weight": 2}, {"file": "owner/rows"}]})
    told = [("a.jsonl", 1.0), ("b.csv", 2.0), ("owner/rows", 1.0)]
    assert [(one.file, one.weight) for one in recipe.data.train_sources] == told
    assert recipe.data.train_told == "a.jsonl, b.csv, owner/rows"
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert (again, again.digest) == (recipe, recipe.digest)


def test_sources_can_be_set(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    assert read_recipe(path, ["data.train=x.jsonl"]).data.train == "x.jsonl"
    sources = read_recipe(path, ["data.train=[x.jsonl, {file: y.jsonl, weight: 0.5}]"]).data.train_sources
    assert [(one.file, one.weight) for one in sources] == [("x.jsonl", 1.0), ("y.jsonl", 0.5)]


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ([], "data.train = [] is neither a source nor a list of sources."),
        ({"file": "a"}, 'data.train = {"file": "a"} is neither a source nor a list of sources.'),
        ([5], "data.train, source 1: 5 is not allowed."),
        (["a", ""], 'data.train, source 2: "" is not allowed.'),
        ([{"weight": 2}], "data.train, source 1: file is missing."),
        ([{"file": "a", "wieght": 2}], "data.train, source 1: wieght is not a field of a source."),
        (["a", {"file": "b", "weight": 0}], "data.train, source 2: weight = 0 is not allowed."),
        ([{"file": "b", "weight": "2"}], "data.train, source 1: weight = 2 is not allowed."),
        ([["a"]], 'data.train, source 1: ["a"] is not allowed.'),
    ],
)
def test_a_wrong_source_is_named_by_its_place_in_the_list(train: Any, problem: str) -> None:
    found, remedy = refused(data={"train": train})
    assert found == problem
    assert "weight: 2.0" in remedy


def test_scores_that_are_no_list_are_told_how_one_is_written() -> None:
    problem, remedy = refused(evaluation={"scores": "bleu"})
    assert problem == "evaluation.scores = bleu is neither auto nor a list of scores."
    assert remedy == "Use auto, or a list such as [bleu]."
    assert parsed(evaluation={"scores": ["bleu"]}).evaluation.scores == ["bleu"]


def test_gates_are_numbers_by_name_and_can_be_set(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "evaluation: {gates: {exact_match: 0.05, forgetting: 1e-2}}\n")
    assert read_recipe(path).evaluation.gates == {"exact_match": 0.05, "forgetting": 0.01}
    assert read_recipe(path, ["evaluation.gates={bleu: 2}"]).evaluation.gates == {"bleu": 2.0}
    assert refused(evaluation={"gates": {"bleu": "much"}})[0].startswith("evaluation.gates")
    assert parsed(evaluation={"gates": {"bleu": 2}}).digest != parsed().digest


# ---------------------------------------------------------------------------------------------------------- round trips


def test_yaml_holds_the_whole_recipe(tmp_path: Path) -> None:
    recipe = parsed(
        model={"revision": "1e5"},
        adapter={"targets": ["q_proj"], "alpha": 3},
        data={"system": "Sei knapp: ja — «immer».\nZwei Zeilen.", "prompt_field": "null"},
        training={"learning_rate": 1e-7, "trackers": ["tensorboard"]},
        evaluation={"split": None},
    )
    again = read_recipe(written(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.digest == recipe.digest
    whole = yaml.safe_load(recipe.to_yaml())
    own = {"adapter.learning_rate_ratio", "adapter.svd_iterations"}  # of other methods than lora
    assert {f"{s}.{f}" for s, fields in whole.items() for f in fields} == set(field_paths()) - own


def test_the_digest_is_of_the_content() -> None:
    plain = parsed()
    assert plain.digest == parsed(adapter={"rank": 16, "method": "lora"}, training={"epochs": 3}).digest
    others = [parsed(adapter={"rank": 8}), parsed(training={"seed": 1}), parsed(data={"train": "b"})]
    assert len({plain.digest, *(other.digest for other in others)}) == 4
    # The order of fields and sections says nothing.
    values = {"data": {"loss_on": "all", "train": "rows.jsonl"}, "model": {"base": "pocket"}}
    assert parse_recipe(values).digest == parsed(data={"loss_on": "all"}).digest


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().training.seed = 5  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------- schema


def test_the_schema_lists_every_field_with_words() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    for name, classes in SECTIONS.items():
        assert name in schema["properties"]
        for cls in classes:
            described = schema["$defs"][cls.__name__]
            assert set(described["properties"]) == set(cls.model_fields)
            assert described["additionalProperties"] is False
            for field, value in described["properties"].items():
                assert field == "method" or value.get("description"), f"{name}.{field} has no description"
    assert schema["required"] == ["model", "data"]
    choices = schema["$defs"]["DataSection"]["properties"]["format"]["enum"]
    assert "sharegpt" in choices


def test_field_paths_are_the_fields_of_all_sections() -> None:
    expected = {
        f"{name}.{field}" for name, classes in SECTIONS.items() for cls in classes for field in cls.model_fields
    }
    assert set(field_paths()) == expected
    assert set(SECTIONS) == set(Recipe.model_fields)


# -------------------------------------------------------------------------------------- every accepted field is read


def attribute_reads(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr


def section_reads() -> set[str]:
    """`field` of every read such as `recipe.training.field` or `section.field` in the package, outside of the recipe."""
    reads: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "recipe" or path.name == "starter.py":
            continue
        reads |= set(attribute_reads(ast.parse(path.read_text(encoding="utf-8"))))
    # What the recipe itself derives counts where the derived name is read.
    derived = {"alpha": "resolved_alpha", "learning_rate": "learning_rate", "train": "train_sources"}
    return reads | {field for field, name in derived.items() if name in reads}


def test_every_field_has_a_reader_in_the_source() -> None:
    """The dynamic half, with real runs, is in test_stages.py."""
    reads = section_reads()
    assert [path for path in field_paths() if path.split(".")[1] not in reads] == []
