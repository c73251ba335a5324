"""Which inference servers take an adapter, with what flag: told by its config and headers, before anything is loaded.

The rules are what the servers' own loaders do with what they find, read in their sources in 2026; servers change, and
each rule names where it was read.  A server that would load an adapter and answer with other numbers than were trained
counts as not accepting it.  Whether a server knows the base's architecture is not looked at.

    vLLM       vllm/lora/peft_helper.py (DoRA, bias, modules_to_save, scale from one r and lora_alpha),
               vllm/config/lora.py (values of --max-lora-rank), vllm/lora/utils.py (names of tensors),
               pull request 41384 (adapters on fused experts dropped without a word)
    SGLang     python/sglang/srt/lora/lora_config.py, lora.py, utils.py (target modules), docs/advanced_features/lora,
               issue 40835 (use_rslora is not read)
    LoRAX,     server/lorax_server/adapters/lora.py and utils/sgmv.py; TGI has the same code.  The rank is padded to 8 or
    TGI        a multiple of 16, and the padded rank then stands in the config from which later modules take their scale
    llama.cpp  convert_lora_to_gguf.py (names of tensors, lora_alpha written as it is), src/llama-adapter.h (scale alpha / rank)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onlay.model.compatibility import read_adapter
from onlay.records import ModelFacts
from onlay.release.weights import read_header

Verdict = Literal["accepted", "accepted with flags", "not accepted"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
SGLANG_MODULES = {
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "out_proj",
    "in_proj",
    "in_proj_qkv",
    "in_proj_q",
    "in_proj_k",
    "in_proj_v",
    "in_proj_z",
    "in_proj_qkvz",
    "embed_tokens",
    "lm_head",
    "q_a_proj",
    "kv_a_proj_with_mqa",
    "q_b_proj",
    "kv_b_proj",
}
"""The last parts of module names that its LoRA layers know."""
PADDED_RANK, FAST_RANK = 16, 128
"""LoRAX and TGI: ranks above 8 are padded to a multiple; above 128 there is no kernel for the whole batch."""
MERGE = "onlay merge RUN OUT, and serve OUT"
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What one server will do."""

    server: str
    verdict: Verdict
    flags: str
    """To start it with; empty where the verdict is no."""
    reasons: list[str]
    """Why not, or what to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What an adapter has that a server may not take."""

    folder: Path
    ranks: tuple[int, ...]
    """Of all its modules, from the shapes of A, ascending, each once."""
    rslora: bool
    dora: bool
    bias: bool
    """Trained biases, by the config or by tensors."""
    whole_modules: tuple[str, ...]
    """modules_to_save: trained without an adapter, stored whole."""
    head: bool
    """An adapter on lm_head."""
    embedding: bool
    experts: bool
    """On the weights of fused experts, which have three dimensions."""
    alpha_pattern: bool
    regex_targets: bool
    transposed: bool
    """On GPT-2's Conv1D."""
    leaves: tuple[str, ...]
    """Last parts of the adapted modules' names."""
    partial: tuple[str, ...]
    """Of these, those that are adapted in some layers only."""
    storage: str
    """How the base was kept in training."""
    loftq: bool

    @property
    def rank(self) -> int:
        return self.ranks[-1]


def read_features(folder: Path, *, facts: ModelFacts | None = None) -> Features:
    """From a PEFT adapter's JSON files and its header.  Raises OutputError for a folder that holds none."""
    adapter = read_adapter(folder)
    config, notes = adapter.config, adapter.notes or {}
    tensors = read_header(folder / "adapter_model.safetensors")
    a_names = [tensor for tensor in tensors if tensor.name.endswith(".lora_A.weight")]
    modules = [tensor.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for tensor in a_names]
    others = [tensor.name for tensor in tensors if ".lora_" not in tensor.name]
    leaves = sorted({module.removesuffix(".base_layer").rpartition(".")[2] for module in modules})
    whole = tuple(config.get("modules_to_save") or ()) or tuple(
        name.removeprefix("base_model.model.") for name in others if not name.endswith(".bias")
    )
    return Features(
        folder=folder,
        ranks=tuple(sorted({tensor.shape[0] for tensor in a_names})) or (int(config.get("r") or 0),),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")) or any("lora_magnitude_vector" in name for name in adapter.tensors),
        bias=config.get("bias", "none") != "none" or any(name.endswith(".bias") for name in adapter.tensors),
        whole_modules=whole,
        head="lm_head" in leaves,
        embedding=any("lora_embedding_" in name for name in adapter.tensors),
        experts=bool(config.get("target_parameters")) or adapter.num_experts_modules > 0,
        alpha_pattern=bool(config.get("alpha_pattern")),
        regex_targets=isinstance(config.get("target_modules"), str),
        transposed=bool(config.get("fan_in_fan_out")),
        leaves=tuple(leaves),
        partial=_partial(modules, facts),
        storage=str(notes.get("storage") or "bf16"),
        loftq=notes.get("method") == "loftq",
    )


