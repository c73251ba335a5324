"""`evaluate` and `compare` from Python, on runs of a tiny base: what is asked, compared, decided and written."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from onlay import ledger, stages
from onlay.data.split import open_split
from onlay.errors import BaseModelError, DataError, OutputError, ProofError, RecipeError, SetupError
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Comparison, Dataset, Likelihood, Report, Run
from onlay.stages import evaluating, subjects
from tests.builders import save_tiny_base, tiny_tokenizer, write_rows

ROWS = 48
GATES = {"exact_match": 0.2, "trained_rows": 10}
BRIEF = ("evaluation.max_new_tokens=6",)
MATERIAL = {
    "general_text": [{"text": "The river runs."}, {"text": "Seven boats wait for rain."}, {"text": "A stone bridge."}],
    "general_checks": [{"question": f"{i} + 1?", "choices": [str(i + 1), "none"], "answer": 0} for i in range(3)],
    "safety_prompts": [{"prompt": f"{word}?", "refuse": word != "boats"} for word in ("harm", "boats", "steal")],
}


def recipe(output: str, **sections: dict[str, Any]) -> Recipe:
    """Three steps on rows.jsonl, three rows in ten held out; each keyword is a section that changes some fields."""
    method = sections.get("adapter", {}).get("method", "lora")
    values: dict[str, dict[str, Any]] = {
        "model": {"base": "base"}, "adapter": {"method": method} | ({"rank": 4} if method == "lora" else {}),
        "data": {"train": "rows.jsonl"}, "training": {"output": output, "max_steps": 3, "batch_size": 4},
        "evaluation": {"split": 0.3},
    }  # fmt: skip
    return parse_recipe({name: fields | sections.get(name, {}) for name, fields in values.items()})


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and runs on it.  `run` learned to say `yes`, whatever is asked; `other` learned nothing."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONLAY_HOME", str(folder / "home"))
        save_tiny_base(Path("base"))
        write_lines(Path("rows.jsonl"), [{"prompt": f"{i} boats?", "completion": "yes"} for i in range(ROWS)])
        write_rows(Path("messages.jsonl"), 12, "messages")
        write_rows(Path("texts.jsonl"), 12, "text")
        write_rows(Path("labels.jsonl"), 24, "classification")
        kinds: dict[str, dict[str, Any]] = {
            "run": {"training": {"max_steps": 40, "learning_rate": 0.01}, "evaluation": {"gates": GATES}},
            "other": {"training": {"seed": 1}},
            "full": {"adapter": {"method": "full"}},
            "messages": {"data": {"train": "messages.jsonl"}},
            "texts": {"data": {"train": "texts.jsonl"}},
            "head": {"data": {"train": "labels.jsonl"}, "adapter": {"method": "head"}},
            "bare": {"evaluation": {"split": None}},
        }
        for name, sections in kinds.items():
            stages.train(recipe(name, **sections))
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with copies of all, and little general material."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))
    for name, rows in MATERIAL.items():
        write_lines(tmp_path / f"small_{name}.jsonl", rows)
    for module in ("general", "safety"):
        monkeypatch.setattr(f"onlay.evaluation.{module}.bundled", lambda name: tmp_path / f"small_{name}.jsonl")
    return tmp_path


def evaluate(what: str, *overrides: str, **options: Any) -> Report:
    return stages.evaluate(what, overrides=(*BRIEF, *overrides), **options)


def one(comparisons: list[Comparison], score: str, against: str = "base") -> Comparison:
    [found] = [row for row in comparisons if row.score == score and row.against == against]
    return found


def likelihood(made: Report, text: str, system: str) -> Likelihood:
    [found] = [row for row in made.likelihood if (row.text, row.system) == (text, system)]
    return found


# ------------------------------------------------------------------------------------------------- a run and its folder


def test_a_run_is_better_than_its_base_and_all_of_it_is_written(place: Path) -> None:
    told: list[Any] = []
    made = evaluate("run", report=told.append)
    held_out = Dataset.load(place / "run").splits["evaluation"].rows
    assert (made.system, set(made.systems), made.rows, made.left_out) == ("adapter", {"adapter", "base"}, held_out, {})
    assert made.scores["adapter"]["exact_match"] == 1.0
    assert made.scores["base"]["exact_match"] == 0.0
    gain = one(made.comparisons, "exact_match")
    assert (gain.difference, gain.rows, gain.p_value) == (1.0, held_out, 2 * 0.5**held_out)
    assert made.verdict == "ship"
    assert [(gate.name, gate.passed, gate.found) for gate in made.gates] == [
        ("exact_match", True, 1.0), ("trained_rows", True, ROWS - held_out)
    ]  # fmt: skip
    assert made.latency_ms is None  # No gate asks for it.
    assert (made.judged, made.seeds, made.gate_edits) == ([], [], [])

    folder = place / "run" / "report"
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl", "failures.jsonl", "report.html", "report.json"
    ]  # fmt: skip
    assert Report.load(folder) == made
    assert "<!doctype html>" in (folder / "report.html").read_text().lower()
    rows = read_lines(folder / "answers.jsonl")
    assert set(rows[0]) == {"row", "place", "prompt", "expected", "answers", "scores"}
    assert rows[0]["answers"]["adapter"] == rows[0]["expected"] == "yes"
    assert rows[0]["place"].startswith("rows.jsonl:")
    assert read_lines(folder / "failures.jsonl") == []
    assert made.failures == 0

    # The chain behind it, and the ledger's row of it.
    run = Run.load(place / "run")
    assert made.sources["run"] == run.digest
    assert made.sources["weights"] == run.proofs["artefact_sha256"]["adapter_model.safetensors"]
    assert made.sources["dataset"] == run.sources["dataset"]
    assert [row.digest for row in ledger.Ledger().rows("report")] == [made.digest]
    shown, chain = stages.show(made.digest[:12])
    assert getattr(shown, "digest", None) == made.digest
    assert {"run", "dataset", "model"} <= {row.kind for row in chain}
    counted = {event.what for event in told if isinstance(event, stages.Loading)}
    assert {"answering held-out rows", "answering safety prompts", "held-out loss, base"} <= counted
    assert made.environment["command"] == "onlay evaluate run --set evaluation.max_new_tokens=6"


def test_paired_numbers_are_those_of_the_rows(place: Path) -> None:
    made = evaluate("other", "evaluation.scores=[token_f1, exact_match]")
    rows = read_lines(place / "other" / "report" / "answers.jsonl")
    for score in ("token_f1", "exact_match", "repetition", "no_stop"):
        ours, theirs = ([row["scores"][system][score] for row in rows] for system in ("adapter", "base"))
        found = one(made.comparisons, score)
        assert found.value == pytest.approx(sum(ours) / len(rows))
        assert found.other == pytest.approx(sum(theirs) / len(rows))
        assert found.difference == pytest.approx(sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(rows))
        assert made.scores["adapter"][score] == pytest.approx(found.value)
    failures = read_lines(place / "other" / "report" / "failures.jsonl")
    assert made.failures == len(failures) == sum(row["scores"]["adapter"]["token_f1"] < 1 for row in rows) > 0
    assert failures[0]["messages"][-1] == {"role": "assistant", "content": "yes"}


def test_perplexity_is_that_of_transformers_own_loss(place: Path) -> None:
    from peft import PeftModel

    made = evaluate("run")
    split = open_split(Dataset.load(place / "run"), "evaluation")
    model: Any = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, "run/adapter").eval()
    sums = {"adapter": 0.0, "base": 0.0}
    tokens = 0
    for index in range(len(split)):
        ids, trained = (torch.from_numpy(array.copy()) for array in split.example(index))
        labels = torch.where(trained, ids, -100).long()[None]
        count = int(trained[1:].sum())
        tokens += count
        with torch.no_grad():
            sums["adapter"] += count * float(adapted(input_ids=ids.long()[None], labels=labels).loss)
            with adapted.disable_adapter():
                sums["base"] += count * float(adapted(input_ids=ids.long()[None], labels=labels).loss)
    for system, nats in sums.items():
        found = likelihood(made, "held_out", system)
        assert (found.rows, found.tokens) == (len(split), tokens)
        assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(found.nats_per_token))
    nats = one(made.comparisons, "nats_per_token")
    assert nats.difference == pytest.approx((sums["adapter"] - sums["base"]) / tokens, rel=1e-5)


def test_a_report_is_replaced_whole_and_the_earlier_one_stays_in_the_ledger(place: Path) -> None:
    first = evaluate("other")
    (place / "other" / "report" / "extra.txt").write_text("of the first")
    second = evaluate("other", "evaluation.answer_rows=3")
    assert Report.load(place / "other" / "report") == second != first
    assert second.rows == 3
    assert sorted(path.name for path in (place / "other").iterdir() if "report" in path.name) == ["report"]
    assert not (place / "other" / "report" / "extra.txt").exists()
    assert [row.digest for row in ledger.Ledger().rows("report")] == [first.digest, second.digest]
    assert ledger.find(first.digest[:12]).values["rows"] == first.rows


def test_what_is_no_report_is_not_written_over(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("keep")
    for output in ("mine", "rows.jsonl", "run"):
        with pytest.raises(OutputError, match=f"{output} exists already and holds no report"):
            evaluate("run", output=output)
    assert (place / "mine" / "notes.txt").read_text() == "keep"
    assert evaluate("run", "evaluation.answer_rows=2", output="elsewhere/new").path == "elsewhere/new"


# ------------------------------------------------------------------------------------------------------ left-out rows


def test_rows_that_are_not_asked_are_counted_and_told(place: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(6)
    ]
    rows.append({"messages": [*rows[0]["messages"], {"role": "user", "content": "And?"}]})
    rows.append({"messages": [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "yes"}]})
    write_lines(place / "mixed.jsonl", rows)
    made = evaluate("run", "evaluation.answer_rows=4", data="mixed.jsonl")
    assert made.rows == 4
    assert made.left_out == {
        "rows that do not end with an answer": 1,
        "rows whose prompt and 6 new tokens pass the context": 1,
        "rows beyond evaluation.answer_rows = 4": 2,
        "rows longer than the context, for their likelihood,": 1,
    }
    for why, count in made.left_out.items():
        assert f"{count} {why} were not asked." in made.risks
    assert made.data == "mixed.jsonl"
    assert likelihood(made, "held_out", "adapter").rows == 7


def test_rows_of_which_none_can_be_asked_are_an_error(place: Path) -> None:
    with pytest.raises(DataError, match=r"None of the 14 rows can be asked: 14 rows whose prompt and 600 new tokens"):
        stages.evaluate("run", overrides=["evaluation.max_new_tokens=600"])


def test_a_score_that_rows_lack_is_told(place: Path) -> None:
    rows = [{"prompt": f"{i} boats?", "completion": '{"a": 1}' if i % 2 else "yes"} for i in range(8)]
    write_lines(place / "some.jsonl", rows)
    made = evaluate("run", data="some.jsonl")
    assert "json_equal counts 4 of 8 rows: the others lack what it needs." in made.risks
    assert one(made.comparisons, "json_equal").rows == 4


# -------------------------------------------------------------------------------------------------------------- systems


def test_baselines_and_another_adapter_answer_in_one_load(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.register("other", name="boats")
    stages.promote("boats@1", force=True, reason="for comparison")
    loads: list[list[str]] = []
    real = subjects.open_model

    def opened(section: Any, adapters: Any, **options: Any) -> Any:
        loads.append(list(adapters))
        return real(section, adapters, **options)

    monkeypatch.setattr(subjects, "open_model", opened)
    made = evaluate(
        "run", "evaluation.baselines=[base, prompt, few-shot, live]", "evaluation.prompt=Say yes.", "evaluation.shots=2",
        "release.name=boats", others=["other", "boats@1"],
    )  # fmt: skip
    assert loads == [["adapter", "other", "boats@1", "live"]]
    assert list(made.systems) == ["adapter", "other", "boats@1", "live", "base", "prompt", "few-shot"]
    assert made.systems["few-shot"] == "the base with 2 examples in context"
    for name in list(made.systems)[1:]:
        assert one(made.comparisons, "exact_match", name).difference == 1.0 - made.scores[name]["exact_match"]  # type: ignore[operator]
    # What is one adapter under three names says one thing.
    assert made.scores["other"] == made.scores["live"] == made.scores["boats@1"]
    plain = {"adapter", "other", "boats@1", "live", "base"}
    assert {row.system for row in made.likelihood} == plain
    assert {row.system for row in made.forgetting} == {"adapter"}
    rows = read_lines(place / "run" / "report" / "answers.jsonl")
    assert set(rows[0]["answers"]) == set(made.systems)


def test_examples_in_context_never_hold_the_question(place: Path) -> None:
    subject = subjects.find_subject("run", others=(), overrides=["evaluation.baselines=[few-shot]"], data=None)
    from onlay.data.template import ChatTemplate
    from onlay.evaluation.systems import questions_of

    rows, _, _ = subject.rows()
    template = ChatTemplate(tiny_tokenizer(), template="auto", loss_on="assistant")
    questions = questions_of(rows, template=template)  # type: ignore[arg-type]
    shown = subject.shot_rows(questions)
    assert len(shown) == ROWS - len(questions)
    assert not {row.place for row in shown} & {question.place for question in questions}


def test_without_the_base_nothing_is_compared_with_it(place: Path) -> None:
    made = evaluate("run", "evaluation.baselines=[prompt]", "evaluation.prompt=Say yes.")
    assert set(made.systems) == {"adapter", "prompt"}
    assert {row.against for row in made.comparisons} == {"prompt"}
    assert (made.forgetting, made.safety, made.verdict) == ([], [], "do not ship")
    assert made.gates[0].found is None
    assert any("no base to compare with" in risk for risk in made.risks)


def test_an_adapter_folder_a_version_and_a_model_need_rows(place: Path) -> None:
    stages.register("run", name="boats")
    stages.promote("boats@1", force=True, reason="for its alias")
    shutil.copytree(place / "run" / "adapter", place / "moved")
    rows = [{"prompt": f"{i} boats?", "completion": "yes"} for i in range(100, 110)]
    write_lines(place / "fresh.jsonl", rows)
    for what in ("moved", "boats@live", "base"):
        with pytest.raises(DataError, match=f"{what} is no run folder, so it brings no held-out rows"):
            evaluate(what)
    found = {what: evaluate(what, data="fresh.jsonl") for what in ("run", "moved", "boats@live", "base")}
    assert [made.path for made in found.values()] == [
        "run/report", "evaluations/moved/report", "evaluations/boats-live/report", "evaluations/base/report"
    ]  # fmt: skip
    for what in ("moved", "boats@live"):
        assert found[what].scores == found["run"].scores
        assert found[what].comparisons == found["run"].comparisons
    assert found["base"].system == "base"
    assert found["base"].scores["base"] == found["run"].scores["base"]
    assert (found["base"].comparisons, found["base"].forgetting) == ([], [])
    assert "run" not in found["boats@live"].sources


def test_a_version_is_asked_with_the_template_it_was_trained_with(place: Path) -> None:
    (place / "own.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    stages.train(recipe("own", data={"template": "own.jinja", "system": "Be brief."}))
    stages.register("own", name="own")
    (place / "own.jinja").unlink()
    shutil.rmtree(place / "own" / "report", ignore_errors=True)
    subject = subjects.find_subject("own@1", others=(), overrides=(), data="rows.jsonl")
    [(bench, _)] = list(subject.benches(report=stages.events.silent))
    rows, _, _ = subject.rows()
    from onlay.evaluation.systems import System, questions_of

    [first, *_] = questions_of(rows, template=bench.template)  # type: ignore[arg-type]
    text = bench.tokenizer.decode(bench.encode(System(name="base", told=""), first))
    assert text == "[system] Be brief.</s>[user] 0 boats?</s>[assistant] "


def test_a_base_tuned_in_full_is_a_second_model(place: Path) -> None:
    made = evaluate("full")
    assert (made.system, list(made.systems)) == ("tuned", ["base", "tuned"])
    assert made.systems["tuned"] == "full/model"
    assert one(made.comparisons, "nats_per_token").difference != 0
    assert likelihood(made, "held_out", "base") == likelihood(evaluate("run"), "held_out", "base")
    with pytest.raises(OutputError, match="tuned in full; --with takes adapters"):
        evaluate("full", others=["run"])
    # The version in use is asked too, where it is the only other system.
    stages.register("run", name="boats")
    stages.promote("boats@1", force=True, reason="for comparison")
    made = evaluate("full", "evaluation.baselines=[live]", "release.name=boats")
    assert list(made.systems) == ["live", "tuned"]
    assert one(made.comparisons, "exact_match", "live").difference == -1.0


# --------------------------------------------------------------------------------------------------- kinds of rows


def test_plain_text_has_a_likelihood_and_no_answers(place: Path) -> None:
    made = evaluate("texts")
    assert (made.rows, made.failures) == (0, 0)
    assert {row.score for row in made.comparisons} == {"nats_per_token"}
    assert likelihood(made, "held_out", "adapter").tokens > 0
    assert made.safety and made.forgetting
    assert "No row asks anything, so nothing was answered, scored or judged." in made.risks
    for name in ("answers.jsonl", "failures.jsonl"):
        assert (place / "texts" / "report" / name).read_text() == ""
    with pytest.raises(OutputError, match="has no answers to compare: no row asked anything"):
        stages.compare("texts", ask=lambda text: "a")


def test_tool_calls_and_turns_before_the_last_are_asked_as_they_are(place: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "boats", "arguments": '{"on": 3}'}}
    tools = [{"name": "boats", "description": "count", "parameters": {"type": "object", "properties": {}}}]
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
         "tools": tools} for i in range(3)
    ]  # fmt: skip
    write_lines(place / "calls.jsonl", rows)
    made = evaluate("messages", data="calls.jsonl")
    assert "tool_call_match" in made.scores["adapter"]
    [first, *_] = read_lines(place / "messages" / "report" / "answers.jsonl")
    assert first["expected"] == '<tool_call>{"name": "boats", "arguments": {"on": 3}}</tool_call>'
    assert first["tools"]
    few = evaluate("messages", "evaluation.baselines=[base, few-shot]", "evaluation.shots=1")
    rows = read_lines(place / "messages" / "report" / "answers.jsonl")
    assert few.rows == len(rows) == Dataset.load(place / "messages").splits["evaluation"].rows
    roles = [[message["role"] for message in row["prompt"]] for row in rows]
    assert ["user", "assistant", "tool"] in roles or ["system", "user", "assistant", "user"] in roles


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("what", "options", "error", "problem"), [
    ("head", {}, OutputError, "head is a classification head, which says labels and writes nothing: .* accuracy"),
    ("bare", {}, DataError, "bare has no held-out rows"),
    ("nowhere", {"data": "rows.jsonl"}, BaseModelError, "nowhere"),
    ("boats@7", {"data": "rows.jsonl"}, OutputError, "boats"),
    ("base", {"data": "rows.jsonl", "others": ["run"]}, OutputError, "base is a model; --with takes adapters beside an"),
    ("run", {"others": ["base"]}, OutputError, "base is no adapter, run or registered version"),
    ("run", {"seeds": 2, "data": "nothing.jsonl"}, DataError, "There is no data file at nothing.jsonl"),
    ("run/adapter", {"overrides": ["evaluation.scores=[exact_mach]"]}, RecipeError, "exact_mach is not a score"),
    ("run", {"overrides": ["training.seed=3"]}, RecipeError, "--set training.seed=3 would change what was trained"),
    ("run", {"overrides": ["evaluation.split=0.1"]}, RecipeError, "--set evaluation.split comes too late"),
    ("run", {"overrides": ["evaluation.gates={bleu: 1}"]}, RecipeError, "--set evaluation.gates comes too late"),
    ("run", {"overrides": ["evaluation.json_schema=no.json"]}, DataError, "evaluation.json_schema = no.json is no file"),
    ("run", {"overrides": ["evaluation.general=[one.txt]"]}, DataError, "one.txt holds one row, and a comparison needs"),
    ("run", {"overrides": ["evaluation.baselines=[live]", "release.name=boats"]}, OutputError, "boats"),
    ("run", {"overrides": ["evaluation.judge_url=http://127.0.0.1:9/v1", "evaluation.judge_model=j",
                           "evaluation.judge_key=NO_SUCH_KEY"]}, SetupError, "variable NO_SUCH_KEY is not set"),
    ("run", {"overrides": ["evaluation.tasks=[own]", "evaluation.tasks_path=tasks"]}, SetupError, "need the package lm_eval"),
])  # fmt: skip
def test_what_cannot_be_evaluated_says_why_before_anything_is_loaded(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    options: dict[str, Any],
    error: type[Exception],
    problem: str,
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a base was loaded")

    (place / "one.txt").write_text("a single piece\nof text\n")
    monkeypatch.setattr("onlay.model.load.load_base", load)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(error, match=problem) as caught:
        stages.evaluate(what, **options)
    assert caught.value.remedy.strip()  # type: ignore[attr-defined]


def test_an_adapter_of_another_base_and_an_unfinished_run_are_refused(place: Path) -> None:
    save_tiny_base(place / "second", seed=5)
    stages.train(recipe("foreign", model={"base": "second"}))
    with pytest.raises(BaseModelError, match="other weights"):
        evaluate("run", others=["foreign"])
    Run.load(place / "run").model_copy(update={"status": "interrupted"}).save(place / "run")
    with pytest.raises(OutputError, match="run is interrupted: there is nothing to evaluate yet") as caught:
        evaluate("run")
    assert caught.value.remedy == "onlay train --resume run"


def test_seeds_need_a_run(place: Path) -> None:
    shutil.copytree(place / "run" / "adapter", place / "moved")
    with pytest.raises(OutputError, match="--seeds 2 trains runs of a recipe, and moved is no run"):
        evaluate("moved", data="rows.jsonl", seeds=2)


# ---------------------------------------------------------------------------------------------------------------- gates


def edit_gates(folder: Path, old: str, new: str) -> None:
    path = folder / "recipe.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_gates_are_those_from_when_training_began(place: Path) -> None:
    edit_gates(place / "run", "exact_match: 0.2", "exact_match: 2.0\n    bleu: 1.0")
    made = evaluate("run")
    assert {gate.name: gate.limit for gate in made.gates} == GATES
    assert made.verdict == "ship"
    assert made.gate_edits == [
        "bleu: none when training began, 1.0 in recipe.yaml now",
        "exact_match: 0.2 when training began, 2.0 in recipe.yaml now",
    ]
    assert all(f"The gates were edited after training began: {edit}." in made.risks for edit in made.gate_edits)


def test_where_the_ledger_does_not_know_the_first_recipe_that_is_told(place: Path, tmp_path: Path) -> None:
    edit_gates(place / "run", "exact_match: 0.2", "exact_match: 2.0")
    (place / "home" / "ledger.sqlite").unlink()
    made = evaluate("run")
    assert made.gates[0].limit == 2.0
    assert "the ledger does not hold that one" in made.gate_edits[0]


def test_a_score_that_a_gate_is_on_is_measured(place: Path) -> None:
    stages.train(recipe("gated", evaluation={"gates": {"chrf": -100, "no_stop": -1, "latency_ms": 1e6}}))
    made = evaluate("gated")
    assert [(gate.name, gate.passed) for gate in made.gates] == [
        ("chrf", True),
        ("no_stop", True),
        ("latency_ms", True),
    ]
    assert made.latency_ms is not None and made.latency_ms > 0
    assert made.gates[2].found == made.latency_ms


def test_gates_can_be_given_where_there_was_no_training(place: Path) -> None:
    shutil.copytree(place / "run" / "adapter", place / "moved")
    made = evaluate("moved", "evaluation.gates={exact_match: 0.5, trained_rows: 1}", data="rows.jsonl")
    assert [(gate.name, gate.found) for gate in made.gates] == [("exact_match", 1.0), ("trained_rows", None)]
    # A bare adapter does not say which rows it learned, and these are among them.
    assert made.verdict == "do not ship"
    unknown = "could not be checked: the adapter does not say what it was trained on"
    assert made.gates[0].reason.endswith(f"but whether the rows were trained on {unknown}")
    assert f"Whether the rows were trained on {unknown}." in made.risks
    with pytest.raises(RecipeError, match=r"evaluation.gates: exact_mach is neither a score"):
        evaluate("moved", "evaluation.gates={exact_mach: 0.5}", data="rows.jsonl")


def test_from_gates_to_promotion(place: Path) -> None:
    assert evaluate("run").verdict == "ship"
    version = stages.register("run", name="boats").version
    assert (version.verdict, [gate.passed for gate in version.gates]) == ("ship", [True, True])
    assert stages.promote("boats@1")[1]
    # The same gates on a run that learned nothing.
    stages.train(recipe("weak", evaluation={"gates": GATES}))
    assert evaluate("weak").verdict == "do not ship"
    stages.register("weak", name="boats")
    with pytest.raises(OutputError, match=r"boats@2 is not promoted: 1 of 2 gates failed: exact_match"):
        stages.promote("boats@2")
    assert stages.find_version("boats@live").version == 1
    assert stages.promote("boats@2", force=True, reason="a trial")[1]
    assert stages.find_version("boats@live").version == 2


# ------------------------------------------------------------------------------------------------------- rows trained on


def split_rows(place: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that `run` was trained on, and those that it held out."""
    rows = read_lines(place / "rows.jsonl")
    held = {row.place for row in open_split(Dataset.load(place / "run"), "evaluation").rows()}
    marked = [(f"rows.jsonl:{number}" in held, row) for number, row in enumerate(rows, start=1)]
    return [row for out, row in marked if not out], [row for out, row in marked if out]


