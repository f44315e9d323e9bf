"""A mixture of experts: a router, routed gated MLPs, and what keeps their load even.

Shapes: B batch, S sequence, D embed, F expert_mlp, E experts, K choices per token.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm import config as cfg
from jaxlm.models import experts, llama
from jaxlm.models.layers import (
    GatedMLP,
    RMSNorm,
    SelfAttention,
    check_rotary,
    normal,
    rotary_positions,
)
from jaxlm.sharding import Layout, wide

Norm = RMSNorm
SHAPE, NUMBERS = "recompiles checkpoint numbers", "recompiles numbers"


@cfg.section
class Config(cfg.Model):
    """The keys of `model:` that families with experts share."""

    mlp_dim: int = cfg.key(
        0, "hidden width of a dense MLP; no layer has one, it is kept for config.json", minimum=0,
        dim="mlp",
    )  # fmt: skip
    rope_theta: float = cfg.key(1e6, "base of the rotary wavelengths", changes=NUMBERS)
    num_experts: int = cfg.key(
        cfg.REQUIRED, "routed experts of a layer", minimum=1, changes=SHAPE, dim="experts"
    )
    experts_per_token: int = cfg.key(
        cfg.REQUIRED, "experts that a token is sent to", minimum=1, changes=NUMBERS
    )
    expert_mlp_dim: int = cfg.key(
        cfg.REQUIRED, "hidden width of one expert", minimum=1, changes=SHAPE, dim="mlp"
    )
    shared_expert_dim: int = cfg.key(
        0, "hidden width of an expert that takes every token; 0: none", minimum=0, changes=SHAPE,
        dim="mlp",
    )  # fmt: skip
    router: str = cfg.key(
        "softmax", "scores of the experts; sigmoid: as in DeepSeek-V3",
        choices=("softmax", "sigmoid"), changes=NUMBERS,
    )  # fmt: skip
    normalize_gates: bool = cfg.key(
        True, "the gates of a token's experts add up to 1", changes=NUMBERS
    )
    dispatch: str = cfg.key(
        "dropless", "capacity: an expert takes so many tokens of a sequence, the rest pass by",
        choices=("dropless", "capacity"), changes=NUMBERS,
    )  # fmt: skip
    capacity_factor: float = cfg.key(
        1.25, "capacity: slots of an expert, as a multiple of the even share", minimum=0.0,
        changes=NUMBERS,
    )  # fmt: skip
    balance: str = cfg.key(
        "loss", "what evens the load: an auxiliary loss, a bias in the choice (arXiv:2408.15664)",
        choices=("loss", "bias", "none"), changes=SHAPE,
    )  # fmt: skip
    balance_coefficient: float = cfg.key(
        0.01, "loss: its weight, for each layer; bias: its change per step", minimum=0.0,
        changes=NUMBERS,
    )  # fmt: skip
    router_z_loss: float = cfg.key(
        0.0, "weight of the mean of the router's log(Z)^2, for each layer", minimum=0.0,
        changes=NUMBERS,
    )  # fmt: skip

    @property
    def expert_share(self) -> float:
        """Those of the router's choice."""
        return self.experts_per_token / self.num_experts

    @property
    def microbatches_change_numbers(self) -> bool:
        """With the balance loss: a product of two means over the tokens of a microbatch.

        Over the global batch it would need every microbatch's forward pass before the first
        backward pass.
        """
        return self.balance == "loss" and self.balance_coefficient > 0

    def shrunk(self, small: dict[str, Any], length: int) -> dict[str, Any]:
        """Experts still run full: at the even share, whatever is uneven is dropped."""
        return {"capacity_factor": min(self.capacity_factor, 1.0)}


def check(config: cfg.Config) -> None:
    """Raise UserError for a config that a family with experts cannot be."""
    m, rules = config.model, cfg.RULES | config.rules
    assert isinstance(m, Config)
    check_rotary(m, "rope_theta")
    if m.experts_per_token > m.num_experts:
        raise cfg.UserError(
            f"model.experts_per_token={m.experts_per_token} is above model.num_experts="
            f"{m.num_experts}; a token is sent to {m.num_experts} at most"
        )
    if m.dispatch == "capacity" and not m.capacity_factor:
        raise cfg.UserError(
            "model.capacity_factor=0.0 leaves no slot; use 1.25, or 1.0 for even loads"
        )
    if outside := [axis for axis in rules["experts"] if axis not in rules["batch"]]:
        raise cfg.UserError(
            f"rules.experts: axis {outside[0]} is not in rules.batch={list(rules['batch'])}: "
            "tokens are sent along the axes of experts, each device its own; add it there"
        )


