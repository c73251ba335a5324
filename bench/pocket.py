"""What the bundled base can do: bits per byte on held-out books, and exact match on held-out exercises, skill by skill.

    python bench/pocket.py --books books_heldout.jsonl --exercises exercises_heldout.jsonl --out bench/results/pocket.json

Both files are made by recipes/pocket (books.py and exercises.py).  Everything runs through onlay's own loading, masking,
loss and generation, greedy, on whatever device there is; `--base` takes any other folder or hub name with a byte-level
tokenizer.  The numbers in onlay/model/pocket/README.md come from here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from onlay.data.build import split_document
from onlay.data.pack import collate, plan_micro_batches
from onlay.data.read import Conversation, parse
from onlay.data.sources import read_rows
from onlay.data.template import ChatTemplate
from onlay.evaluation.scores import exact_match, valid_json
from onlay.hardware import find_hardware
from onlay.model.facts import read_facts
from onlay.model.tokenizer import load_tokenizer, pad_token_id
from onlay.recipe import DataSection, ModelSection

WINDOW_TOKENS = 1024
BUDGET_TOKENS = 8192
SPARE_TOKENS = 8
"""An answer may be this much longer than the longest expected one before it is cut off."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--books", type=Path, required=True, help="JSON lines of {text}")
    parser.add_argument("--exercises", type=Path, required=True, help="JSON lines of {messages, skill}")
    parser.add_argument("--documents", type=int, help="use only the first documents of the books")
    parser.add_argument("--rows", type=int, help="use only the first exercises")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()

    section = ModelSection(base=arguments.base)
    hardware = find_hardware()
    facts = read_facts(section)
    tokenizer: Any = load_tokenizer(facts)
    from onlay.model.load import load_base

    base = load_base(facts, section, hardware)
    began = time.perf_counter()
    books = bits_per_byte(base, tokenizer, arguments.books, documents=arguments.documents)
    exercises = skills(base, tokenizer, arguments.exercises, num_rows=arguments.rows)
    result = {
        "base": facts.name,
        "base_weight_fingerprint": facts.weight_fingerprint,
        "num_parameters": facts.num_parameters,
        "books": books,
        "exercises": exercises,
        "seconds": round(time.perf_counter() - began, 1),
        "device": hardware.devices[0].name if hardware.has_cuda else f"CPU, {hardware.cpu_cores} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    print_tables(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def bits_per_byte(base: Any, tokenizer: Any, path: Path, *, documents: int | None) -> dict[str, float]:
    """Over windows of at most WINDOW_TOKENS that do not overlap; a window's first token is neither scored nor counted.

    A byte-level token is written with one character for each of its bytes, so the bytes are counted exactly.
    """
    import torch

    from onlay.model.attention import Layout
    from onlay.training.loss import make_loss

    section = DataSection.model_validate({"train": str(path)})
    texts = [row.values["text"] for row in read_rows(str(path), section, limit=documents)]
    windows: list[list[int]] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        windows += [piece for piece in split_document(ids, WINDOW_TOKENS) if len(piece) > 1]
    num_bytes = sum(len(token) for window in windows for token in tokenizer.convert_ids_to_tokens(window[1:]))
    layout = Layout(packed=False, mask_padding=False, attention=base.attention, reason="")
    device = next(base.model.parameters()).device
    loss = make_loss(base.model, layout, device=device, compute_dtype=base.compute_dtype)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for group in plan_micro_batches([len(w) for w in windows], budget_tokens=BUDGET_TOKENS, packed=False):
            examples = [(np.array(windows[i]), np.ones(len(windows[i]), dtype=bool)) for i in group]
            batch = collate(examples, packed=False, pad_token_id=pad_token_id(tokenizer))
            nats += float(loss(base.model, batch))
            tokens += batch.num_trained
    return {
        "documents": len(texts),
        "windows": len(windows),
        "tokens": tokens,
        "bytes": num_bytes,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / num_bytes, 4),
    }


def skills(base: Any, tokenizer: Any, path: Path, *, num_rows: int | None) -> dict[str, Any]:
    """Greedy answers to the last turn of each row, compared with what stands there."""
    from onlay.generation.engine import Engine, Request, Sampling

    section = DataSection.model_validate({"train": str(path), "format": "messages"})
    template = ChatTemplate(tokenizer)
    names: list[str] = []
    prompts: list[list[int]] = []
    expected: list[str] = []
    for row in itertools.islice(read_rows(str(path), section), num_rows):
        item = parse(row, "messages", section)
        assert isinstance(item, Conversation)
        names.append(str(row.values["skill"]))
        prompts.append(template.encode_prompt(item.turns[:-1], item.tools))
        expected.append(item.turns[-1].content)
    longest = max(len(tokenizer(text)["input_ids"]) for text in expected)
    engine = Engine(
        base.model, stop_token_ids=template.stop_token_ids, pad_token_id=pad_token_id(tokenizer), context_tokens=None
    )
    found = engine.generate(
        [Request(prompt) for prompt in prompts], sampling=Sampling(max_new_tokens=longest + SPARE_TOKENS)
    )
    answers = [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in found]
    places: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        places[name].append(index)
    return {
        "rows": len(expected),
        "exact_match": round(exact_match(answers, expected), 4),
        "interval_95": [round(edge, 4) for edge in wilson(exact_match(answers, expected), len(expected))],
        "valid_json": valid_json(answers, expected),
        "skills": {
            name: {
                "rows": len(where),
                "exact_match": round(exact_match([answers[i] for i in where], [expected[i] for i in where]), 4),
            }
            for name, where in sorted(places.items())
        },
    }


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share by Wilson's score."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def print_tables(result: dict[str, Any]) -> None:
    books, exercises = result["books"], result["exercises"]
    print(
        f"books: {books['bits_per_byte']:.3f} bits per byte, {books['nats_per_token']:.3f} nats per token "
        f"({books['documents']} documents, {books['bytes']:,} bytes)"
    )
    low, high = exercises["interval_95"]
    print(
        f"exercises: {exercises['exact_match']:.1%} exact match ({low:.1%} to {high:.1%}), {exercises['rows']} rows, "
        f"valid JSON {exercises['valid_json']}"
    )
    for name, score in sorted(exercises["skills"].items(), key=lambda pair: -pair[1]["exact_match"]):
        print(f"| {name} | {score['rows']} | {score['exact_match']:.0%} |")
    print(f"{result['seconds']} s on {result['device']}")


if __name__ == "__main__":
    main()