def test_no_gate_passes_on_rows_that_were_trained_on(place: Path) -> None:
    stages.register("run", name="boats")
    stages.push("boats@1", "pushed")
    trained_rows, held_out = split_rows(place)
    # White space does not make another question.
    mixed = [*held_out, {**trained_rows[0], "prompt": f" {trained_rows[0]['prompt']} "}, *trained_rows[1:3]]
    write_lines(place / "mixed.jsonl", mixed)
    problem = f"3 of {len(mixed)} rows of mixed.jsonl were trained on"
    made = evaluate("run", data="mixed.jsonl")
    assert made.verdict == "do not ship"
    assert [gate.passed for gate in made.gates] == [False, False]
    assert all(gate.reason.endswith(f"but {problem}") for gate in made.gates)
    assert f"{problem}." in made.risks
    for what in ("boats@1", "pushed"):
        assert f"{problem}." in evaluate(what, data="mixed.jsonl").risks
    assert stages.register("run", name="boats").version.verdict == "do not ship"
    with pytest.raises(OutputError, match=r"not promoted: 2 of 2 gates failed: .* rows of mixed.jsonl were trained on"):
        stages.promote("boats@2")

    write_lines(place / "held.jsonl", held_out)
    made = evaluate("run", data="held.jsonl")
    assert (made.verdict, [risk for risk in made.risks if "trained on" in risk]) == ("ship", [])
    # What one seed holds out another learns.
    made = evaluate("run", data="held.jsonl", seeds=2)
    assert made.verdict == "do not ship"
    assert any(re.match(r"With seed 1 \d+ of 14 rows of held.jsonl were trained on", risk) for risk in made.risks)


