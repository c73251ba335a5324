"""Made-up reports, with everything in them and with almost nothing."""

from __future__ import annotations

import math
import random
from typing import Any

from onlay.records import Comparison, Gate, Judged, Likelihood, Report


def comparison(score: str = "exact_match", *, against: str = "base", **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "score": score, "system": "adapter", "against": against, "rows": 300, "value": 0.713, "other": 0.589,
        "difference": 0.124, "low": 0.091, "high": 0.158, "p_value": 0.0000031, "higher_is_better": True,
        "verdict": "better by 12.4 points, 95 % 9.1 to 15.8",
    }  # fmt: skip
    return Comparison(**(values | changes))


def full_report(**changes: Any) -> Report:
    """Four systems, gates of which one fails, forgetting, safety and judges."""
    worse = {"value": 0.713, "other": 0.741, "difference": -0.028, "low": -0.049, "high": -0.008, "p_value": 0.011}
    unsure = {"value": 0.713, "other": 0.701, "difference": 0.012, "low": -0.02, "high": 0.044, "p_value": 0.52}
    values: dict[str, Any] = {
        "path": "runs/support/evaluation", "system": "adapter",
        "systems": {
            "base": "Qwen/Qwen3-8B, no adapter", "adapter": "runs/support/adapter (LoRA, rank 16)",
            "prompt": "the base with the recipe's prompt", "few-shot": "the base with 4 examples in context",
            "live": "support@3, in use since 2026-10-02",
        },
        "base": "Qwen/Qwen3-8B", "base_revision": "9c925d64d72725edaf899c6cb9c377fd0709d9c5", "data": "support.jsonl",
        "data_digest": "9f2c41d07be1", "rows": 300,
        "scores": {
            "base": {"exact_match": 0.589, "rougeL": 0.612, "bleu": 31.2, "valid_json": 0.91, "no_stop": 0.0},
            "adapter": {"exact_match": 0.713, "rougeL": 0.745, "bleu": 42.8, "valid_json": 0.993, "no_stop": 0.013},
            "prompt": {"exact_match": 0.701, "rougeL": 0.733, "bleu": 40.1, "valid_json": 0.97, "no_stop": 0.0},
            "few-shot": {"exact_match": 0.68, "rougeL": 0.702, "bleu": 38.4, "valid_json": None, "no_stop": 0.003},
            "live": {"exact_match": 0.741, "rougeL": 0.75, "bleu": 43.0, "valid_json": 0.99, "no_stop": 0.0},
        },
        "comparisons": [
            comparison(),
            comparison(against="prompt", verdict="no difference shown: +1.2 points, 95 % -2.0 to 4.4", **unsure),
            comparison(against="live", verdict="worse by 2.8 points, 95 % 0.8 to 4.9", **worse),
            comparison("bleu", value=42.8, other=31.2, difference=11.6, low=8.2, high=14.9, p_value=0.0005,
                       verdict="better by 11.6, 95 % 8.2 to 14.9"),
            comparison("no_stop", value=0.013, other=0.0, difference=0.013, low=0.003, high=0.027, p_value=0.125,
                       higher_is_better=False, verdict="no difference shown: +1.3 points, 95 % 0.3 to 2.7"),
        ],
        "smallest_difference": {"exact_match": 0.051, "bleu": 3.1},
        "likelihood": [
            Likelihood(text=text, system=system, rows=rows, tokens=tokens, bytes=4 * tokens, nats_per_token=nats,
                       perplexity=math.exp(nats), bits_per_byte=nats / math.log(2) / 4)
            for text, system, rows, tokens, nats in (
                ("held_out", "base", 300, 21480, 1.842), ("held_out", "adapter", 300, 21480, 0.611),
                ("general", "base", 60, 11904, 2.317), ("general", "adapter", 60, 11904, 2.338),
            )
        ],
        "forgetting": [
            comparison("nats_per_token", rows=60, value=2.338, other=2.317, difference=0.021, low=0.012, high=0.03,
                       p_value=0.0004, higher_is_better=False, verdict="worse by 0.021 nats, 95 % 0.012 to 0.030"),
            comparison("accuracy", rows=150, value=0.607, other=0.62, difference=-0.013, low=-0.047, high=0.02,
                       p_value=0.68, verdict="no difference shown: -1.3 points, 95 % -4.7 to 2.0"),
        ],
        "safety": [
            comparison("refused_harmful", rows=100, value=0.89, other=0.94, difference=-0.05, low=-0.1, high=0.0,
                       p_value=0.0625, verdict="no difference shown: -5.0 points, 95 % -10.0 to 0.0"),
            comparison("refused_harmless", rows=100, value=0.04, other=0.03, difference=0.01, low=-0.02, high=0.04,
                       p_value=1.0, higher_is_better=False, verdict="no difference shown: +1.0 points, 95 % -2.0 to 4.0"),
        ],
        "judged": [
            Judged(judge="local judge", system="adapter", against="base", rows=100, wins=51, losses=22, ties=27,
                   consistency=0.78, first_slot_wins=0.54, unreadable=1, p_value=0.0009),
        ],
        "gates": [
            Gate(name="exact_match gain", limit=0.05, found=0.124, passed=True, reason="better by 12.4 points than the base"),
            Gate(name="forgetting", limit=0.05, found=0.021, passed=True, reason="general text lost 0.021 nats per token"),
            Gate(name="safety loss", limit=0.02, found=0.05, passed=False,
                 reason="refuses 5.0 points fewer harmful prompts than the base; at most 2.0 are allowed"),
            Gate(name="latency", limit=2.0, found=None, passed=False, reason="not measured: run with --latency"),
        ],
        "verdict": "do not ship",
        "reasons": [
            "Better than the base by 12.4 points of exact match (95 % 9.1 to 15.8) on 300 rows.",
            "The version in use, support@3, is better by 2.8 points.",
            "Two gates are not passed: safety loss and latency.",
        ],
        "risks": [
            "Refuses 5.0 points fewer harmful prompts than the base; 100 prompts cannot tell that from chance.",
            "A difference below 5.1 points of exact match would go unseen.",
            "Lost 0.021 nats per token on general text.",
        ],
        "failures": 50,
        "likely_causes": [
            "6% of the answers end in a loop, 1% do not stop by themselves.",
            "Too many epochs: held-out loss rose from step 240 on.", "Duplicate rows: 14 of 2,000.",
        ],
        "seconds": 214.0,
        "environment": {
            "onlay": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "device": "NVIDIA H200",
            "command": "onlay evaluate runs/support --set evaluation.seed=1",
        },
        "sources": {"run": "77d0aa41c3", "dataset": "5b1be2f410", "recipe": "e02cd3ab11"},
    }  # fmt: skip
    return Report(**(values | changes))


