"""Mixtral: Llama's block with experts in place of its MLP (arXiv:2401.04088).

Shapes: as in moe.py; H query heads, K kv heads, C head_dim in the name map.
"""

from __future__ import annotations

from typing import Any

from jaxlm import config as cfg
from jaxlm.models import config_json, moe
from jaxlm.models.moe import (
    IGNORED,
    PREFIX,
    Block,
    Config,
    Norm,
    check,
    encode_positions,
    groups,
    update_fixed,
)

__all__ = ["IGNORED", "PREFIX", "Block", "Config", "Norm"]
__all__ += ["check", "encode_positions", "groups", "update_fixed"]
MODEL_TYPES = ("mixtral",)
# Hugging Face: see llama.py; a leading layer and a leading expert are places in our arrays.
_EXPERT = moe.LAYER + "block_sparse_moe.experts.{expert}."
NAMES: dict[str, tuple[str, str]] = moe.NAMES | {
    "block.moe.router": ("de->ed", moe.LAYER + "block_sparse_moe.gate.weight"),
    "block.moe.gate": ("df->fd", _EXPERT + "w1.weight"),
    "block.moe.down": ("fd->df", _EXPERT + "w2.weight"),
    "block.moe.up": ("df->fd", _EXPERT + "w3.weight"),
}


_DEFAULTS = moe.DEFAULTS | dict(
    hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=32000,
    rms_norm_eps=1e-5, num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.0,
    max_position_embeddings=131072,
)  # fmt: skip


def from_hugging_face(hf: dict) -> dict[str, Any]:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    hf = moe.both_counts(hf, "num_local_experts")
    found = config_json.read(hf, _DEFAULTS, {"head_dim": int, "sliding_window": int})
    if noise := found["router_jitter_noise"]:
        raise cfg.UserError(f"router_jitter_noise={noise} is not supported; 0 is")
    return moe.from_hugging_face(hf, found, 1e6) | {
        "family": "mixtral",
        "num_experts": found["num_local_experts"],
        "expert_mlp_dim": found["intermediate_size"],
        "sliding_window": found["sliding_window"] or 0,
    }


def to_hugging_face(config: Config, max_positions: int = 2048) -> dict[str, Any]:
    """The config.json that transformers 4 and 5 read; `max_positions` is what it promises."""
    c = config
    moe.refuse_export(c, "Mixtral", {"qk_norm": False, "normalize_gates": True})
    return moe.to_hugging_face(c, max_positions) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": c.expert_mlp_dim,
        "num_local_experts": c.num_experts,
        "router_jitter_noise": 0.0,
        "sliding_window": c.sliding_window or None,
    }
