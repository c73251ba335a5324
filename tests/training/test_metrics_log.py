"""metrics.jsonl: a line an event, cut back to where a resumed run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onlay.errors import OutputError
from onlay.training.metrics_log import MetricsLog, read_metrics
from tests.training.test_checkpoint import files_of_at_most


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("evaluation", 0, loss=2.5)
    log.write("step", 1, loss=1 / 3, tokens=7)
    log.write("recovery", 2, reason="loss_spike", detail="täglich")
    assert read_metrics(path) == [
        {"event": "evaluation", "step": 0, "loss": 2.5},
        {"event": "step", "step": 1, "loss": 1 / 3, "tokens": 7},
        {"event": "recovery", "step": 2, "reason": "loss_spike", "detail": "täglich"},
    ]
    assert log.num_bytes == path.stat().st_size
    log.close()


def test_a_resumed_log_is_cut_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("step", 1, loss=1.0)
    log.write("recovery", 7, reason="loss_spike")  # Of a later step, and not lost: the run went back before it.
    kept = log.num_bytes
    log.write("step", 2, loss=2.0)
    log.close()
    log = MetricsLog(path, keep_bytes=kept)
    log.write("step", 2, loss=3.0)
    log.close()
    assert [(e["event"], e["step"]) for e in read_metrics(path)] == [("step", 1), ("recovery", 7), ("step", 2)]
    assert read_metrics(path)[-1]["loss"] == 3.0


def test_a_run_that_starts_over_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "evaluation", "step": 0, "loss": 2.0}\n{"event": "st')
    MetricsLog(path).close()
    assert path.read_bytes() == b""


def test_a_log_that_is_shorter_than_expected_is_not_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n')
    log = MetricsLog(path, keep_bytes=10_000)
    log.write("step", 2)
    log.close()
    assert [e["step"] for e in read_metrics(path)] == [1, 2]


def test_the_half_line_of_a_killed_process_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    assert read_metrics(path) == [{"event": "step", "step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_full_disk_is_told_in_two_lines_and_closing_is_quiet(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with files_of_at_most(50):
        log.write("step", 1, loss=1.0)
        with pytest.raises(OutputError) as caught:
            log.write("step", 2, loss=1.23456789)
        log.close()
    assert str(caught.value).count("\n") == 1
    assert caught.value.remedy == f"Free disk space, then onlay train --resume {tmp_path}"
    assert [e["step"] for e in read_metrics(log.path)] == [1]
    assert json.loads(log.path.read_text().splitlines()[0])["loss"] == 1.0
