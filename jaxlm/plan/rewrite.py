"""What compilers do to a step before it runs: dead operations go, sums merge, loops shrink."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

from jaxlm.plan.walk import Array, Body, Op


def prune(body: Body, wanted: list[bool]) -> set[int]:
    """Drop what no wanted output needs; returns the values that are needed."""
    needed = {v for v, want in zip(body.outputs, wanted, strict=True) if want and v is not None}
    body.outputs = [v if want else None for v, want in zip(body.outputs, wanted, strict=True)]
    kept = []
    for op in reversed(body.ops):
        used = [v in needed for v in op.outputs]
        if not any(used) and op.outputs:
            continue
        if op.name == "scan":
            _prune_scan(op, used)
        elif op.name == "cond":
            inner = [prune(branch, used) for branch in op.bodies]
            for i in range(1, len(op.inputs)):
                if not any(b.inputs[i - 1] in n for b, n in zip(op.bodies, inner, strict=True)):
                    op.inputs[i] = None
        needed.update(v for v in op.inputs if v is not None)
        kept.append(op)
    body.ops = kept[::-1]
    return needed


def _prune_scan(op: Op, used: list[bool]) -> None:
    """What is carried is needed if its last value is, or if another step needs it."""
    (body,), consts, carried = op.bodies, op.params["num_consts"], op.params["num_carry"]
    while op.params["length"] > 1:
        trial = dataclasses.replace(body, ops=list(body.ops), outputs=list(body.outputs))
        needed = _needs(trial, used)
        more = [want or body.inputs[consts + i] in needed for i, want in enumerate(used[:carried])]
        if more == used[:carried]:
            break
        used = more + used[carried:]
    needed = prune(body, used)
    op.inputs = [v if body.inputs[i] in needed else None for i, v in enumerate(op.inputs)]


def _needs(body: Body, wanted: list[bool]) -> set[int]:
    """The values that outputs need, nested bodies taken whole."""
    needed = {v for v, want in zip(body.outputs, wanted, strict=True) if want and v is not None}
    for op in reversed(body.ops):
        if any(v in needed for v in op.outputs):
            needed.update(v for v in op.inputs if v is not None)
    return needed


def hoist(body: Body, grows: bool) -> None:
    """Move out of loops what is the same in every step; `grows`: also what is larger than its
    operands (compilers differ in that)."""
    ops: list[Op] = []
    seen: dict[str, Op] = {}
    for op in body.ops:
        seen.setdefault(_same(op, [body.arrays[v] for v in op.outputs]), op)
        for inner in op.bodies:
            hoist(inner, grows)
        if op.name == "scan" and op.params["length"] > 1:
            ops += _hoisted(body, op, grows, seen)
        ops.append(op)
    body.ops = ops


def _same(op: Op, kinds: list[Array]) -> str:
    """A key that operations share which make the same."""
    return str((op.name, op.inputs, op.literals, op.params, kinds))


def scatter_sums(body: Body) -> None:
    """Where a sum over devices is made and then cut along them, scatter it."""
    made = {v: op for op in body.ops for v in op.outputs}
    used = collections.Counter(v for op in body.ops for v in op.inputs)
    used.update(body.outputs)
    for op in body.ops:
        for inner in op.bodies:
            scatter_sums(inner)
        first = made.get(op.inputs[0]) if op.name == "reshard" else None
        if first is None or first.name != "reshard" or used[first.outputs[0]] > 1:
            continue
        source, between, after = (
            body.arrays[v] for v in (first.inputs[0], *first.outputs, *op.outputs)
        )
        cuts = zip(between.split, after.split, strict=True)
        if source.partial - between.partial and all(old == new or not old for old, new in cuts):
            op.inputs = list(first.inputs)
    prune(body, [v is not None for v in body.outputs])


def merge_sums(body: Body) -> None:
    """Where two sums over devices are added, add first, and make one sum."""
    made = {v: op for op in body.ops for v in op.outputs}
    used = collections.Counter(v for op in body.ops for v in op.inputs)
    used.update(v for v in body.outputs if v is not None)
    dropped, ops = set(), []
    for op in body.ops:
        for inner in op.bodies:
            merge_sums(inner)
        pair = [made.get(v) for v in op.inputs if v is not None and used[v] == 1]
        one, two = pair if len(pair) == 2 else (None, None)
        kinds = lambda each: (
            each.name, body.arrays[each.inputs[0]].split, body.arrays[each.inputs[0]].partial,
            body.arrays[each.outputs[0]],
        )  # fmt: skip
        if (
            op.name in ("add", "add_any") and one and two
            and one.name == two.name == "reshard" and kinds(one) == kinds(two)
            and kinds(one)[2] - kinds(one)[3].partial
        ):  # fmt: skip
            between = -op.outputs[0]
            body.arrays[between] = body.arrays[one.inputs[0]]
            dropped |= {id(one), id(two)}
            ops.append(
                dataclasses.replace(op, inputs=[*one.inputs, *two.inputs], outputs=[between])
            )
            op = dataclasses.replace(one, inputs=[between], outputs=op.outputs)
            made[op.outputs[0]] = op
        ops.append(op)
    body.ops = [op for op in ops if id(op) not in dropped]


def _hoisted(outer: Body, op: Op, grows: bool, seen: dict[str, Op]) -> list[Op]:
    """What leaves one loop; `seen`: what has left others, which equal operations share."""
    (body,), consts = op.bodies, op.params["num_consts"]
    fixed: dict[int, Any] = dict(zip(body.inputs[:consts], op.inputs, strict=False))
    out, kept, new = [], [], []
    for one in body.ops:
        reads = [v for v in one.inputs if v is not None]  # constants are made where they are used
        free = not one.bodies and reads and all(v in fixed for v in reads)
        size = lambda numbers: sum(
            body.arrays[v].width * math.prod(body.arrays[v].shape) for v in numbers if v is not None
        )
        if not free or not (grows or size(one.outputs) <= size(one.inputs)):
            kept.append(one)
            continue
        moved = dataclasses.replace(one, inputs=[v if v is None else fixed[v] for v in one.inputs])
        same = seen.setdefault(_same(moved, [body.arrays[v] for v in one.outputs]), moved)
        if same is moved:
            out.append(moved)
            outer.arrays |= {v: body.arrays[v] for v in one.outputs}
        fixed |= zip(one.outputs, same.outputs, strict=True)
        new += one.outputs
    body.ops = kept
    used = {v for one in kept for v in one.inputs} | set(body.outputs)
    new = [v for v in new if v in used]
    body.inputs[consts:consts] = new
    op.inputs[consts:consts] = [fixed[v] for v in new]
    op.params = op.params | {"num_consts": consts + len(new)}
    return out
