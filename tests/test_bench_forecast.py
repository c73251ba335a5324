"""The benchmark of forecasts: what it runs, how rows become comparisons, and its table on the page."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent
PAGE = PROJECT / "docs" / "planning.md"


@pytest.fixture(scope="module")
def forecast() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROJECT / "bench"))
        module = importlib.import_module("forecast")
    yield module
    for name in ("forecast", "step", "bases"):
        sys.modules.pop(name, None)


def row(forecast: ModuleType, case: Any, **changed: Any) -> dict[str, Any]:
    result = {
        "step_seconds": [9.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "step_tokens": [16384] * 8, "peak_gib": 60.0, "base_gib": 15.0,
        "notes": {"recompute": "no layer"}, "trainable": 41_943_040, "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    }  # fmt: skip
    made: dict[str, Any] = forecast.row_of(case, result | changed, commit="abc1234")
    return {key: str(value) for key, value in made.items()}


def test_configurations_are_as_wide_as_the_claim(forecast: ModuleType) -> None:
    cases = forecast.cases()
    assert len(cases) >= 24 and len({case.name for case in cases}) == len(cases)
    assert {case.shape for case in cases} == {"1b", "8b", "70b"}
    assert {case.storage for case in cases} == {"bf16", "nf4", "fp8"}
    assert {8, 16, 128} == {case.rank for case in cases} and {0.0, 0.05} == {case.dropout for case in cases}
    assert len({case.micro_tokens for case in cases}) >= 3 and any(case.method == "full" for case in cases)
    assert any(case.name.endswith(forecast.ORDINARY) for case in cases)
    assert set(forecast.FITTED) <= {case.name for case in cases} and 4 * len(forecast.FITTED) < len(cases)


def test_every_configuration_has_a_forecast(forecast: ModuleType) -> None:
    for case in forecast.cases():
        peak, seconds = forecast.plan_case(
            case, device="NVIDIA H200", fast_path=not case.name.endswith(forecast.ORDINARY)
        )
        assert 1 < peak < 140 and 0.05 < seconds < 10
    assert forecast.plan_case(forecast.cases()[0], device="another", fast_path=True)[1] is None


def test_a_row_is_compared_by_its_own_settings(forecast: ModuleType) -> None:
    case = next(case for case in forecast.cases() if case.name == "8b-nf4-none")
    found = forecast.compare(row(forecast, case, peak_gib=53.0))
    assert found.memory_error == pytest.approx(0, abs=0.01) and not found.fitted
    assert found.time_error == pytest.approx(found.planned_seconds / 1.0 - 1)
    other = forecast.compare(row(forecast, replace(case, recompute="all"), peak_gib=53.0))
    assert other.memory_error < -0.5


def test_older_rows_say_which_path_they_took(forecast: ModuleType) -> None:
    rows = {
        one["shape"]: one for one in forecast.rows_of(forecast.RESULTS / "memory.csv") if one["device"] == "NVIDIA H200"
    }
    plain = rows["8b"] | {
        "recompute": "none",
        "compute": "",
        "targets": "",
        "micro_tokens": "",
        "limit_gib": "",
        "recomputed": "",
    }
    old = forecast.older(plain)
    assert old.name.endswith("ordinary")
    new = forecast.older(plain | {"recomputed": "no layer", "micro_tokens": "16384"})
    assert not new.name.endswith("ordinary") and new.planned_gib < old.planned_gib
    assert forecast.older(plain | {"method": "dora"}) is None
    assert forecast.older(plain | {"recompute": "auto", "recomputed": "gate and up of 3 of 32 layers"}) is None


def test_rows_of_throughput_count_where_their_levels_are_known(forecast: ModuleType) -> None:
    case = replace(forecast.cases()[0], name="bf16", recompute="auto")
    notes = {"recompute": "no layer", "micro_batch_tokens": "16384", "fused": "32 attentions, each one node"}
    one = {
        "case": "bf16", "system": "onlay", "error": "", "gpus": "1", "peak_gib": "62.6", "step_seconds": "0.94",
        "settings": json.dumps({key: value for key, value in asdict(case).items() if key not in ("name", "system", "model")}),
        "notes": json.dumps(notes), "device": "NVIDIA H200",
    }  # fmt: skip
    found = forecast.of_throughput(one)
    assert abs(found.memory_error) < 0.01 and abs(found.time_error) < 0.02
    some = json.dumps(notes | {"recompute": "gate and up of 3 of 32 layers"})
    assert forecast.of_throughput(one | {"notes": some}) is None
    assert forecast.of_throughput(one | {"system": "unsloth"}) is None
    assert forecast.of_throughput(one | {"error": "out of memory"}) is None


def test_the_table_leaves_fitted_times_out_of_its_errors(forecast: ModuleType) -> None:
    def made(name: str, planned: float, fitted: bool) -> Any:
        return forecast.Comparison(
            name=name,
            device="d",
            planned_gib=planned,
            peak_gib=10.0,
            planned_seconds=planned,
            seconds=10.0,
            fitted=fitted,
        )

    text = forecast.table([made("a", 11.0, True), made("b", 10.2, False), made("c", 10.1, False)])
    assert "+10.0% (fitted)" in text
    assert "Memory, 3 rows: worst 10.0%, median 2.0%." in text
    assert "Time, 2 rows that nothing was fitted to: worst 2.0%, median 1.5%." in text
    assert forecast.table([]) == forecast.NOTHING


def test_the_page_holds_the_table_of_the_rows_that_are_there(forecast: ModuleType) -> None:
    found = forecast.BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == f"<!-- measured: forecast -->\n{forecast.table(forecast.comparisons())}\n<!-- end -->"


def test_a_measurement_from_end_to_end() -> None:
    case = {"name": "tiny-full", "shape": "tiny", "device": "cpu", "rows": 2, "tokens": 24, "steps": 1, "warmup": 1, "method": "full", "recompute": "all"}  # fmt: skip
    words = [sys.executable, str(PROJECT / "bench" / "forecast.py"), "--one", json.dumps(case)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1].partition(" ")[2])
    assert found["trainable"] > 100_000 and len(found["step_seconds"]) == 2
