"""Routed experts: tokens travel to the devices that hold their experts, and back.

Written for one device and its peers (shard_map). Tables made from the router's choices say which
row goes where, and `take_sum` moves rows by such a table and its inverse.

Shapes: B batch, S sequence, D embed, F expert_mlp, K choices per token, E experts, C slots of an
expert per sequence. Local inside shard_map: b, s, n = b*s tokens, N = n*K choices, e experts of one
device, p peers, m rows from a peer at most, R rows of a buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, reshard
from jax.sharding import PartitionSpec as P

from jaxlm.sharding import PRODUCT, SUMMED, Layout, sequence_order, wide


def choose(mesh: Mesh) -> str:
    """How rows are exchanged on these devices: XLA for CPU has no ragged all-to-all."""
    return "padded" if mesh.devices.flat[0].platform == "cpu" else "ragged"


def dropless(x_BSD, expert_BSK, gate_BSK, weights: tuple, layout: Layout) -> jax.Array:
    """Sum over each token's choices of gate * expert(x): [B, S, D]; no choice is dropped.

    Rows sorted by expert meet them in one grouped product (MegaBlocks, arXiv:2211.15841).
    """
    axes, ragged = layout.dim_axes("experts"), layout.experts == "ragged"

    def local(x_bsD, expert_bsK, gate_bsK, *weights):  # local shards below
        choices, held = expert_bsK.shape[-1], weights[0].shape[0]
        expert_N, gate_N1 = expert_bsK.reshape(-1), gate_bsK.reshape(-1)[:, None]
        route = _routes if axes else _sorted
        way = route(expert_N, choices, held, axes, ragged)
        rows_RD, gate_R1 = way.go(x_bsD.reshape(-1, x_bsD.shape[-1]), gate_N1)
        product = lambda x, w: grouped(x, w, way.sizes_e)
        return way.come(_mlp(rows_RD, gate_R1, weights, product)).reshape(x_bsD.shape)

    return _mapped(local, layout, (x_BSD, expert_BSK, gate_BSK), weights)


def capacity(x_BSD, slot_BSK, gate_BSK, weights: tuple, layout: Layout, slots: int) -> jax.Array:
    """The same with `slots` rows for each expert and sequence; a choice without one adds nothing.

    `slot_BSK` counts over all experts, E * slots for none. Buffers are as in GShard
    (arXiv:2006.16668), but filled by index and not by products with one-hot matrices.
    """
    axes, context = layout.dim_axes("experts"), layout.dim_axes("seq")

    def local(x_bsD, slot_bsK, gate_bsK, *weights):  # local shards below
        (batch, _, embed), choices = x_bsD.shape, slot_bsK.shape[-1]
        width = weights[0].shape[0] * layout.size("experts") * slots  # of one sequence
        start_b11 = width * jnp.arange(batch)[:, None, None]
        place_N = jnp.where(slot_bsK < width, start_b11 + slot_bsK, batch * width).reshape(-1)
        source_R1 = _invert(place_N, batch * width)[:, None]
        place_nK = place_N.reshape(-1, choices)

        def go(rows_Rx):
            x_bECx = rows_Rx.reshape(batch, width // slots, slots, -1)
            x_EbCx = jnp.swapaxes(x_bECx, 0, 1)
            if context:  # each device has filled the slots of its own tokens
                x_EbCx = _scatter_slots(x_EbCx, context)
            return _all_to_all(x_EbCx, axes, 0, 1)

        x_ebCD = go(take_sum(x_bsD.reshape(-1, embed), source_R1 // choices, place_nK))
        gate_ebC1 = go(take_sum(gate_bsK.reshape(-1)[:, None], source_R1, place_N[:, None]))
        product = functools.partial(jnp.einsum, "ebcx,exy->ebcy")
        x_EbCD = _all_to_all(_mlp(x_ebCD, gate_ebC1, weights, product), axes, 1, 0)
        if context:
            x_EbCD = _gather_slots(x_EbCD, context)
        rows_RD = jnp.swapaxes(x_EbCD, 0, 1).reshape(-1, embed)  # pyright: ignore
        return take_sum(rows_RD, place_nK, source_R1 // choices).reshape(x_bsD.shape)

    return _mapped(local, layout, (x_BSD, slot_BSK, gate_BSK), weights)


def slots(expert_BSK, real_BS, layout: Layout, num_experts: int, limit: int, stride: int):
    """Each choice's slot, expert * stride + rank among its sequence's choices: [B, S, K].

    First choices come before second ones, and within those earlier tokens before later. Choices
    of rank `limit` and above have none, nor has padding: num_experts * stride.
    """
    split, choices = layout.dim_axes("seq"), expert_BSK.shape[2]

    def local(expert_bSK, real_bS):  # local rows, whole sequences, below
        batch, length = real_bS.shape
        expert_bSK = jnp.where(real_bS[..., None], expert_bSK, num_experts)
        expert_bN = jnp.swapaxes(expert_bSK, 1, 2).reshape(batch, -1)
        turn_N = jnp.arange(choices)[:, None] * length + sequence_order(layout, length)
        turn_bN = jnp.broadcast_to(turn_N.reshape(-1), expert_bN.shape)
        index_bN = jnp.broadcast_to(jnp.arange(choices * length), expert_bN.shape)
        _, _, sorted_bN = jax.lax.sort((expert_bN, turn_bN, index_bN), dimension=1, num_keys=2)
        counts_bE = jax.vmap(lambda e: _count(e, num_experts + 1))(expert_bN)
        start_bN = jnp.take_along_axis(jnp.cumsum(counts_bE, 1) - counts_bE, expert_bN, 1)
        rank_bN = jnp.argsort(sorted_bN, 1) - start_bN
        has_bN = (rank_bN < limit) & (expert_bN < num_experts)
        slot_bN = jnp.where(has_bN, expert_bN * stride + rank_bN, num_experts * stride)
        slot_bSK = jnp.swapaxes(slot_bN.reshape(batch, choices, length), 1, 2).astype(jnp.int32)
        if not split:
            return slot_bSK
        own = length // layout.size("seq")  # tokens of this device
        start = jax.lax.axis_index(split) * own
        return jax.lax.dynamic_slice_in_dim(slot_bSK, start, own, 1)

    arrays = layout.move(expert_BSK, "batch _ _"), layout.move(real_BS, "batch _")
    specs = layout.spec("batch _ _"), layout.spec("batch _")
    return jax.shard_map(local, in_specs=specs, out_specs=layout.spec("batch seq _"))(*arrays)


def _mapped(local, layout: Layout, activations: tuple, weights: tuple) -> jax.Array:
    """Run `local` on every device's shards; its output, partial over mlp's axes, is summed.

    Types inside have no `reduced` or `unreduced`, which a shard_map under vmap cannot take: a copy
    on each device is a part of a new dimension, made and summed outside by products with ones.
    """
    partial, arrays = layout.dim_axes("mlp"), (*activations, *weights)
    copied = [tuple(sorted(jax.typeof(x).sharding.spec.reduced)) for x in arrays]
    spread = [
        _copies(x, axes, layout) if axes else x for x, axes in zip(arrays, copied, strict=True)
    ]

    def run(*arrays):
        own = [x[0] if axes else x for x, axes in zip(arrays, copied, strict=True)]
        return local(*own)[None] if partial else local(*own)

    whole = layout.spec("batch seq _")
    out = P(partial, *whole) if partial else whole
    specs = tuple(jax.typeof(x).sharding.spec for x in spread)
    y_BSD = jax.shard_map(run, in_specs=specs, out_specs=out)(*spread)
    if not partial:
        return reshard(y_BSD, layout.spec("batch residual_seq _"))
    ones_X = jnp.ones(y_BSD.shape[0], y_BSD.dtype, out_sharding=P(partial))
    sums = P(*whole, unreduced=frozenset(partial))
    y_BSD = jnp.einsum("x,xbsd->bsd", ones_X, y_BSD, out_sharding=sums)
    return checkpoint_name(reshard(y_BSD, layout.spec("batch residual_seq _")), SUMMED)


def _copies(x, axes: tuple[str, ...], layout: Layout) -> jax.Array:
    """[X, ...] with one x for each device along `axes`; the gradient is their sum, not yet made."""
    count = math.prod(dict(layout.axes)[axis] for axis in axes)
    letters = "abcd"[: x.ndim]
    ones_X = jnp.ones(count, x.dtype, out_sharding=P(axes))
    return jnp.einsum(f"x,{letters}->x{letters}", ones_X, x)


def _mlp(x, gate, weights: tuple, product) -> jax.Array:
    """A gated MLP, times each row's gate; before `down`, so that its output need not be kept."""
    keep = lambda y: checkpoint_name(checkpoint_name(y, "mlp"), PRODUCT)
    gate_w, up_w, down_w = weights
    hidden = jax.nn.silu(keep(product(x, gate_w))) * keep(product(x, up_w))
    return product((hidden * gate).astype(x.dtype), down_w)


