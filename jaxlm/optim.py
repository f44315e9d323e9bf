"""Optimizers: a config becomes an optax chain, each parameter's rule chosen from its dimensions.

A parameter is a matrix, as `embed` x heads and their width, or a stack of matrices, or a vector
(norms, biases); optax's Adafactor and Muon choose from shapes, which is wrong for stacks.

Letters, for Muon: M x N a matrix, cut over devices into R x C pieces of m x n, all of
them K = R C; B matrices in a stack, G stacks kept apart by sharding (pipeline stages, experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.config import Optimizer
from jaxlm.sharding import wide

Arrays = dict[str, jax.Array]
Axes = tuple[str, ...]  # of the mesh
STACKING = {"layers", "parts", "experts"}
HEADS = {"heads", "kv_heads", "head_dim"}  # one side of a matrix: the width of attention
TABLES = {"vocab", "positions", "experts"}  # sides of matrices that take Adam in place of Muon
MIN_FACTORED = 128  # Adafactor keeps a matrix with a shorter side whole, as optax does
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's, for 5 steps


def schedule(config: Optimizer, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Learning rate at a step (from 0): linear warm-up, then to final_fraction at steps - 1.

    WSD (arXiv:2404.06395) stays at the peak until its last decay_fraction of all steps.
    """
    peak, warmup, begin = config.learning_rate, config.warmup_steps, config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, steps - 1 - round(config.decay_fraction * steps))
    span = steps - 1 - begin
    linear = lambda: optax.linear_schedule(peak, peak * config.final_fraction, span)
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(span, 1), config.final_fraction),
        "linear": linear,
        "wsd": linear,
    }
    decay = decays[config.schedule]()

    def rate(step):
        # Not optax's warm-up, which loses log2(warmup) bits at step 0 to cancellation.
        rising = peak * ((step + 1) / max(warmup, 1))
        return jnp.where(step < warmup, rising, decay(jnp.maximum(step - begin, 0)))

    return rate


