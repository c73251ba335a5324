"""The adviser: every rule speaks when it should and is silent when it should not, and no two contradict each other."""

from __future__ import annotations

import itertools
import random
from typing import Any, get_args

import pytest

from onlay.model.storage import BASE_SHARE
from onlay.planning import advice
from onlay.planning.advice import DECIDED, SETTINGS, Advice, Answers, advise, read_advice, recipe_value
from onlay.planning.rules import Bounds, Known, Rule, decide, read_rules
from onlay.planning.shapes import find_shape
from onlay.recipe import METHODS, Recipe, apply_overrides
from onlay.recipe.sections import Storage

GIB = 2**30
RULES = read_advice()

CASES: dict[str, tuple[dict[str, Known], dict[str, Known]]] = {
    # Rule: where it wins, and where it does not.  What is not named is unknown.
    "approach.facts_change": ({"facts_change": "often", "prompted": "good"}, {"facts_change": "rarely"}),
    "approach.prompt_suffices": ({"prompted": "good"}, {"prompted": "good", "latency": "tight"}),
    "approach.no_rows": ({"rows": 9}, {"rows": 10}),
    "approach.few_rows": ({"rows": 10, "task": "facts"}, {"rows": 50}),
    "approach.facts": ({"task": "facts", "nf4_share": 2.0}, {"task": "skill"}),
    "approach.too_large": ({"nf4_share": 0.91, "task": "domain", "tokens": 10**8}, {"nf4_share": 0.9}),
    "approach.domain": ({"task": "domain", "tokens": 10**7}, {"task": "domain", "tokens": 10**7 - 1}),
    "approach.beyond_capacity": (
        {"capacity_share": 1.1, "full_share": 0.9, "trained_tokens": 10**9},
        {"capacity_share": 1.1, "full_share": 0.91, "trained_tokens": 10**9},
    ),
    "approach.labels_without_gpu": ({"task": "classify", "has_gpu": False}, {"task": "classify"}),
    "approach.quantized": ({"bf16_share": 0.76, "nf4_share": 0.9}, {"bf16_share": 0.75, "nf4_share": 0.2}),
    "approach.lora": ({}, {"bf16_share": 0.76, "nf4_share": 0.2}),
    "rank.capacity": (
        {"capacity_rank": 32, "trained_tokens": 5 * 10**7, "parameters_per_rank": 2 * 10**6},
        {"trained_tokens": 10**6},
    ),
    "rank.much_data": (
        {"capacity_rank": 128, "trained_tokens": 6 * 10**7, "parameters_per_rank": 10**6},
        {"capacity_rank": 128, "trained_tokens": 5 * 10**7, "parameters_per_rank": 10**6},
    ),
    "rank.usual": ({}, {"capacity_rank": 16, "trained_tokens": 9, "parameters_per_rank": 9}),
    "method.full": ({"approach": "full", "rank": 64}, {"approach": "lora"}),
    "method.continued_full": (
        {"approach": "continued-pretraining", "full_share": 0.5},
        {"approach": "continued-pretraining", "full_share": 1.5},
    ),
    "method.head": ({"approach": "head"}, {"approach": "qlora"}),
    "method.high_rank": ({"approach": "lora", "rank": 64}, {"approach": "lora", "rank": 63}),
    "method.plain": ({"approach": "lora", "rank": 16}, {"approach": "full", "rank": 16}),
    "alpha.plain": ({"rank": 16, "method": "dora"}, {"rank": 16, "method": "rslora"}),
    "alpha.rslora": ({"rank": 64, "method": "rslora"}, {"rank": 64, "method": "lora"}),
    "alpha.begun": ({"rank": 16, "method": "pissa"}, {"rank": 16, "method": "lora+"}),
    "targets.all": ({}, {}),
    "dropout.few_rows": ({"rows": 999}, {"rows": 1000}),
    "dropout.none": ({"rows": 1000}, {"rows": 999}),
    "storage.large": ({"bf16_share": 0.76, "method": "lora"}, {"bf16_share": 0.76, "method": "pissa"}),
    "storage.loftq": ({"bf16_share": 0.1, "method": "loftq"}, {"bf16_share": 0.1, "method": "lora"}),
    "storage.fits": ({"bf16_share": 0.75, "method": "lora"}, {"bf16_share": 0.76, "method": "lora"}),
    "epochs.pretraining": ({"approach": "continued-pretraining", "rows": 100}, {"approach": "lora", "rows": 100}),
    "epochs.hundreds": ({"rows": 299}, {"rows": 300}),
    "epochs.thousands": ({"rows": 300}, {"rows": 5000}),
    "epochs.many": ({"rows": 5000}, {"rows": 20000}),
    "epochs.very_many": ({"rows": 20000}, {"rows": 19999}),
    "epochs.usual": ({}, {"rows": 1}),
    "batch.full": ({"rows": 10**5, "batch_for_100_steps": 64, "method": "full"}, {"rows": 10**5, "batch_for_100_steps": 64, "method": "lora"}),
    "batch.steps": ({"rows": 19999, "batch_for_100_steps": 64}, {"rows": 19999}),
    "batch.many": ({"rows": 20000, "batch_for_100_steps": 64}, {"rows": 19999, "batch_for_100_steps": 64}),
    "batch.usual": ({}, {"rows": 20000}),
    "rate.calibrated": (
        {"method": "lora", "calibrated_rate": 3e-4, "hidden_size": 4096, "update_scale": 32.0, "scale_correction": 1.0,
         "parameters": 7 * 10**10},
        {"method": "full", "calibrated_rate": 3e-4, "hidden_size": 4096, "update_scale": 32.0},
    ),
    "rate.large_base": (
        {"method": "rslora", "parameters": 3 * 10**10, "scale_correction": 1.0, "update_scale": 32.0},
        {"method": "rslora", "parameters": 3 * 10**10 - 1, "scale_correction": 1.0, "update_scale": 32.0},
    ),
    "rate.practice": ({"method": "dora", "scale_correction": 0.5, "update_scale": 64.0}, {"method": "loftq", "scale_correction": 0.5, "update_scale": 64.0}),
    "rate.lora_plus": ({"method": "lora+"}, {"method": "lora"}),
    "rate.pissa": ({"method": "pissa"}, {"method": "loftq"}),
    "rate.full": ({"method": "full"}, {"method": "lora"}),
    "rate.head": ({"method": "head"}, {"method": "full"}),
    "rate.usual": ({"method": "loftq"}, {"method": "head"}),
    "warmup.short": ({"steps": 199}, {"steps": 200}),
    "warmup.long": ({"steps": 2000}, {"steps": 1999}),
    "warmup.usual": ({"steps": 200}, {"steps": 199}),
    "clip.quantized": ({"storage": "nf4"}, {"storage": "int8"}),
    "clip.usual": ({"storage": "bf16"}, {"storage": "nf4"}),
    "serving.whole": ({"method": "full", "served_tasks": "many"}, {"method": "lora"}),
    "serving.head": ({"method": "head", "latency": "tight"}, {"method": "lora"}),
    "serving.refused": ({"accepting_servers": 0, "served_tasks": "many"}, {"accepting_servers": 1}),
    "serving.many": ({"served_tasks": "many", "latency": "tight"}, {"served_tasks": "one"}),
    "serving.quantized": ({"storage": "nf4", "latency": "tight"}, {"storage": "bf16", "latency": "tight"}),
    "serving.fast": ({"latency": "tight", "storage": "bf16"}, {"latency": "tight", "served_tasks": "many"}),
    "serving.apart": ({"latency": "relaxed"}, {"latency": "tight"}),
}  # fmt: skip


