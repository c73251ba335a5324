"""Random bases of Llama's shapes: made in memory layer by layer, or written as a checkpoint.

Speed and memory do not depend on the weights' values.  torch is imported by the functions: a peer's library may have to come first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES = {  # layers, hidden, intermediate, query heads, key heads
    "tiny": (2, 64, 128, 4, 2),
    "1b": (16, 2048, 8192, 32, 8),
    "8b": (32, 4096, 14336, 32, 8),
    "70b": (80, 8192, 28672, 64, 8),
}
VOCABULARY = 128256
TINY_VOCABULARY = 512


def wanted_layers(shape: str) -> dict[str, int]:
    """The config of a Llama of this shape, by transformers' names."""
    layers, hidden, intermediate, heads, key_heads = SHAPES[shape]
    return {
        "vocab_size": TINY_VOCABULARY if shape == "tiny" else VOCABULARY, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "max_position_embeddings": 131072,
    }  # fmt: skip


def make_base(
    shape: str, storage: str, *, double_quantization: bool = True, fp8_products: bool = False, device: str = "cuda"
) -> Any:
    """A Llama with random frozen weights; linear layers are quantized as soon as they are drawn, so it is never whole in 16
    bit.  bf16 on a GPU, fp32 on a CPU."""
    import torch
    from torch import nn
    from transformers import LlamaForCausalLM

    from onlay.model.quantize import QuantizedLinear

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = _llama_config(shape)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(parameter.shape, dtype=dtype, device=device)
            weight = drawn.normal_(0.0, 0.02) if drawn.ndim == 2 else drawn.fill_(1.0)
            setattr(module, key, nn.Parameter(weight, requires_grad=False))
            if storage != "bf16" and isinstance(module, nn.Linear) and module is not head:
                packed = QuantizedLinear.from_linear(
                    module, storage=storage, double_quantization=double_quantization, fp8_products=fp8_products
                )
                model.set_submodule(name, packed)
                del module.weight  # the list of modules still holds the layer
    for module in model.modules():  # rotary frequencies are computed, not drawn
        if type(module).__name__ == "LlamaRotaryEmbedding":
            with torch.device(device):
                module.__init__(config=config)  # type: ignore[misc]
    model.requires_grad_(False)
    return model.eval()


def _llama_config(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **wanted_layers(shape), rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False, use_cache=False,
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip


def write_base(folder: Path, shape: str, *, device: str) -> None:
    """A random checkpoint of this shape in bf16 with a byte-level tokenizer, for systems that load from a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(_llama_config(shape))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|pad|>": 258}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    fast.save_pretrained(folder)
