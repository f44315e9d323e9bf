"""Qwen3-MoE: many small experts, and norms on queries and keys (arXiv:2505.09388).

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
MODEL_TYPES = ("qwen3_moe",)
# Hugging Face: see llama.py; a leading layer and a leading expert are places in our arrays.
_EXPERT = moe.LAYER + "mlp.experts.{expert}."
NAMES: dict[str, tuple[str, str]] = moe.NAMES | {
    "block.attention.q_norm.scale": ("c->c", moe.LAYER + "self_attn.q_norm.weight"),
    "block.attention.k_norm.scale": ("c->c", moe.LAYER + "self_attn.k_norm.weight"),
    "block.moe.router": ("de->ed", moe.LAYER + "mlp.gate.weight"),
    "block.moe.gate": ("df->fd", _EXPERT + "gate_proj.weight"),
    "block.moe.down": ("fd->df", _EXPERT + "down_proj.weight"),
    "block.moe.up": ("df->fd", _EXPERT + "up_proj.weight"),
}


_DEFAULTS = moe.DEFAULTS | dict(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4,
    vocab_size=151936, rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8,
    moe_intermediate_size=768, norm_topk_prob=False, decoder_sparse_step=1, attention_bias=False,
    use_sliding_window=False, max_position_embeddings=32768,
)  # fmt: skip


def from_hugging_face(hf: dict) -> dict[str, Any]:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    hf = moe.both_counts(hf, "num_experts")
    width = {"head_dim": 0} if "head_dim" in hf else {}  # transformers refuses null, unlike absence
    found = config_json.read(hf, _DEFAULTS | width, {} if width else {"head_dim": int})
    for key, works in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (hf.get(key) or works) != works:
            raise cfg.UserError(
                f"{key}={hf[key]} is not supported; {works} is: all layers have experts"
            )
    for key in ("attention_bias", "use_sliding_window"):
        if found[key]:
            raise cfg.UserError(f"{key}={found[key]} is not supported; false is")
    return moe.from_hugging_face(hf, found, 10000.0) | {
        "family": "qwen3_moe",
        "qk_norm": True,
        "num_experts": found["num_experts"],
        "mlp_dim": found["intermediate_size"],
        "expert_mlp_dim": found["moe_intermediate_size"],
        "normalize_gates": found["norm_topk_prob"],
    }


def to_hugging_face(config: Config, max_positions: int = 2048) -> dict[str, Any]:
    """The config.json that transformers 4 and 5 read; `max_positions` is what it promises."""
    c = config
    moe.refuse_export(c, "Qwen3-MoE", {"qk_norm": True, "sliding_window": 0})
    return moe.to_hugging_face(c, max_positions) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": c.mlp_dim or c.expert_mlp_dim,
        "moe_intermediate_size": c.expert_mlp_dim,
        "num_experts": c.num_experts,
        "norm_topk_prob": c.normalize_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
    }
