"""One decoding step with several adapters in a batch, on a random base: milliseconds, and tokens a second of whole answers.

    python bench/generation.py [--shape 8b] [--storage bf16] [--rows 128] [--prompt 64] [--adapters 0 1 8] \
        [--out bench/results/generation.csv]
    python bench/generation.py --tiny       the same on a CPU, with a base of a few thousand weights

A step is the forward of all rows and the choice of each next token, timed over many without a wait between; the rows
have the adapters (rank 16 on all linear layers) in turn.  `transformers` is its own `generate` on the base alone, without
the prompt's share.  Answers (`generate_tokens_per_second`) are the engine's whole work: prompts, captures, reading.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onlay.generation.adapters import RowAdapters, base_of
from onlay.generation.engine import Engine, Request, Sampling
from onlay.generation.fused import FusedDecoding
from onlay.generation.sampling import Sampler
from onlay.generation.slots import SLOT_ATTENTION, Slots, attention
from onlay.kernels.decode import has_kernels

STEPS = 48
RANK = 16


def tiny_base() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def with_adapters(base: nn.Module, count: int) -> Any:
    """PEFT's model with `count` random adapters a0, a1, ...; the base itself for none."""
    if count == 0:
        return base
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="a0")  # type: ignore[arg-type]
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02)
    return model.requires_grad_(False).eval()


def adapters_of(rows: int, count: int) -> list[str | None]:
    return [f"a{i % count}" if count else None for i in range(rows)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_milliseconds(
    model: nn.Module, prompts: list[list[int]], adapters: list[str | None]
) -> tuple[float, str | None]:
    """Of one decoding step, and why it was not captured."""
    base = base_of(model)
    rows, device = len(prompts), next(base.parameters()).device
    columns = -(-(len(prompts[0]) + 2 * STEPS) // 64) * 64
    captured = device.type == "cuda"
    with torch.inference_mode(), attention(base, SLOT_ATTENTION):
        fused = FusedDecoding(base) if has_kernels(device) else None
        by_row = RowAdapters(model, groups=fused.groups if fused else ()) if any(adapters) else None
        slots = Slots(base, rows=rows, columns=columns, longest=columns, piece_tokens=8192, graphs=captured)
        sampler = Sampler(Sampling(), rows=rows, device=device)
        with by_row or nullcontext(), fused.use(by_row) if fused else nullcontext():
            if by_row is not None:
                by_row.expect(adapters)
                by_row.put(adapters)
            share = max(1, 8192 // len(prompts[0]))
            ids = torch.zeros(rows, dtype=torch.long, device=device)
            for start in range(0, rows, share):
                places = list(range(start, min(rows, start + share)))
                with by_row.only([adapters[i] for i in places]) if by_row is not None else nullcontext():
                    logits = slots.admit(places, [prompts[i] for i in places], active=places)
                ids[places] = logits.argmax(-1)
            everyone = list(range(rows))
            for _ in range(8):  # the first ones capture
                ids = sampler.choose(slots.step(ids, active=everyone))
            wait(device)
            began = time.perf_counter()
            for _ in range(STEPS):
                ids = sampler.choose(slots.step(ids, active=everyone))
            wait(device)
            seconds = time.perf_counter() - began
    return 1e3 * seconds / STEPS, slots.graph_failure


def transformers_milliseconds(base: Any, prompts: list[list[int]]) -> float:
    from transformers import GenerationConfig

    device = next(base.parameters()).device
    base.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    ids = torch.tensor(prompts, device=device)
    seconds = []
    for tokens in (4, 1, 1 + STEPS):
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, use_cache=True)  # type: ignore[no-untyped-call]
        wait(device)
        began = time.perf_counter()
        with torch.inference_mode():
            base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 1e3 * (seconds[2] - seconds[1]) / STEPS


def answers_per_second(model: nn.Module, prompts: list[list[int]], adapters: list[str | None]) -> tuple[float, dict[str, str]]:  # fmt: skip
    """New tokens a second of whole answers, the second time they are asked; and the engine's notes."""
    engine = Engine(model, stop_token_ids=[], pad_token_id=0, context_tokens=None)
    requests = [Request(prompt, adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]
    sampling = Sampling(max_new_tokens=STEPS)
    engine.generate(requests[:2], sampling=sampling)
    began = time.perf_counter()
    answers = engine.generate(requests, sampling=sampling)
    return sum(len(answer.ids) for answer in answers) / (time.perf_counter() - began), engine.notes


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.tiny:
        base, vocabulary = tiny_base(), 512
    else:
        from bases import VOCABULARY, make_base  # type: ignore[import-not-found, unused-ignore]  # beside this file

        base, vocabulary = make_base(arguments.shape, arguments.storage, double_quantization=True), VOCABULARY
    device = next(base.parameters()).device
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (arguments.rows, arguments.prompt), generator=draw).tolist()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = {
        "shape": "tiny" if arguments.tiny else arguments.shape, "storage": arguments.storage, "rows": arguments.rows,
        "prompt_tokens": arguments.prompt, "steps": STEPS,
    }  # fmt: skip
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} cpu, {torch.get_num_threads()} threads",
        "torch": version("torch"), "transformers": version("transformers"), "peft": version("peft"),
        "commit": arguments.commit or commit.stdout.strip(), "command": " ".join(["bench/generation.py", *sys.argv[1:]]),
    }  # fmt: skip
    found: list[dict[str, Any]] = []

    def add(engine: str, adapters: int | str, milliseconds: float, **more: Any) -> None:
        row = common | {"engine": engine, "adapters": adapters, "step_ms": round(milliseconds, 3)}
        row["step_tokens_per_second"] = round(1e3 * arguments.rows / milliseconds)
        found.append(row | {"generate_tokens_per_second": None, "notes": ""} | more | about)
        print({key: found[-1][key] for key in ("engine", "adapters", "step_ms", "generate_tokens_per_second", "notes")}, flush=True)  # fmt: skip

    add("transformers", 0, transformers_milliseconds(base, prompts))
    for count in sorted(arguments.adapters):
        # PEFT wraps the base's layers in place; what an earlier count added is taken off again.
        model = with_adapters(base, count)
        adapters = adapters_of(arguments.rows, count)
        milliseconds, failure = step_milliseconds(model, prompts, adapters)
        rate, notes = answers_per_second(model, prompts, adapters)
        notes = notes | ({"cuda_graph": failure} if failure else {})
        add("onlay", count, milliseconds, generate_tokens_per_second=round(rate), notes=json.dumps(notes) if notes else "")  # fmt: skip
        base = model.unload() if count else base
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["1b", "8b"], default="8b")
    parser.add_argument("--storage", choices=["bf16", "nf4", "int8"], default="bf16")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=[0, 1, 8], help="how many are mixed, each a row of the table"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny base on a CPU, to try the script")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.storage = "fp32"
    rows = measure(arguments)
    if arguments.out:
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