def _partial(modules: list[str], facts: ModelFacts | None) -> tuple[str, ...]:
    layers: dict[str, set[int]] = {}
    for module in modules:
        if match := _LAYER.search(module):
            layers.setdefault(module.rpartition(".")[2], set()).add(int(match[1]))
    every = facts.num_layers if facts is not None else len(set().union(*layers.values())) if layers else 0
    return tuple(sorted(leaf for leaf, found in layers.items() if len(found) < every))


def judge(features: Features, *, base: str, name: str = "NAME") -> list[Verdicts]:
    """One verdict a server; `base` is what it is started with, `name` what the adapter is called there."""
    return [server(features, base, name) for server in (_vllm, _sglang, _lorax, _tgi, _llama_cpp)]


@dataclass(slots=True)
class _Findings:
    """Collected on the way to a verdict."""

    server: str
    refused: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def refuse(self, found: Any, why: str) -> None:
        if found:
            self.refused.append(why)

    def tell(self, found: Any, what: str) -> None:
        if found:
            self.known.append(what)

    def verdict(self, flags: str, *, needed: bool) -> Verdicts:
        """`needed`: without the flags the adapter would be refused, beyond those that any adapter takes."""
        if self.refused:
            return Verdicts(
                server=self.server, verdict="not accepted", flags="", reasons=[*self.refused, f"instead: {MERGE}"]
            )
        kind: Verdict = "accepted with flags" if needed else "accepted"
        return Verdicts(server=self.server, verdict=kind, flags=flags, reasons=self.known)


def _vllm(f: Features, base: str, name: str) -> Verdicts:
    found = _Findings("vLLM")
    found.refuse(f.dora, "it does not support DoRA")
    found.refuse(f.bias, "it does not support trained biases")
    found.refuse(f.whole_modules, f"it takes no modules_to_save ({', '.join(f.whole_modules[:3])})")
    found.refuse(f.experts, "adapters on fused experts have been dropped without a word, leaving the base's answers")
    found.refuse(len(f.ranks) > 1, f"modules have ranks {_words(f.ranks)}, and it scales all by one r")
    found.refuse(f.alpha_pattern, "it does not read alpha_pattern and scales all modules by one lora_alpha")
    wanted = next((rank for rank in VLLM_RANKS if rank >= f.rank), None)
    found.refuse(wanted is None, f"rank {f.rank} is above {VLLM_RANKS[-1]}, its largest --max-lora-rank")
    found.tell(f.head or f.embedding, "lm_head and embeddings only where the architecture declares them for LoRA")
    quantized = _tell_storage(found, f, with_nf4="--quantization bitsandbytes")
    rank = f" --max-lora-rank {wanted}" if wanted is not None and wanted > VLLM_DEFAULT_RANK else ""
    flags = f"vllm serve {base} --enable-lora --lora-modules {name}={f.folder}{rank}{quantized}"
    return found.verdict(flags, needed=bool(rank or quantized))


def _sglang(f: Features, base: str, name: str) -> Verdicts:
    found = _Findings("SGLang")
    found.refuse(f.dora, "it does not apply DoRA's magnitudes")
    found.refuse(f.bias, "it does not apply trained biases")
    found.refuse(f.whole_modules, f"it does not apply modules_to_save ({', '.join(f.whole_modules[:3])})")
    found.refuse(f.experts, "its loader expects one tensor an expert, not PEFT's fused ones")
    found.refuse(len(f.ranks) > 1, f"modules have ranks {_words(f.ranks)}, and it scales all by one r")
    found.refuse(f.alpha_pattern, "it scales all modules by one lora_alpha")
    found.refuse(f.rslora, "it does not read use_rslora and scales by alpha / r, which is too little")
    found.refuse(f.regex_targets, "target_modules is a pattern, and it takes a list of names")
    unknown = sorted(set(f.leaves) - SGLANG_MODULES)
    found.refuse(unknown, f"its LoRA layers do not know {', '.join(unknown)}")
    _tell_storage(found, f)
    flags = f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={f.folder}"
    # What is loaded later must fit what the server was started with.
    found.tell(True, f"to load it later: --max-lora-rank {f.rank} --lora-target-modules {' '.join(f.leaves)}")
    return found.verdict(flags, needed=False)


