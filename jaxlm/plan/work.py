"""What the operations of a traced step do on one device: FLOPs, and bytes between devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm import attention
from jaxlm.plan.facts import Facts
from jaxlm.plan.walk import Array, Body, Op, Sizes

PRODUCTS = ("dot_general", "ragged_dot_general")


class Sent(NamedTuple):
    """One collective that an operation needs."""

    kind: str
    axes: frozenset[str]
    bytes: Callable[[Sizes], Any]  # of its result


def flops(body: Body, op: Op, sizes: Sizes) -> Any:
    """2 x multiply-adds of a product; elsewhere 0."""
    if op.name not in PRODUCTS or None in op.inputs:
        return 0.0
    local = lambda number: body.arrays[number].local(sizes)
    if op.name == "dot_general":
        inner = _inner(body, op, sizes)
        return 2.0 * math.prod(local(op.outputs[0])) * inner if is_product(body, op, sizes) else 0.0
    numbers = op.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left = local(op.inputs[0])
    inner = math.prod(left[i] for i in contracted)
    # Compilers make one dense product of all groups. Without group dimensions each has a result.
    times = local(op.inputs[2])[0] if numbers.rhs_group_dimensions else 1
    return 2.0 * math.prod(local(op.outputs[0])) * inner * times


def is_product(body: Body, op: Op, sizes: Sizes) -> bool:
    """Whether a dot_general is more than elementwise work and a sum, which compilers make of one
    without a sum, or of vectors alone."""
    if None in op.inputs:
        return False
    _, (left_batch, _) = op.params["dimension_numbers"]
    free = len(body.arrays[op.outputs[0]].shape) > len(left_batch)
    return free and not np.all(_inner(body, op, sizes) == 1)


def _inner(body: Body, op: Op, sizes: Sizes) -> Any:
    """The length of the sums of a dot_general."""
    (contracted, _), _ = op.params["dimension_numbers"]
    left = body.arrays[op.inputs[0]].local(sizes)
    return math.prod(left[i] for i in contracted)


def kernel_flops(body: Body, op: Op, sizes: Sizes) -> Any:
    """FLOPs of a kernel, as it declares them; None where it is not one, or says nothing."""
    name = str(op.params.get("name", "")) if op.name == "pallas_call" else op.name
    shapes = [
        (body.arrays[v].local(sizes), body.arrays[v].width)
        for v in (*op.inputs, *op.outputs) if v is not None
    ]  # fmt: skip
    return attention.kernel_flops(name, op.scope, shapes)


def collectives(
    body: Body, op: Op, sizes: Sizes, facts: Facts
) -> Iterator[tuple[str, frozenset[str], Any]]:
    """(kind, axes, bytes of the result) of what an operation communicates on a platform: the step
    itself, or the partitioner for it."""
    for sent in needed(body, op):
        axes = _active(sent, sizes)
        if not axes:
            continue
        kind, size = sent.kind, sent.bytes(sizes)
        moved = body.arrays[op.outputs[0]]
        if not moved.whole:
            size = size * max(1, facts.wire // max(1, moved.width))
        if kind == "reduce-scatter" and not facts.scatters:
            kind, size = "all-reduce", size * math.prod(sizes[axis] for axis in axes)
        yield kind, axes, size


def communicates(body: Body, op: Op, sizes: Sizes) -> bool:
    """Whether an operation needs a collective."""
    return any(_active(sent, sizes) for sent in needed(body, op))


def _active(sent: Sent, sizes: Sizes) -> frozenset[str]:
    return frozenset(axis for axis in sent.axes if np.any(sizes[axis] > 1))


def needed(body: Body, op: Op) -> list[Sent]:
    """The collectives of an operation on a mesh of which no axis is 1."""
    if op.sent is None:
        op.sent = list(_needed(body, op))
    return op.sent


def _needed(body: Body, op: Op) -> Iterator[Sent]:
    of = lambda number: body.arrays[number]
    if not op.inputs or op.inputs[0] is None:
        return
    if op.name == "reshard":
        before, after = of(op.inputs[0]), of(op.outputs[0])
        yield from _moved(before, after, before.partial - after.partial)
    elif op.name == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        left, after = of(op.inputs[0]), of(op.outputs[0])
        summed = {axis for i in contracted for axis in left.split[i]} - after.partial
        if summed:
            yield Sent("all-reduce", frozenset(summed), after.bytes)
    elif op.name.startswith("reduce_") and "axes" in op.params:
        before, after = of(op.inputs[0]), of(op.outputs[0])
        summed = {axis for i in op.params["axes"] for axis in before.split[i]} - after.partial
        if summed:
            yield Sent("all-reduce", frozenset(summed), after.bytes)
    elif op.name == "gather":
        table, after = of(op.inputs[0]), of(op.outputs[0])
        kept = {axis for axes in after.split for axis in axes}
        summed = {axis for axes in table.split for axis in axes} - kept - after.partial
        if summed:
            yield Sent("all-reduce", frozenset(summed), after.bytes)
    elif op.name == "ragged_all_to_all":  # what is sent, and not the room for all that may come
        before, after = of(op.inputs[0]), of(op.outputs[0])
        size = lambda sizes: np.minimum(before.bytes(sizes), after.bytes(sizes))
        yield Sent("ragged-all-to-all", frozenset(_names(op)), size)
    elif op.name in EXPLICIT:
        for number in op.outputs:
            yield Sent(EXPLICIT[op.name], frozenset(_names(op)), of(number).bytes)


def _names(op: Op) -> tuple[str, ...]:
    name = op.params.get("axis_name") or op.params.get("axes") or ()
    return (name,) if isinstance(name, str) else tuple(name)


KERNELS = {
    "pallas_call", "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper",
}  # fmt: skip
EXPLICIT = {
    "psum": "all-reduce", "psum_invariant": "all-reduce", "psum2": "all-reduce",
    "pmax": "all-reduce", "pmin": "all-reduce", "all_gather": "all-gather",
    "all_gather_invariant": "all-gather", "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter", "all_to_all": "all-to-all", "ppermute": "collective-permute",
}  # fmt: skip


def _moved(before: Array, after: Array, summed: frozenset[str]) -> Iterator[Sent]:
    """A reshard: sums are made, then what lies on too many or too few axes is moved."""
    was = {axis: i for i, axes in enumerate(before.split) for axis in axes}
    now = {axis: i for i, axes in enumerate(after.split) for axis in axes}
    scattered = summed & now.keys()
    part = lambda sizes: before.bytes(sizes) / math.prod(sizes[axis] for axis in scattered)
    size = part if scattered else before.bytes
    if scattered:
        yield Sent("reduce-scatter", frozenset(scattered), size)
    if rest := summed - scattered:
        yield Sent("all-reduce", frozenset(rest), size)
    moved = {axis for axis in was if axis in now and was[axis] != now[axis]}
    if moved:
        yield Sent("all-to-all", frozenset(moved), size)
    gathered = was.keys() - now.keys()
    if gathered:
        yield Sent("all-gather", frozenset(gathered), after.bytes)