def make_optimizer(
    config: Optimizer, steps: int, dims: dict[str, str]
) -> optax.GradientTransformation:
    """The update rule of `config` for parameters with these dimension names, without clipping.

    Weight decay is decoupled and times the learning rate (arXiv:1711.05101, as in PyTorch).
    """
    rules = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.epsilon),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adafactor": lambda: scale_by_adafactor(dims),
        "muon": lambda: scale_by_muon(config, dims),
        "sgd": optax.identity,
    }

    def decayed(params):
        return {name: is_matrix(dims[name]) for name in params}

    return optax.chain(
        rules[config.name](),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def global_norm(grads: Arrays) -> jax.Array:
    """L2 norm over all arrays, in float32, replicated: one all-reduce.

    shard_map, because sums of sharded arrays are reduced one by one, and then per set of axes.
    """
    axes = {name: sum(_dim_axes(g), ()) for name, g in grads.items()}
    cut = tuple(sorted(set(sum(axes.values(), ()))))
    copies = {name: _devices(cut) // _devices(a) for name, a in axes.items()}

    def square(local: Arrays) -> jax.Array:
        parts = [jnp.sum(jnp.square(g.astype(wide(g.dtype)))) / copies[n] for n, g in local.items()]
        return jax.lax.psum(jnp.sum(jnp.stack(parts)), cut)

    if not cut:
        return jnp.sqrt(square(grads))
    specs = {name: jax.typeof(g).sharding.spec for name, g in grads.items()}
    return jnp.sqrt(jax.shard_map(square, in_specs=(specs,), out_specs=P(), check_vma=False)(grads))


def clip_by_norm(grads: Arrays, norm: jax.Array, max_norm: float) -> Arrays:
    """Scale gradients of global norm `norm` down to `max_norm` (arXiv:1211.5063)."""
    scale = max_norm / jnp.maximum(norm, max_norm)
    return {name: g * scale.astype(g.dtype) for name, g in grads.items()}


class Sides(NamedTuple):
    """Positions of a parameter's dimensions: those that stack, and a matrix's two sides."""

    stack: tuple[int, ...]
    one: tuple[int, ...]  # `embed`, where there is one
    other: tuple[int, ...]


def sides(dims: str) -> Sides:
    """Sort dimensions into stacking ones and two sides; a vector has one side (or none, a number).

    One side is `embed`, or what comes first where there is none: a latent projection is rank x
    heads and their width. A router is embed x experts.
    """
    names = dims.split()
    router = set(names) <= STACKING | {"embed"}
    stacking = STACKING - {"experts"} if router else STACKING
    rest = [name for name in names if name not in stacking]
    first = "embed" if "embed" in rest else rest[0] if rest else ""
    one = {first} | (HEADS if first in HEADS else set())
    kinds = [0 if name in stacking else 1 if name in one else 2 for name in names]
    return Sides(*(tuple(i for i, kind in enumerate(kinds) if kind == k) for k in range(3)))


def is_matrix(dims: str) -> bool:
    """Whether a parameter holds matrices: neither a norm nor a bias."""
    _, one, other = sides(dims)
    return bool(one and other) and "norm" not in dims.split()


def takes_muon(dims: str) -> bool:
    """Whether it holds matrices between hidden activations: no table of rows, no router."""
    names = dims.split()
    _, one, other = sides(dims)
    return is_matrix(dims) and not TABLES & {names[i] for i in one + other}


class AdafactorState(NamedTuple):
    """Mean squared gradients: of rows and columns for factored parameters, else of elements."""

    count: jax.typing.ArrayLike
    row: Arrays
    column: Arrays
    full: Arrays


def scale_by_adafactor(dims: dict[str, str]) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235, algorithms 4 and 5), without momentum or parameter scale.

    optax.scale_by_factored_rms factors the two largest dimensions of an array, and its clipping
    takes an array as one block: stacked layers would share both. Here each matrix has its own.
    """

    def init(params) -> AdafactorState:
        row, column, full = {}, {}, {}
        for name, x in params.items():
            _, one, other = sides(dims[name])
            if is_matrix(dims[name]) and min(_size(x, one), _size(x, other)) >= MIN_FACTORED:
                row[name], column[name] = _zeros_without(x, other), _zeros_without(x, one)
            else:
                full[name] = jnp.zeros_like(x)
        return AdafactorState(jnp.zeros((), jnp.int32), row, column, full)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        new = 1.0 * count ** jnp.float32(-0.8)  # section 7.2
        row, column, full, clipped = {}, {}, {}, {}
        for name, g in updates.items():
            _, one, other = sides(dims[name])
            square = jnp.square(g) + 1e-30
            if name in state.row:
                row[name] = (1 - new) * state.row[name] + new * jnp.mean(square, other)
                column[name] = (1 - new) * state.column[name] + new * jnp.mean(square, one)
                means = jnp.expand_dims(row[name], other)
                means = means / jnp.mean(means, one, keepdims=True)
                u = g * means**-0.5 * jnp.expand_dims(column[name], one) ** -0.5
            else:
                full[name] = (1 - new) * state.full[name] + new * square
                u = g * full[name] ** -0.5
            rms = jnp.sqrt(jnp.mean(jnp.square(u), one + other, keepdims=True))
            clipped[name] = u / jnp.maximum(1.0, rms)
        return clipped, AdafactorState(count, row, column, full)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    """Momentum of the matrices that take Muon, and Adam's state for the others."""

    count: jax.typing.ArrayLike
    momentum: Arrays
    adam: optax.OptState


def scale_by_muon(config: Optimizer, dims: dict[str, str]) -> optax.GradientTransformation:
    """Muon (Keller Jordan, 2024) for the matrices of the layers, Adam for everything else.

    Nesterov momentum with bias correction as in optax.contrib.muon; its Newton-Schulz, mapped
    over stacks, would communicate in every product.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    beta = config.momentum

    def split(arrays: Arrays) -> tuple[Arrays, Arrays]:
        chosen = {name for name in arrays if takes_muon(dims[name])}
        rest = {name: x for name, x in arrays.items() if name not in chosen}
        return {name: x for name, x in arrays.items() if name in chosen}, rest

    def init(params) -> MuonState:
        matrices, rest = split(params)
        momentum = jax.tree.map(jnp.zeros_like, matrices)
        return MuonState(jnp.zeros((), jnp.int32), momentum, adam.init(rest))

    def update(updates, state, params=None):
        del params
        matrices, rest = split(updates)
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(matrices, state.momentum, beta, 1)
        ahead = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(momentum, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(matrices, beta, count),
        )
        others: Any
        others, adam_state = adam.update(rest, state.adam)
        return {**orthogonalize(ahead, dims), **others}, MuonState(count, momentum, adam_state)

    return optax.GradientTransformation(init, update)


def newton_schulz(x_MN: jax.Array) -> jax.Array:
    """Quintic iteration towards the nearest semi-orthogonal matrix; leading dimensions map.

    Arrays are float32, and products have the backend's default precision (bf16 or TF32 passes
    on accelerators, which is all that the iteration needs). With bf16 arrays its error, 1e-2,
    would hide a wrong layout, and it is the only part of a step that whole matrices pass through.
    """
    a, b, c = NEWTON_SCHULZ
    x_MN = x_MN / (jnp.sqrt(jnp.sum(jnp.square(x_MN), (-2, -1), keepdims=True)) + 1e-8)
    for _ in range(5):
        gram_MM = x_MN @ jnp.swapaxes(x_MN, -1, -2)
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return x_MN


class Pieces(NamedTuple):
    """How an array is viewed as the pieces of matrices that its devices hold.

    Rows or columns may come out permuted: Newton-Schulz commutes with permutations of both.
    """

    split: tuple[int, ...]  # each dimension as (pieces, size of a piece)
    split_axes: tuple[Axes, ...]
    order: tuple[int, ...]  # of the split dimensions, those of one letter together
    merged: tuple[int, ...]  # G B R C m n
    axes: tuple[Axes, ...]  # of G, R and C


def cut(x: jax.Array, dims: str) -> Pieces:
    """Plan the pieces of an array from its sharding, with the shorter side as rows."""
    stack, one, other = sides(dims)
    rows, columns = (one, other) if _size(x, one) <= _size(x, other) else (other, one)
    axes = _dim_axes(x)
    parts = [(_devices(a), size // _devices(a)) for a, size in zip(axes, x.shape, strict=True)]
    split = sum(parts, ())
    letters = [[2 * i for i in stack], [2 * i + 1 for i in stack]]
    letters += [[2 * i + half for i in side] for half in (0, 1) for side in (rows, columns)]
    return Pieces(
        split,
        sum(((a, ()) for a in axes), ()),
        tuple(sum(letters, [])),
        tuple(math.prod(split[i] for i in letter) for letter in letters),
        tuple(sum((axes[i] for i in side), ()) for side in (stack, rows, columns)),
    )


def to_pieces(x: jax.Array, plan: Pieces) -> jax.Array:
    """View an array as its pieces of matrices; nothing leaves its device."""
    stack, rows, columns = plan.axes
    x = _reshape(x, plan.split, *plan.split_axes).transpose(plan.order)
    return _reshape(x, plan.merged, stack, (), rows, columns)


def from_pieces(x_GBRCmn: jax.Array, plan: Pieces, shape: tuple[int, ...]) -> jax.Array:
    """Undo `to_pieces`."""
    ordered = [plan.split[i] for i in plan.order]
    x = _reshape(x_GBRCmn, ordered, *(plan.split_axes[i] for i in plan.order))
    x = x.transpose(sorted(range(x.ndim), key=plan.order.__getitem__))
    return _reshape(x, shape, *plan.split_axes[::2])


def orthogonalize(matrices: Arrays, dims: dict[str, str]) -> Arrays:
    """Muon's update of all matrices; those of one shape and layout travel and compute together."""
    plans = {name: cut(x, dims[name]) for name, x in matrices.items()}
    groups: dict[tuple, list[str]] = {}
    for name, plan in plans.items():
        groups.setdefault((plan.axes, plan.merged[0], plan.merged[2:]), []).append(name)
    updates = {}
    for (axes, _, _), names in groups.items():
        pieces = [to_pieces(matrices[name], plans[name]) for name in names]
        done_GBRCmn, start = _orthogonalize_group(jnp.concatenate(pieces, 1), *axes), 0
        for name in names:
            stop = start + plans[name].merged[1]
            x = done_GBRCmn[:, start:stop]
            updates[name], start = from_pieces(x, plans[name], matrices[name].shape), stop
    return updates