def test_rows_that_cannot_be_compared_with_the_training_pass_no_gate(place: Path) -> None:
    def found(**options: Any) -> str:
        made = evaluate("run", **options)
        assert made.verdict == "do not ship"
        [risk] = [risk for risk in made.risks if "trained on could not be checked" in risk]
        return risk

    fresh = [{"prompt": f"{i} boats?", "completion": "yes"} for i in range(100, 108)]
    write_lines(place / "fresh.jsonl", fresh)
    assert evaluate("run", data="fresh.jsonl").verdict == "ship"
    # Another split would call other rows held out; the ledger knows the one of the training.
    edit_gates(place / "run", "split: 0.3", "split: 0.9")
    write_lines(place / "learned.jsonl", split_rows(place)[0])
    risks = evaluate("run", data="learned.jsonl").risks
    assert any(risk.startswith("34 of 34 rows of learned.jsonl were trained on") for risk in risks)
    write_lines(place / "rows.jsonl", fresh)
    assert "rows.jsonl is not the file any more that was trained on" in found(data="fresh.jsonl")
    (place / "rows.jsonl").unlink()
    assert "There is no data file at rows.jsonl" in found(data="fresh.jsonl")
    assert evaluate("run").verdict == "ship"  # Its own held-out rows share no prompt with the others.
    (place / "home" / "ledger.sqlite").unlink()
    assert "is not the recipe that training began with" in found(data="fresh.jsonl")


