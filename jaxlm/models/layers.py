"""Norms, initialisers, rotary positions, attention, gated MLP: the pieces that families share.

Shapes: B batch, S sequence, D embed, H query heads, K kv heads, C head_dim.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm import attention, ghost
from jaxlm import config as cfg
from jaxlm.attention.xla import CACHE
from jaxlm.sharding import Layout, wide

# What a block keeps of each token for generation: the dimensions of each array, of which the first
# two are cache_batch and cache_seq, and the sizes of the others.
Cache = tuple[tuple[str, tuple[int, ...]], ...]


def normal(key: jax.Array, std: float):
    """Initialiser: N(0, std^2) as one of 2^16 equally likely quantiles, within 4.2 std.

    A table and not an inverse error function: vector and scalar code round that differently, so a
    shard's bits would depend on its shape. These are the same on every mesh and kind of device.
    """
    table = jnp.asarray(std * quantiles(), jnp.float32)

    def init(shape, sharding):
        index = jax.random.bits(key, shape, jnp.uint16, out_sharding=sharding)
        return table.at[index.astype(jnp.int32)].get(out_sharding=sharding)

    return init


@functools.lru_cache
def quantiles() -> np.ndarray:
    """The 2^16 quantiles of N(0, 1) at (i + 1/2) / 2^16, scaled to unit variance; float64."""
    count = 1 << 16
    lower = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count // 2)]
    table = np.array(lower + [-x for x in reversed(lower)])
    return table / table.std()


def constant(value: float):
    """Initialiser: one value everywhere."""
    return lambda shape, sharding: jnp.full(shape, value, jnp.float32, out_sharding=sharding)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), computed in float32 (arXiv:1910.07467); at first * 1.

    With an offset of 1 (Gemma) the scale is kept as the file has it: 1 + w would lose bits of w.
    """

    def __init__(
        self, config, layout: Layout, size: int = 0, over: str = "batch residual_seq",
        offset: float = 0.0,
    ):  # fmt: skip
        self.epsilon, self.offset = config.norm_epsilon, offset
        init = constant(1.0 - offset)
        self.scale = layout.param(init, (size or config.embed_dim,), "norm", over)

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        x32 = x.astype(wide(x.dtype))
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.epsilon)
        scale = layout.gather(self.scale)
        if self.offset:
            scale = self.offset + scale.astype(x32.dtype)
        return _scale(x32, scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias, computed in float32 (arXiv:1607.06450)."""

    def __init__(self, config, layout: Layout, over: str = "batch residual_seq"):
        self.epsilon = config.norm_epsilon
        shape = (config.embed_dim,)
        self.scale = layout.param(constant(1.0), shape, "norm", over)
        self.bias = layout.param(constant(0.0), shape, "norm", over) if config.biases else None

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        x32 = x.astype(wide(x.dtype))
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.epsilon)
        x32 = _scale(x32, layout.gather(self.scale))
        if self.bias is not None:
            x32 = layout.add_bias("bs,d->bsd", x32, layout.gather(self.bias))
        return x32.astype(x.dtype)


def _scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale over the last dimension, as a product whose gradient can stay unreduced."""
    letters = "abcd"[: x.ndim - 1]
    return ghost.einsum(f"{letters}z,z->{letters}z", x, scale.astype(x.dtype))


def rotary_table(positions_BS: jax.Array, frequencies_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, S, C/2] of the rotary angles, in jax's float (float32)."""
    angles_BSC = positions_BS[..., None].astype(float) * frequencies_C
    return jnp.cos(angles_BSC), jnp.sin(angles_BSC)


def rotate(x_BSHC: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, halves convention (arXiv:2104.09864 as in Hugging Face)."""
    cos, sin = (t[:, :, None, :] for t in table)
    first, second = jnp.split(x_BSHC.astype(wide(x_BSHC.dtype)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSHC.dtype)


class SelfAttention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions, and its projections.

    `norm` is that of queries and keys, per head, or None; `biases` are those of queries, keys and
    values; `query_scale` multiplies queries, beyond the 1 / sqrt(C) of every backend.
    """

    def __init__(
        self, config, layout: Layout, keys: jax.Array, *, window: int, softcap: float = 0.0,
        norm: Callable | None = None, biases: bool = False, query_scale: float = 1.0,
    ):  # fmt: skip
        c = config
        std, std_out = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
        D, H, K, C = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        self.softcap, self.window, self.query_scale = softcap, window, query_scale
        self.q = layout.param(normal(keys[0], std), (D, H, C), "embed heads head_dim")
        self.k = layout.param(normal(keys[1], std), (D, K, C), "embed kv_heads head_dim")
        self.v = layout.param(normal(keys[2], std), (D, K, C), "embed kv_heads head_dim")
        self.o = layout.param(normal(keys[3], std_out), (H, C, D), "heads head_dim embed")
        bias = lambda *shape_dims: layout.param(constant(0.0), *shape_dims) if biases else None
        self.q_bias = bias((H, C), "heads head_dim")
        self.k_bias, self.v_bias = (bias((K, C), "kv_heads head_dim") for _ in "kv")
        self.q_norm = norm(c, layout, C, "batch seq heads") if norm else None
        self.k_norm = norm(c, layout, C, "batch seq kv_heads") if norm else None

    @staticmethod
    def cache(config) -> Cache:
        """Keys and values of each token."""
        shape = (config.num_kv_heads, config.head_dim)
        return ((CACHE, shape), (CACHE, shape))

    @jax.named_scope("projections")
    def __call__(self, x_BSD, table, segments_BS, layout: Layout, cache=None):
        """What attention adds to the residual stream, of its normalised copy; and the cache."""
        s, w = layout, layout.gather
        x_BSD = s.move(x_BSD, "batch seq _", over="kv_heads")
        add = lambda y, bias: y if bias is None else s.add_bias("bs,hc->bshc", y, w(bias))
        q_BSHC = add(s.dot("bsd,dhc->bshc", x_BSD, w(self.q)), self.q_bias)
        k_BSKC = add(s.dot("bsd,dkc->bskc", x_BSD, w(self.k)), self.k_bias)
        v_BSKC = add(s.dot("bsd,dkc->bskc", x_BSD, w(self.v)), self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHC, k_BSKC = self.q_norm(q_BSHC, s), self.k_norm(k_BSKC, s)
        if self.query_scale != 1:
            q_BSHC = q_BSHC * self.query_scale
        q_BSHC = checkpoint_name(rotate(q_BSHC, table), "query")
        k_BSKC = checkpoint_name(rotate(k_BSKC, table), "key")
        v_BSKC = checkpoint_name(v_BSKC, "value")
        a_BSHC, cache = attention.attend(
            q_BSHC, k_BSKC, v_BSKC, segments_BS, layout, self.softcap, self.window, cache
        )
        return s.dot("bshc,hcd->bsd", a_BSHC, w(self.o), out="batch residual_seq _"), cache


def gated_weights(config, layout: Layout, keys: jax.Array, width: int) -> tuple[nnx.Param, ...]:
    """The weights (gate, up, down) of a gated MLP of this width."""
    c, D = config, config.embed_dim
    std, std_out = c.init_std, c.init_std / (2 * c.num_layers) ** 0.5
    return (
        layout.param(normal(keys[0], std), (D, width), "embed mlp"),
        layout.param(normal(keys[1], std), (D, width), "embed mlp"),
        layout.param(normal(keys[2], std_out), (width, D), "mlp embed"),
    )


@jax.named_scope("mlp")
def gated_mlp(x_BSD, weights, layout: Layout, activation=jax.nn.silu) -> jax.Array:
    """What a gated MLP (arXiv:2002.05202) adds to the residual stream."""
    s, (gate, up, down) = layout, (layout.gather(weight) for weight in weights)
    x_BSD = s.move(x_BSD, "batch seq _", over="mlp")
    gate_BSF = checkpoint_name(s.dot("bsd,df->bsf", x_BSD, gate), "mlp")
    up_BSF = checkpoint_name(s.dot("bsd,df->bsf", x_BSD, up), "mlp")
    return s.dot("bsf,fd->bsd", activation(gate_BSF) * up_BSF, down, out="batch residual_seq _")


class GatedMLP(nnx.Module):
    """A gated MLP that has its weights (Llama's block has them itself: its checkpoints do)."""

    def __init__(self, config, layout: Layout, keys: jax.Array, width: int, activation=jax.nn.silu):
        self.gate, self.up, self.down = gated_weights(config, layout, keys, width)
        self.activation = activation

    def __call__(self, x_BSD, layout: Layout) -> jax.Array:
        return gated_mlp(x_BSD, (self.gate, self.up, self.down), layout, self.activation)


def check_rotary(model: cfg.Model, *keys: str) -> None:
    """Raise UserError where heads cannot be rotated; `keys` of the model must be above 0."""
    if model.head_dim % 2:
        near = " or ".join(str(n) for n in (model.head_dim - 1, model.head_dim + 1) if n)
        raise cfg.UserError(f"model.head_dim={model.head_dim} must be even to rotate; use {near}")
    for key in keys:
        if getattr(model, key) <= 0:
            raise cfg.UserError(f"model.{key}={getattr(model, key)} must be above 0")


def rotary_positions(positions_BS: jax.Array, head_dim: int, theta: float, factor: float = 1.0):
    """The rotary table of these positions; `factor` stretches every wavelength."""
    frequencies = np.array(rotary_frequencies(head_dim, theta)) / factor
    return rotary_table(positions_BS, jnp.asarray(frequencies, jnp.float32))


@functools.lru_cache
def rotary_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """Angular frequencies theta^(-2i/C), radians per token."""
    return tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2))


def stretch_llama3(
    frequency: float, factor: float, low: float, high: float, original_length: int
) -> float:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / frequency
    if wavelength < original_length / high:
        return frequency
    if wavelength > original_length / low:
        return frequency / factor
    keep = (original_length / wavelength - low) / (high - low)
    return (1 - keep) * frequency / factor + keep * frequency
