"""Norms, initialisers and rotary positions: the pieces that families share.

Shapes: B batch, S sequence, D embed, H query heads, C head_dim.
"""

from __future__ import annotations

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.sharding import Layout


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
    """x / rms(x) * scale, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, config, layout: Layout, size: int = 0, over: str = "batch residual_seq"):
        self.epsilon = config.norm_epsilon
        self.scale = layout.param(constant(1.0), (size or config.embed_dim,), "norm", over)

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.epsilon)
        return _scale(x32, layout.gather(self.scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias, computed in float32 (arXiv:1607.06450)."""

    def __init__(self, config, layout: Layout, over: str = "batch residual_seq"):
        self.epsilon = config.norm_epsilon
        shape = (config.embed_dim,)
        self.scale = layout.param(constant(1.0), shape, "norm", over)
        self.bias = layout.param(constant(0.0), shape, "norm", over) if config.biases else None

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.epsilon)
        x32 = _scale(x32, layout.gather(self.scale))
        if self.bias is not None:
            x32 = layout.add_bias("bs,d->bsd", x32, layout.gather(self.bias))
        return x32.astype(x.dtype)


def _scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale over the last dimension, as a product whose gradient can stay unreduced."""
    letters = "abcd"[: x.ndim - 1]
    return jnp.einsum(f"{letters}z,z->{letters}z", x, scale.astype(x.dtype))


def rotary_table(positions_BS: jax.Array, frequencies_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, S, C/2] of the rotary angles, float32."""
    angles_BSC = positions_BS[..., None].astype(jnp.float32) * frequencies_C
    return jnp.cos(angles_BSC), jnp.sin(angles_BSC)


def rotate(x_BSHC: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, halves convention (arXiv:2104.09864 as in Hugging Face)."""
    cos, sin = (t[:, :, None, :] for t in table)
    first, second = jnp.split(x_BSHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSHC.dtype)


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