# -------------------------------------------------------------------------------------------------------- sound adapters


def edit_weights(path: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for key in tensors:
        if name in key:
            tensors[key][:] = value
    path.chmod(0o644)
    save_file(tensors, path)


WEIGHTS = "adapter_model.safetensors"


def test_an_adapter_that_is_not_sound_is_refused_by_name_before_anything_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a base was loaded")

    for name, change in {"nan": ("lora_A", math.nan), "still": ("lora_B", 0.0)}.items():
        shutil.copytree(place / "run" / "adapter", place / name)
        edit_weights(place / name / WEIGHTS, *change)
    stages.register("run", name="boats")
    stages.promote("boats@1", force=True, reason="for comparison")
    version = Path(stages.find_version("boats@1").path)
    shutil.copytree(place / "other", place / "changed")
    edit_weights(place / "changed" / "adapter" / WEIGHTS, "lora_A", 0.5)
    stages.push("boats@1", "pushed")
    edit_weights(place / "pushed" / WEIGHTS, "lora_A", 0.5)
    monkeypatch.setattr("onlay.model.load.load_base", load)
    data = {"data": "rows.jsonl"}
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("nan", data, f"nan/{WEIGHTS}: .* holds NaN or infinity"),
        ("still", data, f"still/{WEIGHTS} did not move: B is zero in every module"),
        ("run", {"others": ["nan"]}, f"nan/{WEIGHTS}: .* holds NaN"),
        ("changed", {}, f"changed/adapter/{WEIGHTS} was changed on disk since the run saved it"),
        ("run", {"others": ["changed"]}, f"changed/adapter/{WEIGHTS} was changed on disk"),
        ("pushed", data, f"pushed/{WEIGHTS} was changed on disk since it was registered or saved"),
    ]
    for what, options, problem in refused:
        with pytest.raises(ProofError, match=problem) as caught:
            evaluate(what, **options)
        assert (caught.value.exit_code, "\n" in caught.value.problem) == (1, False)
    edit_weights(version / WEIGHTS, "lora_A", 0.5)
    live = {"overrides": ["evaluation.baselines=[live]", "release.name=boats"]}
    for what, options in (
        ("boats@1", data),
        ("other", {"others": ["boats@live"]}),
        ("other", live),
        (str(version), data),
    ):
        with pytest.raises(ProofError, match=f"{version}/{WEIGHTS} was changed on disk"):
            stages.evaluate(what, **options)
    (place / "other" / "adapter" / "onlay.json").unlink()
    with pytest.raises(ProofError, match=r"other/adapter/onlay.json is missing on disk since the run saved it"):
        evaluate("other")