def situation(**known: Known) -> dict[str, Known | None]:
    return {**dict.fromkeys(RULES.quantities), **known}


def winner(setting: str, known: dict[str, Known]) -> str:
    return decide(setting, situation(**known), rules=RULES).rule


def test_every_rule_is_tried() -> None:
    assert list(CASES) == [rule.id for rule in RULES.rules]


@pytest.mark.parametrize("rule", RULES.rules, ids=lambda rule: rule.id)
def test_it_fires_and_it_is_silent(rule: Rule) -> None:
    where, where_not = CASES[rule.id]
    # Rules about what was decided need all of it; where it is not named, it is something else.
    assert winner(rule.setting, {"rank": 16, **where}) == rule.id
    if rule.id != "targets.all":  # The only one for its setting.
        assert winner(rule.setting, {"rank": 16, **where_not}) != rule.id


def test_what_is_decided_first_is_known_to_what_follows() -> None:
    """No rule goes by a quantity that is only made after its setting."""
    later = {"update_scale": "adapter.alpha", "scale_correction": "adapter.alpha", "calibrated_rate": "adapter.alpha",
             "batch_for_100_steps": "training.epochs", "steps": "training.batch_size", "accepting_servers": "model.storage"}  # fmt: skip
    made_by = {quantity: setting for setting, quantity in DECIDED.items()} | later
    for rule in RULES.rules:
        computed = [rule.value.quantity] if hasattr(rule.value, "quantity") else []
        for name in (*rule.when, *rule.needs, *computed):
            if name in made_by:
                assert SETTINGS.index(made_by[name]) < SETTINGS.index(rule.setting), (rule.id, name)


