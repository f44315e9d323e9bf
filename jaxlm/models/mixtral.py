"""Mixtral: Llama's block with experts in place of its MLP (arXiv:2401.04088).

Shapes: as in moe.py; H query heads, K kv heads, C head_dim in the name map.
"""

from __future__ import annotations

from typing import Any

from jaxlm import config as cfg
from jaxlm.models import moe
from jaxlm.models.moe import (
    IGNORED,
    PREFIX,
    Block,
    Config,
    Norm,
    encode_positions,
    groups,
    learned_positions,
    update_fixed,
)

__all__ = ["IGNORED", "PREFIX", "Block", "Config", "Norm"]
__all__ += ["encode_positions", "groups", "learned_positions", "update_fixed"]
# Hugging Face: see llama.py; a leading layer and a leading expert are places in our arrays.
_EXPERT = moe.LAYER + "block_sparse_moe.experts.{expert}."
NAMES: dict[str, tuple[str, str]] = moe.NAMES | {
    "groups.0.0.moe.router": ("de->ed", moe.LAYER + "block_sparse_moe.gate.weight"),
    "groups.0.0.moe.gate": ("df->fd", _EXPERT + "w1.weight"),
    "groups.0.0.moe.down": ("fd->df", _EXPERT + "w2.weight"),
    "groups.0.0.moe.up": ("df->fd", _EXPERT + "w3.weight"),
}


def from_hugging_face(hf: dict) -> dict[str, Any]:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    if hf.get("router_jitter_noise"):
        noise = hf["router_jitter_noise"]
        raise cfg.UserError(f"router_jitter_noise={noise} is not supported; 0 is")
    return moe.from_hugging_face(hf) | {
        "family": "mixtral",
        "num_experts": hf["num_local_experts"],
        "expert_mlp_dim": hf["intermediate_size"],
        "sliding_window": hf.get("sliding_window") or 0,
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
