"""Qwen 3 and 2, dense (arXiv:2505.09388, 2407.10671): Llama with other attention projections.

Qwen 3 normalises queries and keys, Qwen 2 adds biases to queries, keys and values.

Shapes: B batch, S sequence, D embed, H query heads, K kv heads, C head_dim, F mlp.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxlm import config as cfg
from jaxlm.models import config_json, llama
from jaxlm.models.layers import GatedMLP, RMSNorm, SelfAttention, check_rotary, rotary_positions
from jaxlm.sharding import Layout

Norm = RMSNorm


@cfg.section
class Config(cfg.Model):
    """The keys of `model:` when model.family is qwen."""

    qk_norm: bool = cfg.key(
        True, "RMSNorm on queries and keys, per head (Qwen 3)",
        changes="recompiles checkpoint numbers",
    )  # fmt: skip
    qkv_biases: bool = cfg.key(
        False, "biases of queries, keys and values (Qwen 2)",
        changes="recompiles checkpoint numbers",
    )  # fmt: skip
    rope_theta: float = cfg.key(1e6, "base of the rotary wavelengths", changes="recompiles numbers")


def check(config: cfg.Config) -> None:
    """Raise UserError for a config that Qwen cannot be."""
    check_rotary(config.model, "rope_theta")


def groups(config: Config) -> list[tuple[tuple[type, ...], int]]:
    """Layers as (pattern of blocks, repeats)."""
    return [((Block,), config.num_layers)]


def encode_positions(config: Config, positions_BS: jax.Array):
    """What every block needs to know of the positions: cosines and sines."""
    return rotary_positions(positions_BS, config.head_dim, config.rope_theta)


class Block(nnx.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    cache = staticmethod(SelfAttention.cache)

    @staticmethod
    def window(config: Config) -> int:
        """Tokens that a query of this block sees, itself included; 0: all before it."""
        return config.sliding_window

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 7)
        self.attention_norm = RMSNorm(c, layout)
        self.attention = SelfAttention(
            c, layout, keys[:4], window=self.window(c), softcap=c.attention_softcap,
            norm=RMSNorm if c.qk_norm else None, biases=c.qkv_biases,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(c, layout)
        self.mlp = GatedMLP(c, layout, keys[4:], c.mlp_dim)

    def __call__(self, x_BSD, table, segments_BS, layout: Layout, cache=None):
        """One layer: (residual stream, cache, aux)."""
        h_BSD = self.attention_norm(x_BSD, layout)
        y_BSD, cache = self.attention(h_BSD, table, segments_BS, layout, cache)
        x_BSD += y_BSD
        return x_BSD + self.mlp(self.mlp_norm(x_BSD, layout), layout), cache, {}


# Hugging Face (see jaxlm/interop/name_map.py). Letters: the legend above.
MODEL_TYPES = ("qwen2", "qwen3")
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
_LAYER = "model.layers.{layer}."
_MLP = {"block.gate", "block.up", "block.down"}  # of Llama, which has them in its block
NAMES: dict[str, tuple[str, str]] = {
    **{name: place for name, place in llama.NAMES.items() if name not in _MLP},
    **{name.replace("block.", "block.mlp."): llama.NAMES[name] for name in _MLP},
    "block.attention.q_norm.scale": ("c->c", _LAYER + "self_attn.q_norm.weight"),
    "block.attention.k_norm.scale": ("c->c", _LAYER + "self_attn.k_norm.weight"),
    "block.attention.q_bias": ("hc->(hc)", _LAYER + "self_attn.q_proj.bias"),
    "block.attention.k_bias": ("kc->(kc)", _LAYER + "self_attn.k_proj.bias"),
    "block.attention.v_bias": ("kc->(kc)", _LAYER + "self_attn.v_proj.bias"),
}


_DEFAULTS = dict(  # of transformers, where config.json lacks the key
    hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=151936, hidden_act="silu", rms_norm_eps=1e-6,
    initializer_range=0.02, tie_word_embeddings=False, use_sliding_window=False,
    max_position_embeddings=32768,
)  # fmt: skip


def from_hugging_face(hf: dict) -> dict[str, Any]:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    newer = hf["model_type"] == "qwen3"
    own, optional = {"attention_bias": False} if newer else {}, {}
    if newer or "head_dim" in hf:  # transformers refuses null, unlike absence
        own |= {"head_dim": 128}
    else:
        optional = {"head_dim": int}
    if hf.get("num_key_value_heads", ...) is None:
        hf = hf | {"num_key_value_heads": hf.get("num_attention_heads", 32)}
    found = config_json.read(hf, _DEFAULTS | own, optional)
    for key in ("attention_bias", "use_sliding_window"):
        if found.get(key):
            raise cfg.UserError(f"{key}={found[key]} is not supported; false is")
    kinds = config_json.layer_types(hf, found["num_hidden_layers"]) or []
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise cfg.UserError(f"layer_types: {other[0]} is not supported; full_attention is")
    rope = llama.rope_from_hugging_face(hf, 10000.0)
    if "rope_scaling" in rope:
        raise cfg.UserError("rope_scaling is not supported here; null is")
    return {
        "family": "qwen",
        "mlp_dim": found["intermediate_size"],
        "qk_norm": newer,
        "qkv_biases": not newer,
        **llama.shared_from_hugging_face(found),
        **rope,
    }


def to_hugging_face(config: Config, max_positions: int = 2048) -> dict[str, Any]:
    """The config.json that transformers 4 and 5 read; `max_positions` is what it promises."""
    c = config
    for key in ("attention_softcap", "logit_softcap", "sliding_window"):
        if getattr(c, key):
            raise cfg.UserError(f"model.{key}: Hugging Face's Qwen has no such thing here")
    if c.qk_norm == c.qkv_biases:
        raise cfg.UserError(
            f"model.qk_norm={c.qk_norm} with model.qkv_biases={c.qkv_biases}: Hugging Face's "
            "Qwen 3 has the norms alone, and Qwen 2 the biases alone"
        )
    version = 3 if c.qk_norm else 2
    return (
        llama.shared_to_hugging_face(c, max_positions)
        | {
            "architectures": [f"Qwen{version}ForCausalLM"],
            "model_type": f"qwen{version}",
            "intermediate_size": c.mlp_dim,
            "use_sliding_window": False,
            "rope_theta": c.rope_theta,
            "rope_scaling": None,
        }
        | ({"attention_bias": False} if version == 3 else {})
    )