def _mappable(plain: Callable) -> Callable:
    """A function of whole local arrays, that can be mapped over a mesh axis.

    jax has no rule for a grouped product or a ragged exchange that is, as under the pipeline's
    stages. Here it becomes a shard_map over that axis, in which each device runs its own; autodiff,
    which cannot take a shard_map in another, must not see it: `plain` is within a custom_vjp.
    """
    function = custom_vmap(plain)

    @function.def_vmap
    def mapped(size, has_axis, *arrays):
        del size
        operands = lambda arrays: zip(arrays, has_axis, strict=True)
        (place,) = {jax.typeof(x).sharding.spec[0] for x, has in operands(arrays) if has}
        if place is None:
            return jax.vmap(plain, [0 if has else None for has in has_axis])(*arrays), True

        def local(*arrays):  # local shards below
            return function(*(x[0] if has else x for x, has in operands(arrays)))[None]

        specs = tuple(P(place) if has else P() for has in has_axis)
        axes = {place} if isinstance(place, str) else set(place)
        each = jax.shard_map(local, in_specs=specs, out_specs=P(place), axis_names=axes)
        return each(*arrays), True

    return function


def _grouped_product(x_dim: int, y_dim: int, y_groups: bool) -> Callable:
    """(x [R, .], y, sizes) -> products that contract a dimension of each, by groups of rows."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        (((x_dim,), (y_dim,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if y_groups else [],
    )
    whole = P(None, None) if y_groups else P(None, None, None)
    product = functools.partial(
        jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=dims, out_sharding=whole
    )
    return _mappable(lambda x, y, sizes: product(x, y, sizes))


_rows_by_w = _grouped_product(1, 1, True)  # [R, X], [e, X, Y] -> [R, Y]
_rows_by_transposed = _grouped_product(1, 2, True)  # [R, Y], [e, X, Y] -> [R, X]
_outer = _grouped_product(0, 0, False)  # [R, X], [R, Y] -> [e, X, Y]


@jax.custom_vjp
def grouped(x_RX, w_eXY, sizes_e) -> jax.Array:
    """Each row times the matrix of its group, `sizes` rows after one another each: [R, Y]."""
    return _rows_by_w(x_RX, w_eXY, sizes_e)


def _grouped_forward(x_RX, w_eXY, sizes_e):
    return grouped(x_RX, w_eXY, sizes_e), (x_RX, w_eXY, sizes_e)


def _grouped_backward(operands, grad_RY):
    x_RX, w_eXY, sizes_e = operands
    grad_eXY = _outer(x_RX, grad_RY, sizes_e)
    return _rows_by_transposed(grad_RY, w_eXY, sizes_e), grad_eXY, None


grouped.defvjp(_grouped_forward, _grouped_backward)


class Way(NamedTuple):
    """How rows reach their experts, sorted by expert, and how results come back."""

    go: Callable  # (x_nD, gate_N1) -> rows_RD, gate_R1
    come: Callable  # rows_RD -> y_nD
    sizes_e: jax.Array  # rows of each of this device's experts; what lies behind is undefined


def _sorted(expert_N, choices: int, held: int, axes, ragged) -> Way:
    """All experts are here."""
    del axes, ragged
    order_N1 = jnp.argsort(expert_N, stable=True)[:, None]
    back_N = _invert(order_N1[:, 0], expert_N.size)
    token_N1, back_N1, back_nK = order_N1 // choices, back_N[:, None], back_N.reshape(-1, choices)
    go = lambda x_nD, gate_N1: (
        take_sum(x_nD, token_N1, back_nK),
        take_sum(gate_N1, order_N1, back_N1),
    )
    return Way(go, lambda x_RD: take_sum(x_RD, back_nK, token_N1), _count(expert_N, held))


def _routes(expert_N, choices: int, held: int, axes: tuple[str, ...], ragged: bool) -> Way:
    """Experts are spread over the peers along `axes`; each buffer has a part for each peer.

    A part takes all that a peer can send, since a token's choices are different experts. `ragged`
    sends the rows that there are, else whole parts travel: the same result.
    """
    peers, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    part = expert_N.size // choices * min(choices, held)
    counts_E = _count(expert_N, peers * held)
    counts_pE = jax.lax.all_gather(counts_E, axes)
    send_p = jnp.sum(counts_E.reshape(peers, held), 1)
    start_p = jnp.cumsum(send_p) - send_p
    order_N = jnp.argsort(expert_N, stable=True)
    back_N = _invert(order_N, expert_N.size)
    place_N = expert_N // held * part + back_N - start_p[expert_N // held]
    source_R = _invert(place_N, peers * part)

    # What arrives: from every peer a part sorted by expert, put in order of the experts.
    counts_pe = jax.lax.dynamic_slice_in_dim(counts_pE, me * held, held, 1)
    ends_p1e = jnp.cumsum(counts_pe, 1)[:, None]
    expert_pm = jnp.sum(jnp.arange(part)[:, None] >= ends_p1e, -1)  # `held`: no row
    arrange_R = jnp.argsort(expert_pm.reshape(-1), stable=True)
    restore_R1 = _invert(arrange_R, peers * part)[:, None]

    # Where in their sorted rows the peers' choices of our experts begin.
    theirs_p = jax.lax.dynamic_index_in_dim(
        jnp.cumsum(counts_pE, 1) - counts_pE, me * held, 1, keepdims=False
    )
    parts_p, receive_p = part * jnp.arange(peers), jnp.sum(counts_pe, 1)
    table = lambda *columns: tuple(x.astype(jnp.int32) for x in columns)
    there = table(start_p, send_p, jnp.full(peers, part) * me, receive_p)
    home = table(parts_p, receive_p, theirs_p, send_p)
    from_N, to_N = (order_N, back_N) if ragged else (source_R, place_N)
    token_X1, to_nK = from_N[:, None] // choices, to_N.reshape(-1, choices)

    def exchange(rows, size, *table):
        return send(rows, size, *table, axes) if ragged else _all_to_all(rows, axes, 0, 0)

    def go(x_nD, gate_N1):
        rows_RD = exchange(take_sum(x_nD, token_X1, to_nK), peers * part, there, home)
        gate_R1 = _all_to_all(take_sum(gate_N1, source_R[:, None], place_N[:, None]), axes, 0, 0)
        arrange = lambda x: take_sum(x, arrange_R[:, None], restore_R1)
        return arrange(rows_RD), arrange(gate_R1)

    def come(x_RD):
        rows_RD = take_sum(x_RD, restore_R1, arrange_R[:, None])
        return take_sum(exchange(rows_RD, expert_N.size, home, there), to_nK, token_X1)

    return Way(go, come, jnp.sum(counts_pe, 0, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 4))
def send(rows, size: int, there: tuple, back: tuple, axes: tuple[str, ...]) -> jax.Array:
    """[size, D]: rows sent to the peers along `axes` by a table, and 0 where none arrives.

    `back` is the table by which they would return; with it the gradient is such an exchange too.
    """

    def move(rows, *table):
        # Like `rows`, also in the axes that they vary over: else their gradient would be summed.
        zeros = jnp.zeros_like(rows, shape=(size, rows.shape[-1]))
        return jax.lax.ragged_all_to_all(rows, zeros, *table, axis_name=axes)

    return _mappable(move)(rows, *there)


def _send_forward(rows, size, there, back, axes):
    return send(rows, size, there, back, axes), (there, back, jnp.zeros((rows.shape[0], 0)))


def _send_backward(size, axes, tables, grad):
    there, back, like = tables
    return send(grad, like.shape[0], back, there, axes), None, None


send.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def take_sum(rows, index_mA, back_nC) -> jax.Array:
    """Row i is the sum, in `wide`, of rows[index[i, :]]; an index past the end adds nothing.

    `back` is the inverse table: for each of `rows`, where it went. With it the gradient is such a
    sum too, not a scatter.
    """
    found = rows.at[index_mA].get(mode="fill", fill_value=0)
    if index_mA.shape[1] == 1:
        return found[:, 0]
    return jnp.sum(found.astype(wide(rows.dtype)), 1).astype(rows.dtype)


def _take_sum_forward(rows, index_mA, back_nC):
    return take_sum(rows, index_mA, back_nC), (index_mA, back_nC)


def _take_sum_backward(tables, grad):
    index_mA, back_nC = tables
    return take_sum(grad, back_nC, index_mA), None, None


take_sum.defvjp(_take_sum_forward, _take_sum_backward)


def _invert(place_N, size: int) -> jax.Array:
    """source[place[i]] = i for `size` places; N for a place that nothing goes to."""
    source = jnp.full(size, place_N.size, place_N.dtype)
    return source.at[place_N].set(jnp.arange(place_N.size, dtype=source.dtype), mode="drop")


def _count(expert_N, num_experts: int) -> jax.Array:
    return jnp.sum(expert_N[:, None] == jnp.arange(num_experts), 0, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scatter_slots(x_EbCx, axes: tuple[str, ...]) -> jax.Array:
    """The sum over `axes`, each device its part of the slots. jax cannot lower it mapped."""
    scatter = lambda x: jax.lax.psum_scatter(x, axes, scatter_dimension=2, tiled=True)
    return _mappable(scatter)(x_EbCx)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_slots(x_EbCx, axes: tuple[str, ...]) -> jax.Array:
    """All slots, from the devices along `axes`: the transpose."""
    return _mappable(lambda x: jax.lax.all_gather(x, axes, axis=2, tiled=True))(x_EbCx)


_scatter_slots.defvjp(
    lambda x, axes: (_scatter_slots(x, axes), None),
    lambda axes, _, grad: (_gather_slots(grad, axes),),
)
_gather_slots.defvjp(
    lambda x, axes: (_gather_slots(x, axes), None),
    lambda axes, _, grad: (_scatter_slots(grad, axes),),
)


def _all_to_all(x, axes: tuple[str, ...], split: int, join: int) -> jax.Array:
    return jax.lax.all_to_all(x, axes, split, join, tiled=True) if axes else x
