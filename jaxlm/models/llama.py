"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv:2302.13971).

Shapes: B batch, S sequence, D embed, H query heads, K kv heads, C head_dim, F mlp.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm import config as cfg
from jaxlm.models import config_json
from jaxlm.models.layers import (
    RMSNorm,
    SelfAttention,
    check_rotary,
    gated_mlp,
    gated_weights,
    rotary_frequencies,
    rotary_table,
    stretch_llama3,
)
from jaxlm.sharding import Layout

COMMON = "recompiles numbers"
Norm = RMSNorm


@cfg.section
class Config(cfg.Model):
    """The keys of `model:` when model.family is llama."""

    rope_theta: float = cfg.key(10000.0, "base of the rotary wavelengths", changes=COMMON)
    rope_scaling: str = cfg.key(
        "none",
        "llama3: stretch long wavelengths (Llama 3.1)",
        choices=("none", "llama3"),
        changes=COMMON,
    )
    rope_factor: float = cfg.key(8.0, "llama3: stretch of long wavelengths", changes=COMMON)
    rope_low_freq_factor: float = cfg.key(
        1.0, "llama3: wavelengths over original / this are stretched", changes=COMMON
    )
    rope_high_freq_factor: float = cfg.key(
        4.0, "llama3: wavelengths under original / this are kept", changes=COMMON
    )
    rope_original_length: int = cfg.key(
        8192, "llama3: context of the first training, tokens", changes=COMMON
    )

    def shrunk(self, small: dict[str, Any], length: int) -> dict[str, Any]:
        """Wavelengths are still stretched."""
        return {"rope_original_length": min(self.rope_original_length, length)}


def check(config: cfg.Config) -> None:
    """Raise UserError for a config that Llama cannot be."""
    model = config.model
    assert isinstance(model, Config)
    names = ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_length")
    names = tuple(f"rope_{name}" for name in names)
    check_rotary(model, *(names if model.rope_scaling == "llama3" else names[:1]))
    if model.rope_scaling == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise cfg.UserError(
            f"model.rope_low_freq_factor={model.rope_low_freq_factor} must be below "
            f"model.rope_high_freq_factor={model.rope_high_freq_factor}, as 1 and 4"
        )


def groups(config: Config) -> list[tuple[tuple[type, ...], int]]:
    """Layers as (pattern of blocks, repeats)."""
    return [((Block,), config.num_layers)]


def encode_positions(config: Config, positions_BS: jax.Array):
    """What every block needs to know of the positions: cosines and sines."""
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    if config.rope_scaling == "llama3":
        frequencies = [
            stretch_llama3(
                f, config.rope_factor, config.rope_low_freq_factor, config.rope_high_freq_factor,
                config.rope_original_length,
            )
            for f in frequencies
        ]  # fmt: skip
    return rotary_table(positions_BS, jnp.asarray(np.array(frequencies, np.float32)))