def test_a_pushed_folder_and_a_versions_own_are_adapters(place: Path) -> None:
    stages.register("run", name="boats")
    stages.push("boats@1", "pushed")
    write_lines(place / "fresh.jsonl", [{"prompt": f"{i} boats?", "completion": "yes"} for i in range(100, 104)])
    expected = evaluate("boats@1", data="fresh.jsonl")
    for what in ("pushed", stages.find_version("boats").path):
        made = evaluate(what, data="fresh.jsonl")
        assert (made.system, made.scores) == ("adapter", expected.scores)
        assert made.sources["weights"] == expected.sources["weights"]
        with pytest.raises(DataError, match="is no run folder, so it brings no held-out rows"):
            evaluate(what)
    assert list(evaluate("other", others=["pushed"], data="fresh.jsonl").systems) == ["adapter", "pushed", "base"]
    stages.register("head", name="mood")
    for what in ("mood@1", stages.find_version("mood").path):
        with pytest.raises(OutputError, match="is a classification head"):
            evaluate(what, data="labels.jsonl")


def test_a_version_answers_as_its_run_does(place: Path) -> None:
    (place / "own.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    stages.train(recipe("own", data={"template": "own.jinja"}, training={"max_steps": 20, "learning_rate": 0.01}))
    stages.register("own", name="own")
    stages.push("own@1", "pushed")
    expected = stages.generate("own", ["3 boats?"])
    (place / "own.jinja").unlink()
    for what in ("own@1", "own@latest", "pushed", stages.find_version("own").path):
        assert stages.generate(what, ["3 boats?"]) == expected
    assert stages.chat("own@1").say("3 boats?")[0] == expected[0]["answer"]
    stages.register("head", name="mood")
    assert stages.generate("mood@1", ["a text"]) == stages.generate("head", ["a text"])
    with pytest.raises(OutputError, match="mood@1 is a classification head"):
        stages.chat("mood@1")
    with pytest.raises(OutputError, match="own@7 is not registered"):
        stages.generate("own@7", ["3 boats?"])
    with pytest.raises(OutputError, match=r"run.json does not exist"):
        stages.generate("nowhere", ["3 boats?"])


# ------------------------------------------------------------------------------------------------------------ what is kept


def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("onlay.model.load.load_base", load)
    with pytest.raises(OutputError, match=r"rows.jsonl/new/report cannot be written: Not a directory"):
        evaluate("run", output="rows.jsonl/new/report")


def test_what_fails_before_there_are_answers_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise SetupError("The device is gone.", "Try again.")

    monkeypatch.setattr("onlay.evaluation.systems.Bench.answer", fail)
    before = sorted(path.name for path in (place / "run").iterdir())
    for output in (None, "new/deep/report"):
        with pytest.raises(SetupError, match="device is gone") as caught:
            evaluate("run", output=output)
        assert caught.value.remedy == "Try again."
    assert sorted(path.name for path in (place / "run").iterdir()) == before
    assert not (place / "new").exists()


@pytest.mark.parametrize("arguments", [("The device is gone.", "Try again."), ()], ids=["error", "interrupted"])
@pytest.mark.parametrize("part", [
    "onlay.evaluation.systems.Bench.nats", "onlay.stages.evaluating.judge_answers", "onlay.evaluation.page.write_page",
])  # fmt: skip
def test_what_fails_after_the_answers_costs_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, part: str, arguments: tuple[str, ...]
) -> None:
    error = SetupError(*arguments) if arguments else KeyboardInterrupt()

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    told: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(part, fail)
        with pytest.raises(type(error)):
            evaluate("run", report=told.append)
    kept = Path("run/.report.unfinished/answers.jsonl")
    rows = read_lines(kept)
    assert [row["answers"]["adapter"] for row in rows] == ["yes"] * 14
    assert all(row["answers"]["base"] for row in rows)
    assert f"the answers so far are in {kept}" in told
    if isinstance(error, SetupError):
        assert error.remedy.endswith(f"The answers so far are in {kept}.")
    assert not (place / "run" / "report").exists()
    made = evaluate("run")
    assert not kept.parent.exists()
    assert Report.load(place / "run" / "report") == made
    assert read_lines(place / "run" / "report" / "answers.jsonl")[0]["scores"]


