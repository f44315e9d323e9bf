"""GPT-2: LayerNorm, learned positions, GELU, biases (Radford et al., 2019).

Shapes: B batch, S sequence, D embed, H heads, C head_dim, F mlp.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm import attention
from jaxlm import config as cfg
from jaxlm.models import config_json
from jaxlm.models.layers import LayerNorm, RMSNorm, SelfAttention, constant, normal
from jaxlm.sharding import Layout

Norm = LayerNorm


@cfg.section
class Config(cfg.Model):
    """The keys of `model:` when model.family is gpt2."""

    max_positions: int = cfg.key(
        1024,
        "learned positions: the longest sequence, tokens",
        minimum=1,
        changes="recompiles checkpoint numbers",
        dim="positions",
    )
    biases: bool = cfg.key(
        True, "biases in projections and norms", changes="recompiles checkpoint numbers"
    )

    @property
    def learned_positions(self) -> int:
        """Length of the learned position table."""
        return self.max_positions


def check(config: cfg.Config) -> None:
    """Raise UserError for a config that GPT-2 cannot be."""
    model = config.model
    assert isinstance(model, Config)
    if model.num_kv_heads != model.num_heads:
        raise cfg.UserError(
            f"model.num_kv_heads={model.num_kv_heads}: gpt2 has no grouped heads; "
            f"use model.num_kv_heads={model.num_heads} (model.num_heads)"
        )
    lengths = {"batch.sequence_length": config.batch.sequence_length}
    lengths |= {"sample.tokens": config.sample.tokens} if config.sample.every else {}
    for name, length in lengths.items():
        if length > model.max_positions:
            raise cfg.UserError(
                f"{name}={length} is above model.max_positions={model.max_positions}; "
                f"use {name}={model.max_positions} or model.max_positions={length}"
            )


def groups(config: Config) -> list[tuple[tuple[type, ...], int]]:
    """Layers as (pattern of blocks, repeats)."""
    return [((Block,), config.num_layers)]


def encode_positions(config: Config, positions_BS: jax.Array):
    """Blocks need nothing: positions were added to the embedding."""
    return None


class Block(nnx.Module):
    """Attention and an MLP, each on a normalised copy of the residual stream."""

    @staticmethod
    def window(config: Config) -> int:
        """Tokens that a query of this block sees, itself included; 0: all before it."""
        return config.sliding_window

    cache = staticmethod(SelfAttention.cache)  # keys and values of each token

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 4)
        std, std_out = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
        D, H, C, F = c.embed_dim, c.num_heads, c.head_dim, c.mlp_dim
        bias = lambda *shape_dims: layout.param(constant(0.0), *shape_dims) if c.biases else None
        self.softcap, self.sees = c.attention_softcap, self.window(c)
        self.attention_norm = LayerNorm(c, layout)
        self.qkv = layout.param(normal(keys[0], std), (3, D, H, C), "parts embed heads head_dim")
        self.qkv_bias = bias((3, H, C), "parts heads head_dim")
        self.o = layout.param(normal(keys[1], std_out), (H, C, D), "heads head_dim embed")
        self.o_bias = bias((D,), "norm", "batch residual_seq")
        head_norm = lambda: RMSNorm(c, layout, C, "batch seq heads") if c.qk_norm else None
        self.q_norm, self.k_norm = head_norm(), head_norm()
        self.mlp_norm = LayerNorm(c, layout)
        self.up = layout.param(normal(keys[2], std), (D, F), "embed mlp")
        self.up_bias = bias((F,), "mlp")
        self.down = layout.param(normal(keys[3], std_out), (F, D), "mlp embed")
        self.down_bias = bias((D,), "norm", "batch residual_seq")

    def __call__(self, x_BSD, table, segments_BS, layout: Layout, cache=None):
        """One layer: (residual stream, cache, aux)."""
        s, w = layout, layout.gather
        add = lambda terms, y, bias: y if bias is None else s.add_bias(terms, y, w(bias))
        with jax.named_scope("projections"):
            h_BSD = s.move(self.attention_norm(x_BSD, s), "batch seq _", over="heads")
            qkv_ZBSHC = s.dot("bsd,zdhc->zbshc", h_BSD, w(self.qkv))
            q_BSHC, k_BSHC, v_BSHC = add("bs,zhc->zbshc", qkv_ZBSHC, self.qkv_bias)
            if self.q_norm is not None and self.k_norm is not None:
                q_BSHC, k_BSHC = self.q_norm(q_BSHC, s), self.k_norm(k_BSHC, s)
            q_BSHC = checkpoint_name(q_BSHC, "query")
            k_BSHC, v_BSHC = checkpoint_name(k_BSHC, "key"), checkpoint_name(v_BSHC, "value")
            a_BSHC, cache = attention.attend(
                q_BSHC, k_BSHC, v_BSHC, segments_BS, layout, self.softcap, self.sees, cache
            )
            y_BSD = s.dot("bshc,hcd->bsd", a_BSHC, w(self.o), out="batch residual_seq _")
            x_BSD += add("bs,d->bsd", y_BSD, self.o_bias)

        with jax.named_scope("mlp"):
            h_BSD = s.move(self.mlp_norm(x_BSD, s), "batch seq _", over="mlp")
            h_BSF = add("bs,f->bsf", s.dot("bsd,df->bsf", h_BSD, w(self.up)), self.up_bias)
            h_BSF = jax.nn.gelu(checkpoint_name(h_BSF, "mlp"), approximate=True)
            y_BSD = s.dot("bsf,fd->bsd", h_BSF, w(self.down), out="batch residual_seq _")
            x_BSD += add("bs,d->bsd", y_BSD, self.down_bias)
        return x_BSD, cache, {}


# Hugging Face (see jaxlm/interop): our layer as letters -> their tensor's dimensions, and its
# name. Letters: the legend above, v vocab, p positions, z parts. Their weights are [in, out].
MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."  # of every tensor but the head; files of the bare model lack it
IGNORED = ("*.attn.bias", "*.attn.masked_bias")  # causal masks, in old files
_LAYER = "transformer.h.{layer}."
NAMES: dict[str, tuple[str, str]] = {
    "embed": ("vd->vd", "transformer.wte.weight"),
    "positions": ("pd->pd", "transformer.wpe.weight"),
    "final_norm.scale": ("d->d", "transformer.ln_f.weight"),
    "final_norm.bias": ("d->d", "transformer.ln_f.bias"),
    "head": ("vd->vd", "lm_head.weight"),
    "block.attention_norm.scale": ("d->d", _LAYER + "ln_1.weight"),
    "block.attention_norm.bias": ("d->d", _LAYER + "ln_1.bias"),
    "block.qkv": ("zdhc->d(zhc)", _LAYER + "attn.c_attn.weight"),
    "block.qkv_bias": ("zhc->(zhc)", _LAYER + "attn.c_attn.bias"),
    "block.o": ("hcd->(hc)d", _LAYER + "attn.c_proj.weight"),
    "block.o_bias": ("d->d", _LAYER + "attn.c_proj.bias"),
    "block.mlp_norm.scale": ("d->d", _LAYER + "ln_2.weight"),
    "block.mlp_norm.bias": ("d->d", _LAYER + "ln_2.bias"),
    "block.up": ("df->df", _LAYER + "mlp.c_fc.weight"),
    "block.up_bias": ("f->f", _LAYER + "mlp.c_fc.bias"),
    "block.down": ("fd->fd", _LAYER + "mlp.c_proj.weight"),
    "block.down_bias": ("d->d", _LAYER + "mlp.c_proj.bias"),
}
_REFUSED = dict(  # what works, which is the default of transformers too
    scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
    add_cross_attention=False, scale_attn_weights=True,
)  # fmt: skip
_DEFAULTS = _REFUSED | dict(  # of transformers, where config.json lacks the key
    n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50257,
    activation_function="gelu_new", layer_norm_epsilon=1e-5, initializer_range=0.02,
    tie_word_embeddings=True,
)  # fmt: skip
_OTHER_NAMES = dict(  # transformers reads both, these over those
    hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
    max_position_embeddings="n_positions",
)  # fmt: skip


def from_hugging_face(hf: dict) -> dict:
    """The values of `model:` for a config.json; UserError for what this family lacks."""
    hf = hf | {name: hf[other] for other, name in _OTHER_NAMES.items() if other in hf}
    found = config_json.read(hf, _DEFAULTS, {"n_inner": int})
    for key, supported in _REFUSED.items():
        if found[key] != supported:
            raise cfg.UserError(f"{key}={found[key]} is not supported; {supported} is")
    kind, kinds = found["activation_function"], ("gelu_new", "gelu_pytorch_tanh")
    if kind not in kinds:  # two names of one function
        raise cfg.UserError(f"activation_function={kind} is not supported; {kinds[0]} is")
    heads, width = found["n_head"], found["n_embd"]
    if width % heads:
        raise cfg.UserError(f"n_embd={width} is not divisible by n_head={heads}")
    return {
        "family": "gpt2",
        "num_layers": found["n_layer"],
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp_dim": found["n_inner"] or 4 * width,
        "vocab_size": found["vocab_size"],
        "tie_embeddings": found["tie_word_embeddings"],
        "norm_epsilon": found["layer_norm_epsilon"],
        "init_std": found["initializer_range"],
        "max_positions": found["n_positions"],
    }


def to_hugging_face(config: Config, max_positions: int = 0) -> dict:
    """The config.json that transformers 4 and 5 read; its length is that of the learned table.

    Hugging Face's GPT-2 always has biases: with biases=false they are exported as zeros, which is
    the same function, and come back as a model with biases=true.
    """
    for key in ("qk_norm", "attention_softcap", "logit_softcap", "sliding_window"):
        if getattr(config, key):
            raise cfg.UserError(f"model.{key}: Hugging Face's GPT-2 has no such thing")
    c = config
    if c.num_heads * c.head_dim != c.embed_dim:
        raise cfg.UserError(
            f"model.head_dim={c.head_dim}: Hugging Face's GPT-2 has embed_dim / num_heads only"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": c.embed_dim,
        "n_inner": c.mlp_dim,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_positions": c.max_positions,
        "n_ctx": c.max_positions,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "layer_norm_epsilon": c.norm_epsilon,
        "initializer_range": c.init_std,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
