from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from onlay.errors import OutputError
from onlay.records import (
    RECORDS,
    AdapterVersion,
    Audit,
    AuditedFile,
    Checkpoint,
    Comparison,
    Dataset,
    Finding,
    Gate,
    Judged,
    Likelihood,
    Merge,
    MergeCheck,
    ModelFacts,
    Plan,
    Record,
    Recovery,
    Report,
    RowAt,
    Run,
    SplitFacts,
    write_whole,
)


def model_facts(**changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "name": "pocket", "path": "/bases/pocket", "revision": None, "licence": "apache-2.0",
        "architecture": "LlamaForCausalLM", "model_type": "llama", "num_parameters": 10, "weight_bytes": 20,
        "vocabulary_size": 4, "context_tokens": 8, "hidden_size": 2, "num_layers": 1,
        "linear_shapes": {"layers.0.q_proj": (2, 3)}, "weight_fingerprint": "ab",
    }  # fmt: skip
    return ModelFacts(**(values | changes))


def dataset(**changes: Any) -> Dataset:
    values: dict[str, Any] = {
        "path": "/p", "source": "rows.jsonl", "source_digest": "aa", "format": "messages", "template": "base",
        "template_digest": "bb", "tokenizer_digest": "cc", "max_tokens": 8, "stop_token_ids": [2], "sources": {"data": "aa"},
        "splits": {"train": SplitFacts(rows=3, examples=2, tokens=9, trained_tokens=4, longest_tokens=5)},
        "findings": [Finding(code="overlong_dropped", count=1, message="too long", rows=[RowAt(file="rows.jsonl", row=2)])],
    }  # fmt: skip
    return Dataset(**(values | changes))


def run(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "path": "runs/a", "status": "finished", "started": "2026-11-01T00:00:00+00:00", "seconds": 1.5, "steps": 2,
        "total_steps": 2, "examples": 3, "trained_tokens": 4, "sources": {"model": "aa", "dataset": "bb"},
        "checkpoints": [Checkpoint(step=2, path="runs/a/checkpoints/step-0000002")],
        "recoveries": [Recovery(step=1, reason="out_of_memory", detail="d", action="a")], "proofs": {"finite": True},
    }  # fmt: skip
    return Run(**(values | changes))


def merge(**changes: Any) -> Merge:
    check = MergeCheck(
        into="quantized", split="evaluation", rows=2, tokens=9, max_logit_difference=0.09, mean_logit_difference=0.007,
        top1_agreement=0.99, perplexity={"adapter": 3.5, "merged": 3.6, "base": 600.0}, base_mean_logit_difference=1.5,
        proven_max_difference=0.09, proven_mean_difference=0.007, rounding_max_difference=0.1,
        rounding_mean_difference=0.008, limit=0.016, passed=True,
    )  # fmt: skip
    values: dict[str, Any] = {
        "path": "merged", "status": "merged", "base": "pocket", "base_revision": None, "method": "lora", "storage": "nf4",
        "into": "quantized", "seconds": 1.0, "weight_bytes": 20, "changed_tensors": 1, "verification": check,
        "candidates": {name: check.model_copy(update={"into": name}) for name in ("quantized", "original")},
        "sources": {"run": "aa"},
    }  # fmt: skip
    return Merge(**(values | changes))


def report(**changes: Any) -> Report:
    compared = Comparison(
        score="exact_match", system="adapter", against="base", rows=100, value=0.76, other=0.0, difference=0.76, low=0.68,
        high=0.84, p_value=1e-20, higher_is_better=True, verdict="better by 76.0 points, 95 % 68.0 to 84.0",
    )  # fmt: skip
    values: dict[str, Any] = {
        "path": "runs/a/report", "system": "adapter", "systems": {"base": "pocket", "adapter": "runs/a"}, "base": "pocket",
        "base_revision": None, "data": "rows.jsonl", "data_digest": "aa", "rows": 100,
        "scores": {"base": {"exact_match": 0.0, "valid_json": None}, "adapter": {"exact_match": 0.76, "valid_json": None}},
        "comparisons": [compared], "smallest_difference": {"exact_match": 0.09},
        "likelihood": [Likelihood(
            text="held_out", system="base", rows=100, tokens=900, bytes=3000, nats_per_token=1.5, perplexity=4.48,
            bits_per_byte=0.65,
        )],
        "forgetting": [compared], "safety": [compared],
        "judged": [Judged(
            judge="person", system="adapter", against="base", rows=3, wins=2, losses=0, ties=1, consistency=1.0,
            first_slot_wins=0.5, unreadable=0, p_value=0.5,
        )],
        "gates": [Gate(name="exact_match", limit=0.5, found=0.76, passed=True, reason="0.76 is at least 0.5")],
        "verdict": "ship", "reasons": ["better"], "risks": ["few rows"], "failures": 24, "likely_causes": [],
        "seconds": 12.0, "environment": {"torch": "2.13.0"}, "sources": {"run": "aa"},
    }  # fmt: skip
    return Report(**(values | changes))


def version(**changes: Any) -> AdapterVersion:
    values: dict[str, Any] = {
        "name": "support", "version": 4, "path": "registry/versions/aa", "origin": "runs/a",
        "registered_at": "2026-11-01T00:00:00+00:00", "registered_by": "ada@desk", "method": "lora",
        "files": {"adapter_model.safetensors": "aa"}, "weight_digest": "aa", "rank": 16, "base": "pocket",
        "base_revision": None, "base_weight_fingerprint": "ab", "storage": "bf16", "tokenizer_digest": "cc",
        "template_digest": "bb", "evaluation_loss": 0.04, "scores": {"exact_match": 0.76},
        "gates": [Gate(name="exact_match", limit=0.5, found=0.76, passed=True, reason="0.76 is at least 0.5")],
        "verdict": "ship", "sources": {"run": "aa"},
    }  # fmt: skip
    return AdapterVersion(**(values | changes))