# ---------------------------------------------------------------------------------------------- seeds, judge, likely causes


def test_runs_of_other_seeds_are_trained_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    real = evaluating.train

    def train(*arguments: Any, **options: Any) -> Any:
        trained.append(options.get("resume", "new"))
        return real(*arguments, **options)

    monkeypatch.setattr(evaluating, "train", train)
    first = evaluate("run", seeds=2)
    assert trained == ["new"]
    assert Run.load(place / "run" / "seeds" / "1").status == "finished"
    gain = next(row for row in first.seeds if (row.score, row.against) == ("exact_match", "base"))
    assert set(gain.gains) == {"0", "1"}
    assert gain.gains["0"] == one(first.comparisons, "exact_match").difference
    assert gain.mean == pytest.approx(sum(gain.gains.values()) / 2)
    assert gain.verdict.endswith("over 2 seeds")
    assert any(risk.startswith("Over seeds: exact_match against base is") for risk in first.risks)
    again = evaluate("run", seeds=2)
    assert trained == ["new"]
    assert again.seeds == first.seeds
    # A run that was interrupted is gone on with, not begun anew.
    half = place / "run" / "seeds" / "1"
    Run.load(half).model_copy(update={"status": "interrupted"}).save(half)
    evaluate("run", seeds=2)
    assert trained == ["new", half.relative_to(place)]


