"""Attention over chunks of queries, recomputed in the backward pass: memory grows with T, not S*T.

Shapes: B batch, S queries, T keys, N chunks, s queries of a chunk, t keys up to the last of a span,
H query heads, K kv heads, C head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.attention.xla import masked_attention, visible
from jaxlm.sharding import Layout, wide

SPANS = 4  # runs of chunks, each with the keys up to its end (5/8 of all keys), from its window on


def attend(
    q_BSHC, k_BTKC, v_BTKC, segments_BS, layout: Layout, softcap: float, window: int
) -> jax.Array:
    """As xla.attend, one chunk of queries at a time (Rabe and Staats, arXiv:2112.05682)."""
    length, dtype = q_BSHC.shape[1], k_BTKC.dtype
    count = -(-length // layout.attention.chunk)
    size = -(-length // count)
    q_NBsHC = _split(q_BSHC, count, size)
    ids_NBs = None if segments_BS is None else _split(segments_BS, count, size)
    # `wide` here is the type in which the gradients of all chunks are summed.
    k_BTKC, v_BTKC = k_BTKC.astype(wide(dtype)), v_BTKC.astype(wide(dtype))

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=5)
    def one(q_BsHC, ids_Bs, start, k_BtKC, v_BtKC, low):
        # The mask depends on no weight, so autodiff would make it ahead and keep it, as large as
        # the scores of all chunks; behind a barrier with the queries it is made again.
        q_BsHC, ids_Bs, start = jax.lax.optimization_barrier((q_BsHC, ids_Bs, start))
        queries_s, keys_t = start + jnp.arange(size), low + jnp.arange(k_BtKC.shape[1])
        mask_Bst = visible(queries_s, keys_t, window)[None]
        if segments_BS is not None:
            mask_Bst = mask_Bst & (
                ids_Bs[:, :, None] == segments_BS[:, None, low : low + keys_t.size]
            )
        k_BtKC, v_BtKC = k_BtKC.astype(dtype), v_BtKC.astype(dtype)
        return masked_attention(q_BsHC, k_BtKC, v_BtKC, mask_Bst, layout, softcap)

    outs = []
    bounds = [count * i // SPANS for i in range(SPANS + 1)]
    for first, last in zip(bounds, bounds[1:], strict=False):
        low = max(0, first * size - window + 1) if window else 0
        keys = (k_BTKC[:, low : last * size], v_BTKC[:, low : last * size], low)
        step = lambda _, chunk, keys=keys: (None, one(*chunk, *keys))
        starts = size * jnp.arange(first, last)
        ids = None if ids_NBs is None else ids_NBs[first:last]
        if first < last:
            outs.append(jax.lax.scan(step, None, (q_NBsHC[first:last], ids, starts))[1])
    return _join(jnp.concatenate(outs), length)


def _split(x_BS, count: int, size: int) -> jax.Array:
    """[B, S, ...] -> [N, B, s, ...], padded at the end."""
    batch, length, *rest = x_BS.shape
    b, s, *r = jax.typeof(x_BS).sharding.spec
    x_BS = jnp.pad(x_BS, [(0, 0), (0, count * size - length)] + [(0, 0)] * len(rest))
    x_BNs = jnp.reshape(x_BS, (batch, count, size, *rest), out_sharding=P(b, None, s, *r))
    return jnp.moveaxis(x_BNs, 1, 0)


def _join(x_NBs, length: int) -> jax.Array:
    """The inverse of `_split`."""
    count, batch, size, *rest = x_NBs.shape
    _, b, s, *r = jax.typeof(x_NBs).sharding.spec
    x_BNs = jnp.moveaxis(x_NBs, 0, 1)
    return jnp.reshape(x_BNs, (batch, count * size, *rest), out_sharding=P(b, s, *r))[:, :length]