def _lorax(f: Features, base: str, name: str) -> Verdicts:
    found = _Findings("LoRAX")
    _punica(found, f)
    found.tell(True, f"requests name it: adapter_id {f.folder}, adapter_source local")
    return found.verdict(f"lorax-launcher --model-id {base} --adapter-source local", needed=False)


def _tgi(f: Features, base: str, name: str) -> Verdicts:
    found = _Findings("TGI")
    _punica(found, f)
    found.tell(True, "adapters are named at the start only; it is in maintenance mode since December 2025")
    return found.verdict(f"LORA_ADAPTERS={name}={f.folder} text-generation-launcher --model-id {base}", needed=True)


def _punica(found: _Findings, f: Features) -> None:
    """LoRAX and TGI load adapters with the same code."""
    found.refuse(f.dora, "it ignores DoRA's magnitudes")
    found.refuse(f.bias, "it ignores trained biases")
    found.refuse(f.whole_modules, f"it ignores modules_to_save ({', '.join(f.whole_modules[:3])})")
    found.refuse(f.embedding, "it ignores adapters on embeddings")
    found.refuse(f.experts, "it ignores adapters on fused experts")
    found.refuse(len(f.ranks) > 1, f"modules have ranks {_words(f.ranks)}, and it stacks them in one tensor")
    found.refuse(f.alpha_pattern, "it scales all modules by one lora_alpha")
    found.refuse(f.partial, f"{', '.join(f.partial)} is adapted in some layers only, and such modules are left out")
    padded = f.rank != 8 and f.rank % PADDED_RANK != 0
    found.refuse(
        padded, f"rank {f.rank} is padded, and later modules are scaled by the padded rank: use 8 or a multiple of 16"
    )
    found.tell(f.rank > FAST_RANK, f"above rank {FAST_RANK} adapters are computed one by one: slow")
    found.tell(not padded, "over n GPUs only where the rank is 8 n or a larger multiple of 16")
    _tell_storage(found, f)


def _llama_cpp(f: Features, base: str, name: str) -> Verdicts:
    found = _Findings("llama.cpp")
    found.refuse(f.dora, "its converter stops at DoRA's magnitudes")
    found.refuse(f.bias, "its converter stops at trained biases")
    found.refuse(f.whole_modules, f"its converter stops at modules_to_save ({', '.join(f.whole_modules[:3])})")
    found.refuse(f.experts, "its converter finds no place for PEFT's fused experts")
    found.refuse(f.rslora, "its converter does not read use_rslora, and the scale is alpha / rank, which is too little")
    found.refuse(f.alpha_pattern, "its converter writes one alpha for all modules")
    found.refuse(f.transposed, "its converter transposes GPT-2's layers and not their adapters")
    found.tell(f.head, "lm_head only where it is not tied to the embeddings")
    _tell_storage(found, f)
    flags = (
        f"python convert_lora_to_gguf.py {f.folder} --base BASE_FOLDER --outfile {name}.gguf; "
        f"llama-server -m BASE.gguf --lora {name}.gguf"
    )
    found.tell(True, "both are converted to GGUF first")
    return found.verdict(flags, needed=True)


def _tell_storage(found: _Findings, f: Features, *, with_nf4: str | None = None) -> str:
    """A base that was quantized in training is another one in 16 bits; the flag that quantizes it, where there is one."""
    if f.storage == "bf16":
        return ""
    if f.storage == "nf4" and with_nf4 is not None:
        found.tell(True, "trained on the base in nf4: with this flag it is served on much the same")
        return f" {with_nf4}"
    found.refuse(f.loftq, f"loftq makes up for what {f.storage} rounds away, and it serves the base unrounded")
    found.tell(True, f"trained on the base in {f.storage}: on its 16-bit weights answers may differ; evaluate it there")
    return ""


def _words(ranks: tuple[int, ...]) -> str:
    return f"{ranks[0]} to {ranks[-1]}"
