"""The train step as it was traced: its equations, with calls opened and shapes as they are sharded.

`read` makes of a jaxpr a `Body`: operations in order, of values whose dimensions say which mesh
axes split them. Nothing here knows a model, a layer or an optimizer: an operation has a cost
because of its primitive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jax.sharding import AxisType

Axes = tuple[str, ...]
Sizes = dict[str, Any]  # mesh axis -> devices; of many meshes at once, an integer array [N] each
# Primitives that run another jaxpr once, in place.
CALLS = {
    "pjit", "jit", "closed_call", "core_call", "remat", "checkpoint", "remat2", "custom_jvp_call",
    "custom_vjp_call", "custom_vmap_call", "shard_map",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """A value: its shape over the devices that its `split` does not name."""

    shape: tuple[int, ...]  # of all devices; inside shard_map of one, for the axes that it maps
    split: tuple[Axes, ...]  # mesh axes of each dimension
    width: int  # bytes of an element
    partial: frozenset[str] = frozenset()  # axes over which it is a sum that is still to be made
    host: bool = False  # it lies in the host's memory
    whole: bool = False  # its elements are whole numbers
    frame: int = dataclasses.field(default=0, compare=False)  # the shard_map that it is in; 0: none
    # Of a step that stands for others (shared.py), where `shape` is of what these do not name:
    times: tuple[Axes, ...] = ()  # what each dimension is a multiple of
    mapped: tuple[Axes, ...] = ()  # mesh axes that a shard_map splits each dimension over

    def local(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape on one device."""
        shape = self.shape
        if self.times:
            pairs = zip(shape, self.times, strict=True)
            shape = [n * math.prod(sizes[one] for one in times) for n, times in pairs]
        for split in (self.split, self.mapped):
            if split:
                shape = [
                    -(-n // math.prod(sizes[axis] for axis in axes)) if axes else n
                    for n, axes in zip(shape, split, strict=True)
                ]
        return tuple(shape)

    def bytes(self, sizes: Sizes) -> int:
        """Of one device."""
        return self.width * math.prod(self.local(sizes))


@dataclasses.dataclass
class Op:
    """An equation; operands that are literals are None."""

    name: str
    inputs: list[Any]  # numbers of values
    outputs: list[Any]
    scope: str  # named scopes and autodiff's marks, as in a compiled program's op_name
    params: dict[str, Any]
    literals: str = ""
    bodies: list[Body] = dataclasses.field(default_factory=list)
    sent: list[Any] | None = None  # the collectives that it needs, once they are known (work.py)


@dataclasses.dataclass
class Body:
    """Operations in order, and what they start and end with. Values are numbers."""

    arrays: dict[int, Array]
    inputs: list[Any]
    outputs: list[Any]
    ops: list[Op]
    # Of each shard_map (the first stands for what is in none): its operands and results, as they
    # are outside and inside.
    frames: list[list[tuple[Array, Array]]] = dataclasses.field(default_factory=list)


def array(aval: Any, frame: int = 0) -> Array:
    """The type of a value."""
    shape = tuple(aval.shape)
    try:
        width, whole = np.dtype(aval.dtype).itemsize, np.dtype(aval.dtype).kind in "iub"
    except TypeError:  # a random key
        width, whole = 8, True
    host = getattr(aval, "memory_space", None) == jax.memory.Space.Host
    sharding = getattr(aval, "sharding", None)
    if sharding is None or len(sharding.mesh.shape) == 0:
        return Array(shape, ((),) * len(shape), width, host=host, whole=whole, frame=frame)
    spec = sharding.spec
    entries = tuple(getattr(spec, "partitions", None) or getattr(spec, "_partitions", ()))
    entries += (None,) * (len(shape) - len(entries))
    axes = lambda entry: (entry,) if isinstance(entry, str) else tuple(entry or ())
    split = tuple(map(axes, entries))
    return Array(shape, split, width, frozenset(spec.unreduced), host, whole, frame)


def read(jaxpr: Jaxpr) -> Body:
    """A jaxpr with its calls opened; equal operations are one."""
    reader = _Reader()
    return dataclasses.replace(reader.body(jaxpr, ""), frames=reader.frames)


class _Reader:
    def __init__(self) -> None:
        self.count = 0
        self.retyped: dict[int, int] = {}  # number -> of what it is another type
        self.frames: list[list[tuple[Array, Array]]] = [[]]
        self.frame = 0

    def new(self, arrays: dict[int, Array], aval: Any) -> int:
        self.count += 1
        arrays[self.count] = array(aval, self.frame)
        return self.count

    def same(self, made: Body, variable: Any, number: int | None) -> int:
        """The number of a value under another name; its type changes at the edge of shard_map."""
        if number is None:
            return self.new(made.arrays, variable.aval)
        kind, first = array(variable.aval, self.frame), self.retyped.get(number, number)
        same = [n for n, of in self.retyped.items() if of == first and n in made.arrays]
        for known in (number, first, *same):
            if made.arrays.get(known) == kind:
                return known
        new = self.new(made.arrays, variable.aval)
        self.retyped[new] = first
        made.ops.append(Op("retype", [number], [new], "", {}))
        return new

    def body(self, jaxpr: Jaxpr, scope: str) -> Body:
        made = Body({}, [], [], [])
        names: dict[Any, int] = {}
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            names[variable] = self.new(made.arrays, variable.aval)
        made.inputs = [names[v] for v in (*jaxpr.constvars, *jaxpr.invars)]
        self.visit(jaxpr, scope, made, names, {})
        made.outputs = [_number(v, names) for v in jaxpr.outvars]
        return made

    def enter(self, eqn: Any, inner: Jaxpr) -> int:
        """The number of the frame inside a shard_map."""
        pairs = zip((*eqn.invars, *eqn.outvars), (*inner.invars, *inner.outvars), strict=True)
        frame = len(self.frames)
        kinds = [(array(a.aval, self.frame), array(b.aval, frame)) for a, b in pairs]
        self.frames.append(kinds)
        return frame

    def visit(
        self, jaxpr: Jaxpr, scope: str, made: Body, names: dict[Any, int], seen: dict[Any, Op]
    ) -> None:
        """Add a jaxpr's operations; `seen` are those that an equal one is merged with."""
        for eqn in jaxpr.eqns:
            stack = str(eqn.source_info.name_stack)
            where = f"{scope}/{stack}" if stack else scope
            found = list(_jaxprs(eqn.params))
            once = eqn.primitive.name == "scan" and eqn.params["length"] == 1
            inner = found[0] if found and (once or eqn.primitive.name in CALLS) else None
            if inner is not None and len(inner.invars) == len(eqn.invars):
                before = self.frame
                if eqn.primitive.name == "shard_map":
                    self.frame = self.enter(eqn, inner)
                own = {v: self.new(made.arrays, v.aval) for v in inner.constvars}
                pairs = zip(inner.invars, eqn.invars, strict=True)
                for variable, operand in pairs:
                    own[variable] = self.same(made, variable, _number(operand, names))
                self.visit(inner, where, made, own, {} if eqn.params.get("prevent_cse") else seen)
                self.frame = before
                for variable, result in zip(eqn.outvars, inner.outvars, strict=True):
                    names[variable] = self.same(made, variable, _number(result, own))
                continue
            inputs = [_number(v, names) for v in eqn.invars]
            values = [np.asarray(v.val).tolist() for v in eqn.invars if isinstance(v, Literal)]
            literals, avals = str(values), tuple(v.aval for v in eqn.outvars)
            key: Any = None  # what runs another jaxpr is not merged
            if not found:
                key = (eqn.primitive.name, tuple(inputs), literals, str(eqn.params), avals)
            if key is not None and key in seen:
                names.update(zip(eqn.outvars, seen[key].outputs, strict=True))
                continue
            outputs = [self.new(made.arrays, v.aval) for v in eqn.outvars]
            names.update(zip(eqn.outvars, outputs, strict=True))
            bodies = (
                [] if eqn.primitive.name in KERNELS else [self.body(one, where) for one in found]
            )
            params = {k: eqn.params[k] for k in PARAMS if k in eqn.params}
            if eqn.primitive.name == "scan":
                params |= _scan_counts(eqn, bodies[0])
            op = Op(eqn.primitive.name, inputs, outputs, where, params, literals, bodies)
            made.ops.append(op)
            if key is not None:
                seen[key] = op
            if any(map(_is_auto, (v.aval for v in eqn.outvars))):
                _settle(made, op)


KERNELS = {"pallas_call", "scatter-add", "scatter", "reduce", "sort"}
PARAMS = (
    "dimension_numbers", "axes", "length", "axis_name", "name", "ragged_dot_dimension_numbers",
    "permutation", "broadcast_dimensions", "mask_type",
)  # fmt: skip


def _is_auto(aval: Any) -> bool:
    """Whether the partitioner decides where a value lives: its type does not say."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and any(
        kind == AxisType.Auto for kind in sharding.mesh.axis_types or ()
    )


def _settle(made: Body, op: Op) -> None:
    """Places for what the partitioner decides: results live where their operands do."""
    arrays, params = made.arrays, op.params
    if not op.inputs or op.inputs[0] is None:
        return
    first = arrays[op.inputs[0]]
    for number in op.outputs:
        old, split, partial = arrays[number], None, frozenset()
        if op.name == "reshard":
            op.name, split = "retype", first.split
        elif op.name == "gather" and op.inputs[1] is not None:
            numbers, indices = params["dimension_numbers"], arrays[op.inputs[1]].split
            rows = [
                axes for i, axes in enumerate(first.split)
                if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
            ]  # fmt: skip
            batch = iter(indices[:-1])
            split = tuple(
                rows[numbers.offset_dims.index(i)] if i in numbers.offset_dims else next(batch)
                for i in range(len(old.shape))
            )
            kept = {axis for axes in split for axis in axes}
            partial = frozenset(axis for axes in first.split for axis in axes) - kept
        elif op.name == "broadcast_in_dim":
            split = tuple(
                axes if n == size else () for n, size, axes in _spread(params, first, old)
            )
        elif op.name == "transpose":
            split = tuple(first.split[i] for i in params["permutation"])
        elif op.name.startswith("reduce_") and "axes" in params:
            split = tuple(a for i, a in enumerate(first.split) if i not in params["axes"])
        else:
            same = [arrays[v] for v in op.inputs if v is not None and arrays[v].shape == old.shape]
            split = max((one.split for one in same), key=lambda s: sum(map(len, s)), default=None)
        if split is not None:
            arrays[number] = dataclasses.replace(old, split=split, partial=partial)


def _spread(params: dict[str, Any], first: Array, new: Array):
    """(size, size before, axes before) of each dimension of a broadcast value."""
    places = {dim: i for i, dim in enumerate(params["broadcast_dimensions"])}
    for i, n in enumerate(new.shape):
        j = places.get(i)
        yield (n, 0, ()) if j is None else (n, first.shape[j], first.split[j])


def _scan_counts(eqn: Any, body: Body) -> dict[str, int]:
    """How many operands of a scan are constants, and how many are carried.

    What is scanned over has a dimension more outside; jax's own counts moved between versions.
    """
    rank = lambda number: len(body.arrays[number].shape) if number is not None else 0
    stacked = sum(len(v.aval.shape) > rank(n) for v, n in zip(eqn.invars, body.inputs, strict=True))
    same = [
        len(v.aval.shape) == len(w.aval.shape)
        for v, w in zip(eqn.outvars, _results(eqn), strict=True)
    ]
    carried = sum(same)
    return {"num_carry": carried, "num_consts": len(eqn.invars) - stacked - carried}


def _results(eqn: Any) -> list[Any]:
    return next(_jaxprs(eqn.params)).outvars


def _number(variable: Any, names: dict[Any, int]) -> int | None:
    return None if isinstance(variable, Literal) else names[variable]


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # of a closed one
            if isinstance(part, Jaxpr):
                yield part


def loops(body: Body, sizes: Sizes, times: Any = 1.0) -> Iterator[tuple[Body, Op, Any]]:
    """Every operation, with the body that it stands in and how often it runs."""
    for op in body.ops:
        yield body, op, times
        for inner in op.bodies:
            yield from loops(inner, sizes, times * trips(op, sizes))


def trips(op: Op, sizes: Sizes) -> Any:
    """How often an operation's bodies run; every branch of a condition counts once."""
    if op.name == "scan":
        length = op.params["length"]
        return 1.0 * (sizes[length] if isinstance(length, str) else length)
    return 1.0
