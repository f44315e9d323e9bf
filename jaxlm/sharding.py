"""Layout: which mesh axes each array dimension lives on.

A weight has two homes. At rest it is spread over every axis that can hold it (`storage`); in use it
has the sharding of the computation (`rules`). `Layout.gather` is the way from one to the other, and
its transpose is the gradient's reduction. The mesh is Explicit: shardings are part of array types,
and an operation whose result is ambiguous fails at trace time instead of silently replicating.

Gradients wait: a gathered weight is marked `reduced` over the axes that the batch is split over, so
its gradient comes back `unreduced` over them - a sum that has not been communicated yet. Over fsdp
it is reduced as the layer is left; over axes that do not shard the weight at rest (data, and
whatever runs across the slow network) it is reduced once, after the last microbatch.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec, reshard

from jaxlm import config as cfg
from jaxlm import ghost
from jaxlm.specs import entry_axes as _axes
from jaxlm.specs import partitions, wide

__all__ = ["Layout", "partitions", "wide"]
P = PartitionSpec
SUMMED = "summed"  # the name, for remat, of products that were summed over devices
PRODUCT = "product"  # and of products that remat cannot tell from those of attention


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every dimension lives and how the program runs there; passed as an argument."""

    axes: tuple[tuple[str, int], ...]  # mesh axis -> size
    rules: tuple[tuple[str, tuple[str, ...]], ...]  # dimension -> axes, in use
    storage: tuple[tuple[str, tuple[str, ...]], ...]  # dimension -> further axes, at rest
    gather_at: str = "layer"
    compute: str = "float32"
    reduce: str = "float32"
    remat: cfg.Remat = cfg.Remat()
    attention: cfg.Attention = cfg.Attention(backend="xla")
    experts: str = "padded"  # how their rows are exchanged: models/experts.py

    def size(self, dim: str) -> int:
        """Devices that dimension `dim` is split over, in use."""
        sizes = dict(self.axes)
        return math.prod(sizes[axis] for axis in self.dim_axes(dim))

    def dim_axes(self, dim: str) -> tuple[str, ...]:
        """Mesh axes of one dimension in use; axes of size 1 are dropped (they count as sharded)."""
        if dim == "_":
            return ()
        sizes = dict(self.axes)
        return tuple(axis for axis in dict(self.rules)[dim] if sizes[axis] > 1)

    def spec(self, dims: str) -> PartitionSpec:
        """Sharding in use of an array with these dimension names ("batch seq _")."""
        return P(*(_entry(self.dim_axes(dim)) for dim in dims.split()))

    def stored(self, dims: str) -> PartitionSpec:
        """Sharding at rest: the rules, and the storage axes that the weight does not use yet."""
        sizes, extra = dict(self.axes), dict(self.storage)
        entries = [self.dim_axes(dim) for dim in dims.split()]
        used = {axis for entry in entries for axis in entry}
        for i, dim in enumerate(dims.split()):
            for axis in extra.get(dim, ()):
                if sizes[axis] > 1 and axis not in used:
                    entries[i] += (axis,)
                    used.add(axis)
        return P(*map(_entry, entries))

    def local_shape(self, where: str | PartitionSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array on one device: of its dimension names in use, or of a sharding."""
        entries = partitions(self.spec(where) if isinstance(where, str) else where)
        sizes = dict(self.axes)
        counts = [math.prod(sizes[axis] for axis in _axes(entry)) for entry in entries]
        return tuple(-(-size // count) for size, count in zip(shape, counts, strict=True))

    def stored_axes(self, dims: str) -> frozenset[str]:
        """The axes that split a weight at rest; over all others it is copied."""
        return frozenset(axis for entry in self.stored(dims) for axis in _axes(entry))

    def without(self, axis: str) -> Layout:
        """The layout of code that runs under vmap over, or shard_map manual on, that axis."""
        axes = tuple((a, 1 if a == axis else n) for a, n in self.axes)
        return dataclasses.replace(self, axes=axes)

    def replace(self, **rules: tuple[str, ...]) -> Layout:
        """The same layout with other axes for some dimensions in use."""
        return dataclasses.replace(self, rules=tuple({**dict(self.rules), **rules}.items()))

    def unstaged(self) -> Layout:
        """The layout in which every stage has a part of every layer, gathered like that of fsdp."""
        storage = dict(self.storage)
        storage["embed"] = (*storage.get("embed", ()), "stage")
        return dataclasses.replace(self.replace(layers=()), storage=tuple(storage.items()))

    def beside_stages(self) -> Layout:
        """The layout of layers that are on no stage: the stages split rows, as data and fsdp do."""
        return self.unstaged().replace(batch=(*dict(self.rules)["batch"], "stage"))

    def param(self, init, shape: tuple[int, ...], dims: str, over: str = "batch seq") -> nnx.Param:
        """A weight at rest from `init(shape, sharding)`; `over` names the activations it meets."""
        assert len(shape) == len(dims.split())
        return nnx.Param(init(shape, self.stored(dims)), dims=dims, over=over)

    def gather(self, param: nnx.Param) -> jax.Array:
        """The weight in use, in the compute type: cast, then all-gathered."""
        raw, dims = param.get_raw_value(), param.get_metadata("dims")
        if isinstance(raw, ghost.Probed):  # its gradient's norm is wanted, not the gradient
            return raw.replace(self._gather(raw.value, param, dims))  # pyright: ignore
        return self._gather(param.get_value(), param, dims)

    def _gather(self, value: jax.Array, param: nnx.Param, dims: str) -> jax.Array:
        spec = self.spec(dims)
        target = P(*spec, reduced=self.summed(param.get_metadata("over"), spec))
        dtype = jnp.dtype(self.compute)
        source = jax.typeof(value)
        if source.sharding.spec == target:
            return value.astype(dtype)
        home = P(*partitions(source.sharding.spec), unreduced=source.sharding.spec.reduced)
        return _gather(value, dtype, jnp.dtype(self.reduce), target, home)

    def summed(self, over: str, spec: PartitionSpec) -> frozenset[str]:
        """Axes that a gradient is summed over: those of the activations, less the weight's own."""
        own = {axis for entry in spec for axis in _axes(entry)}
        return frozenset(axis for dim in over.split() for axis in self.dim_axes(dim)) - own

    def dot(self, equation: str, x: jax.Array, w: jax.Array, out: str | None = None) -> jax.Array:
        """Einsum; with `out`, a sharded dimension is contracted and the result is communicated."""
        if out is None:
            return ghost.einsum(equation, x, w)
        terms, result = equation.split("->")
        places = {}
        for term, array in zip(terms.split(","), (x, ghost.value(w)), strict=True):
            places |= dict(zip(term, partitions(jax.typeof(array).sharding.spec), strict=True))
        contracted = [places[letter] for letter in places if letter not in result]
        partial = frozenset(axis for entry in contracted for axis in _axes(entry))
        local = P(*(places[letter] for letter in result), unreduced=partial)
        y = reshard(ghost.einsum(equation, x, w, local), self.spec(out))
        return checkpoint_name(y, SUMMED) if partial else y

    def take(self, table: jax.Array, index: jax.Array, out: str) -> jax.Array:
        """Rows of a gathered table [vocab embed]; its first dimension may be sharded."""
        if isinstance(table, ghost.Probed):
            return ghost.take(table, index, self.spec(out))
        return _take(table, index, self.spec(out), jax.typeof(table))

    def add_bias(self, equation: str, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x + bias as "bs,d->bsd": an outer product with ones, so that its gradient can wait."""
        ones_term, result = equation.split(",")[0], equation.split("->")[1]
        sizes = dict(zip(result, x.shape, strict=True))
        places = dict(zip(result, partitions(jax.typeof(x).sharding.spec), strict=True))
        spec = P(*(places[letter] for letter in ones_term))
        ones = jnp.ones([sizes[letter] for letter in ones_term], x.dtype, out_sharding=spec)
        # The transpose of `1.0 *` pins the sharding of a cotangent that comes straight from a
        # scan's carry; without it the compiler aborts on the unreduced sum.
        return x + 1.0 * ghost.einsum(equation, ones, bias.astype(x.dtype))

    def move(self, x: jax.Array, dims: str, over: str = "") -> jax.Array:
        """Reshard an activation to the dimensions' axes in use.

        `over` names the dimension of the weights that it meets: the gradients that come back from
        all of them are added first, and then summed over the devices once.
        """
        spec = self.spec(dims)
        return reshard(x, P(*spec, reduced=self.summed(over, spec)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(value, dtype, reduce_dtype, target, home):
    """Cast, then all-gather: the wire carries the compute type. The gradient comes `home`."""
    return reshard(value.astype(dtype), target)


def _gather_forward(value, dtype, reduce_dtype, target, home):
    return _gather(value, dtype, reduce_dtype, target, home), jnp.zeros((), value.dtype)


def _gather_backward(dtype, reduce_dtype, target, home, like, grad):
    return (reshard(grad.astype(reduce_dtype), home).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _take(table, index, out, kind):
    """Rows of a table; the gradient of a row is summed in `wide`, however often it is taken."""
    return table.at[index].get(out_sharding=out, mode="clip")


def _take_forward(table, index, out, kind):
    return _take(table, index, out, kind), index


def _take_backward(out, kind, index, grad):
    vocab = _axes(partitions(kind.sharding.spec)[0])
    rows = kind.sharding.shard_shape(kind.shape)[0]

    def scatter(index, grad):  # local shards below
        index = index - (jax.lax.axis_index(vocab) * rows if vocab else 0)
        index = jnp.where((index >= 0) & (index < rows), index, rows)
        zeros = jnp.zeros((rows, grad.shape[-1]), wide(kind.dtype))
        return zeros.at[index].add(grad.astype(zeros.dtype), mode="drop").astype(kind.dtype)

    # Mapped, because the partitioner gets an unreduced scatter wrong where a mesh axis of neither
    # the batch nor the vocabulary comes before theirs.
    entries, home = partitions(out), kind.sharding.spec
    spec = P(*partitions(home), unreduced=home.reduced)
    mapped = jax.shard_map(
        scatter, in_specs=(P(*entries[:-1]), out), out_specs=spec, check_vma=False
    )
    return mapped(index, grad), None


_take.defvjp(_take_forward, _take_backward)


def wide_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Einsum with a `wide` result, whose gradients are products in the type of `x` and `y`."""
    return _wide_einsum(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=wide(x.dtype))


def _wide_forward(equation, x, y):
    return _wide_einsum(equation, x, y), (x, y)


def _wide_backward(equation, operands, grad):
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *operands)
    return pull(grad.astype(operands[0].dtype))


_wide_einsum.defvjp(_wide_forward, _wide_backward)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def sequence_order(layout: Layout, length: int) -> np.ndarray:
    """The token of a row [S] that each place of a batch holds: the zig-zag order of ring.py.

    Device i of n holds pieces i and 2n-1-i of 2n, and so an equal share of the causal mask. Whole
    sequences, and those that all_to_all makes whole, stay in their natural order.
    """
    count = layout.size("seq")
    if count == 1 or layout.attention.context == "all_to_all":
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * count, -1)
    return np.stack([pieces[:count], pieces[: count - 1 : -1]], axis=1).reshape(-1)


