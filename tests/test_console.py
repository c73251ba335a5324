"""What a person sees, at 80 columns, in a terminal and in a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onlay.console import runs as view
from onlay.doctor import Check
from onlay.records import Finding, Recovery, RowAt, Run
from onlay.stages import Demo, Loading
from onlay.training.loop import StepReport
from tests.test_records import dataset, merge, run

WIDTH = 80


def screen(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=WIDTH, force_terminal=terminal, color_system=None, legacy_windows=False), out


def printed(thing: Any) -> str:
    console, out = screen()
    console.print(thing)
    text = out.getvalue()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    return text


def step(number: int, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "step": number, "total_steps": 40, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0,
        "tokens": 1000, "seconds": 0.5, "memory_bytes": 2**30,
    }  # fmt: skip
    return StepReport(**(values | changes))


# ------------------------------------------------------------------------------------------------------------ progress


def test_in_a_file_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = screen()
    now = [0.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    with view.Reporter(console) as report:
        report("loading pocket")
        report(Loading("preparing rows", 5, 10))
        for number in range(1, 41):
            now[0] += 1.0
            report(step(number))
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading pocket"
    assert [line.split()[1] for line in lines[1:]] == ["1/40", "12/40", "23/40", "34/40", "40/40"]
    assert lines[1] == "step 1/40  loss 2.0000  2,000 tokens/s  1.0 GiB  rate 1.00e-04"
    assert "\x1b" not in out.getvalue()


def test_in_a_terminal_progress_is_a_bar() -> None:
    console, out = screen(terminal=True)
    with view.Reporter(console) as report:
        report(Loading("preparing rows", 5, 10))
        report(Loading("preparing rows", 10, 10))
        report(step(1))
        report(step(20, tokens=3000))
    text = out.getvalue()
    assert "preparing rows" in text
    assert "10/10" in text
    assert "20/40" in text
    # The speed is a mean: 2,000 and 6,000 tokens/s make 2,400.
    assert "loss 2.0000  2,400 tokens/s  1.0 GiB" in text
    assert "rate" not in text


def test_a_long_run_fits_the_bar_into_80_columns() -> None:
    console, out = screen(terminal=True)
    with view.Reporter(console) as report:
        report(step(99_999, total_steps=100_000, tokens=99_999_999, memory_bytes=139 * 2**30))
    assert "loss 2.0000" in out.getvalue()
    assert all(len(line.split("\x1b")[0]) <= WIDTH for line in out.getvalue().splitlines())


def test_recoveries_and_notes_are_told_as_they_are() -> None:
    console, out = screen()
    with view.Reporter(console) as report:
        report(Recovery(step=3, reason="loss_spike", detail="steps [3, 4] [/]", action="went back"))
        report("long " * 40)
    lines = out.getvalue().splitlines()
    assert lines[0] == "loss_spike: steps [3, 4] [/]; went back."
    assert lines[1] == ("long " * 40)


# -------------------------------------------------------------------------------------------------------------- tables


def test_the_summary_of_a_run_tells_what_happened() -> None:
    whole = run(
        first_loss=3.0, last_loss=1.5, base_evaluation_loss=2.5, evaluation_loss=1.25, selected_step=2,
        peak_memory_bytes=2**31, trainable_parameters=1234, fast_paths={"layout": "packed [rows]", "stopped_early": "enough"},
        proofs={"movement": {"moved_modules": 7}, "finite": True, "base_unchanged": True},
    )  # fmt: skip
    text = " ".join(printed(view.run_table(whole)).split())
    for part in (
        "Run runs/a: finished", "2 of 2 in 1.5 s", "3.0000 at the first step, 1.5000", "2.5000 before, 1.2500 after (step 2)",
        "1,234 parameters", "2.00 GiB", "step 1: out_of_memory; a", "7 modules moved, all values finite, base unchanged",
        "packed [rows]", "stopped early enough", "adapter runs/a/adapter",
    ):  # fmt: skip
        assert part in text
    full = printed(view.run_table(whole.model_copy(update={"method": "full"})))
    assert "runs/a/model" in full
    assert "adapter" not in full
    failed = printed(view.run_table(whole.model_copy(update={"status": "failed", "error": "It broke."})))
    assert "It broke." in failed
    assert "runs/a/adapter" not in failed
    assert "none yet" in printed(view.run_table(run(proofs={})))


def test_the_data_comes_with_its_findings() -> None:
    found = Finding(
        code="overlong_cut",
        count=9,
        message="rows longer than 8 tokens",
        rows=[RowAt(file="[a].jsonl", row=1), RowAt(file="b", row=2)],
    )
    text = printed(view.dataset_table(dataset(findings=[found])))
    assert "rows.jsonl: format messages, template base, at most 8 tokens" in text
    assert "4 (44%)" in text
    assert "9 rows longer than 8 tokens ([a].jsonl:1, b:2, ...)" in text


def listed(**changes: Any) -> dict[str, Any]:
    return run(**changes).model_dump(mode="json") | {"digest": "d" * 64}


def test_the_log_fits_with_the_usual_names() -> None:
    path = "runs/support-20261122-011916"
    runs = [listed(path=path, base_evaluation_loss=10.5, evaluation_loss=1.25), listed(status="interrupted")]
    lines = printed(view.log_table(runs)).splitlines()
    assert len(lines) == 3
    assert path in lines[1]
    assert "10.500 -> 1.250" in lines[1]
    assert "interrupted" in lines[2]


def test_a_record_is_listed_without_what_is_empty(tmp_path: Path) -> None:
    console, out = screen()
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"event": "step", "step": n, "loss": 4.0 - n / 50}) + "\n" for n in range(100))
    )
    links = [{"kind": "dataset", "digest": "e" * 64, "path": "/some/[place]", "created_at": "x"}]
    view.record_view(console, listed(trained_tokens=12345, proofs={"movement": {"moved_modules": 7}}), links, tmp_path)
    text = out.getvalue()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert "12,345" in text
    assert "proofs.movement.moved_modules" in text
    assert "error" not in text
    assert "None" not in text
    assert "{" not in text
    assert "e" * 12 in text
    assert "/some/[place]" in text
    assert "loss 3.99" in text or "loss 4.0" in text


def test_the_curve_goes_from_high_to_low(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert str(view.loss_curve(path, width=10)) == "no step yet"
    path.write_text("".join(json.dumps({"event": "step", "step": n, "loss": 8.0 - n}) + "\n" for n in range(8)))
    assert str(view.loss_curve(path, width=8)) == "loss 8.00 █▇▆▅▄▃▂▁ 1.00"
    assert len(str(view.loss_curve(path, width=3))) == len("loss 7.00 ▁▁▁ 1.50")


def test_answers_are_shown_as_they_are() -> None:
    plain = printed(view.answers_table([{"prompt": "[red]a", "answer": "[/]b"}]))
    assert "[red]a" in plain
    assert "[/]b" in plain
    assert "answer" in plain
    assert "adapter" not in plain
    compared = printed(view.answers_table([{"prompt": "a", "answer": "b", "base": "c"}]))
    long = "word" * 40
    assert long in "".join(c for c in printed(view.answers_table([{"prompt": long, "answer": ""}])) if c in "word")
    assert compared.splitlines()[1].split() == ["┃", "prompt", "┃", "base", "┃", "adapter", "┃"]


def test_the_demo_ends_with_scores_and_answers() -> None:
    console, out = screen()
    example = {"prompt": "p [x]", "expected": "e", "base": "b", "adapter": "a"}
    scores: dict[str, float | None] = {"exact_match": 0.0, "valid_json": None, "evaluation_loss": 7.5}
    demo = Demo(
        run="runs/demo",
        train_seconds=12.3,
        rows=100,
        base=scores,
        adapter=scores | {"exact_match": 0.815},
        examples=[example],
    )
    view.demo_view(console, demo)
    text = out.getvalue()
    assert "On 100 held-out rows" in text
    assert "82%" in text
    assert "p [x]" in text
    assert "Trained in 12 s." in text


def test_doctor_shows_what_to_do_below_what_is_wrong() -> None:
    console, out = screen()
    checks = [
        Check(name="torch", found="2.0 [old]", ok=False, remedy='pip install "x[y]"'),
        Check(name="CPU", found="2", ok=True),
    ]
    view.doctor_view(console, checks)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[1].split() == ["no", "torch", "2.0", "[old]"]
    assert lines[2].strip() == 'pip install "x[y]"'
    assert lines[3].split() == ["ok", "CPU", "2"]


def test_every_field_of_a_run_that_holds_something_is_shown() -> None:
    shown = {name.split(".")[0] for name, _ in view._fields(Run.model_validate(run()).model_dump(mode="json"))}
    assert {"status", "steps", "seconds", "proofs", "recoveries", "checkpoints"} <= shown


def test_a_merge_is_one_column_for_each_choice_of_weights() -> None:
    text = printed(view.merge_table(merge()))
    assert text.splitlines()[0].split() == [
        "merged:",
        *["merged", "into", "the", "quantized", "weights", "of", "pocket"],
    ]
    assert text.splitlines()[1].split() == ["into", "quantized", "into", "original"]
    assert "same likeliest token" in text
    assert "99.00%" in text
    broken = merge().verification.model_copy(update={"max_logit_difference": None, "passed": False, "reason": "why"})
    alone = printed(view.merge_table(merge(candidates={}, verification=broken)))
    assert "not finite" in alone
    assert "no: why" in alone
    assert "original" not in alone
