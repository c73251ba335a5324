"""What the presets of adapter.targets mean by the names of modules: one rule for training and for planning, without torch."""

from __future__ import annotations

import re

ATTENTION_PARENT = re.compile(
    r"(^|[._])(attn|attention|self_attn|self_attention|mixer|temporal_block|mamba)([._]|$)|attention", re.I
)
QUERY_VALUE = re.compile(r"^(q_proj|v_proj|query|value|wq|wv|q_lin|v_lin|q|v)$", re.I)
FUSED_QKV = re.compile(r"^(query_key_value|qkv_proj|qkv|c_attn|wqkv|attn_qkv)$", re.I)


def is_wanted(name: str, wanted: str | list[str]) -> bool:
    """Whether a preset or a list of names means the linear layer of this full name."""
    if isinstance(wanted, list):
        return any(name == entry or name.endswith("." + entry) for entry in wanted)
    parent, _, leaf = name.rpartition(".")
    in_attention = bool(ATTENTION_PARENT.search(parent))
    if wanted == "qv":
        return in_attention and bool(QUERY_VALUE.match(leaf) or FUSED_QKV.match(leaf))
    return wanted == "all-linear" or in_attention == (wanted == "attention")
