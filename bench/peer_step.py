"""One configuration of a peer's training step, timed in a process of its own; bench/throughput.py starts it.

    python bench/peer_step.py '{"system": "unsloth", "model": "FOLDER", "storage": "nf4", "recompute": "none"}'

trl       TRL's SFTTrainer on PEFT, as its documents set it up.
trl+liger the same with Liger's kernels (`use_liger_kernel`).
axolotl   the same with Liger's kernels and axolotl's LoRA kernels on q/k/v, o and the MLP: its kernels, not its command line.
unsloth   FastLanguageModel with TRL's SFTTrainer, as Unsloth patches it.

All get the same rows in the same order as onlay (`bench/step.py`); packed rows are filled by the peer's own packer.  A step's
seconds run from the trainer's on_step_begin to its on_step_end, with the GPU waited for at both ends; fetching rows lies
outside.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import MARK, Case, allocated_gib, device_facts, limit_memory, tokens_of_rows, versions

SYSTEMS = ("trl", "trl+liger", "axolotl", "unsloth")
TARGETS = {
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qv": ["q_proj", "v_proj"],
}
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def load_unsloth(case: Case) -> tuple[Any, Any, None]:
    from unsloth import FastLanguageModel

    import torch  # isort: skip

    limit_memory(case.limit_gib)
    model, tokenizer = FastLanguageModel.from_pretrained(
        case.model, max_seq_length=longest(case), load_in_4bit=case.storage == "nf4", dtype=torch.bfloat16, local_files_only=True
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, bias="none", target_modules=TARGETS[case.targets],
        use_gradient_checkpointing={"none": False, "all": True, "offload": "unsloth"}[case.recompute],
    )  # fmt: skip
    return model, tokenizer, None


def load_plain(case: Case) -> tuple[Any, Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    limit_memory(case.limit_gib)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        case.model, quantization_config=nf4 if case.storage == "nf4" else None, dtype=torch.bfloat16, device_map={"": 0},
        attn_implementation="sdpa",
    )  # fmt: skip
    adapter = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=TARGETS[case.targets],
    )  # fmt: skip
    return model, AutoTokenizer.from_pretrained(case.model), adapter


def use_axolotl_kernels(model: Any) -> None:
    """axolotl's fused LoRA functions on every layer of a PEFT model; they want an adapter on each linear layer."""
    from types import MethodType

    from axolotl.kernels.lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv
    from transformers.models.llama import modeling_llama as llama

    def attention(
        self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        shape = hidden_states.shape[:-1]
        query, key, value = (
            x.view(*shape, -1, self.head_dim).transpose(1, 2) for x in apply_lora_qkv(self, hidden_states)
        )
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        kwargs.pop("past_key_values", None)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return apply_lora_o(self, out.reshape(*shape, -1).contiguous()), weights

    for layer in model.get_base_model().model.layers:
        layer.self_attn.forward = MethodType(attention, layer.self_attn)
        layer.mlp.forward = MethodType(apply_lora_mlp_swiglu, layer.mlp)


def longest(case: Case) -> int:
    return case.tokens or case.pack_tokens or 2048


def rows_in_one_pass(case: Case) -> int:
    if case.micro_tokens is None or case.tokens is None:
        return case.rows
    return case.micro_tokens // case.tokens


def dataset_of(case: Case) -> Any:
    from datasets import Dataset

    rows = tokens_of_rows(case)
    columns = {"input_ids": rows}
    if case.system == "unsloth" and case.pack_tokens is None:
        columns |= {"labels": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return Dataset.from_dict(columns)


def real_tokens(sample: Any) -> int:
    """Of one micro-batch: padding is left out; rows that are laid end to end come without a mask and have none."""
    mask = sample.get("attention_mask")
    return sample["input_ids"].numel() if mask is None else int(mask.sum())


def measure(case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    model, tokenizer, adapter = load_unsloth(case) if case.system == "unsloth" else load_plain(case)
    loaded, base_gib = time.perf_counter() - began, allocated_gib()
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    begins: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            begins.append(time.time())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.time())

    micro = rows_in_one_pass(case)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="peer-step-"), max_length=longest(case), packing=case.pack_tokens is not None,
        per_device_train_batch_size=micro, gradient_accumulation_steps=case.rows // micro, max_steps=case.all_steps,
        bf16=True, gradient_checkpointing=case.recompute != "none", optim=OPTIMIZERS[case.optimizer], learning_rate=2e-4,
        report_to="none", logging_steps=1, save_strategy="no", use_liger_kernel=case.system in ("trl+liger", "axolotl"),
        train_sampling_strategy="sequential", dataset_num_proc=None, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=dataset_of(case), processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()]
    )  # fmt: skip
    if case.system == "axolotl":
        use_axolotl_kernels(trainer.model)
    tokens: list[int] = []
    fetch = trainer.get_batch_samples

    def counting(*args: Any, **kwargs: Any) -> Any:
        """All micro-batches of one optimizer step, before it begins."""
        samples, items = fetch(*args, **kwargs)
        tokens.append(sum(real_tokens(sample) for sample in samples))
        return samples, items

    trainer.get_batch_samples = counting
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {
        "step_seconds": [end - begin for begin, end in zip(begins, ends, strict=True)], "step_tokens": tokens[: len(ends)],
        "losses": [float(log["loss"]) for log in trainer.state.log_history if "loss" in log], "load_seconds": loaded,
        "first_step_at": ends[0], "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "base_gib": base_gib,
        "notes": {"attention": model.config._attn_implementation},
        "versions": versions("trl", "unsloth", "liger-kernel", "axolotl"),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad), **device_facts(),
    }  # fmt: skip


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    case = Case(**json.loads(sys.argv[1]))
    if case.system not in SYSTEMS:
        sys.exit(f"ValueError: system = {case.system} is not one of {', '.join(SYSTEMS)}")
    if case.model is None or not (Path(case.model) / "config.json").is_file():
        sys.exit(
            f"ValueError: model = {case.model}: peers load a checkpoint from a folder (--model FOLDER --make-model)"
        )
    print(MARK + json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
