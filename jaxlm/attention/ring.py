"""Causal attention with the sequence split over devices: keys and values come to the queries.

With n devices a row is cut into 2n pieces and device i holds pieces i and 2n-1-i, its low and its
high one (`sharding.sequence_order`). Of another device's keys the high queries see the low piece
whole, and then either the low queries see it too (that device comes before) or the high queries
see the high piece (it comes after): two products of piece and piece, on every device, every step.

Shapes: B batch, S sequence, p tokens of a piece, N chunks, s queries of a chunk, t keys of a piece,
H query heads, K kv heads, G queries per kv head, C head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm.attention.xla import visible
from jaxlm.sharding import Layout, wide


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a product of pieces needs to know; static."""

    axes: tuple[str, ...]  # that split the sequence
    devices: int  # along them
    gathered: bool  # keys and values are all-gathered; else they go round the ring
    chunk: int
    softcap: float
    window: int


class Queries(NamedTuple):
    """A piece of queries, and for the backward pass what came of them."""

    start: jax.Array  # place in the row of the first
    ids_Bp: jax.Array | None
    q_BpKGC: jax.Array
    grad_BpKGC: jax.Array | None = None
    lse_BpKG: jax.Array | None = None  # log of the sum of exp(scores)
    delta_BpKG: jax.Array | None = None  # output times its gradient, summed over C


class Keys(NamedTuple):
    """A piece of keys and values."""

    start: jax.Array
    ids_Bp: jax.Array | None
    k_BpKC: jax.Array
    v_BpKC: jax.Array


def attend(
    q_BSHC, k_BSKC, v_BSKC, segments_BS, layout: Layout, softcap: float, window: int
) -> jax.Array:
    """As xla.attend, of a split sequence in zig-zag order (Liu et al., arXiv:2310.01889)."""
    k_BSKC, v_BSKC = (fit_heads(x, layout, layout.size("heads")) for x in (k_BSKC, v_BSKC))
    options = layout.attention
    axes, devices = layout.dim_axes("seq"), layout.size("seq")
    rule = Rule(axes, devices, options.context == "all_gather", options.chunk, softcap, window)
    spec, rows = layout.spec("batch seq heads _"), layout.spec("batch seq")
    specs = (spec, spec, spec, None if segments_BS is None else rows)
    # Mapped, because a ring is a program of one device: what to send on, and what to do meanwhile.
    local = functools.partial(_local, rule)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(q_BSHC, k_BSKC, v_BSKC, segments_BS)


def fit_heads(x_BSKC, layout: Layout, ways: int) -> jax.Array:
    """kv heads repeated to the least number that `ways` divides, and split as query heads are."""
    batch, length, heads, width = x_BSKC.shape
    b, s, h, c = jax.typeof(x_BSKC).sharding.spec
    times = math.lcm(heads, ways) // heads
    if times > 1:
        x_BSKTC = jnp.broadcast_to(x_BSKC[:, :, :, None], (batch, length, heads, times, width))
        shape = (batch, length, heads * times, width)
        x_BSKC = jnp.reshape(x_BSKTC, shape, out_sharding=P(b, s, h, c))
    return reshard(x_BSKC, P(b, s, layout.spec("heads")[0], c))


def attend_whole(
    q_BSHC, k_BSKC, v_BSKC, segments_BS, layout: Layout, softcap: float, window: int, attend
) -> jax.Array:
    """All heads of a part of the sequence become a part of the heads of all of it, and back.

    By one all-to-all for each array (Ulysses, Jacobs et al., arXiv:2309.14509); `attend` is the
    backend in between. A piece of tensor's heads is split further over the axes of the sequence.
    """
    heads = layout.dim_axes("heads") + layout.dim_axes("seq")
    whole = layout.replace(seq=(), heads=heads, kv_heads=heads)
    ways = whole.size("heads")
    k_BSKC, v_BSKC = (fit_heads(x, layout, ways) for x in (k_BSKC, v_BSKC))
    q_BSHC, k_BSKC, v_BSKC = (whole.move(x, "batch seq heads _") for x in (q_BSHC, k_BSKC, v_BSKC))
    segments_BS = None if segments_BS is None else whole.move(segments_BS, "batch seq")
    out_BSHC = attend(q_BSHC, k_BSKC, v_BSKC, segments_BS, whole, softcap, window)
    return layout.move(out_BSHC, "batch seq heads _")


