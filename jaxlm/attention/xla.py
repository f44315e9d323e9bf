"""Attention in plain JAX: scores are held whole, so memory grows with S*T.

Shapes: B batch, S queries, T keys, H query heads, K kv heads, G queries per kv head, C head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.sharding import Layout, wide_einsum

CACHE = "cache_batch cache_seq cache_kv_heads head_dim"  # keys and values of a layer


def attend(
    q_BSHC, k_BTKC, v_BTKC, segments_BS, layout: Layout, softcap: float, window: int
) -> jax.Array:
    """Causal attention; a query sees keys of its own segment at or before it.

    With a window it sees that many at most, itself included (arXiv:2310.06825, section 2).
    """
    places = jnp.arange(q_BSHC.shape[1])
    mask_BST = visible(places, places, window)[None]
    if segments_BS is not None:
        mask_BST = mask_BST & (segments_BS[:, :, None] == segments_BS[:, None, :])
    return masked_attention(q_BSHC, k_BTKC, v_BTKC, mask_BST, layout, softcap)


def masked_attention(q_BSHC, k_BTKC, v_BTKC, mask_BST, layout: Layout, softcap: float) -> jax.Array:
    """softmax(q k / sqrt(C)) v where the mask is true; scores and softmax in float32."""
    q_BSKGC, k_BTKC, v_BTKC = group_heads(q_BSHC, k_BTKC, v_BTKC, layout)
    # In the order of the scores: queries are small to transpose, XLA:GPU would do it to scores.
    q_BKGSC = jnp.moveaxis(q_BSKGC, 1, 3)
    scores_BKGST = wide_einsum("bkgsc,btkc->bkgst", q_BKGSC, k_BTKC)
    scores_BKGST *= q_BSHC.shape[-1] ** -0.5
    if softcap:
        scores_BKGST = softcap * jnp.tanh(scores_BKGST / softcap)
    scores_BKGST = jnp.where(
        mask_BST[:, None, None], scores_BKGST, jnp.finfo(scores_BKGST.dtype).min
    )
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(v_BTKC.dtype)
    out_BKGSC = jnp.einsum("bkgst,btkc->bkgsc", weights_BKGST, v_BTKC)
    out_BSKGC = jnp.moveaxis(out_BKGSC, 3, 1)
    return jnp.reshape(out_BSKGC, q_BSHC.shape, out_sharding=jax.typeof(q_BSHC).sharding.spec)


def visible(queries_S, keys_T, window: int) -> jax.Array:
    """Which keys [S, T] each query sees, by their places in the row; window 0: all before it."""
    mask_ST = queries_S[:, None] >= keys_T[None, :]
    return mask_ST & (keys_T[None, :] > queries_S[:, None] - window) if window else mask_ST


def visible_pairs(length: int, window: int) -> int:
    """How many (query, key) pairs `visible` shows in a row of this length."""
    seen = min(window or length, length)  # by a query, at most; the first ones see fewer
    return length * seen - seen * (seen - 1) // 2


def group_heads(q_BSHC, k_BTKC, v_BTKC, layout: Layout):
    """Queries as [B, S, K, G, C]; kv heads replicated over tensor are copied to each query."""
    batch, length, heads, width = q_BSHC.shape
    if layout.dim_axes("kv_heads") != layout.dim_axes("heads"):
        k_BTKC, v_BTKC = (repeat_heads(x, heads, layout) for x in (k_BTKC, v_BTKC))
    kv_heads = k_BTKC.shape[2]
    b, s, h, c = jax.typeof(q_BSHC).sharding.spec
    q_BSKGC = jnp.reshape(
        q_BSHC,
        (batch, length, kv_heads, heads // kv_heads, width),
        out_sharding=P(b, s, h, None, c),
    )
    return q_BSKGC, k_BTKC, v_BTKC


def repeat_heads(x_BTKC, heads: int, layout: Layout) -> jax.Array:
    """Replicated kv heads copied to every query head, then sharded like those: no communication."""
    batch, length, kv_heads, width = x_BTKC.shape
    b, t, _, c = jax.typeof(x_BTKC).sharding.spec
    shape = (batch, length, kv_heads, heads // kv_heads, width)
    wide = jnp.broadcast_to(x_BTKC[:, :, :, None], shape)
    wide = jnp.reshape(wide, (batch, length, heads, width), out_sharding=P(b, t, None, c))
    return jax.sharding.reshard(wide, P(b, t, layout.spec("heads")[0], c))


def attend_cached(
    q_BSHC, k_BSKC, v_BSKC, layout: Layout, softcap: float, window: int, cache, whole
):
    """Write keys and values into the cache, then attend to everything up to each query.

    `cache` is (k_BTKC, v_BTKC, positions_BS). One token per row is a step of decoding, each row at
    its own position; more are the prompt, at 0 .. S-1 in every row, which `whole` attends over. The
    cache has axes of its own.
    """
    *old, positions_BS = cache
    length, slots = q_BSHC.shape[1], old[0].shape[1]
    if length > 1:
        pad = [(0, 0), (0, slots - length), (0, 0), (0, 0)]
        k_BTKC, v_BTKC = (layout.move(jnp.pad(x, pad), CACHE) for x in (k_BSKC, v_BSKC))
        out_BSHC = whole(q_BSHC, k_BSKC, v_BSKC, None, layout, softcap, window)
        return out_BSHC, (k_BTKC, v_BTKC)
    slots_T = jnp.arange(slots)
    here_BT = slots_T == layout.move(positions_BS, "cache_batch _")
    one = lambda x_B1KC: layout.move(x_B1KC, CACHE.replace("cache_seq", "_"))
    write = lambda new, old: jnp.where(here_BT[:, :, None, None], one(new), old)
    k_BTKC, v_BTKC = kept = write(k_BSKC, old[0]), write(v_BSKC, old[1])
    k_BTKC, v_BTKC = (layout.move(x, "batch _ kv_heads head_dim") for x in kept)
    mask_BST = slots_T <= positions_BS[:, :, None]
    if window:
        mask_BST &= slots_T > positions_BS[:, :, None] - window
    return masked_attention(q_BSHC, k_BTKC, v_BTKC, mask_BST, layout, softcap), kept
