"""The norm of each row's gradient, without any gradient: what every use of a weight adds to it.

A weight of which only this norm is wanted is `Probed`. A use of it (a product, a lookup) is
computed as always; on the way back the cotangent of `norms_B`, zeros that the value ignores, is the
squared norm of the gradient that each row of the batch has through this use ("ghost norms",
arXiv:2009.03106), and the weight has no gradient. For y = x w it is the norm of a product over the
tokens of the row: made, or taken from the products of all pairs of its tokens, whichever costs
less.

The norm of a sum is no sum of norms: a weight that is used twice is refused, but for an embedding
that is also the head (privacy/norms.py). What knows nothing of this file cannot use such a weight.

Shapes: B batch, S sequence, D embed, V vocabulary; in products H what all three arrays have, L what
the weight sums over, R what it makes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm.keys import UserError
from jaxlm.specs import entry_axes, partitions, wide

BALANCE = 1000  # multiplications in the time that an accelerator moves a float32 twice
SMALL = 1 << 20  # bytes of the products of a device's rows, up to which they are made at once


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """What ties the two uses of an embedding that is also the head.

    The cotangent of `looked_BSD` is that of what was looked up; that of `met_BSD` is the head's row
    gradient at the tokens that were looked up. Twice their product joins the two squared norms.
    """

    tokens_BS: jax.Array
    looked_BSD: jax.Array  # zeros, in the compute type
    met_BSD: jax.Array  # zeros, in `wide`


@dataclasses.dataclass(frozen=True, eq=False)
class Probed:
    """A weight in whose place comes the squared norm of every row's gradient."""

    name: str
    value: jax.Array
    norms_B: jax.Array  # zeros; stacked as the weight is
    link: Link | None = None
    uses: list[str] = dataclasses.field(default_factory=list)
    born: Any = dataclasses.field(default_factory=lambda: get_opaque_trace_state(convention="nnx"))

    def replace(self, value: jax.Array) -> Probed:
        """The same weight, gathered or cast."""
        return dataclasses.replace(self, value=value)

    @property
    def dtype(self):
        """That of the value."""
        return self.value.dtype

    def astype(self, dtype) -> Probed:
        """Cast."""
        return self.replace(self.value.astype(dtype))

    def __radd__(self, number: float) -> Probed:
        """number + weight: its gradient is that of the weight."""
        if not isinstance(number, float):
            return NotImplemented
        return self.replace(number + self.value)

    def __jax_array__(self):
        """What jax asks of an object that it does not know: every use that is not one below."""
        raise UserError(
            f"privacy: the weight {self.name} is used by an operation for which the norm of each "
            "row's gradient is not known; use it through Layout's gather, dot, take and add_bias, "
            "or train without privacy.clip_norm"
        )

    def use(self, kind: str) -> None:
        """Note a use; UserError where the squared norms of all uses would not add up."""
        if self.born != get_opaque_trace_state(convention="nnx"):
            raise UserError(
                f"privacy: the weight {self.name} is used in a loop that is not given it, and so "
                "again in every turn; the norm of each row's gradient is not known there"
            )
        if self.uses and (self.link is None or kind in self.uses):
            raise UserError(
                f"privacy: the weight {self.name} is used more than once; the norm of each row's "
                "gradient is known only for weights used once, and for an embedding as the head"
            )
        self.uses.append(kind)


jax.tree_util.register_dataclass(Link, ["tokens_BS", "looked_BSD", "met_BSD"], [])
# Not `uses` and `born`: they are of one place in the program, where the object is put together.
jax.tree_util.register_pytree_node(
    Probed,
    lambda w: ((w.value, w.norms_B, w.link), w.name),
    lambda name, parts: Probed(name, *parts),
)


def value(weight: jax.Array | Probed) -> jax.Array:
    """The array of a weight."""
    return weight.value if isinstance(weight, Probed) else weight