# Local shards below: S is the part of the row that this device holds, two pieces of p tokens.


# The backward pass goes round once more. Differentiated step by step it would keep the keys and
# values of every device.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local(rule: Rule, q_BSHC, k_BSKC, v_BSKC, ids_BS):
    return _local_forward(rule, q_BSHC, k_BSKC, v_BSKC, ids_BS)[0]


def _save(rule: Rule, q_BSHC, k_BSKC, v_BSKC, ids_BS):
    out_BSHC, lse_BSH = _local_forward(rule, q_BSHC, k_BSKC, v_BSKC, ids_BS)
    out_BSHC = checkpoint_name(out_BSHC, "attention")
    lse_BSH = checkpoint_name(lse_BSH, "attention")
    return out_BSHC, (q_BSHC, k_BSKC, v_BSKC, ids_BS, out_BSHC, lse_BSH)


def _pull(rule: Rule, residuals, grad_BSHC):
    q_BSHC, k_BSKC, v_BSKC, ids_BS, out_BSHC, lse_BSH = residuals
    grads = _local_backward(rule, q_BSHC, k_BSKC, v_BSKC, ids_BS, out_BSHC, lse_BSH, grad_BSHC)
    return *grads, None


_local.defvjp(_save, _pull)


def _local_forward(rule: Rule, q_BSHC, k_BSKC, v_BSKC, ids_BS):
    """Output [B, S, H, C], and the log of the sum of exp(scores) [B, S, H]."""
    me, ids_BS, q_BSHC = _pinned(rule, ids_BS, q_BSHC)
    low, high = _halves(rule, me, Queries, ids_BS, _grouped(q_BSHC, k_BSKC))

    def own(blocks):  # the diagonal: a query sees itself, so every sum is above 0 from here on
        k_low, k_high = _halves(rule, me, Keys, *blocks)
        of_high = _merge(_forward(rule, high, k_high), _forward(rule, high, k_low))
        return _forward(rule, low, k_low), of_high

    def other(step, blocks, sums):
        before, (k_low, k_high) = _source(rule, me, step, blocks)
        of_low, of_high = sums
        of_high = _merge(of_high, _forward(rule, high, k_low))
        pick = functools.partial(_where, before)
        new = _merge(pick(of_low, of_high), _forward(rule, pick(low, high), pick(k_low, k_high)))
        return pick(new, of_low), pick(of_high, new)

    sums = _visit(rule, me, (ids_BS, k_BSKC, v_BSKC), own, other)
    out_BSKGC, lse_BSKG = (jnp.concatenate(pair, 1) for pair in zip(*sums, strict=True))
    out_BSHC = out_BSKGC.reshape(q_BSHC.shape).astype(q_BSHC.dtype)
    return out_BSHC, lse_BSKG.reshape(q_BSHC.shape[:3])