def test_every_quantity_is_spoken_of_and_made() -> None:
    read: set[str] = set()
    for rule in RULES.rules:
        read |= {*rule.when, *rule.needs} | ({rule.value.quantity} if hasattr(rule.value, "quantity") else set())
    made = advised(Answers(rows=1000, mean_tokens=100.0, memory_bytes=80 * GIB, has_gpu=True, **SAID)).known
    unread = {"alpha", "epochs", "batch_size"}  # What others are made from.
    assert read | unread == set(RULES.quantities)
    assert set(made) == set(RULES.quantities)


def test_words_and_shares_are_those_of_the_code() -> None:
    words = {name: quantity.words for name, quantity in RULES.quantities.items()}
    assert words["method"] == METHODS
    assert {*words["storage"], "auto"} == set(get_args(Storage))
    for name, kind in (("task", advice.Task), ("facts_change", advice.FactsChange), ("prompted", advice.Prompted),
                       ("latency", advice.Latency), ("served_tasks", advice.Tasks)):  # fmt: skip
        assert words[name] == get_args(kind)
    by_id = {rule.id: rule for rule in RULES.rules}
    for one in ("approach.quantized", "storage.large"):
        assert by_id[one].when["bf16_share"] == Bounds(above=BASE_SHARE)
    approaches = {rule.value for rule in RULES.rules if rule.setting == "approach"}
    assert approaches == set(words["approach"])
    assert set(advice.TRAINING) < approaches


# ----------------------------------------------------------------------------------------------------- contradictions

FILE: dict[str, Any] = {
    "quantities": {
        "rows": {"meaning": "rows", "form": "count"},
        "task": {"meaning": "task", "words": ["style", "facts"]},
        "has_gpu": {"meaning": "a GPU", "form": "yes"},
    },
    "rules": [{"id": "usual", "setting": "rank", "value": 16, "reason": "usual", "source": "here"}],
}


def with_rules(*rules: dict[str, Any]) -> dict[str, Any]:
    whole = [{"setting": "rank", "value": 8, "reason": "why", "source": "here", **rule} for rule in rules]
    return {**FILE, "rules": [*FILE["rules"], *whole]}


def test_contradictory_rules_are_refused() -> None:
    one = {"id": "few", "when": {"rows": {"below": 100}}, "precedence": 1}
    other = {"id": "style", "when": {"task": "style"}, "precedence": 1, "value": 4}
    with pytest.raises(ValueError, match="few and style can hold at once, with different values and one precedence"):
        read_rules(with_rules(one, other), settings=["rank"])
    read_rules(with_rules(one, {**other, "value": 8}), settings=["rank"])
    read_rules(with_rules(one, {**other, "precedence": 2}), settings=["rank"])
    read_rules(with_rules(one, {**other, "when": {"task": "style", "rows": {"at_least": 100}}}), settings=["rank"])


