"""The collectives of a compiled program, and the mesh axes that they run along.

`axes` are the names and sizes of a mesh's axes in their order, as `jax.sharding.Mesh.shape` has
them: HLO numbers devices by their place in the mesh, the last axis fastest.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxlm.xla.hlo import Computation, Instruction, Module
from jaxlm.xla.schedule import Visit, walk

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "ragged-all-to-all", "all-to-all",
    "collective-permute",
)  # fmt: skip


class Collective(NamedTuple):
    """One collective of a compiled program; asynchronous halves are one."""

    kind: str  # one of KINDS
    shapes: tuple[str, ...]  # results on one device, "f32[8,32]": several where combined
    bytes: int  # of those
    groups: tuple[tuple[int, ...], ...]  # positions in the mesh that talk; (): all
    loops: int  # while loops around it
    times: int  # that it runs in a step
    blocking: bool = True  # nothing else runs meanwhile

    @property
    def scalars(self) -> int:
        """How many of the results are a single number, or a few that were put together."""
        count = lambda shape: math.prod(map(int, re.findall(r"\d+", shape.split("[")[1])))
        return sum(count(shape) < 8 for shape in self.shapes)


def find_collectives(module: Module) -> list[Collective]:
    """Every collective, wherever it is called.

    On TPU one collective spans its start, step and done fusions: within the computation that calls
    those it counts once.
    """
    found, seen = [], set()
    for visit in walk(module):
        each = visit.instruction
        if each.kind not in KINDS or each.opcode.endswith(("-done", "-update")):
            continue
        channel = re.search(r"channel_id=\d+", each.attributes)
        shapes = tuple((shape.dtype, shape.dims) for shape in each.shapes)
        key = (visit.place.name, shapes, each.kind, channel[0] if channel else each.name)
        if visit.scheduled is each or key not in seen:
            found.append(_collective(visit, module))
        seen.add(key)
    return found


def _collective(visit: Visit, module: Module) -> Collective:
    each, kind = visit.instruction, visit.instruction.kind
    arrays = list(each.shapes)
    start = each.opcode.endswith("-start")
    nested = each.attributes and _nested_result(each, visit.computation)
    if start and (kind != "all-reduce" or nested):  # operands, results, contexts
        arrays = [shape for shape in arrays if (shape.dtype, shape.dims) != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    groups, parts = replica_groups(each.attributes), 1
    if kind == "all-reduce" and "all-reduce-scatter" in visit.computation.name:
        kind = "reduce-scatter"  # TPU: an all-reduce (of this shape) and the slice of it, fused
        parts = max(1, *map(len, groups)) if groups else module.partitions
    if kind == "ragged-all-to-all":  # the larger of its two buffers has room for the worst case
        given = visit.computation.by_name[each.operands[0]].shapes
        arrays = min(arrays, list(given), key=lambda some: sum(shape.bytes for shape in some))
    names = tuple(f"{shape.dtype}[{','.join(map(str, shape.dims))}]" for shape in arrays)
    size = int(sum(shape.bytes for shape in arrays) / parts)
    return Collective(kind, names, size, groups, visit.loops, visit.times, not overlapped(visit))


def _nested_result(each: Instruction, computation: Computation) -> bool:
    """Whether the result of a started all-reduce holds its operands too."""
    operands = sum(len(made.shapes) for made in computation.operands(each))
    return len(each.shapes) >= 2 * operands


_WORK = (
    "fusion", "dot", "convolution", "while", "call", "conditional", "custom-call", "ragged-dot",
)  # fmt: skip


def overlapped(visit: Visit) -> bool:
    """Whether the schedule has work between the start and the end of a collective."""
    each, scheduled = visit.instruction, visit.scheduled
    if scheduled is each and not each.opcode.endswith("-start"):
        return False
    if scheduled is not each and scheduled.opcode == "fusion":  # TPU: fused with computation
        inside = visit.computation.instructions
        marks = any("AsyncCollective" in other.target for other in inside)
        return marks or "async_collective" in visit.computation.name + scheduled.name
    if scheduled is not each and not scheduled.opcode.endswith("-start"):
        return False
    begun, ready = False, {scheduled.name}
    for other in visit.place.instructions:
        if other.name == scheduled.name:
            begun = True
        elif begun and ready & set(other.operands) and other.opcode.endswith(("-done", "-update")):
            if other.opcode.endswith("-done"):
                return False
            ready.add(other.name)
        elif begun and other.opcode in _WORK:
            return True
    return False


# Bytes that a device sends for each byte of the result, in a ring of n.
WIRE = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


def replica_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """The groups of an HLO line, in any of the ways that XLA writes them; (): all devices."""
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text)
    if lists:
        found = re.findall(r"\{([\d, ]+)\}", lists[1])
        return tuple(tuple(int(n) for n in group.split(",")) for group in found)
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return tuple(map(tuple, _iota(iota[1]).tolist()))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? *\{([^}]*)\}", text
    )
    assert mesh or "replica_groups={}" in text, text
    return _mesh_groups(*mesh.groups()) if mesh else ()


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): 0..7 as 2x4, transposed, as 4x2; without the left side not the last."""
    shape, source, order = (
        [int(n) for n in part.split(",") if n]
        for part in re.findall(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)[0]
    )
    ids = np.arange(math.prod(source)).reshape(source)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape) if shape else ids


def _mesh_groups(axes: str, ids: str | None, names: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=4,'b'=2] {'a'}: groups along axis a; 'a':(2)2 is its part of size 2 after 2."""
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)
    taken = {axis: (int(before or 1), int(size or sizes[axis])) for axis, before, size in parts}
    shape = []
    for axis, size in sizes.items():
        before, part = taken.get(axis, (1, 1))
        shape += [before, part, size // (before * part)]
    inside = [3 * i + 1 for i in range(len(sizes))]
    around = [i for i in range(len(shape)) if i not in inside]
    places = _iota(ids) if ids else np.arange(math.prod(shape))
    groups = places.reshape(shape).transpose(around + inside)
    return tuple(map(tuple, groups.reshape(-1, math.prod(shape[i] for i in inside)).tolist()))


def mesh_axes(groups: tuple[tuple[int, ...], ...], axes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    shape = list(axes.values())
    groups = groups or (tuple(range(math.prod(shape))),)
    places = [np.array(np.unravel_index(group, shape)) for group in groups]
    varies = [any(len(set(p[i])) > 1 for p in places) for i in range(len(shape))]
    return tuple(axis for axis, does in zip(axes, varies, strict=True) if does)


SUMS = ("count", "arrays", "scalars", "bytes", "step_bytes")


def summarize(found: list[Collective], axes: Mapping[str, int]) -> list[dict]:
    """Collectives of one kind, axes and loop depth as one row each, largest first."""
    rows = collections.defaultdict(lambda: dict.fromkeys(SUMS, 0))
    for one in found:
        row = rows[one.kind, mesh_axes(one.groups, axes), one.loops]
        row["count"] += 1
        row["arrays"] += len(one.shapes)
        row["scalars"] += one.scalars
        row["bytes"] += one.bytes
        row["step_bytes"] += one.bytes * one.times
    names = ("kind", "axes", "loops")
    table = [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]
    return sorted(table, key=lambda row: -row["step_bytes"])