def _local_backward(rule: Rule, q_BSHC, k_BSKC, v_BSKC, ids_BS, out_BSHC, lse_BSH, grad_BSHC):
    """Gradients of q, k, v; those of k and v are summed in `wide` as they go round."""
    me, ids_BS, q_BSHC = _pinned(rule, ids_BS, q_BSHC)
    wide_type = wide(q_BSHC.dtype)
    delta_BSH = jnp.sum(out_BSHC.astype(wide_type) * grad_BSHC.astype(wide_type), -1)
    facts = (_grouped(x, k_BSKC) for x in (q_BSHC, grad_BSHC, lse_BSH, delta_BSH))
    low, high = _halves(rule, me, Queries, ids_BS, *facts)

    def own(blocks):
        k_low, k_high = _halves(rule, me, Keys, *blocks)
        q_low, of_low = _backward(rule, low, k_low)
        q_high, of_high = _backward(rule, high, k_high)
        q_more, of_more = _backward(rule, high, k_low)
        return (q_low, q_high + q_more), _pieces(_add(of_low, of_more), of_high)

    def other(step, blocks, grads):
        before, (k_low, k_high) = _source(rule, me, step, blocks)
        q_low, q_high = grads
        q_more, of_low = _backward(rule, high, k_low)
        pick = functools.partial(_where, before)
        q_new, of_new = _backward(rule, pick(low, high), pick(k_low, k_high))
        zero = functools.partial(jax.tree.map, jnp.zeros_like)
        of_low = _add(of_low, pick(of_new, zero(of_new)))
        q_high = q_high + q_more + pick(zero(q_new), q_new)
        return (q_low + pick(q_new, zero(q_new)), q_high), _pieces(
            of_low, pick(zero(of_new), of_new)
        )

    grads, (dk_BSKC, dv_BSKC) = _visit_back(rule, me, (ids_BS, k_BSKC, v_BSKC), own, other)
    dq_BSHC = jnp.concatenate(grads, 1).reshape(q_BSHC.shape)
    return tuple(x.astype(q_BSHC.dtype) for x in (dq_BSHC, dk_BSKC, dv_BSKC))


def _pinned(rule: Rule, ids_BS, q_BSHC):
    """The device's place in the ring, segments and queries, known all at once.

    Places and segments are the same in every layer. Known before the queries, the scan over layers
    would take what follows of them, the masks of all steps, out of its loop and hold them.
    """
    return jax.lax.optimization_barrier((jax.lax.axis_index(rule.axes), ids_BS, q_BSHC))


def _visit(rule: Rule, me, blocks, own, other):
    """own(blocks), then other(step, blocks of device me - step, sums) for the n-1 others.

    The next blocks are under way while these are worked on.
    """
    if rule.gathered:
        whole = _gather(rule, blocks)
        visit = lambda step, sums: other(step, _take(whole, (me - step) % rule.devices), sums)
        return jax.lax.fori_loop(1, rule.devices, visit, own(blocks))

    def body(step, carry):
        blocks, sums = carry
        return _shift(rule, blocks), other(step, blocks, sums)

    last = rule.devices - 1
    carry = _shift(rule, blocks), own(blocks)
    blocks, sums = jax.lax.fori_loop(1, last, body, carry)
    return other(last, blocks, sums)


def _visit_back(rule: Rule, me, blocks, own, other):
    """As `_visit`; `own` and `other` also return what they add to the gradients of the blocks."""
    grads, sums = own(blocks)
    last = rule.devices - 1
    if rule.gathered:
        whole = _gather(rule, blocks)
        put = lambda old, place, new: jax.tree.map(lambda x, y: x.at[place].add(y), old, new)
        zeros = jax.tree.map(lambda x: jnp.zeros((rule.devices, *x.shape), x.dtype), sums)

        def visit(step, carry):
            grads, sums = carry
            source = (me - step) % rule.devices
            grads, more = other(step, _take(whole, source), grads)
            return grads, put(sums, source, more)

        grads, sums = jax.lax.fori_loop(1, rule.devices, visit, (grads, put(zeros, me, sums)))
        # A reduce-scatter in two parts: jax cannot lower it under vmap over another mesh axis.
        home = lambda x: jnp.sum(jax.lax.all_to_all(x, rule.axes, 0, 0, tiled=True), 0)
        return grads, jax.tree.map(home, sums)

    def body(step, carry):
        blocks, grads, sums = carry
        came = _shift(rule, sums)
        grads, more = other(step, blocks, grads)
        return _shift(rule, blocks), grads, _add(came, more)

    carry = _shift(rule, blocks), grads, sums
    blocks, grads, sums = jax.lax.fori_loop(1, last, body, carry)
    came = _shift(rule, sums)
    grads, more = other(last, blocks, grads)
    return grads, _shift(rule, _add(came, more))  # home again


