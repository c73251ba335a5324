"""What lies beside a merged model's weights: the base's own small files, what the run taught, and the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from onlay.model.hub import wanted_files
from onlay.model.tokenizer import load_tokenizer
from onlay.recipe import Recipe
from onlay.records import Dataset, Merge, ModelFacts, write_whole

_NOT_COPIED = ("README.md",)


def copy_small_files(facts: ModelFacts, folder: Path, *, remote_code: bool) -> None:
    """Config, tokenizer, templates, licence of the base, byte for byte; weights, their index and the card left out."""
    source = Path(facts.path)
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    for name in wanted_files(names, shards=None, remote_code=remote_code, weights=False):
        if name not in _NOT_COPIED and not name.endswith(".index.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def write_template(facts: ModelFacts, folder: Path, *, recipe: Recipe, dataset: Dataset) -> None:
    """The chat template that the run was trained with, where it is not the base's own."""
    from onlay.data.template import ChatTemplate

    if dataset.template == "base" or dataset.format == "text":
        return
    tokenizer = load_tokenizer(facts, trust_remote_code=recipe.model.trust_remote_code)
    template = ChatTemplate(tokenizer, template=recipe.data.template, loss_on=recipe.data.loss_on)
    write_whole(folder / "chat_template.jinja", template.source)


def write_generation_config(folder: Path, *, stop_token_ids: list[int]) -> None:
    """The base's, with the tokens that ended answers in training among those that end a generation."""
    path = folder / "generation_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key)}
    known = values.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if set(stop_token_ids) - set(ends):
        values["eos_token_id"] = [*ends, *(token for token in stop_token_ids if token not in ends)]
        write_whole(path, json.dumps(values, indent=2) + "\n")


def write_card(folder: Path, *, merge: Merge, recipe: Recipe, facts: ModelFacts) -> None:
    """README.md: what was merged into what, the proof, the recipe, where it comes from."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["onlay", "lora"],
    }
    if facts.revision is not None:
        front["base_model"] = facts.name
    if facts.licence is not None:
        front["license"] = facts.licence
    base = f"{facts.name}@{facts.revision}" if facts.revision else facts.name
    stored = "" if merge.storage == "bf16" else f", kept in {merge.storage} during training"
    into = {
        "original": "the base's original weights",
        "quantized": f"the weights that {merge.storage} stands for, which the adapter was trained against",
    }[merge.into]
    sources = "\n".join(f"| {kind} | `{digest}` |" for kind, digest in sorted(merge.sources.items()))
    text = f"""---
{yaml.safe_dump(front, sort_keys=True)}---

# {Path(merge.path).name}

An adapter (method {merge.method}) merged by onlay into {into}. It loads as any transformers model does; no adapter is
needed beside it.

- base: {base}{stored}
- licence of the base: {facts.licence or "not stated by its files"}
- {merge.changed_tensors:,} stored tensors were changed; the others are byte for byte the base's

## Proof

Logits compared with those of base and adapter as they were trained.

{verification_table(merge)}

## Recipe

```yaml
{recipe.to_yaml().rstrip()}
```

## Made from

| record | SHA-256 |
|---|---|
{sources}
"""
    write_whole(folder / "README.md", text)


def verification_table(merge: Merge) -> str:
    checks = merge.candidates or {merge.into: merge.verification}
    names = list(checks)
    lines = ["| | " + " | ".join(f"into {name}" for name in names) + " |", "|---|" + "---:|" * len(names)]
    rows = [check.told() for check in checks.values()]
    lines += [f"| {label} | " + " | ".join(row[label] for row in rows) + " |" for label in rows[0]]
    return "\n".join(lines)
