"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv:2302.13971).

Shapes: B batch, S sequence, D embed, H query heads, K kv heads, C head_dim, F mlp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm import config as cfg
from jaxlm.models.layers import (
    RMSNorm,
    SelfAttention,
    normal,
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


def groups(config: Config) -> list[tuple[tuple[type, ...], int]]:
    """Layers as (pattern of blocks, repeats)."""
    return [((Block,), config.num_layers)]


def learned_positions(config: Config) -> int:
    """Length of the learned position table: there is none."""
    return 0


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

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 7)
        std, std_out = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
        self.attention_norm = RMSNorm(c, layout)
        self.attention = SelfAttention(c, layout, keys[:4], self.window(c))
        self.mlp_norm = RMSNorm(c, layout)
        self.gate = layout.param(normal(keys[4], std), (c.embed_dim, c.mlp_dim), "embed mlp")
        self.up = layout.param(normal(keys[5], std), (c.embed_dim, c.mlp_dim), "embed mlp")
        self.down = layout.param(normal(keys[6], std_out), (c.mlp_dim, c.embed_dim), "mlp embed")

    def __call__(self, x_BSD, table, segments_BS, layout: Layout, cache=None):
        """One layer: (residual stream, cache, aux)."""
        s, w = layout, layout.gather
        y_BSD, cache = self.attention(self.attention_norm(x_BSD, s), table, segments_BS, s, cache)
        x_BSD += y_BSD

        with jax.named_scope("mlp"):
            h_BSD = s.move(self.mlp_norm(x_BSD, s), "batch seq _", over="mlp")
            gate_BSF = checkpoint_name(s.dot("bsd,df->bsf", h_BSD, w(self.gate)), "mlp")
            up_BSF = checkpoint_name(s.dot("bsd,df->bsf", h_BSD, w(self.up)), "mlp")
            h_BSF = jax.nn.silu(gate_BSF) * up_BSF
            x_BSD += s.dot("bsf,fd->bsd", h_BSF, w(self.down), out="batch residual_seq _")
        return x_BSD, cache, {}


# Hugging Face (see jaxlm/interop): our layer as letters -> their tensor's dimensions, and its
# name. Letters: the legend above, v vocab.
PREFIX = "model."  # of every tensor but the head; files of the bare model lack it
IGNORED = ("*.rotary_emb.inv_freq",)  # not parameters, in old files
_LAYER = "model.layers.{layer}."
NAMES: dict[str, tuple[str, str]] = {
    "embed": ("vd->vd", "model.embed_tokens.weight"),
    "final_norm.scale": ("d->d", "model.norm.weight"),
    "head": ("vd->vd", "lm_head.weight"),
    "groups.0.0.attention_norm.scale": ("d->d", _LAYER + "input_layernorm.weight"),
    "groups.0.0.attention.q": ("dhc->(hc)d", _LAYER + "self_attn.q_proj.weight"),
    "groups.0.0.attention.k": ("dkc->(kc)d", _LAYER + "self_attn.k_proj.weight"),
    "groups.0.0.attention.v": ("dkc->(kc)d", _LAYER + "self_attn.v_proj.weight"),
    "groups.0.0.attention.o": ("hcd->d(hc)", _LAYER + "self_attn.o_proj.weight"),
    "groups.0.0.mlp_norm.scale": ("d->d", _LAYER + "post_attention_layernorm.weight"),
    "groups.0.0.gate": ("df->fd", _LAYER + "mlp.gate_proj.weight"),
    "groups.0.0.up": ("df->fd", _LAYER + "mlp.up_proj.weight"),
    "groups.0.0.down": ("fd->df", _LAYER + "mlp.down_proj.weight"),
}


def from_hugging_face(hf: dict) -> dict:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise cfg.UserError(f"{key}={hf[key]} is not supported: Llama here has no biases")
    if hf.get("hidden_act", "silu") != "silu":
        raise cfg.UserError(f"hidden_act={hf['hidden_act']} is not supported; silu is")
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    return {
        "family": "llama",
        "num_layers": hf["num_hidden_layers"],
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or width // heads,
        "mlp_dim": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "init_std": hf.get("initializer_range", 0.02),
        **rope_from_hugging_face(hf),
    }


def rope_from_hugging_face(hf: dict) -> dict:
    """Of rope_parameters (transformers 5), or of rope_theta and rope_scaling."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise cfg.UserError(f"{key}.rope_type={kind} is not supported; default and llama3 are")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise cfg.UserError(f"partial_rotary_factor={partial} is not supported; 1 is")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta}
    return {
        "rope_theta": theta,
        "rope_scaling": "llama3",
        "rope_factor": rope["factor"],
        "rope_low_freq_factor": rope["low_freq_factor"],
        "rope_high_freq_factor": rope["high_freq_factor"],
        "rope_original_length": rope["original_max_position_embeddings"],
    }


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
