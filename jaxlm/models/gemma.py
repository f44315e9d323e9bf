"""Gemma 3 and 2, text (arXiv:2503.19786, 2408.00118): layers with a window before each without.

Norms multiply by 1 + scale and stand before and after attention and the MLP; embeddings are scaled.
Gemma 3 has five local layers to a global one, each kind with its own rotary base, and norms on
queries and keys; Gemma 2 has one to one, and soft caps.

Shapes: B batch, S sequence, D embed, H query heads, K kv heads, C head_dim, F mlp.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
from flax import nnx

from jaxlm import config as cfg
from jaxlm.models import config_json, llama
from jaxlm.models.layers import GatedMLP, RMSNorm, SelfAttention, check_rotary, rotary_positions
from jaxlm.sharding import Layout

SHAPE, NUMBERS = "recompiles checkpoint numbers", "recompiles numbers"
Norm = functools.partial(RMSNorm, offset=1.0)


@cfg.section
class Config(cfg.Model):
    """The keys of `model:` when model.family is gemma; sliding_window is that of local layers."""

    tie_embeddings: bool = cfg.key(True, "the head is the embedding", changes=SHAPE)
    norm_epsilon: float = cfg.key(
        1e-6, "added to the variance in norms", minimum=0.0, changes=NUMBERS
    )
    qk_norm: bool = cfg.key(True, "RMSNorm on queries and keys, per head (Gemma 3)", changes=SHAPE)
    locals_per_global: int = cfg.key(
        5, "layers with model.sliding_window before each one without (Gemma 2: 1)", minimum=0,
        changes=SHAPE,
    )  # fmt: skip
    query_pre_attn_scalar: int = cfg.key(
        256, "scores are divided by the root of this", minimum=1, changes=NUMBERS
    )
    rope_theta: float = cfg.key(1e6, "global layers: base of the wavelengths", changes=NUMBERS)
    rope_factor: float = cfg.key(1.0, "global layers: stretch of all wavelengths", changes=NUMBERS)
    rope_local_theta: float = cfg.key(1e4, "local layers: base of the wavelengths", changes=NUMBERS)

    @property
    def embedding_scale(self) -> float:
        """The root of the width."""
        return self.embed_dim**0.5

    def shrunk(self, small: dict[str, Any], length: int) -> dict[str, Any]:
        """Scores are scaled as before, against those of the head's width."""
        ratio = small["head_dim"] / self.head_dim
        return {"query_pre_attn_scalar": max(1, round(self.query_pre_attn_scalar * ratio))}


def check(config: cfg.Config) -> None:
    """Raise UserError for a config that Gemma cannot be."""
    model = config.model
    assert isinstance(model, Config)
    check_rotary(model, "rope_theta", "rope_factor", "rope_local_theta")
    if model.locals_per_global and not model.sliding_window:
        raise cfg.UserError(
            f"model.sliding_window=0 with model.locals_per_global={model.locals_per_global}: local "
            "layers need a window; use model.sliding_window=1024 or model.locals_per_global=0"
        )


def groups(config: Config) -> list[tuple[tuple[type, ...], int]]:
    """Layers as (pattern of blocks, repeats): whole patterns, and what is left of one."""
    pattern = (Local,) * config.locals_per_global + (Global,)
    whole, rest = divmod(config.num_layers, len(pattern))
    return [(blocks, n) for blocks, n in ((pattern, whole), (pattern[:rest], 1)) if blocks and n]