def _shift(rule: Rule, blocks):
    """To the next device of the ring, from the one before."""
    ring = [(i, (i + 1) % rule.devices) for i in range(rule.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, rule.axes, ring), blocks)


def _gather(rule: Rule, blocks):
    return jax.tree.map(lambda x: jax.lax.all_gather(x, rule.axes), blocks)


def _take(whole, place):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), whole)


def _source(rule: Rule, me, step, blocks):
    """Whether the device that these blocks are of comes before this one, and its two pieces."""
    source = (me - step) % rule.devices
    return source < me, _halves(rule, source, Keys, *blocks)


def _halves(rule: Rule, device, kind, ids_BS, *arrays):
    """The low and the high piece of what a device holds, each with its place in the row."""
    p = arrays[0].shape[1] // 2
    starts = device * p, (2 * rule.devices - 1 - device) * p
    cut = lambda x, half: None if x is None else x[:, half * p : (half + 1) * p]
    return tuple(
        kind(start, *(cut(x, half) for x in (ids_BS, *arrays))) for half, start in enumerate(starts)
    )


def _grouped(x_BSHC, k_BSKC):
    """[B, S, H, ...] as [B, S, K, G, ...]."""
    batch, length, heads, *rest = x_BSHC.shape
    kv_heads = k_BSKC.shape[2]
    return x_BSHC.reshape(batch, length, kv_heads, heads // kv_heads, *rest)


def _where(condition, first, second):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), first, second)


def _add(first, second):
    return jax.tree.map(jnp.add, first, second)


def _pieces(low, high):
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), low, high)


def _merge(first, second):
    """The softmax over two sets of keys, from (output, logsumexp) over each."""
    (out_BpKGC, lse_BpKG), (other_BpKGC, other_BpKG) = first, second
    both_BpKG = jnp.logaddexp(lse_BpKG, other_BpKG)
    part = lambda out, lse: out * jnp.exp(lse - both_BpKG)[..., None]
    return part(out_BpKGC, lse_BpKG) + part(other_BpKGC, other_BpKG), both_BpKG


def _scores(rule: Rule, queries: Queries, keys: Keys, places_s):
    """(masked scores, tanh of the soft cap) of a chunk, [B, K, G, s, t]; `wide`."""
    q_BsKGC, k_BtKC = queries.q_BpKGC, keys.k_BpKC
    scores_BKGst = jnp.einsum(  # in the order of the scores, as in xla.py
        "bkgsc,btkc->bkgst", jnp.moveaxis(q_BsKGC, 1, 3), k_BtKC,
        preferred_element_type=wide(q_BsKGC.dtype),
    )  # fmt: skip
    scores_BKGst *= q_BsKGC.shape[-1] ** -0.5
    tanh_BKGst = None
    if rule.softcap:
        tanh_BKGst = jnp.tanh(scores_BKGst / rule.softcap)
        scores_BKGst = rule.softcap * tanh_BKGst
    mask_Bst = visible(places_s, keys.start + jnp.arange(k_BtKC.shape[1]), rule.window)[None]
    if queries.ids_Bp is not None and keys.ids_Bp is not None:
        mask_Bst = mask_Bst & (queries.ids_Bp[:, :, None] == keys.ids_Bp[:, None, :])
    low = jnp.finfo(scores_BKGst.dtype).min
    return jnp.where(mask_Bst[:, None, None], scores_BKGst, low), tanh_BKGst


def _forward(rule: Rule, queries: Queries, keys: Keys):
    """softmax(q k / sqrt(C)) v over these keys [B, p, K, G, C], and its logsumexp; `wide`."""

    def one(chunk):
        places_s, queries = chunk
        scores_BKGst, _ = _scores(rule, queries, keys, places_s)
        top_BKGs = jnp.max(scores_BKGst, -1)
        weights_BKGst = jnp.exp(scores_BKGst - top_BKGs[..., None])
        total_BsKG = jnp.moveaxis(jnp.sum(weights_BKGst, -1), 3, 1)
        out_BsKGC = jnp.einsum(
            "bkgst,btkc->bskgc", weights_BKGst.astype(keys.v_BpKC.dtype), keys.v_BpKC,
            preferred_element_type=weights_BKGst.dtype,
        )  # fmt: skip
        lse_BsKG = jnp.moveaxis(top_BKGs, 3, 1) + jnp.log(total_BsKG)
        return out_BsKGC / total_BsKG[..., None], lse_BsKG

    length = queries.q_BpKGC.shape[1]
    run = lambda: jax.tree.map(lambda x: _join(x, length), jax.lax.map(one, _chunks(rule, queries)))
    lowest = float(jnp.finfo(wide(queries.q_BpKGC.dtype)).min)
    return _unless_hidden(rule, queries, keys, run, lowest)


