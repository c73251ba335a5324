from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onlay.errors import DataError, SetupError
from onlay.evaluation.harness import Abilities, Continuation, Wanted, cut, run_tasks, wanted_of

ITEMS = [
    {"question": "1 + 1?", "choices": ["2", "three"], "answer": 0},
    {"question": "2 + 2?", "choices": ["5", "4"], "answer": 1},
    {"question": "3 + 3?", "choices": ["6", "7"], "answer": 0},
]
NEEDS_HARNESS = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three tasks on local data, one of each kind of request."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(
        "task: own_choice\n" + shared + "output_type: multiple_choice\n"
        'doc_to_text: "Q: {{question}} A:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\nmetadata: {version: 2}\n"
    )
    (tmp_path / "tasks" / "text.yaml").write_text(
        "task: own_text\n" + shared + "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    (tmp_path / "tasks" / "answer.yaml").write_text(
        "task: own_answer\n" + shared + "output_type: generate_until\n"
        'doc_to_text: "Q: {{question}} A:"\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n'
    )
    (tmp_path / "tasks" / "group.yaml").write_text(
        "group: own_group\ntask: [own_choice]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return tmp_path / "tasks"


class Calculator:
    """A system that knows the answers, or none of them, and remembers what it was asked."""

    def __init__(self, *, knows: bool) -> None:
        self.knows = knows
        self.right = {f"Q: {item['question']} A:": str(item["choices"][int(str(item["answer"]))]) for item in ITEMS}  # type: ignore[index]
        self.wanted: list[Wanted] = []
        self.abilities = Abilities(
            score=self.score,
            score_text=lambda texts: [-float(len(text.encode())) for text in texts],
            generate=self.generate,
        )

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        hits = [self.right[context] == continuation.strip() for context, continuation in pairs]
        return [Continuation(-1.0 if hit is self.knows else -9.0, hit) for hit in hits]

    def generate(self, wanted: Sequence[Wanted]) -> list[str]:
        self.wanted += wanted
        return [(self.right[one.prompt] if self.knows else "0") + "\nand more" for one in wanted]


@NEEDS_HARNESS
def test_all_systems_answer_local_tasks_from_one_load(folder: Path) -> None:
    clever, dull = Calculator(knows=True), Calculator(knows=False)
    random.seed(5)
    np.random.seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index,union-attr]
    found = run_tasks(
        ["own_choice", "own_text", "own_answer"],
        systems={"adapter": clever.abilities, "base": dull.abilities},
        include_path=folder,
    )
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index,union-attr]
    choice = found["adapter"]["own_choice"]
    assert (choice.rows, choice.metrics, choice.version) == (3, {"acc,none": 1.0, "acc_norm,none": 1.0}, "2")
    assert choice.higher_is_better == {"acc": True, "acc_norm": True}
    assert choice.per_row["acc,none"] == [1.0, 1.0, 1.0]
    assert found["base"]["own_choice"].per_row["acc,none"] == [0.0, 0.0, 0.0]
    # One nat a byte is 1 / ln 2 bits a byte.
    assert found["adapter"]["own_text"].metrics["bits_per_byte,none"] == pytest.approx(1 / np.log(2))
    assert found["adapter"]["own_text"].higher_is_better == {"bits_per_byte": False}
    assert found["adapter"]["own_answer"].metrics == {"exact_match,none": 1.0}
    assert found["base"]["own_answer"].metrics == {"exact_match,none": 0.0}
    assert {(one.max_new_tokens, one.stops[0], one.temperature) for one in clever.wanted} == {(5, "\n", 0.0)}


@NEEDS_HARNESS
def test_limits_and_mistakes(folder: Path) -> None:
    system = {"base": Calculator(knows=True).abilities}
    found = run_tasks(["own_choice"], systems=system, include_path=folder, limit=2)
    assert found["base"]["own_choice"].rows == 2 and len(found["base"]["own_choice"].per_row["acc,none"]) == 2
    with pytest.raises(DataError, match="no task own_choise") as error:
        run_tasks(["own_choise"], systems=system, include_path=folder)
    assert "own_choice" in error.value.remedy
    with pytest.raises(DataError, match="No task is named"):
        run_tasks([], systems=system, include_path=folder)
    (folder.parent / "items.jsonl").unlink()
    with pytest.raises(DataError, match="data of own_text cannot be read"):
        run_tasks(["own_text"], systems=system, include_path=folder)


@NEEDS_HARNESS
def test_a_group_stands_beside_its_parts(folder: Path) -> None:
    found = run_tasks(["own_group"], systems={"base": Calculator(knows=True).abilities}, include_path=folder)["base"]
    assert set(found) == {"own_group", "own_choice"}
    assert (found["own_group"].rows, found["own_group"].metrics["acc,none"], found["own_group"].per_row) == (3, 1.0, {})
    assert found["own_choice"].per_row["acc,none"] == [1.0] * 3


@NEEDS_HARNESS
def test_as_a_chat(folder: Path) -> None:
    seen: list[str] = []

    def score(pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        seen.extend(context for context, _ in pairs)
        return [Continuation(-1.0, False)] * len(pairs)

    abilities = Abilities(
        score=score,
        score_text=lambda texts: [],
        generate=lambda wanted: [],
        apply_template=lambda messages, begins: f"<{messages[-1]['role']}>{messages[-1]['content']}<{begins}>",
        template_name="t",
    )
    run_tasks(["own_choice"], systems={"base": abilities}, include_path=folder, chat=True)
    assert seen[0] == "<user>Q: 1 + 1? A:<True>"


def test_a_missing_package_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="lm_eval") as error:
        run_tasks(["mmlu"], systems={})
    assert 'pip install "onlay[harness]"' in error.value.remedy


def test_a_chat_needs_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SetupError, match="base has no chat template"):
        run_tasks(["mmlu"], systems={"base": Calculator(knows=True).abilities}, chat=True)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (256, (), 0.0, 1.0)),
        ({"until": "\n"}, (256, ("\n",), 0.0, 1.0)),
        ({"until": ["a", "b"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}, (7, ("a", "b"), 0.0, 1.0)),
        ({"until": None, "max_tokens": 9, "do_sample": True, "temperature": 0.5, "top_p": 0.9}, (9, (), 0.5, 0.9)),
        ({"temperature": 0.5}, (256, (), 0.5, 1.0)),
        ({"do_sample": True}, (256, (), 1.0, 1.0)),
        ({"temperature": 0.0, "repetition_penalty": None}, (256, (), 0.0, 1.0)),
    ],
)
def test_a_tasks_options(options: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    found = wanted_of("p", options)
    assert (found.max_new_tokens, found.stops, found.temperature, found.top_p) == wanted
    assert found.prompt == "p"


def test_no_option_is_lost_in_silence() -> None:
    with pytest.raises(DataError, match=r"generation_kwargs\.num_beams"):
        wanted_of("p", {"num_beams": 4})


def test_answers_end_at_the_first_stop() -> None:
    assert cut("abc", ["c", "b"]) == "a"
    assert cut("abc", ["x", ""]) == "abc"
    assert cut("", ["x"]) == ""