def encode_positions(config: Config, positions_BS: jax.Array):
    """Cosines and sines for each kind of block."""
    table = functools.partial(rotary_positions, positions_BS, config.head_dim)
    return {
        "local": table(config.rope_local_theta),
        "global": table(config.rope_theta, config.rope_factor),
    }


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by the tanh formula."""
    return jax.nn.gelu(x, approximate=True)


class Block(nnx.Module):
    """Attention and a gated MLP, each between two norms; what it sees is in Local and Global."""

    kind: str
    cache = staticmethod(SelfAttention.cache)

    @classmethod
    def window(cls, config: Config) -> int:
        """Tokens that a query of this block sees, itself included; 0: all before it."""
        return config.sliding_window if cls.kind == "local" else 0

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 7)
        self.attention_norm, self.attention_after = Norm(c, layout), Norm(c, layout)
        self.attention = SelfAttention(
            c, layout, keys[:4], window=self.window(c), softcap=c.attention_softcap,
            norm=Norm if c.qk_norm else None,
            query_scale=(c.head_dim / c.query_pre_attn_scalar) ** 0.5,
        )  # fmt: skip
        self.mlp_norm, self.mlp_after = Norm(c, layout), Norm(c, layout)
        self.mlp = GatedMLP(c, layout, keys[4:], c.mlp_dim, gelu_tanh)

    def __call__(self, x_BSD, tables, segments_BS, layout: Layout, cache=None):
        """One layer: (residual stream, cache, aux)."""
        h_BSD, table = self.attention_norm(x_BSD, layout), tables[self.kind]
        y_BSD, cache = self.attention(h_BSD, table, segments_BS, layout, cache)
        x_BSD += self.attention_after(y_BSD, layout)
        y_BSD = self.mlp(self.mlp_norm(x_BSD, layout), layout)
        return x_BSD + self.mlp_after(y_BSD, layout), cache, {}


class Local(Block):
    """Sees model.sliding_window tokens."""

    kind = "local"


class Global(Block):
    """Sees all tokens before it."""

    kind = "global"


# Hugging Face (see jaxlm/interop/name_map.py). Letters: the legend above.
MODEL_TYPES = ("gemma2", "gemma3_text")
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
_LAYER = "model.layers.{layer}."
NAMES: dict[str, tuple[str, str]] = {
    "embed": llama.NAMES["embed"],
    "final_norm.scale": llama.NAMES["final_norm.scale"],
    "head": llama.NAMES["head"],
    "block.attention_norm.scale": ("d->d", _LAYER + "input_layernorm.weight"),
    "block.attention.q": llama.NAMES["block.attention.q"],
    "block.attention.k": llama.NAMES["block.attention.k"],
    "block.attention.v": llama.NAMES["block.attention.v"],
    "block.attention.o": llama.NAMES["block.attention.o"],
    "block.attention.q_norm.scale": ("c->c", _LAYER + "self_attn.q_norm.weight"),
    "block.attention.k_norm.scale": ("c->c", _LAYER + "self_attn.k_norm.weight"),
    "block.attention_after.scale": ("d->d", _LAYER + "post_attention_layernorm.weight"),
    "block.mlp_norm.scale": ("d->d", _LAYER + "pre_feedforward_layernorm.weight"),
    "block.mlp.gate": llama.NAMES["block.gate"],
    "block.mlp.up": llama.NAMES["block.up"],
    "block.mlp.down": llama.NAMES["block.down"],
    "block.mlp_after.scale": ("d->d", _LAYER + "post_feedforward_layernorm.weight"),
}


_DEFAULTS = dict(  # of transformers, where config.json lacks the key
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh",
    initializer_range=0.02, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
    query_pre_attn_scalar=256,
)  # fmt: skip
_DEFAULTS_OF = {
    "gemma2": dict(vocab_size=256000, max_position_embeddings=8192),
    "gemma3_text": dict(vocab_size=262208, max_position_embeddings=131072),
}
_GELUS = ("gelu_pytorch_tanh", "gelu_new")  # two names of one function


def from_hugging_face(hf: dict) -> dict[str, Any]:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    newer = hf["model_type"] == "gemma3_text"
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    hf = ({"sliding_window": 4096} | (caps if newer else _CAPS)) | hf
    optional = dict.fromkeys(caps, float) | {"sliding_window": int}
    found = config_json.read(hf, _DEFAULTS | _DEFAULTS_OF[hf["model_type"]], optional)
    if found["hidden_activation"] not in _GELUS:
        kind = found["hidden_activation"]
        raise cfg.UserError(f"hidden_activation={kind} is not supported; {_GELUS[0]} is")
    for key in ("attention_bias", "use_bidirectional_attention"):
        if hf.get(key):
            raise cfg.UserError(f"{key}={hf[key]} is not supported; false is")
    if newer and found["attn_logit_softcapping"]:
        raise cfg.UserError("attn_logit_softcapping: transformers' Gemma 3 has none; null is read")
    locals_per_global = _pattern(hf, found["num_hidden_layers"], newer)
    if locals_per_global and not found["sliding_window"]:
        shown = json.dumps(found["sliding_window"])
        raise cfg.UserError(f"sliding_window={shown}: local layers need one, as transformers says")
    return {
        "family": "gemma",
        "mlp_dim": found["intermediate_size"],
        "qk_norm": newer,
        "attention_softcap": found["attn_logit_softcapping"] or 0.0,
        "logit_softcap": found["final_logit_softcapping"] or 0.0,
        "sliding_window": found["sliding_window"] or 0,
        "locals_per_global": locals_per_global,
        "query_pre_attn_scalar": found["query_pre_attn_scalar"],
        **llama.shared_from_hugging_face(found),
        **(_ropes(hf) if newer else _rope(hf)),
    }


_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # of Gemma 2


def _pattern(hf: dict, layers: int, newer: bool) -> int:
    """Local layers before each global one."""
    kinds = config_json.layer_types(hf, layers)
    if kinds is None:
        every = config_json.read(hf, {"sliding_window_pattern": 6})["sliding_window_pattern"]
        if newer and every < 1:
            raise cfg.UserError(f"sliding_window_pattern={every} must be at least 1")
        return every - 1 if newer else 1
    locals_per_global = kinds.index("full_attention") if "full_attention" in kinds else layers
    if kinds != _layer_types(layers, locals_per_global):
        raise cfg.UserError(
            "layer_types: only a fixed number of sliding_attention before each full_attention is "
            "supported"
        )
    return locals_per_global


def _layer_types(layers: int, locals_per_global: int) -> list[str]:
    last = lambda i: (i + 1) % (locals_per_global + 1) == 0
    return ["full_attention" if last(i) else "sliding_attention" for i in range(layers)]


def _rope(hf: dict) -> dict[str, Any]:
    """Of Gemma 2: one base for all layers."""
    rope = llama.rope_from_hugging_face(hf, 10000.0)
    if "rope_scaling" in rope:
        raise cfg.UserError("rope_scaling is not supported here; null is")
    return rope | {"rope_local_theta": rope["rope_theta"]}


def _ropes(hf: dict) -> dict[str, Any]:
    """Of Gemma 3: bases of global and local layers, as transformers 4 or 5 names them."""
    both = hf.get("rope_parameters") or {}
    thetas = config_json.read(hf, {"rope_theta": 1e6, "rope_local_base_freq": 1e4})
    wide = {"rope_theta": thetas["rope_theta"]} | (both.get("full_attention") or {})
    wide |= hf.get("rope_scaling") or {}
    near = {"rope_theta": thetas["rope_local_base_freq"]} | (both.get("sliding_attention") or {})
    for kind, rope, works in (("full", wide, ("default", "linear")), ("local", near, ("default",))):
        found = rope.get("rope_type", rope.get("type", "default"))
        if found not in works or rope.get("partial_rotary_factor") not in (None, 1):
            raise cfg.UserError(
                f"rope of {kind} layers: rope_type={found} or its partial_rotary_factor is not "
                f"supported; {' and '.join(works)} are"
            )
    linear = wide.get("rope_type", wide.get("type")) == "linear"
    numbers = {"rope_theta": wide["rope_theta"], "rope_local_theta": near["rope_theta"]}
    numbers["rope_factor"] = wide["factor"] if linear else 1.0
    for key, value in numbers.items():
        if not config_json.has_type(value, float):
            raise cfg.UserError(f"{key}={json.dumps(value)} is not a number")
    return numbers


def to_hugging_face(config: Config, max_positions: int = 2048) -> dict[str, Any]:
    """The config.json that transformers 4 and 5 read; `max_positions` is what it promises."""
    c, newer = config, config.qk_norm
    hf = llama.shared_to_hugging_face(c, max_positions)
    del hf["hidden_act"]
    hf |= {
        "architectures": ["Gemma3ForCausalLM" if newer else "Gemma2ForCausalLM"],
        "model_type": "gemma3_text" if newer else "gemma2",
        "intermediate_size": c.mlp_dim,
        "hidden_activation": _GELUS[0],
        "attention_bias": False,
        "query_pre_attn_scalar": c.query_pre_attn_scalar,
        "sliding_window": c.sliding_window or None,
        "layer_types": _layer_types(c.num_layers, c.locals_per_global),
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
    }
    if not newer:
        if c.rope_local_theta != c.rope_theta or c.rope_factor != 1:
            raise cfg.UserError(
                f"model.rope_local_theta={c.rope_local_theta}, model.rope_factor={c.rope_factor}: "
                "Hugging Face's Gemma 2 has model.rope_theta alone for all layers"
            )
        return hf
    if c.attention_softcap:
        raise cfg.UserError("model.attention_softcap: Hugging Face's Gemma 3 has no such thing")
    if c.rope_factor != 1:
        hf["rope_scaling"] = {"rope_type": "linear", "factor": c.rope_factor}
    return hf | {
        "rope_local_base_freq": c.rope_local_theta,
        "sliding_window_pattern": c.locals_per_global + 1,
    }