def audit() -> Audit:
    file = AuditedFile(path="a.jsonl", digest="ab", format="alpaca", rows=3, unreadable=0, role="train")
    return Audit(files=[file], rows=3, unreadable=0, findings=[], seconds=1.0)


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "base": "pocket", "gpu": "RTX 4090", "gpus": 1, "rows": 10, "mean_tokens": 4.5, "data": "10 rows, declared",
        "parameters": {"trainable": 1, "total": 11},
        "memory": {
            "peak_bytes": 28, "low_bytes": 20, "high_bytes": 30, "needed_bytes": 40, "device_bytes": 50, "weights_bytes": 1,
            "adapter_bytes": 2, "gradient_bytes": 3, "optimizer_bytes": 4, "activation_bytes": 5, "loss_bytes": 6, "working_bytes": 7,
        },
        "time": {
            "seconds": 6.0, "low_seconds": 5.0, "high_seconds": 7.0, "training_seconds": 3.0, "evaluation_seconds": 2.0,
            "loading_seconds": 1.0, "steps": 2, "step_seconds": 1.5, "tokens": 45, "tokens_per_second": 15.0,
            "flops_per_token": 60.0, "verified": False,
        },
        "cost": {
            "usd": 0.5, "most_usd": 1.0, "spot_usd": None, "usd_per_hour": 300.0, "provider": "somewhere", "date": "2026-11-01",
            "source": "a page", "notes": [],
        },
        "settings": {
            "storage": "nf4", "compute": "bf16", "optimizer": "adamw", "offload_activations": False, "micro_batch_tokens": 512,
            "levels": ["mlp", "none"], "recompute": "gate and up computed again in 1 of 2 layers", "fast_path": True,
        },
        "decisions": [{"what": "model.storage", "chosen": "nf4", "why": "room", "rejected": ["bf16: 1 GiB more"]}],
        "rungs": [
            {"setting": "bf16", "needed_bytes": 60, "tokens_per_second": None, "verdict": "does not fit", "reason": "10 more"}
        ],
    }  # fmt: skip
    return Plan(**(values | changes))


EVERY = [model_facts(), dataset(), run(), merge(), report(), version(), audit(), plan()]


@pytest.mark.parametrize("record", EVERY, ids=lambda record: record.kind)
def test_json_both_ways(record: Record, tmp_path: Path) -> None:
    assert type(record).model_validate_json(record.to_json()) == record
    path = record.save(tmp_path)
    assert path == tmp_path / f"{record.kind}.json"
    again = type(record).load(tmp_path)
    assert again == record
    assert again.digest == record.digest
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_kind_is_known() -> None:
    assert {type(record) for record in EVERY} == set(RECORDS.values())
    assert all(RECORDS[record.kind] is type(record) for record in EVERY)


@pytest.mark.parametrize(
    "other",
    [
        run(seconds=1.6),
        run(status="failed"),
        run(sources={"model": "aa", "dataset": "bc"}),
        run(recoveries=[]),
        run(proofs={"finite": False}),
        run(checkpoints=[Checkpoint(step=3, path="runs/a/checkpoints/step-0000002")]),
        run(first_loss=0.1),
    ],
)
def test_any_change_changes_the_digest(other: Run) -> None:
    assert other.digest != run().digest


def test_the_digest_is_of_content_only() -> None:
    assert run().digest == run(sources={"dataset": "bb", "model": "aa"}).digest
    assert run(error=None, peak_memory_bytes=None).digest == run().digest
    assert len(run().digest) == 64


def test_a_field_that_a_later_version_adds_changes_no_digest() -> None:
    class LaterRun(Run):
        colour: str | None = None

    values = run().model_dump()
    assert LaterRun(**values).digest == run().digest
    assert LaterRun(**values, colour="red").digest != run().digest


def test_a_record_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        run().steps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        run(colour="red")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda values: values.pop("steps"), "steps"),
        (lambda values: values.update(steps="many"), "steps"),
        (lambda values: values.update(colour="red"), "colour"),
        (lambda values: values["checkpoints"][0].pop("path"), "checkpoints.0.path"),
    ],
)
def test_an_edited_file_is_told_with_the_field(tmp_path: Path, edit: Any, named: str) -> None:
    path = run().save(tmp_path)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(OutputError) as caught:
        Run.load(tmp_path)
    assert str(path) in caught.value.problem
    assert f": {named}: " in caught.value.problem
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_a_broken_file_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match="is not a run record"):
        Run.load(tmp_path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"run\.json does not exist"):
        Run.load(tmp_path)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onlay.records.os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_record_lies_is_not_what_it_is() -> None:
    """A cache that moved holds the same rows: a run begun with them can be resumed."""

    class Placed(Record):
        kind: ClassVar[str] = "placed"
        elsewhere: ClassVar[frozenset[str]] = frozenset({"path"})
        path: str
        rows: int

    assert Placed(path="a", rows=1).digest == Placed(path="b", rows=1).digest
    assert Placed(path="a", rows=1).digest != Placed(path="a", rows=2).digest
    assert Dataset.elsewhere == ModelFacts.elsewhere == {"path"}