class Block(nnx.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    @staticmethod
    def window(config: Config) -> int:
        """Tokens that a query of this block sees, itself included; 0: all before it."""
        return config.sliding_window

    cache = staticmethod(SelfAttention.cache)

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 7)
        self.attention_norm = RMSNorm(c, layout)
        self.attention = SelfAttention(
            c, layout, keys[:4], window=self.window(c), softcap=c.attention_softcap,
            norm=RMSNorm if c.qk_norm else None,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(c, layout)
        self.gate, self.up, self.down = gated_weights(c, layout, keys[4:], c.mlp_dim)

    def __call__(self, x_BSD, table, segments_BS, layout: Layout, cache=None):
        """One layer: (residual stream, cache, aux)."""
        s, weights = layout, (self.gate, self.up, self.down)
        y_BSD, cache = self.attention(self.attention_norm(x_BSD, s), table, segments_BS, s, cache)
        x_BSD += y_BSD
        return x_BSD + gated_mlp(self.mlp_norm(x_BSD, s), weights, s), cache, {}


# Hugging Face (see jaxlm/interop): our layer as letters -> their tensor's dimensions, and its
# name. Letters: the legend above, v vocab.
MODEL_TYPES = ("llama",)
PREFIX = "model."  # of every tensor but the head; files of the bare model lack it
IGNORED = ("*.rotary_emb.inv_freq",)  # not parameters, in old files
_LAYER = "model.layers.{layer}."
NAMES: dict[str, tuple[str, str]] = {
    "embed": ("vd->vd", "model.embed_tokens.weight"),
    "final_norm.scale": ("d->d", "model.norm.weight"),
    "head": ("vd->vd", "lm_head.weight"),
    "block.attention_norm.scale": ("d->d", _LAYER + "input_layernorm.weight"),
    "block.attention.q": ("dhc->(hc)d", _LAYER + "self_attn.q_proj.weight"),
    "block.attention.k": ("dkc->(kc)d", _LAYER + "self_attn.k_proj.weight"),
    "block.attention.v": ("dkc->(kc)d", _LAYER + "self_attn.v_proj.weight"),
    "block.attention.o": ("hcd->d(hc)", _LAYER + "self_attn.o_proj.weight"),
    "block.mlp_norm.scale": ("d->d", _LAYER + "post_attention_layernorm.weight"),
    "block.gate": ("df->fd", _LAYER + "mlp.gate_proj.weight"),
    "block.up": ("df->fd", _LAYER + "mlp.up_proj.weight"),
    "block.down": ("fd->df", _LAYER + "mlp.down_proj.weight"),
}


_DEFAULTS = dict(  # of transformers, where config.json lacks the key
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    vocab_size=32000, hidden_act="silu", rms_norm_eps=1e-6, initializer_range=0.02,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False, max_position_embeddings=2048,
)  # fmt: skip


def from_hugging_face(hf: dict) -> dict:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    found = config_json.read(hf, _DEFAULTS, {"num_key_value_heads": int, "head_dim": int})
    for key in ("attention_bias", "mlp_bias"):
        if found[key]:
            raise cfg.UserError(f"{key}={found[key]} is not supported: Llama here has no biases")
    return {
        "family": "llama",
        "mlp_dim": found["intermediate_size"],
        **shared_from_hugging_face(found),
        **rope_from_hugging_face(hf, 10000.0),
    }


def shared_from_hugging_face(found: dict) -> dict:
    """What Llama's relatives read alike, of the values in config.json."""
    if found.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise cfg.UserError(f"hidden_act={found['hidden_act']} is not supported; silu is")
    heads, width = found["num_attention_heads"], found["hidden_size"]
    return {
        "num_layers": found["num_hidden_layers"],
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": found["num_key_value_heads"] or heads,
        "head_dim": found["head_dim"] or width // heads,
        "vocab_size": found["vocab_size"],
        "tie_embeddings": found["tie_word_embeddings"],
        "norm_epsilon": found["rms_norm_eps"],
        "init_std": found["initializer_range"],
    }


def rope_from_hugging_face(hf: dict, theta: float) -> dict:
    """Of rope_theta (its default is `theta`), and rope_scaling or, in transformers 5,
    rope_parameters; where both are there, the former is read.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        shown = kind if isinstance(kind, str) else json.dumps(kind)
        raise cfg.UserError(f"{key}.rope_type={shown} is not supported; default and llama3 are")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise cfg.UserError(f"partial_rotary_factor={partial} is not supported; 1 is")
    if "rope_theta" not in rope:
        rope = rope | config_json.read(hf, {"rope_theta": theta})
    if kind == "default":
        return {"rope_theta": _number(rope, key, "rope_theta")}
    original = "original_max_position_embeddings"
    rope = {original: hf.get("max_position_embeddings", 2048)} | rope
    rope |= {key: value for key, value in hf.items() if key == original}
    return {
        "rope_theta": _number(rope, key, "rope_theta"),
        "rope_scaling": "llama3",
        "rope_factor": _number(rope, key, "factor"),
        "rope_low_freq_factor": _number(rope, key, "low_freq_factor"),
        "rope_high_freq_factor": _number(rope, key, "high_freq_factor"),
        "rope_original_length": _number(rope, key, original),
    }


def _number(rope: dict, where: str, key: str) -> float:
    """A value that transformers needs as a number."""
    if not config_json.has_type(rope[key], float):
        raise cfg.UserError(
            f"{where}.{key}={json.dumps(rope[key])} is not a number, and transformers too fails "
            "on it; write the model's value"
        )
    return rope[key]


def to_hugging_face(config: Config, max_positions: int = 2048) -> dict:
    """The config.json that transformers 4 and 5 read; `max_positions` is what it promises."""
    for key in ("qk_norm", "attention_softcap", "logit_softcap", "sliding_window"):
        if getattr(config, key):
            raise cfg.UserError(f"model.{key}: Hugging Face's Llama has no such thing")
    c, rope = config, None
    if c.rope_scaling == "llama3":
        max_positions = max(max_positions, int(c.rope_factor * c.rope_original_length))
        rope = {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_length,
        }
    return shared_to_hugging_face(c, max_positions) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": c.mlp_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope,
    }


def shared_to_hugging_face(config: cfg.Model, max_positions: int) -> dict:
    """The part of config.json that Llama's relatives write alike."""
    c = config
    return {
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "rms_norm_eps": c.norm_epsilon,
        "initializer_range": c.init_std,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
    }