def einsum(equation: str, x: jax.Array, w: jax.Array | Probed, out: P | None = None) -> jax.Array:
    """jnp.einsum of activations, whose first dimension is the row, and a weight."""
    if not isinstance(w, Probed):
        return jnp.einsum(equation, x, w, out_sharding=out)
    w.use("product")
    return _einsum(equation, out, x, w.value, w.norms_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(equation, out, x, w, norms_B):
    return jnp.einsum(equation, x, w, out_sharding=out)


def _einsum_forward(equation, out, x, w, norms_B):
    return _einsum(equation, out, x, w, norms_B), (x, w, jnp.zeros((), norms_B.dtype))


def _einsum_backward(equation, out, saved, grad):
    x, w, like = saved
    _, pull = jax.vjp(lambda x: jnp.einsum(equation, x, w, out_sharding=out), x)
    return *pull(grad), None, row_squares(equation, x, grad).astype(like.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def row_squares(equation: str, x: jax.Array, grad: jax.Array) -> jax.Array:
    """Squared norm of each row's gradient of w, [B], where x w gave `grad` back."""
    inputs, out = equation.split("->")
    term, weight = inputs.split(",")
    places = {}
    for letters, array in ((term, x), (out, grad)):
        places |= dict(zip(letters, partitions(jax.typeof(array).sharding.spec), strict=True))
    row = term[0]
    tokens = [c for c in term if c not in weight and c != row]
    assert row in out and set(out) - set(weight) == {row, *tokens}, equation
    kinds = (
        [c for c in weight if c in term and c in out],
        tokens,
        [c for c in weight if c not in out],
        [c for c in weight if c not in term],
    )
    axes = lambda letters: sum((entry_axes(places[c]) for c in letters), ())
    token_axes, weight_axes = axes(tokens), axes(weight)

    def squares(x, grad):  # local shards below
        shared, _, left, right = kinds
        x_BHSL = _fold(x, term, row, (shared, tokens, left))
        g_BHSR = _fold(grad, out, row, (shared, tokens, right))
        square_B = _squares(x_BHSL, g_BHSR, token_axes)
        return jax.lax.psum(square_B, weight_axes) if weight_axes else square_B

    plain = lambda array: P(*partitions(jax.typeof(array).sharding.spec))
    x, grad = reshard(x, plain(x)), reshard(grad, plain(grad))
    # Mapped: the rows of a device are gone through one by one, and the partitioner does not know
    # that sums of squares can wait until the end.
    mapped = jax.shard_map(
        squares, in_specs=(plain(x), plain(grad)), out_specs=P(places[row]), check_vma=False
    )
    return mapped(x, grad)


def _fold(array: jax.Array, letters: str, row: str, groups) -> jax.Array:
    """[B, ...]: the dimensions of each group as one."""
    order = [letters.index(row), *(letters.index(c) for group in groups for c in group)]
    array = jnp.transpose(array, order)
    sizes, shape = iter(array.shape[1:]), [array.shape[0]]
    for group in groups:
        shape.append(math.prod(next(sizes) for _ in group))
    return array.reshape(shape)


def _squares(x_BHSL, g_BHSR, token_axes: tuple[str, ...]) -> jax.Array:
    """Squared norms of the rows' products over tokens, of which token_axes split the sum."""
    rows, shared, length, left = x_BHSL.shape
    right = g_BHSR.shape[-1]
    whole = length * math.prod(jax.lax.axis_size(axis) for axis in token_axes)
    dtype = wide(x_BHSL.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def by_product(x_HSL, g_HSR):
        product_HLR = product("hsl,hsr->hlr", x_HSL, g_HSR)
        if token_axes:
            product_HLR = jax.lax.psum(product_HLR, token_axes)
        return jnp.sum(jnp.square(product_HLR))

    def by_pairs(x_HSL, g_HSR):
        every = lambda a: jax.lax.all_gather(a, token_axes, axis=1, tiled=True)
        others = [every(a) if token_axes else a for a in (x_HSL, g_HSR)]
        xx_ST = product("hsl,htl->st", x_HSL, others[0])
        gg_ST = product("hsr,htr->st", g_HSR, others[1])
        total = jnp.sum(xx_ST * gg_ST)
        return jnp.maximum(jax.lax.psum(total, token_axes) if token_axes else total, 0)

    # Multiplications, and what reading and writing the squares costs in the time of them.
    product_cost = left * right * (length + BALANCE)
    pairs = shared == 1 and length * whole * (left + right + 1.5 * BALANCE) < product_cost
    one = by_pairs if pairs else by_product
    size = dtype.itemsize * (2 * length * whole if pairs else shared * left * right)
    if rows == 1 or rows * size > SMALL:
        return jax.lax.map(lambda row: one(*row), (x_BHSL, g_BHSR))
    return jax.vmap(one)(x_BHSL, g_BHSR)


def take(table: Probed, index: jax.Array, out: P) -> jax.Array:
    """Rows of a table [V, D] at `index` [B, S]."""
    table.use("lookup")
    looked_BSD = None if table.link is None else table.link.looked_BSD
    return _take(out, table.value, index, table.norms_B, looked_BSD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(out, table, index, norms_B, looked_BSD):
    return table.at[index].get(out_sharding=out, mode="clip")


def _take_forward(out, table, index, norms_B, looked_BSD):
    like = jnp.zeros((), norms_B.dtype)
    linked = None if looked_BSD is None else like
    return _take(out, table, index, norms_B, looked_BSD), (index, like, linked)


def _take_backward(out, saved, grad):
    index, like, linked = saved
    square_B = lookup_squares(index, grad).astype(like.dtype)
    return None, None, square_B, None if linked is None else grad


_take.defvjp(_take_forward, _take_backward)


def lookup_squares(index_BS: jax.Array, grad_BSD: jax.Array) -> jax.Array:
    """Squared norm [B] of each row's gradient of a table: what came back is summed per token."""
    batch, seq, embed = partitions(jax.typeof(grad_BSD).sharding.spec)
    token_axes, weight_axes = entry_axes(seq), entry_axes(embed)

    def one(index_S, grad_SD):
        order_S = jnp.argsort(index_S)
        sorted_S = index_S[order_S]
        new_S = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.diff(sorted_S) != 0])
        grad_SD = grad_SD[order_S].astype(wide(grad_SD.dtype))
        sums_SD = jnp.zeros_like(grad_SD).at[jnp.cumsum(new_S)].add(grad_SD)
        return jnp.sum(jnp.square(sums_SD))

    def squares(index_BS, grad_BSD):  # local shards below
        if token_axes:  # whole rows: each device along these axes does the same
            every = lambda a: jax.lax.all_gather(a, token_axes, axis=1, tiled=True)
            index_BS, grad_BSD = every(index_BS), every(grad_BSD)
        square_B = jax.vmap(one)(index_BS, grad_BSD)
        return jax.lax.psum(square_B, weight_axes) if weight_axes else square_B

    grad_BSD = reshard(grad_BSD, P(batch, seq, embed))
    specs = (P(batch, seq), P(batch, seq, embed))
    mapped = jax.shard_map(squares, in_specs=specs, out_specs=P(batch), check_vma=False)
    return mapped(index_BS, grad_BSD)
