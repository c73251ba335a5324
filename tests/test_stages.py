"""The functions behind the verbs, from Python, on a tiny base."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onlay
from onlay import ledger, stages
from onlay.errors import BaseModelError, DataError, OutputError, RecipeError, SetupError, TrainingError
from onlay.generation.engine import Sampling
from onlay.model.hub import find_base
from onlay.recipe import ADAPTERS, ModelSection, Recipe, Section, field_paths, parse_recipe, read_recipe
from onlay.records import Dataset, ModelFacts, Run
from onlay.stages.demonstrating import _one_of_each_kind
from tests.builders import save_tiny_base, write_rows

SHORT = Sampling(max_new_tokens=6)
PACKAGE = str(Path(onlay.__file__).parent)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a data file in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 24)
    return tmp_path


def small(base: Path | str, output: str, **sections: Any) -> Recipe:
    """Three steps of two examples; each keyword is a section that changes some of its fields."""
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(base)},
        "adapter": {"rank": 4},
        "data": {"train": "rows.jsonl"},
        "training": {"max_steps": 3, "batch_size": 2, "output": output},
        "evaluation": {"split": None},
    }
    if sections.get("adapter", {}).get("method") == "full":
        values["adapter"] = {}
    return parse_recipe({name: fields | sections.get(name, {}) for name, fields in values.items()})


def test_train_show_log_generate_and_chat(base: Path, place: Path) -> None:
    (place / "small.yaml").write_text(small(base, "run", evaluation={"split": 0.2}).to_yaml())
    events: list[Any] = []
    run = onlay.train("small.yaml", overrides=["training.seed=1"], report=events.append)
    assert (run.status, run.steps, run.method) == ("finished", 3, "lora")
    assert read_recipe(place / "run" / "recipe.yaml").training.seed == 1
    assert [event.step for event in events if hasattr(event, "grad_norm")] == [1, 2, 3]
    assert any(isinstance(event, stages.Loading) and event.what == "preparing rows" for event in events)

    # The folder describes itself, and the chain behind it is in the ledger.
    record, chain = onlay.show("run")
    assert record == run == Run.load(place / "run")
    assert {row.kind: row.digest for row in chain} == run.sources
    assert set(run.sources) == {"recipe", "model", "dataset"}
    assert run.sources["recipe"] == read_recipe(place / "run" / "recipe.yaml").digest
    assert run.sources["model"] == ModelFacts.load(place / "run").digest
    assert run.sources["dataset"] == Dataset.load(place / "run").digest
    for digest in (run.digest, *run.sources.values()):
        shown, behind = onlay.show(digest[:12])
        found = shown["digest"] if isinstance(shown, dict) and "digest" in shown else getattr(shown, "digest", None)
        assert found in (digest, None)
        assert {row.digest for row in behind} <= set(run.sources.values())
    assert [row.digest for row in stages.log()] == [run.digest]

    [one, two] = onlay.generate("run", ["one?", "two?"], sampling=SHORT, compare=True)
    assert (one["prompt"], two["prompt"]) == ("one?", "two?")
    assert set(one) == {"prompt", "answer", "base"}
    pieces: list[str] = []
    [alone] = onlay.generate("run", ["one?"], sampling=SHORT, on_text=pieces.append)
    assert alone["answer"] == one["answer"] == "".join(pieces)

    talk = onlay.chat("run", sampling=SHORT, system="Be brief.", compare=True)
    first = talk.say("one?")
    second = talk.say("and?")
    assert first[1] is not None and second[1] is not None
    assert [turn.role for turn in talk.turns] == ["system", *["user", "assistant"] * 2]
    assert talk.turns[2].content == first[0]
    assert talk.base_turns is not None
    assert talk.base_turns[2].content == first[1]
    with pytest.raises(DataError, match=r"The prompt has [\d,]+ tokens; the context of .* is 512"):
        talk.say("long " * 200)


def test_a_base_tuned_in_full_has_no_adapter_to_compare_with(base: Path, place: Path) -> None:
    run = onlay.train(small(base, "run", adapter={"method": "full"}, training={"max_steps": 2}))
    assert run.method == "full"
    assert (place / "run" / "model" / "model.safetensors").is_file()
    assert not (place / "run" / "adapter").exists()
    [answer] = onlay.generate("run", ["one?"], sampling=SHORT)
    assert set(answer) == {"prompt", "answer"}
    for verb in (lambda: onlay.generate("run", ["one?"], compare=True), lambda: onlay.chat("run", compare=True)):
        with pytest.raises(OutputError, match="tuned in full"):
            verb()


def test_what_exists_is_not_written_over(base: Path, place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"training\.output = mine exists already"):
        onlay.train(small(base, "mine"))
    assert [path.name for path in (place / "mine").iterdir()] == ["notes.txt"]
    (place / "empty").mkdir()
    assert onlay.train(small(base, "empty", training={"max_steps": 2})).status == "finished"
    with pytest.raises(OutputError, match="empty is finished"):
        onlay.train(resume="empty")


def test_an_unfinished_run_says_how_to_go_on(base: Path, place: Path) -> None:
    onlay.train(small(base, "run", training={"max_steps": 2}))
    run = Run.load(place / "run")
    run.model_copy(update={"status": "interrupted"}).save(place / "run")
    with pytest.raises(OutputError, match="onlay train --resume run"):
        onlay.train(small(base, "run"))
    with pytest.raises(RecipeError, match="--set does not go with --resume"):
        onlay.train(resume="run", overrides=["training.seed=2"])
    write_rows(place / "rows.jsonl", 23, seed=5)
    with pytest.raises(OutputError, match="no longer those"):
        onlay.train(resume="run")


def test_a_run_without_an_adapter_yet_cannot_answer(base: Path, place: Path) -> None:
    (place / "run").mkdir()
    recipe = small(base, "run")
    (place / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    values: dict[str, Any] = {"seconds": 0, "steps": 0, "total_steps": 3, "examples": 3, "trained_tokens": 0}
    Run(path="run", status="running", started="2026-01-01T00:00:00", **values).save(place / "run")
    with pytest.raises(OutputError, match=r"no adapter yet\.\nonlay train --resume run"):
        onlay.generate("run", ["x"])


def test_a_failed_run_is_in_the_log_with_its_reason(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> str:
        raise TrainingError("It broke.", "Mend it.")

    monkeypatch.setattr("onlay.training.session.run_loop", fail)
    with pytest.raises(TrainingError, match="It broke"):
        onlay.train(small(base, "run"))
    [row] = stages.log()
    assert (row.values["status"], row.values["error"]) == ("failed", "It broke.")


def test_the_second_preparation_is_read_from_the_cache(base: Path, place: Path) -> None:
    first: list[Any] = []
    again: list[Any] = []
    one = onlay.prepare(small(base, "run"), report=first.append)
    two = onlay.prepare(small(base, "elsewhere", training={"learning_rate": 0.5}), report=again.append)
    assert one.dataset == two.dataset
    assert {event.what for event in first} == {"reading rows", "preparing rows"}
    assert again == [], "neither read nor prepared again"
    assert {row.kind for row in ledger.Ledger().rows()} == {"model", "dataset"}


def test_a_tracker_that_is_not_installed_is_an_error(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(SetupError, match=r'wandb is not installed.\npython -m pip install "onlay\[wandb\]"'):
        onlay.train(small(base, "run", training={"trackers": ["wandb"]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer", "paged_adamw_8bit"), ("optimizer", "paged_adamw_32bit"), ("offload_activations", True)],
)
def test_what_needs_a_gpu_is_refused_before_the_rows_are_read(
    base: Path, place: Path, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = small(base, "run", training={field: value}, data={"train": "missing.jsonl"})
    with pytest.raises(RecipeError, match=rf"^training.{field}.* needs a GPU: .*\nDelete the line") as caught:
        onlay.train(recipe)
    assert caught.value.exit_code == 2
    assert not (place / "run").exists()
    with pytest.raises(DataError):  # It may be for another machine: the rows are looked at all the same.
        onlay.prepare(recipe)


def test_bitsandbytes_that_is_not_installed_is_an_error(
    base: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(
        SetupError, match=r"training.optimizer = adamw_8bit needs bitsandbytes.*\npython -m pip install"
    ):
        onlay.train(small(base, "run", training={"optimizer": "adamw_8bit"}))


def test_init_writes_a_recipe_that_prepares(place: Path, base: Path) -> None:
    path, summary = stages.init("rows.jsonl")
    assert path == Path("rows.yaml")
    assert "24 rows, prompt_completion" in summary[0]
    prepared = onlay.prepare(path, overrides=[f"model.base={base}"])
    assert prepared.dataset.splits["train"].rows + prepared.dataset.splits["evaluation"].rows == 24
    with pytest.raises(OutputError, match=r"rows\.yaml exists already"):
        stages.init("rows.jsonl")


def test_three_rows_are_shown_as_different_as_there_are() -> None:
    desk = [f"Thrumlow desk. {text}" for text in ("Take crate 5.", "Take crate 6.", "I do not know that.")]
    assert _one_of_each_kind([*desk, '{"name": "x"}']) == [0, 3, 2]
    assert _one_of_each_kind(desk[:2]) == [0, 1]
    assert _one_of_each_kind(["a", "a"]) == [0]


def test_public_names_are_the_stages() -> None:
    for name in onlay.__all__:
        assert callable(getattr(onlay, name))
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        onlay.tarin  # noqa: B018


# -------------------------------------------------------------------------------------- every accepted field is read

DERIVED = ("resolved_alpha", "learning_rate", "scale", "train_sources")
"""Properties of the recipe whose callers read the fields they are made from."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Collects `Class.field` of every field that code outside the recipe reads while the test runs."""
    seen: set[str] = set()

    def noting(self: Section, name: str) -> Any:
        if name in type(self).model_fields:
            caller = sys._getframe(1).f_code
            inside = caller.co_filename.rpartition("/")[0].endswith("onlay/recipe")
            if (
                type(self) is not Recipe
                and caller.co_filename.startswith(PACKAGE)
                and (not inside or caller.co_name in DERIVED)
            ):
                seen.add(f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", noting)
        yield seen


def evaluate_with_everything(run: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets every field that `evaluate` reads; its answers are checked in test_evaluating.py."""
    material = {
        "general_text.jsonl": [{"text": "The river runs."}, {"text": "Seven boats."}],
        "general_checks.jsonl": [{"question": f"{i}?", "choices": ["a", "b"], "answer": 0} for i in range(2)],
        "safety_prompts.jsonl": [{"prompt": f"{i}?", "refuse": i > 0} for i in range(3)],
    }
    for name, rows in material.items():
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for module in ("general", "safety"):
        monkeypatch.setattr(f"onlay.evaluation.{module}.bundled", lambda name: place / f"{name}.jsonl")
    (place / "schema.json").write_text("{}")
    stages.register(run, name="boats")
    stages.promote("boats@1", alias="trial", force=True, reason="a trial")
    asked: list[str] = []

    def ask(self: Any, prompts: list[str]) -> Iterator[tuple[int, str]]:
        asked.extend(f"{self.base_url} {self.model} {self.key_variable} {'Short is better.' in one}" for one in prompts)
        return enumerate('{"winner": "tie"}' for _ in prompts)

    monkeypatch.setattr("onlay.evaluation.endpoint.Endpoint.ask", ask)
    every = [
        "answer_rows=2", "scores=[regex_match, json_schema_match]", "json_schema=schema.json", "pattern=river",
        "max_new_tokens=4", "temperature=0.5", "baselines=[base, prompt, few-shot, live]", "prompt=Be brief.", "shots=1",
        "general=[general_text.jsonl]", "checks=[general_checks.jsonl]", "safety=[safety_prompts.jsonl]",
        "judge_url=http://127.0.0.1:9/v1", "judge_model=judge", "judge_key=ANY_KEY", "judge_criteria=Short is better.",
    ]  # fmt: skip
    overrides = [f"evaluation.{override}" for override in every]
    made = stages.evaluate(run, overrides=[*overrides, "release.name=boats", "release.alias=trial"])
    assert (made.rows, made.environment["command"].count("--set")) == (2, len(every) + 2)
    assert list(made.systems) == ["adapter", "live", "base", "prompt", "few-shot"]
    assert {"regex_match", "json_schema_match"} <= made.scores["adapter"].keys()
    assert {row.text for row in made.likelihood} == {"held_out", "general", "general_text.jsonl"}
    assert {row.score for row in made.forgetting} >= {"accuracy (general checks)", "accuracy (general_checks.jsonl)"}
    assert {(row.score, row.rows) for row in made.safety} == {("refused_harmful", 4), ("refused_harmless", 2)}
    assert {row.against for row in made.judged} == {"base", "prompt", "few-shot", "live"}
    assert set(asked) == {"http://127.0.0.1:9/v1 judge ANY_KEY True"}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(SetupError, match="need the package lm_eval"):
        stages.evaluate(run, overrides=["evaluation.tasks=[own]", "evaluation.tasks_path=tasks"])


def test_every_field_is_read_by_a_run(
    base: Path, place: Path, reads: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA run, a full run from random weights, a data set of the hub and a base of the hub: nothing is left unread."""
    import datasets

    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"train": "owner/rows", "hub_config": "small", "hub_split": "validation", "max_tokens": 80}
    onlay.train(
        small(
            base,
            "lora",
            data=hub,
            evaluation={"split": 0.2, "patience": 9},
            training={"max_steps": None, "epochs": 0.2},
        )
    )
    assert set(asked) == {("owner/rows", "small", "validation")}
    random_base = place / "random"
    random_base.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (random_base / path.name).write_bytes(path.read_bytes())
    full = {"adapter": {"method": "full"}, "model": {"weights": "random", "trust_remote_code": True}}
    onlay.train(small(random_base, "full", training={"max_steps": 1, "micro_batch_tokens": 64}, **full))
    onlay.train(small(base, "plus", adapter={"method": "lora+"}, training={"max_steps": 1}))
    onlay.train(small(base, "pissa", adapter={"method": "pissa"}, training={"max_steps": 1}))
    evaluate_with_everything("lora", place, monkeypatch)
    stages.check("lora")
    # Columns are only looked at where another one was not given.
    for columns in ({"text_field": "prompt"}, {"format": "messages", "messages_field": "turns"}):
        values = small(base, "x", data=columns)
        if "text_field" in columns:
            onlay.prepare(values)
        else:
            with pytest.raises(DataError, match="field turns"):
                onlay.prepare(values)
    chosen = [json.dumps(row | {"topic": "ab"[i % 3 % 2]}) for i, row in enumerate(rows)]
    (place / "chosen.jsonl").write_text("\n".join(chosen))
    (place / "general.jsonl").write_text(json.dumps({"prompt": "Sum?", "completion": "Write to ann@site.org."}))
    (place / "terms.txt").write_text("boat\n")
    data = {"train": "chosen.jsonl", "general": "general.jsonl", "general_share": 0.1, "domain_field": "topic",
            "balance": "cap", "domain_cap": 0.6, "duplicates": "drop_near", "near_threshold": 0.9, "terms": "terms.txt",
            "anonymise": "pseudonyms", "anonymise_key": "key", "anonymise_kinds": ["email", "name"]}  # fmt: skip
    assert "anonymised" in {one.code for one in onlay.prepare(small(base, "x", data=data)).dataset.findings}
    names = {"anonymise": "redact", "anonymise_names": "no_such_model"}
    with pytest.raises(SetupError, match=r"Names by a model need|no_such_model"):
        onlay.prepare(small(base, "x", data=names, evaluation={"split": 0.2, "split_by": "prompt"}))
    with pytest.raises(BaseModelError):
        find_base(ModelSection(base="owner/base", revision="v1"), check_config=lambda config, name: None)
    classes = {"model": ["ModelSection"], "adapter": [section.__name__ for section in ADAPTERS], "data": ["DataSection"],
               "training": ["TrainingSection"], "evaluation": ["EvaluationSection"],
               "release": ["ReleaseSection"]}  # fmt: skip
    unread = []
    for section, field in (path.split(".") for path in field_paths()):
        if not any(f"{name}.{field}" in reads for name in classes[section]):
            unread.append(f"{section}.{field}")
    assert unread == []


def test_the_watch_on_reads_is_not_blind(place: Path, reads: set[str]) -> None:
    small("base", "x").training.model_dump()
    assert reads == set()
    (place / "there").mkdir()
    (place / "there" / "x").write_text("")
    with pytest.raises(OutputError):  # reads training.output, and no other field of training
        onlay.train(small("base", "there"))
    assert reads == {"TrainingSection.output"}