@pytest.mark.parametrize(
    ("one", "other", "excluded"),
    [
        ({"below": 3}, {"at_least": 3}, True),
        ({"at_most": 3}, {"at_least": 3}, False),
        ({"at_most": 3}, {"above": 3}, True),
        ({"below": 3}, {"above": 2}, False),
        ({"at_least": 1, "below": 3}, {"at_least": 2}, False),
        ({}, {"below": 0}, False),
    ],
)
def test_bounds_that_exclude_each_other(one: dict[str, float], other: dict[str, float], excluded: bool) -> None:
    first, second = Bounds(**one), Bounds(**other)
    assert first.exclude(second) is second.exclude(first) is excluded
    shared = [number for number in (0.0, 1.0, 2.0, 2.5, 3.0, 3.5, -1.0) if first.hold(number) and second.hold(number)]
    assert bool(shared) is not excluded


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"id": "a", "when": {"row": {"below": 1}}}, "row is not a quantity"),
        ({"id": "a", "when": {"task": "stile"}}, "task is never stile"),
        ({"id": "a", "when": {"task": {"below": 1}}}, "task is not a number"),
        ({"id": "a", "when": {"rows": {}}}, "rows has no bound"),
        ({"id": "a", "when": {"rows": {"under": 1}}}, "under"),
        ({"id": "a", "when": {"has_gpu": "style"}}, "has_gpu is never style"),
        ({"id": "a", "setting": "alpha", "when": {"task": "style"}}, "alpha is not a setting"),
        ({"id": "a", "when": {"task": "style"}, "reason": "{rows} rows"}, "the reason speaks of rows, which may be unknown"),
        ({"id": "a", "when": {"task": ["style", "unknown"]}, "reason": "{task}"}, "speaks of task, which may be unknown"),
        ({"id": "a", "when": {"task": "style"}, "value": {"quantity": "row"}}, "row is not a quantity"),
        ({"id": "usual", "when": {"task": "style"}}, "two rules are named usual"),
        ({"id": "a"}, "rank needs one rule without conditions"),
        ({"id": "a", "when": {"task": "style"}, "why": "no"}, "Extra inputs"),
    ],
)  # fmt: skip
def test_unsound_rules_are_refused(rule: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_rules(with_rules(rule), settings=["rank"])


def test_a_setting_without_rules_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha needs one rule without conditions"):
        read_rules(FILE, settings=["rank", "alpha"])


# ------------------------------------------------------------------------------------------------------------- advise

SAID: dict[str, Any] = {
    "task": "style", "facts_change": "never", "prompted": "fair", "latency": "relaxed", "served_tasks": "one",
}  # fmt: skip


def advised(answers: Answers, model: str = "llama-3.1-8b", **how: Any) -> Advice:
    how = {"accepting": lambda _known: 5, **how}
    return advise(answers, base=find_shape(model), **how)


def values(made: Advice) -> dict[str, Known]:
    return {one.setting: one.advised for one in (made.approach, *made.settings, made.serving)}


def test_a_usual_job() -> None:
    found = values(advised(Answers(rows=5000, mean_tokens=300, has_gpu=True, memory_bytes=80 * GIB)))
    assert found == {
        "approach": "lora", "adapter.rank": 16, "adapter.method": "lora", "adapter.alpha": 32,
        "adapter.targets": "all-linear", "adapter.dropout": 0.0, "model.storage": "bf16", "training.epochs": 2,
        "training.batch_size": 16, "training.learning_rate": 2.9e-4, "training.warmup_fraction": 0.05,
        "training.max_grad_norm": 1.0, "serving": "apart",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "rate"), [("llama-3.2-1b", 4.9e-4), ("llama-3.1-70b", 1.7e-4), ("qwen3-8b", 4.7e-4), ("mistral-7b", 2e-4)]
)
def test_the_rate_goes_by_family_and_width(model: str, rate: float) -> None:
    made = advised(Answers(rows=5000, mean_tokens=300), model)
    assert values(made)["training.learning_rate"] == rate


def test_the_rate_goes_down_as_the_scale_goes_up() -> None:
    """rsLoRA at rank 64 with alpha 16 moves the weights by 16 x 8 = 128, four times as much as alpha 32."""
    made = advised(Answers(rows=200_000, mean_tokens=900), "llama-3.1-8b")
    found = values(made)
    assert made.known["trained_tokens"] == 180_000_000
    assert (found["adapter.rank"], found["adapter.method"], found["adapter.alpha"]) == (128, "rslora", 16)
    assert made.known["update_scale"] == pytest.approx(16 * 128**0.5)
    assert found["training.learning_rate"] == pytest.approx(2.856e-4 * 32 / (16 * 128**0.5), rel=0.02)


def test_the_memory_decides_on_quantization_and_on_fitting_at_all() -> None:
    job = {"rows": 5000, "mean_tokens": 300.0, "has_gpu": True}
    shares = {gib: advised(Answers(**job, memory_bytes=gib * GIB)).approach.advised for gib in (80, 16, 4)}
    assert shares == {80: "lora", 16: "qlora", 4: "smaller base or larger GPU"}
    on_16 = values(advised(Answers(**job, memory_bytes=16 * GIB)))
    assert (on_16["model.storage"], on_16["training.max_grad_norm"], on_16["serving"]) == ("nf4", 0.3, "apart")


def test_bytes_of_the_base_are_those_of_the_storage() -> None:
    """8,030,261,248 parameters, of which 6,979,321,856 in the linear layers: published counts."""
    known = advised(Answers(memory_bytes=80 * GIB)).known
    assert known["bf16_share"] == pytest.approx(2 * 8_030_261_248 / (80 * GIB))
    packed = 6_979_321_856
    nf4 = packed * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * (8_030_261_248 - packed)
    assert known["nf4_share"] == pytest.approx(nf4 / (80 * GIB))