class MoE(nnx.Module):
    """Top-k routed experts in place of an MLP."""

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 7)
        std, std_out = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
        D, E, F = c.embed_dim, c.num_experts, c.expert_mlp_dim
        self.config = nnx.static(config)
        self.router = layout.param(
            normal(keys[0], std), (D, E), "embed experts", "batch residual_seq"
        )
        self.gate = layout.param(normal(keys[1], std), (E, D, F), "experts embed mlp")
        self.up = layout.param(normal(keys[2], std), (E, D, F), "experts embed mlp")
        self.down = layout.param(normal(keys[3], std_out), (E, F, D), "experts mlp embed")
        shared = c.shared_expert_dim  # the expert that takes every token (arXiv:2401.06066)
        self.shared = GatedMLP(c, layout, keys[4:], shared) if shared else None
        zeros = jnp.zeros(E, jnp.float32)
        self.bias = nnx.Variable(zeros, dims="_", over="") if c.balance == "bias" else None

    @jax.named_scope("experts")
    def __call__(self, x_BSD, segments_BS, layout: Layout):
        """What the experts add to the residual stream, of its normalised copy; and aux."""
        c, s = self.config, layout
        scores_BSE, logits_BSE = self._score(x_BSD, s)
        bias_E = 0.0 if self.bias is None else self.bias.get_value()
        _, expert_BSK = jax.lax.top_k(scores_BSE + bias_E, c.experts_per_token)
        hit_BSKE = expert_BSK[..., None] == jnp.arange(c.num_experts)
        # A masked sum: its gradient is not a scatter.
        gate_BSK = jnp.sum(jnp.where(hit_BSKE, scores_BSE[:, :, None], 0.0), -1)
        if c.normalize_gates:
            gate_BSK = gate_BSK / jnp.sum(gate_BSK, -1, keepdims=True)
        real_BS = jnp.ones(x_BSD.shape[:2], bool) if segments_BS is None else segments_BS > 0

        weights = tuple(s.gather(w) for w in (self.gate, self.up, self.down))
        place_BSK = s.move(expert_BSK.astype(jnp.int32), "batch seq _")
        gate_BSK = s.move(gate_BSK, "batch seq _", over="mlp")
        h_BSD = s.move(x_BSD, "batch seq _", over="mlp")
        none = c.num_experts  # no place: never a dropless one
        if c.dispatch == "dropless":
            y_BSD = experts.dropless(h_BSD, place_BSK, gate_BSK, weights, s)
        else:
            limit, stride = slots_per_expert(c, x_BSD.shape[1], s)
            place_BSK = experts.slots(place_BSK, real_BS, s, c.num_experts, limit, stride)
            y_BSD = experts.capacity(h_BSD, place_BSK, gate_BSK, weights, s, stride)
            none = c.num_experts * stride
        dropped_BS = jnp.sum(place_BSK == none, -1)
        if self.shared is not None:
            y_BSD += self.shared(h_BSD, s)
        here = lambda x_BS: s.move(x_BS, "batch residual_seq")
        aux = statistics(c, scores_BSE, logits_BSE, hit_BSKE, here(dropped_BS), here(real_BS))
        return y_BSD, aux

    @jax.named_scope("router")
    def _score(self, x_BSD, layout: Layout):
        """Each expert's score for each token, and the logits, in `wide`; experts are not split."""
        router_DE = layout.replace(experts=()).gather(self.router)
        dtype = wide(x_BSD.dtype)
        logits_BSE = jnp.einsum("bsd,de->bse", x_BSD.astype(dtype), router_DE.astype(dtype))
        if self.config.router == "softmax":
            return jax.nn.softmax(logits_BSE, -1), logits_BSE
        return jax.nn.sigmoid(logits_BSE), logits_BSE