def stacked_dims(param: nnx.Variable) -> str:
    """A variable's dimension names, with the leading `layers` that stacking gave it."""
    dims = param.get_metadata("dims")
    return f"layers {dims}" if param.get_value().ndim == len(dims.split()) + 1 else dims


def make_layout(
    config: cfg.Config, sizes: dict[str, int], attention: cfg.Attention, experts: str = "padded"
) -> Layout:
    """The layout that a config names on a mesh of these sizes."""
    rules = {dim: cfg.RULES.get(dim, ()) for dim in cfg.DIMS} | config.rules
    if config.model.num_kv_heads < math.prod(sizes[a] for a in rules["kv_heads"]):
        rules["kv_heads"] = ()  # replicated; each device uses its group
    rules["cache_kv_heads"] = config.rules.get("cache_kv_heads", rules["kv_heads"])
    storage = {**cfg.STORAGE, **config.storage}
    frozen = lambda table: tuple((dim, tuple(axes)) for dim, axes in table.items())
    return Layout(
        axes=tuple(sizes.items()), rules=frozen(rules), storage=frozen(storage),
        gather_at=config.gather_at, compute=config.precision.compute,
        reduce=config.precision.reduce, remat=config.remat, attention=attention, experts=experts,
    )  # fmt: skip


def batch_shardings(config: cfg.Config, layout: Layout, mesh: Mesh) -> dict[str, NamedSharding]:
    """The arrays of a batch, [B, S] each, and where they live."""
    names = ["tokens", "targets", "weights", "positions"] + ["segments"] * config.data.segments
    return dict.fromkeys(names, NamedSharding(mesh, layout.spec("batch seq")))


def place(mesh: Mesh, tree):
    """Shapes with concrete shardings on `mesh`, from the abstract ones that eval_shape returns."""

    def one(leaf):
        spec = leaf.sharding.spec if getattr(leaf, "sharding", None) is not None else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)
