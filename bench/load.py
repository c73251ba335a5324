"""Seconds from a folder on disk to a base that computes, and the memory that it took on the way.

    python bench/load.py FOLDER [--storage bf16|nf4|int8] [--make-8b] [--cold]

Prints one JSON line: seconds of imports, of loading and of the first forward pass (512 tokens), gigabytes a second, the
host's peak of resident memory beside what the imports took, the device's peak and what remains allocated.
`--make-8b` first writes a base of 8 billion random bf16 weights (16 GB, Llama's shapes) into FOLDER; `--cold` asks the system
to forget the files before they are read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--storage", choices=["auto", "bf16", "nf4", "int8"], default="nf4")
    parser.add_argument("--make-8b", action="store_true", help="write a random base of 8 billion weights first")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    chosen = parser.parse_args()
    if chosen.make_8b and not (chosen.folder / "config.json").is_file():
        make_base(chosen.folder)
    if chosen.cold:
        forget(chosen.folder)
    print(json.dumps(measure(chosen.folder, chosen.storage)))


def measure(folder: Path, storage: str) -> dict[str, object]:
    began = time.perf_counter()
    import torch
    import transformers.models.llama.modeling_llama

    from onlay.hardware import find_hardware
    from onlay.kernels.nf4 import bitsandbytes_kernels
    from onlay.model import hf_quantizer, stream  # noqa: F401
    from onlay.model.facts import read_facts
    from onlay.model.load import load_base
    from onlay.recipe import ModelSection

    if storage == "nf4":
        bitsandbytes_kernels()
    hardware = find_hardware()
    device = torch.device("cuda:0" if hardware.has_cuda else "cpu")
    torch.zeros(1, device=device)
    imported = time.perf_counter()
    section = ModelSection.model_validate({"base": str(folder), "storage": storage})
    facts = read_facts(section)
    before, looked = peak_host_bytes(), time.perf_counter()
    base = load_base(facts, section, hardware)
    wait(device)
    loaded, host = time.perf_counter(), peak_host_bytes() - before
    ids = torch.arange(TOKENS, device=device)[None] % facts.vocabulary_size
    with torch.inference_mode():
        base.model(input_ids=ids)
    wait(device)
    first = time.perf_counter()
    on_device = {
        "device_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "device_gb": torch.cuda.memory_allocated() / 1e9,
    } if hardware.has_cuda else {}  # fmt: skip
    return {
        "storage": base.storage, "import_seconds": round(imported - began, 2), "facts_seconds": round(looked - imported, 2),
        "load_seconds": round(loaded - looked, 2), "first_forward_seconds": round(first - loaded, 2),
        "read_gb": facts.weight_bytes / 1e9, "gb_per_second": round(facts.weight_bytes / 1e9 / (loaded - looked), 2),
        "host_peak_gb": host / 1e9, **on_device, "cpu_cores": hardware.cpu_cores,
        "hardware": hardware.devices[0].name if hardware.devices else platform.processor() or platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__, "notes": base.notes,
    }  # fmt: skip


def wait(device: object) -> None:
    import torch

    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def peak_host_bytes() -> int:
    """Most resident memory so far; pages of mapped files count, the system's own cache of files does not."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_base(folder: Path) -> None:
    """Llama 3's shapes with random bf16 weights, four shards, written layer by layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names = sorted(shapes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    for number in range(4):
        shard = f"model-{number + 1:05}-of-00004.safetensors"
        part = names[number::4]
        tensors = {
            name: torch.randn(shapes[name], device=device, dtype=torch.bfloat16).mul_(0.02).cpu() for name in part
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


if __name__ == "__main__":
    main()