class Block(nnx.Module):
    """Attention and experts, each on a normalised copy; aux names the bias as in `moe`, here."""

    @staticmethod
    def window(config: Config) -> int:
        """Tokens that a query of this block sees, itself included; 0: all before it."""
        return config.sliding_window

    cache = staticmethod(SelfAttention.cache)

    def __init__(self, config: Config, layout: Layout, key: jax.Array):
        c, keys = config, jax.random.split(key, 5)
        self.attention_norm = RMSNorm(c, layout)
        self.attention = SelfAttention(
            c, layout, keys[:4], window=self.window(c), softcap=c.attention_softcap,
            norm=RMSNorm if c.qk_norm else None,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(c, layout)
        self.moe = MoE(c, layout, keys[4])

    def __call__(self, x_BSD, table, segments_BS, layout: Layout, cache=None):
        """One layer: (residual stream, cache, aux)."""
        h_BSD = self.attention_norm(x_BSD, layout)
        y_BSD, cache = self.attention(h_BSD, table, segments_BS, layout, cache)
        x_BSD += y_BSD
        y_BSD, aux = self.moe(self.mlp_norm(x_BSD, layout), segments_BS, layout)
        return x_BSD + y_BSD, cache, aux


def groups(config: Config) -> list[tuple[tuple[type, ...], int]]:
    """Layers as (pattern of blocks, repeats)."""
    return [((Block,), config.num_layers)]


def slots_per_expert(config: Config, length: int, layout: Layout) -> tuple[int, int]:
    """Choices that an expert takes of a sequence, and that number rounded up to divide `seq`."""
    even = length * config.experts_per_token / config.num_experts
    limit, ways = max(1, math.ceil(config.capacity_factor * even)), layout.size("seq")
    return limit, -(-limit // ways) * ways


def statistics(c: Config, scores_BSE, logits_BSE, hit_BSKE, dropped_BS, real_BS) -> dict:
    """Losses, metrics and the load, over the tokens of a microbatch that are no padding.

    Balance: E * sum of (an expert's share of tokens) * (its mean probability), over all choices
    (arXiv:2101.03961, equations 4 to 6). z: the mean of log(Z)^2 (arXiv:2202.08906, equation 5).
    """
    dtype, E = scores_BSE.dtype, c.num_experts
    chances_BSE = scores_BSE / jnp.sum(scores_BSE, -1, keepdims=True)
    if c.router == "softmax":
        chances_BSE = scores_BSE
    z_BS = jax.nn.logsumexp(logits_BSE, -1) ** 2
    p_BSE = jax.lax.stop_gradient(chances_BSE)
    entropy_BS = -jnp.sum(p_BSE * jnp.log(jnp.maximum(p_BSE, jnp.finfo(dtype).tiny)), -1)
    columns_BSX = jnp.stack([z_BS, entropy_BS, dropped_BS.astype(dtype)], -1)
    hits_BSE = jnp.sum(hit_BSKE, 2).astype(dtype)
    # Side by side, so that the devices add them up at once.
    all_BSX = jnp.concatenate([chances_BSE, hits_BSE, columns_BSX], -1)
    sums_X = jnp.sum(jnp.where(real_BS[..., None], all_BSX, 0.0), (0, 1))
    # By index: jax cannot map the gradient of unpacking over stages where a part of it is zero.
    z, entropy, dropped = (sums_X[2 * E + i] for i in range(3))
    chance_E, load_E = sums_X[:E], sums_X[E : 2 * E]
    count = jnp.maximum(jnp.sum(load_E) / c.experts_per_token, 1.0)  # tokens
    balance = E * jnp.sum(load_E / count * chance_E / count)
    weight = c.balance_coefficient if c.balance == "loss" else 0.0
    aux = {
        "router/balance_loss": weight * balance,
        "router/z_loss": c.router_z_loss * z / count,
        "router/entropy": entropy / count,
        "peak/router/load_max": load_E,
        "router/dropped": dropped / (count * c.experts_per_token),
    }
    return aux | ({"update/moe.bias": load_E} if c.balance == "bias" else {})


def update_fixed(config: Config, name: str, bias_LE: jax.Array, load_LE: jax.Array) -> jax.Array:
    """A router's bias after a step: up where an expert had less than the mean load, else down."""
    assert name.endswith("moe.bias")
    mean_L1 = jnp.mean(load_LE, -1, keepdims=True)
    return bias_LE + config.balance_coefficient * jnp.sign(mean_L1 - load_LE).astype(bias_LE.dtype)


def encode_positions(config, positions_BS: jax.Array):
    """What every block needs to know of the positions: cosines and sines."""
    return rotary_positions(positions_BS, config.head_dim, config.rope_theta)


# Hugging Face (see llama.py): what the families with experts share.
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
LAYER = "model.layers.{layer}."
MLP = ("gate", "up", "down")  # of Llama, which has one
NAMES: dict[str, tuple[str, str]] = {
    name: place for name, place in llama.NAMES.items() if name.split(".")[-1] not in MLP
}


DEFAULTS = dict(  # of transformers, where config.json lacks the key
    num_hidden_layers=32, num_attention_heads=32, hidden_act="silu", initializer_range=0.02,
    tie_word_embeddings=False, router_aux_loss_coef=0.001,
)  # fmt: skip


def from_hugging_face(hf: dict, found: dict[str, Any], theta: float) -> dict[str, Any]:
    """The values of `model:` that the families read alike, of config.json and of what was read of
    it; `theta` is the default of rope_theta.
    """
    rope = llama.rope_from_hugging_face(hf, theta)
    if rope.get("rope_scaling", "none") != "none":
        raise cfg.UserError("rope_scaling is not supported here; null is")
    return {
        **llama.shared_from_hugging_face(found),
        "experts_per_token": found["num_experts_per_tok"],
        "balance_coefficient": found["router_aux_loss_coef"],
        **rope,
    }


def both_counts(hf: dict, name: str) -> dict:
    """config.json with the number of experts under this name: transformers reads both names."""
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[name]
    return hf | {name: hf[other]} if other in hf else hf


def refuse_export(config: Config, name: str, wanted: dict[str, Any]) -> None:
    """Raise UserError for what Hugging Face's model cannot compute."""
    wanted = {"router": "softmax", "shared_expert_dim": 0, "dispatch": "dropless"} | wanted
    wanted |= {"attention_softcap": 0.0, "logit_softcap": 0.0}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            now = getattr(config, key)
            raise cfg.UserError(f"model.{key}={now}: Hugging Face's {name} has no such thing")
    if config.balance == "bias":
        raise cfg.UserError(f"model.balance=bias: Hugging Face's {name} has no such thing")


def to_hugging_face(config: Config, max_positions: int) -> dict[str, Any]:
    """The part of config.json that the families write alike."""
    return llama.shared_to_hugging_face(config, max_positions) | {
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.balance_coefficient,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