def bare_report(**changes: Any) -> Report:
    """One system, one score, no gates and nothing else."""
    values: dict[str, Any] = {
        "path": "out", "system": "base", "systems": {"base": "pocket"}, "base": "pocket", "base_revision": None,
        "data": "rows.jsonl", "data_digest": "aa", "rows": 2, "scores": {"base": {"exact_match": 0.5}}, "comparisons": [],
        "smallest_difference": {}, "likelihood": [], "forgetting": [], "safety": [], "judged": [], "gates": [],
        "verdict": "no gates", "reasons": [], "risks": [], "failures": 0, "likely_causes": [], "seconds": 1.0,
        "environment": {},
    }  # fmt: skip
    return Report(**(values | changes))


def answer_row(number: int, **changes: Any) -> dict[str, Any]:
    """One line of answers.jsonl, answered by base and adapter."""
    values: dict[str, Any] = {
        "row": number, "place": f"support.jsonl:{number + 1}", "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "expected": "Open the settings and press Reset.",
        "answers": {"base": "Call support.", "adapter": "Open the settings and press Reset."},
        "scores": {"base": {"exact_match": 0.0}, "adapter": {"exact_match": 1.0}},
    }  # fmt: skip
    return values | changes


def metrics(steps: int = 300) -> list[dict[str, Any]]:
    """A run of `steps` steps with eleven evaluations and one recovery, after which a step was repeated."""
    stream = random.Random(0)
    events: list[dict[str, Any]] = [{"event": "evaluation", "step": 0, "loss": 1.842}]
    for step in range(1, steps + 1):
        loss = 0.55 + 1.3 * math.exp(-step / 40) + stream.gauss(0, 0.05)
        rate = 2e-4 * min(step / 30, 1) * (1 - max(0, step - 30) / steps)
        events.append(
            {"event": "step", "step": step, "loss": loss, "learning_rate": rate, "grad_norm": 0.4, "tokens": 2048}
        )
        if step % 30 == 0:
            events.append({"event": "evaluation", "step": step, "loss": 0.6 + 1.24 * math.exp(-step / 35)})
        if step == 140:
            events.append({"event": "recovery", "step": 140, "reason": "loss_spike", "detail": "d", "action": "a"})
            events.append(
                {"event": "step", "step": 140, "loss": 0.6, "learning_rate": rate, "grad_norm": 0.4, "tokens": 2048}
            )
    return events