def _orthogonalize_group(x_GBRCmn: jax.Array, stack: Axes, rows: Axes, columns: Axes) -> jax.Array:
    """Bring each matrix together on one device, iterate there, and send its pieces back.

    One all-to-all each way, over the axes that cut matrices; all at once, because a reshard that
    moves two dimensions is an all-gather of everything. Axes that hold copies share the work
    while there are more matrices than devices, and gather the result. The update is scaled to
    the RMS of Adam's (arXiv:2502.16982, equation 4).
    """
    G, B, R, C, m, n = x_GBRCmn.shape
    pieces, copies = rows + columns, ()
    for axis in _axes():
        if axis not in stack + pieces and B > _devices(pieces + copies):
            copies += (axis,)
    if short := -B % _devices(pieces + copies):
        x_GBRCmn = jnp.pad(x_GBRCmn, [(0, 0), (0, short)] + [(0, 0)] * 4)
        # Without this XLA:CPU (jax 0.12) rewrites the pad and the all-to-all to a wrong program,
        # which its verifier refuses.
        x_GBRCmn = jax.lax.optimization_barrier(x_GBRCmn)
    padded, whole = x_GBRCmn.shape[1], (stack, copies + pieces)
    x_GBKmn = _reshape(x_GBRCmn, (G, padded, R * C, m, n), stack, (), pieces)
    x_GBKmn = _reshard(x_GBKmn, stack, copies, pieces)  # each copy takes a part: no traffic
    x_GBKmn = _reshard(x_GBKmn, *whole)  # all-to-all
    x_GBRmCn = _reshape(x_GBKmn, (G, padded, R, C, m, n), *whole).transpose(0, 1, 2, 4, 3, 5)
    x_GBMN = newton_schulz(_reshape(x_GBRmCn, (G, padded, R * m, C * n), *whole))
    x_GBMN = x_GBMN * (0.2 * math.sqrt(max(R * m, C * n)))
    x_GBRCmn = _reshape(x_GBMN, (G, padded, R, m, C, n), *whole).transpose(0, 1, 2, 4, 3, 5)
    x_GBKmn = _reshape(x_GBRCmn, (G, padded, R * C, m, n), *whole)
    x_GBKmn = _reshard(x_GBKmn, stack, copies, pieces)  # all-to-all
    x_GBKmn = _reshard(x_GBKmn, stack, (), pieces)  # all-gather over the copies
    return _reshape(x_GBKmn, (G, padded, R, C, m, n), stack, (), rows, columns)


def _axes() -> Axes:
    """Mesh axes over which arrays may be copies; `replica` holds parameters that differ."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Explicit and axis != "replica")


def _dim_axes(x: jax.Array) -> list[Axes]:
    """Mesh axes of each dimension of an array."""
    spec = jax.typeof(x).sharding.spec
    return [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]


def _devices(axes: Axes) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


def _size(x: jax.Array, where: tuple[int, ...]) -> int:
    return math.prod(x.shape[i] for i in where)


def _zeros_without(x: jax.Array, where: tuple[int, ...]) -> jax.Array:
    """Zeros with the shape and sharding of the mean over these dimensions."""
    return jnp.zeros_like(jax.eval_shape(lambda x: jnp.mean(x, where), x))


def _reshape(x: jax.Array, shape, *axes: Axes) -> jax.Array:
    """Reshape to a stated sharding (jax cannot infer it); outside a mesh there is none."""
    return jnp.reshape(x, shape, out_sharding=P(*axes) if _axes() else None)


def _reshard(x: jax.Array, *axes: Axes) -> jax.Array:
    return jax.sharding.reshard(x, P(*axes)) if _axes() else x
