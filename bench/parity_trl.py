"""Is onlay's loss curve TRL's?  Same rows, order, seed and initial adapter, in float32 on the CPU.

    python bench/parity_trl.py --data train.jsonl --base FOLDER [--steps 50] [--out bench/results/parity_trl.json]

Needs trl (pip install --no-deps trl==1.4.0; later ones need Triton for the loss), which onlay itself does not.  Exits with 1 when a step's losses differ by more than
the limit, relatively.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT = 1e-5


def onlay_losses(recipe: Any) -> tuple[list[float], list[list[tuple[list[int], list[bool]]]], Path]:
    """Loss of each step, the examples of each step in onlay's order, and a folder with the initial adapter."""
    from onlay import stages
    from onlay.data.pack import collate, plan_micro_batches
    from onlay.hardware import find_hardware
    from onlay.model.adapter import attach
    from onlay.model.load import load_base
    from onlay.training.batches import Batches
    from onlay.training.metrics_log import read_metrics

    prepared = stages.prepare(recipe)
    examples = prepared.split("train")
    batches = Batches(
        examples, batch_size=recipe.training.batch_size, seed=recipe.training.seed,
        plan=partial(plan_micro_batches, packed=False), collate=partial(collate, packed=False, pad_token_id=0),
    )  # fmt: skip
    rows = []
    for step in range(1, recipe.training.max_steps + 1):
        chosen = [examples.example(int(i)) for i in batches.indices(step)]
        rows.append([(ids.tolist(), trained.tolist()) for ids, trained in chosen])
    base = load_base(prepared.source.facts, recipe.model, find_hardware(), device="cpu")
    adapted, _ = attach(base.model, recipe.adapter, seed=recipe.training.seed)
    initial = Path(tempfile.mkdtemp()) / "adapter"
    adapted.save_pretrained(str(initial), save_embedding_layers=False)
    run = stages.train(recipe)
    losses = [e["loss"] for e in read_metrics(Path(run.path) / "metrics.jsonl") if e["event"] == "step"]
    return losses, rows, initial


def trl_losses(base: str, rows: Any, initial: Path, recipe: Any) -> list[float]:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(initial), is_trainable=True)
    flat = [example for step in rows for example in step]
    data = Dataset.from_dict({
        "input_ids": [ids for ids, _ in flat],
        "completion_mask": [[int(t) for t in trained] for _, trained in flat],
    })  # fmt: skip
    training = recipe.training
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=training.batch_size, max_steps=training.max_steps,
        learning_rate=recipe.learning_rate, lr_scheduler_type="constant", warmup_steps=0, weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm, optim="adamw_torch", logging_steps=1, report_to="none", save_strategy="no",
        bf16=False, fp16=False, use_cpu=True, loss_type="nll", gradient_checkpointing=False, seed=training.seed, packing=False,
        max_length=None, completion_only_loss=True, disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    trainer = InOrder(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    logged: list[float] = []

    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        logged.append(float(loss.detach()))  # the log itself is rounded
        return out

    trainer.compute_loss = compute_loss
    trainer.train()
    return logged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from onlay.recipe import parse_recipe

    recipe = parse_recipe({
        "model": {"base": arguments.base, "compute": "fp32"},
        "data": {"train": arguments.data, "max_rows": 600},
        "training": {
            "max_steps": arguments.steps, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "constant",
            "warmup_fraction": 0.0, "output": str(Path(tempfile.mkdtemp()) / "run"),
        },
        "evaluation": {"max_rows": 8, "every_steps": 1000},
    })  # fmt: skip
    ours, rows, initial = onlay_losses(recipe)
    theirs = trl_losses(arguments.base, rows, initial, recipe)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    for step in range(0, len(ours), max(1, len(ours) // 10)):
        print(f"step {step + 1:3d}  onlay {ours[step]:.7f}  trl {theirs[step]:.7f}")
    print(f"{len(ours)} steps, largest relative difference {worst:.2e} (limit {LIMIT:.0e})")
    if arguments.out:
        packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
        result = {
            "command": "bench/parity_trl.py", "steps": len(ours), "largest_relative_difference": worst,
            "first": ours[0], "last": ours[-1], "machine": platform.machine(), "versions": packages,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