def test_a_judge_that_fails_costs_no_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, prompts: Any) -> Any:
        if prompts:
            raise SetupError("The judge does not answer.", "Try again later.")
        yield from ()

    monkeypatch.setattr("onlay.evaluation.endpoint.Endpoint.ask", fail)
    with pytest.raises(SetupError, match="does not answer"):
        evaluate("run", "evaluation.judge_url=http://127.0.0.1:9/v1", "evaluation.judge_model=j")
    made = Report.load(Path("run/report"))
    assert (made.judged, made.rows) == ([], 14)
    assert "The judge failed: The judge does not answer." in made.risks


def test_a_judge_is_asked_of_each_pair_in_both_orders(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(self: Any, prompts: Any) -> Any:
        for at, prompt in enumerate(prompts):
            asked.append(prompt)
            first = prompt.split("<answer-A-")[1].split(">\n", 1)[1].split("\n</answer-A-")[0]
            yield at, json.dumps({"reason": "", "winner": "A" if first == "yes" else "B"})

    monkeypatch.setattr("onlay.evaluation.endpoint.Endpoint.ask", ask)
    judge = (
        "evaluation.judge_url=http://127.0.0.1:9/v1",
        "evaluation.judge_model=j",
        "evaluation.judge_criteria=Short.",
    )
    made = evaluate("run", *judge)
    [record] = made.judged
    assert (record.rows, record.wins, record.losses, record.consistency) == (made.rows, made.rows, 0, 1.0)
    assert (record.system, record.against) == ("adapter", "base")
    assert len(asked) == 2 * made.rows
    assert all("Short." in prompt for prompt in asked)
    evaluate("run", *judge)  # Replies are kept.
    assert len(asked) == 2 * made.rows
    assert evaluate("texts", *judge).judged == []


def test_answers_without_an_end_have_their_causes_told(place: Path) -> None:
    made = evaluate("other", "evaluation.max_new_tokens=2")
    assert made.scores["adapter"]["no_stop"] == 1.0
    assert made.likely_causes[0].endswith("100% do not stop by themselves.")
    # `yes` and no more than two tokens: the limit is too short, and the records say the rest is well.
    assert any(line.startswith("likely: length limit: 2 new tokens are allowed, the longest expected answer has 3")
               for line in made.likely_causes)  # fmt: skip
    assert any("100% of the trained examples have a trained end token" in line for line in made.likely_causes)
    assert evaluate("run").likely_causes == []


def test_failures_are_sorted_by_a_score_of_which_more_is_better(place: Path) -> None:
    made = evaluate("run", "evaluation.scores=[no_stop, exact_match]")
    assert (made.scores["adapter"]["no_stop"], made.failures) == (0.0, 0)


# -------------------------------------------------------------------------------------------------------------- compare


def typing(*words: str) -> Callable[[str], str]:
    left = list(words)
    return lambda text: left.pop(0)


def test_a_person_may_stop_and_go_on(place: Path) -> None:
    with pytest.raises(OutputError, match="other has no answers to compare yet") as caught:
        stages.compare("other", ask=typing())
    assert caught.value.remedy == "onlay evaluate other"
    evaluate("run", "evaluation.answer_rows=4")
    with pytest.raises(OutputError, match="--against live did not answer in run/report"):
        stages.compare("run", against="live", ask=typing())
    rows = read_lines(place / "run" / "report" / "answers.jsonl")
    assert all(row["answers"]["adapter"] != row["answers"]["base"] for row in rows)
    judged, left = stages.compare("run", ask=typing("a", "q"))
    assert (judged.rows, left) == (1, 3)
    judged, left = stages.compare("run", ask=typing("b", "tie", "skip"))
    assert (judged.rows, judged.wins + judged.losses, judged.ties, left) == (3, 2, 1, 0)
    [choices] = (place / "run").glob("choices-*.jsonl")
    assert len(read_lines(choices)) == 4
    # Fewer rows than were chosen are not fewer than none.
    assert stages.compare("run/report", rows=2, ask=typing())[1] == 0
