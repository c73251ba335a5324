"""The benchmarks of training steps: their rows, their rules, and a run of each script on a tiny base.  No time is asserted."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

PROJECT = Path(__file__).parent.parent
BENCH = PROJECT / "bench"
NAMES = ("bases", "step", "throughput", "budget", "memory", "peer_step")
TINY = {"shape": "tiny", "device": "cpu", "rows": 2, "tokens": 24, "steps": 2, "warmup": 1}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The scripts as modules.  bench/ is on the path for their import alone: packages look for others under names that
    scripts there have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        modules = {name: importlib.import_module(name) for name in NAMES}
    yield SimpleNamespace(**modules)
    for name in NAMES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def page(bench: SimpleNamespace) -> ModuleType:
    spec = importlib.util.spec_from_file_location("performance_page", PROJECT / "docs" / "performance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(**changed: Any) -> dict[str, Any]:
    """What a process would have found on the GPU whose ceilings are known."""
    return {
        "step_seconds": [9.0, 2.0, 1.0, 1.0, 1.0, 4.0], "step_tokens": [16384] * 6, "losses": [12.58, 12.5, 12.4, 12.3, 12.2, 12.1],
        "load_seconds": 8.0, "first_step_seconds": 20.0, "peak_gib": 60.0, "base_gib": 6.0, "reserved_gib": 62.0, "context_gib": 0.6,
        "seconds": 40.0, "notes": {}, "versions": {"torch": "2.11.0"}, "device": "NVIDIA H200",
    } | changed  # fmt: skip


def row(bench: SimpleNamespace, case: Any, **changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = bench.throughput.row_of(case, result(**changed), commit="abc1234", run="2026-01-01 00:00:00")
    return made


# ------------------------------------------------------------------------------------------------------------ the work


def test_every_configuration_is_one_that_its_system_takes(bench: SimpleNamespace) -> None:
    every = bench.throughput.cases() + bench.throughput.several_gpus(2) + bench.budget.cases()
    assert len({json.dumps(asdict(case), sort_keys=True) for case in every}) == len(every)
    for case in every:
        assert case.tokens is None or not (case.micro_tokens or 0) % case.tokens
        if case.system == "onlay":
            assert bench.step.recipe_of(case).training.batch_size == case.rows
            continue
        assert case.system in bench.peer_step.SYSTEMS and case.storage in ("bf16", "nf4") and case.compute == "auto"
        assert case.recompute in ("none", "all") or (case.recompute == "offload" and case.system == "unsloth")
        assert case.optimizer in bench.peer_step.OPTIMIZERS and case.targets in bench.peer_step.TARGETS
        assert case.system != "axolotl" or case.targets == "all-linear"  # Its functions want an adapter on every layer.
        assert not case.rows % bench.peer_step.rows_in_one_pass(case)


def test_all_systems_get_the_same_rows(bench: SimpleNamespace) -> None:
    ours, peer = bench.step.Case(rows=3, tokens=16), bench.step.Case(rows=3, tokens=16, system="trl", storage="nf4")
    assert bench.step.tokens_of_rows(ours) == bench.step.tokens_of_rows(peer)
    real = bench.step.Case(rows=96, tokens=None)
    packed = replace(real, system="unsloth", rows=8, pack_tokens=2048)
    rows, more = bench.step.tokens_of_rows(real), bench.step.row_lengths(packed)
    assert len(rows) == 96 * real.all_steps
    # The packer has enough for all of its steps, and what both have in common comes first.
    assert sum(more) > packed.rows * packed.all_steps * 2048
    assert more[: len(rows)] == [len(row) for row in rows][: len(more)]
    counts = json.loads(bench.step.LENGTHS.read_text(encoding="utf-8"))
    assert sum(counts.values()) == 7473
    assert sum(int(length) * rows for length, rows in counts.items()) / 7473 == pytest.approx(165.63, abs=0.01)


def test_the_session_takes_the_rows_in_their_order(bench: SimpleNamespace) -> None:
    from onlay.training.batches import Batches

    rows = [[i] * (3 + i) for i in range(12)]
    placed = bench.step.Rows(rows, batch_size=4)
    batches = Batches(placed, batch_size=4, seed=0, plan=lambda *_: [], collate=lambda _: None)  # type: ignore[arg-type, return-value]
    taken = [int(placed.example(int(i))[0][0]) for step in (1, 2, 3) for i in batches.indices(step)]
    assert taken == list(range(12))
    assert batches.trained_tokens(1) == sum(len(row) - 1 for row in rows[:4])
    ids, trained = placed.example(0)
    assert len(ids) == len(trained) and not trained[0] and trained[1:].all()


def test_accumulation_is_counted_in_rows(bench: SimpleNamespace) -> None:
    case = bench.step.Case(rows=8, tokens=2048, micro_tokens=4096)
    assert bench.peer_step.rows_in_one_pass(case) == 2
    assert bench.peer_step.rows_in_one_pass(replace(case, micro_tokens=None)) == 8
    import torch

    ids = torch.zeros(2, 5, dtype=torch.long)
    assert bench.peer_step.real_tokens({"input_ids": ids}) == 10
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert bench.peer_step.real_tokens({"input_ids": ids, "attention_mask": mask}) == 7


# ------------------------------------------------------------------------------------------------------------ the rows


def test_a_row_says_what_was_measured(bench: SimpleNamespace, tmp_path: Path) -> None:
    case = bench.step.Case(name="nf4", storage="nf4")
    made = row(bench, case)
    assert made["step_seconds"] == 1.0 and made["tokens_per_second"] == 16384  # Medians of the timed steps.
    assert made["peak_gib"] == 60.0 and made["first_loss"] == 12.58 and made["error"] == ""
    assert json.loads(made["settings"])["storage"] == "nf4" and json.loads(made["steps"]) == result()["step_seconds"]
    failed = bench.throughput.row_of(case, {"error": "ValueError: no", "seconds": 3.0}, commit="c", run="r")
    assert failed.keys() == made.keys() and failed["tokens_per_second"] is None and failed["error"] == "ValueError: no"
    path = tmp_path / "folder" / "rows.csv"
    for one in (made, failed | {"later": 1}):
        bench.step.append_row(path, one)
    with path.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["later"] == "" and second["later"] == "1" and first["tokens_per_second"] == "16384"


def test_the_ceiling_is_that_of_the_products(bench: SimpleNamespace) -> None:
    """8B, 8 rows of 2,048: 7.5e9 weights times 4 FLOPs at 813 TFLOP/s and attention are about 0.64 s a step in bf16."""

    def seconds(**changed: Any) -> float:
        case = replace(bench.step.Case(), **changed)
        share = bench.throughput.share_of_ceiling(case, 16384.0, device="NVIDIA H200")
        assert share is not None
        return float(share)

    weights, head = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 128256 * 4096
    attention = 32 * 4096 * 2048
    assert seconds() == pytest.approx(16384 * (4 * (weights + head) + 7 * attention) / 813e12)
    assert seconds() == pytest.approx(0.643, abs=0.001)
    assert seconds(recompute="all") == pytest.approx(16384 * (6 * weights + 4 * head + 9 * attention) / 813e12)
    assert seconds(recompute="16") == pytest.approx((seconds() + seconds(recompute="all")) / 2)
    assert seconds(storage="fp8") == pytest.approx(0.374, abs=0.001)
    assert seconds(gpus=2) == pytest.approx(seconds() / 2)
    assert bench.throughput.share_of_ceiling(bench.step.Case(), 1.0, device="another") is None


def test_first_losses_must_agree(bench: SimpleNamespace) -> None:
    ours, peer = (
        bench.step.Case(name="nf4", storage="nf4"),
        bench.step.Case(name="nf4", storage="nf4", system="trl+liger"),
    )

    def apart(case: Any, nats: float, other: Any = peer) -> list[str]:
        losses = [12.58 + nats, 12.0, 12.0, 12.0, 12.0, 12.0]
        found: list[str] = bench.throughput.disagreements([row(bench, case, losses=losses), row(bench, other)])
        return found

    assert apart(ours, 0.001) == [] and len(apart(ours, 0.004)) == 1
    assert "onlay begins at 12.584" in apart(ours, 0.004)[0] and "trl+liger" in apart(ours, 0.004)[0]
    bf16 = replace(peer, storage="bf16")
    assert (
        apart(replace(ours, storage="fp8"), 0.005, bf16) == []
        and len(apart(replace(ours, storage="fp8"), 0.01, bf16)) == 1
    )
    real = replace(ours, rows=96, tokens=None)
    packed = replace(peer, rows=8, tokens=None, pack_tokens=2048)
    assert apart(real, 0.03, packed) == [] and len(apart(real, 0.1, packed)) == 1  # Other rows: the mean of others.
    assert apart(ours, float("nan")) != []
    assert apart(ours, 1.0, replace(peer, storage="bf16")) == []  # Nothing to compare with.


def test_the_last_error_is_found_among_warnings(bench: SimpleNamespace) -> None:
    text = "Traceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA out of memory.\n\n[W1] process group was not destroyed\n"
    assert bench.throughput.last_error(text) == "torch.OutOfMemoryError: CUDA out of memory."
    assert bench.throughput.last_error("Segmentation fault\n") == "Segmentation fault"
    assert bench.throughput.last_error("") == ""


def test_the_best_that_fits_makes_the_curve(bench: SimpleNamespace) -> None:
    case = bench.step.Case(storage="nf4")
    rows = [
        row(bench, case, peak_gib=7.4, context_gib=0.5, step_seconds=[4.0] * 6),
        row(bench, case, peak_gib=7.6, context_gib=0.5, step_seconds=[2.0] * 6),
        row(bench, case, peak_gib=5.0, context_gib=None, step_seconds=[8.0] * 6),
        row(bench, replace(case, system="unsloth"), peak_gib=70.0, step_seconds=[1.0] * 6),
        row(bench, replace(case, rank=8), peak_gib=1.0, step_seconds=[0.5] * 6),  # Other work.
        bench.throughput.row_of(case, {"error": "no", "seconds": 1.0}, commit="c", run="r"),
    ]
    best = bench.budget.best_within(rows)
    assert list(best) == ["onlay", "unsloth"]
    assert [best["onlay"][gib]["tokens_per_second"] for gib in (8, 12, 139)] == [4096, 8192, 8192]
    assert best["unsloth"][48] is None and best["unsloth"][80]["tokens_per_second"] == 16384
    assert " 12       8,192           -" in bench.budget.table(rows)


# ------------------------------------------------------------------------------------------------------- on a tiny base


@pytest.mark.parametrize("changed", [{}, {"storage": "nf4", "dropout": 0.05, "targets": "qv", "tokens": None}])
def test_steps_run_through_the_session(bench: SimpleNamespace, changed: dict[str, Any]) -> None:
    case = bench.step.Case(**(TINY | changed))
    found = bench.step.measure(case)
    assert len(found["step_seconds"]) == len(found["losses"]) == 3 and min(found["step_seconds"]) > 0
    assert found["step_tokens"] == np.array(bench.step.row_lengths(case)).reshape(3, 2).sum(1).tolist()
    # Random weights know nothing of random tokens: the loss begins at the logarithm of the vocabulary.
    assert found["losses"][0] == pytest.approx(np.log(bench.bases.TINY_VOCABULARY), abs=0.1)
    assert found["notes"]["recompute"] == "no layer" and found["trainable"] > 0
    assert bench.throughput.row_of(case, found | {"seconds": 1.0}, commit="c", run="r")["tokens_per_second"] > 0


def test_a_checkpoint_gives_the_same_steps_whoever_loads_it(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.bases.write_base(tmp_path / "base", "tiny", device="cpu")
    case = bench.step.Case(**TINY, model=str(tmp_path / "base"))
    once, again = bench.step.measure(case), bench.step.measure(replace(case, rank=4, targets="qv"))
    # Before the first update no adapter changes anything; the base is the folder's, not one made in memory.
    assert once["losses"][0] == pytest.approx(again["losses"][0], abs=1e-6)
    assert once["losses"][0] != pytest.approx(bench.step.measure(replace(case, model=None))["losses"][0], abs=1e-6)


def test_memory_appends_a_row(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "memory.csv"
    words = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--tokens",
        "24",
        "--steps",
        "2",
        "--recompute",
        "1",
        "--commit",
        "c",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["memory.py", *words])
    bench.memory.main()
    assert "'peak_gib'" in capsys.readouterr().out
    [made] = csv.DictReader(out.open(newline="", encoding="utf-8"))
    with (BENCH / "results" / "memory.csv").open(newline="", encoding="utf-8") as file:
        assert set(csv.DictReader(file).fieldnames or ()) <= made.keys()  # Old rows and new ones have one header.
    assert made["recomputed"] == "all but its input of 1 of 2 layers" and made["commit"] == "c"
    with pytest.raises(SystemExit):
        bench.memory.parse(["--steps", "1"])


def test_processes_that_fail_are_rows(bench: SimpleNamespace) -> None:
    """One that the recipe refuses, a peer without a checkpoint, and one that takes too long."""
    case = bench.step.Case(**TINY)
    refused = bench.throughput.run_case(replace(case, rank=0), timeout=120)
    assert refused["error"].startswith("RecipeError: adapter.rank = 0")
    peer = bench.throughput.run_case(replace(case, system="trl"), timeout=120)
    assert "peers load a checkpoint from a folder" in peer["error"]
    assert bench.throughput.run_case(case, timeout=0.05)["error"] == "not done after 0 s"


def test_throughput_on_a_cpu(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "throughput.csv"
    words = ["--shape", "tiny", "--device", "cpu", "--steps", "1", "--warmup", "1", "--commit", "c", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words, "--only", "gsm8k-nf4"])
    with pytest.raises(SystemExit) as ended:
        bench.throughput.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "on a CPU these cannot run: trl+liger, unsloth" in said and "tokens/s" in said
    [made] = csv.DictReader(out.open(newline="", encoding="utf-8"))
    assert made["case"] == "gsm8k-nf4" and made["error"] == "" and float(made["tokens_per_second"]) > 0
    # Nothing fits into no time; what was left out is said.
    rows = bench.throughput.run_cases([bench.step.Case(**TINY)], out=None, timeout=1.0, budget=0.0, commit="c")
    assert rows == [] and "not run for want of time: step (onlay)" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "told"), [(["--only", "nf5"], "nf5"), (["--systems", "onlay,peft"], "peft")])
def test_unknown_names_are_refused(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    for script in (bench.throughput, bench.budget):
        monkeypatch.setattr(sys, "argv", ["script.py", "--list", *words])
        with pytest.raises(SystemExit, match=f"{told} is not one of"):
            script.main()


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_and_its_plot_are_what_the_rows_say(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text
    assert set(page.BLOCK.findall(text)) == set(page.blocks())
    assert page.PLOT.read_text(encoding="utf-8") == page.plot(
        page.rows_of("throughput.csv") + page.rows_of("budget.csv")
    )


def test_the_tables_show_what_rows_hold(bench: SimpleNamespace, page: ModuleType, tmp_path: Path) -> None:
    ours, peer = (
        bench.step.Case(name="nf4", storage="nf4"),
        bench.step.Case(name="nf4", storage="nf4", system="unsloth", recompute="none"),
    )
    noted = {"recompute": "no layer", "micro_batch_tokens": "16384"}
    rows = [
        row(bench, ours, step_seconds=[3.0] * 6), row(bench, peer, step_seconds=[1.25] * 6), row(bench, ours, notes=noted),
        bench.throughput.row_of(replace(ours, storage="fp8"), {"error": "RecipeError: a | b", "seconds": 1.0}, commit="c", run="r"),
    ]  # fmt: skip
    for one in rows:
        bench.step.append_row(tmp_path / "rows.csv", one)
    read = bench.budget.read_rows([tmp_path / "rows.csv"])
    table = page.throughput_table(read).splitlines()
    # The later row of onlay's counts; 16,384 against 13,107 tokens a second is 1.25.
    assert table[2].startswith(
        "| nf4 | onlay | nf4, by itself: no layer recomputed, at most 16,384 tokens a pass | 16,384 | 1.25 | 60.0 | "
    )
    assert table[3].startswith("| nf4 | unsloth | nf4, nothing recomputed | 13,107 |  | 60.0 |")
    assert table[4].endswith("| failed | | | | RecipeError: a / b |") and len(table) == 5
    assert {line.count("|") for line in table} == {9}
    assert "| 80 | **16,384**: " in page.budget_table(
        read
    ) and "| 48 | none measured that fits | none measured that fits |" in page.budget_table(read)
    assert page.losses_text(read) == "They do."
    assert "NVIDIA H200, commit abc1234: 3 rows; torch 2.11.0." in page.runs_text(read)
    drawn = ElementTree.fromstring(page.plot(read))
    told = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert any("unsloth, 80 GiB: 13,107 tokens/s" in (text or "") for text in told)
    assert page.throughput_table([]) == page.budget_table([]) == page.NOTHING


def test_every_system_has_a_colour(bench: SimpleNamespace, page: ModuleType) -> None:
    assert all(f".{system.removeprefix('trl+')} {{ stroke" in page.STYLE for system in bench.throughput.SYSTEMS)