def test_what_others_would_have_said_is_told() -> None:
    made = advised(Answers(rows=20, task="facts", facts_change="often"))
    assert made.approach.advised == "rag"
    assert not made.trains
    assert {other.rule for other in made.approach.overruled} == {"approach.few_rows"}, "rag for facts says the same"
    assert "20 rows" in made.approach.overruled[0].reason


def test_what_was_not_said_is_told() -> None:
    made = advise(Answers(rows=100), base=None)
    assert set(made.unknown) == {
        "task", "facts_change", "prompted", "latency", "served_tasks", "mean_tokens", "has_gpu", "memory_bytes", "base",
    }  # fmt: skip
    assert values(made)["adapter.rank"] == 16
    assert advised(Answers(rows=9, mean_tokens=9, has_gpu=False, **SAID)).unknown == ()


def recipe_of(**sections: Any) -> Recipe:
    return apply_overrides({"model": {"base": "llama-3.1-8b"}, "data": {"train": "rows.jsonl"}, **sections}, [])


def test_a_recipe_is_compared_and_its_method_kept() -> None:
    recipe = recipe_of(adapter={"method": "dora", "rank": 24}, training={"max_grad_norm": None, "batch_size": 64})
    made = advised(Answers(rows=5000, mean_tokens=300), recipe=recipe)
    by_name = {one.setting: one for one in made.settings}
    assert made.known["method"] == "dora"
    assert {name: (one.recipe, one.verdict) for name, one in by_name.items()} == {
        "adapter.rank": (24, "near"), "adapter.method": ("dora", "differs"), "adapter.alpha": (48, "near"),
        "adapter.targets": ("all-linear", "same"), "adapter.dropout": (0.0, "same"), "model.storage": ("auto", None),
        "training.epochs": (3.0, "near"), "training.batch_size": (64, "differs"),
        "training.learning_rate": (2e-4, "near"), "training.warmup_fraction": (0.05, "same"),
        "training.max_grad_norm": ("off", "differs"),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["full", "head"])
def test_a_whole_model_and_a_head_have_no_adapter_settings(method: str) -> None:
    made = advised(Answers(rows=5000), recipe=recipe_of(adapter={"method": method}))
    assert [one.setting for one in made.settings if one.setting.startswith("adapter.")] == ["adapter.method"]
    assert made.serving.advised == "as it is"
    assert recipe_value("adapter.rank", recipe_of(adapter={"method": method})) is None


def test_any_advice_is_a_recipe() -> None:
    """Whatever is said, every setting gets a value that the recipe takes, and all of them together do."""
    draw = random.Random(0)
    kinds = {name: [*get_args(kind), None] for name, kind in
             (("task", advice.Task), ("facts_change", advice.FactsChange), ("prompted", advice.Prompted),
              ("latency", advice.Latency), ("served_tasks", advice.Tasks))}  # fmt: skip
    models = ["llama-3.1-70b", "qwen2.5-0.5b", "mistral-7b", "gpt2"]
    for number in range(300):
        answers = Answers(
            **{name: draw.choice(choices) for name, choices in kinds.items()},
            rows=draw.choice([None, 0, 5, 49, 299, 5000, 10**5, 10**7]), mean_tokens=draw.choice([None, 20.0, 4000.0]),
            trained_share=draw.choice([None, 0.0, 0.5]), has_gpu=draw.choice([None, True, False]),
            memory_bytes=draw.choice([None, 8 * GIB, 80 * GIB]),
        )  # fmt: skip
        made = advised(answers, draw.choice(models), accepting=lambda _known: draw.choice([None, 0, 5]))
        found = {one.setting: one.advised for one in made.settings}
        changed = [f"{name}={value}" for name, value in found.items()]
        recipe = apply_overrides({"model": {"base": "pocket"}, "data": {"train": "rows.jsonl"}}, changed)
        assert recipe.training.batch_size <= 64, number
        assert 1e-6 < recipe.learning_rate < 1e-2


def test_no_pair_of_rules_can_contradict() -> None:
    """Said once more without the engine: of every pair with one precedence and different values, one case of each."""
    for one, other in itertools.combinations(RULES.rules, 2):
        if one.setting != other.setting or one.precedence != other.precedence or one.value == other.value:
            continue
        where = situation(**{"rank": 16, **CASES[one.id][0]})
        assert not (one.holds(where) and other.holds(where)), (one.id, other.id)