def _backward(rule: Rule, queries: Queries, keys: Keys):
    """dq [B, p, K, G, C] and (dk, dv) [B, p, K, C] through these keys; `wide`.

    Scores are computed anew, chunk by chunk (Dao et al., arXiv:2205.14135, algorithm 4).
    """
    dtype = queries.q_BpKGC.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=wide(dtype))

    def one(sums, chunk):
        places_s, part = chunk
        heads = lambda x_BsKG: jnp.moveaxis(x_BsKG, 1, 3)[..., None]
        scores_BKGst, tanh_BKGst = _scores(rule, part, keys, places_s)
        p_BKGst = jnp.exp(scores_BKGst - heads(part.lse_BpKG))
        grad_BKGsC = jnp.moveaxis(part.grad_BpKGC, 1, 3)
        dp_BKGst = product("bkgsc,btkc->bkgst", grad_BKGsC, keys.v_BpKC)
        ds_BKGst = p_BKGst * (dp_BKGst - heads(part.delta_BpKG))
        if tanh_BKGst is not None:
            ds_BKGst *= 1 - tanh_BKGst**2
        ds_BKGst = (ds_BKGst * part.q_BpKGC.shape[-1] ** -0.5).astype(dtype)
        dk = product("bkgst,bskgc->btkc", ds_BKGst, part.q_BpKGC)
        dv = product("bkgst,bkgsc->btkc", p_BKGst.astype(dtype), grad_BKGsC)
        return _add(sums, (dk, dv)), product("bkgst,btkc->bskgc", ds_BKGst, keys.k_BpKC)

    zeros = jnp.zeros(keys.k_BpKC.shape, wide(dtype))

    def run():
        sums, dq = jax.lax.scan(one, (zeros, zeros), _chunks(rule, queries))
        return _join(dq, queries.q_BpKGC.shape[1]), sums

    return _unless_hidden(rule, queries, keys, run, 0.0)


def _unless_hidden(rule: Rule, queries: Queries, keys: Keys, run, fill: float):
    """run(), or `fill` where all keys lie before the window of all queries."""
    if not rule.window:
        return run()
    last = keys.start + keys.k_BpKC.shape[1] - 1
    filled = lambda: jax.tree.map(lambda x: jnp.full(x.shape, fill, x.dtype), jax.eval_shape(run))
    return jax.lax.cond(last > queries.start - rule.window, run, filled)


def _chunks(rule: Rule, queries: Queries):
    """(places in the row [N, s], queries with [N, B, s, ...]): padded at the end."""
    length = queries.q_BpKGC.shape[1]
    count = -(-length // rule.chunk)
    size = -(-length // count)

    def split(x_Bp):
        x_Bp = jnp.pad(x_Bp, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x_Bp.ndim - 2))
        x_BNs = x_Bp.reshape(x_Bp.shape[0], count, size, *x_Bp.shape[2:])
        return jnp.moveaxis(x_BNs, 1, 0)

    places_Ns = queries.start + jnp.arange(count * size).reshape(count, size)
    arrays = jax.tree.map(split, queries._replace(start=None))
    return places_Ns, arrays


def _join(x_NBs, length: int):
    """[N, B, s, ...] as [B, p, ...]."""
    x_BNs = jnp.moveaxis(x_NBs, 0, 1)
    return x_BNs.reshape(x_BNs.shape[0], -1, *x_BNs.shape[3:])[:, :length]
