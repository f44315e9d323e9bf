"""Read a compiled program: what its HLO text says of collectives, with the trips of its loops."""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from jaxlm.sharding import Layout


class Collective(NamedTuple):
    """One collective of a compiled program; asynchronous halves are one."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute
    shapes: tuple[str, ...]  # results on one device, "f32[8,32]": several where combined
    bytes: int  # of those
    groups: tuple[tuple[int, ...], ...]  # positions in the mesh that talk; (): all
    loops: int  # while loops around it
    times: int  # that it runs in a step

    @property
    def scalars(self) -> int:
        """How many of the results are a single number, or a few that were put together."""
        count = lambda shape: math.prod(map(int, re.findall(r"\d+", shape.split("[")[1])))
        return sum(count(shape) < 8 for shape in self.shapes)


_KINDS = "all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)")
_CALLED = re.compile(r"[ ,](body|calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """Every collective of an optimized HLO module, wherever it is called."""
    computations, entry = _computations(hlo)
    found = []

    def walk(name: str, loops: int, times: int, outer: set | None) -> None:
        # On TPU one collective spans its start, step and done fusions: within the computation
        # that calls those, `outer`, it counts once.
        seen = set() if outer is None else outer
        for line in computations[name]:
            match = _COLLECTIVE.search(line)
            if match:
                channel = re.search(r"channel_id=\d+", line)
                key = (*_ARRAY.findall(match[1]), match[2], channel[0] if channel else line)
                if outer is None or key not in seen:
                    found.append(_collective(match, name, loops, times))
                seen.add(key)
            for role, callee in _CALLED.findall(line):
                trips = _trips(line, computations) if role == "body" else 1
                inside = seen if role == "calls" else outer
                walk(callee, loops + (role == "body"), times * trips, inside)
            for branches in _BRANCHES.findall(line):
                for callee in re.findall(r"[\w.\-]+", branches):
                    walk(callee, loops, times, outer)

    walk(entry, 0, 1, None)
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a while loop runs: the compiler says so, or its condition is counter < constant."""
    if known := re.search(r"known_trip_count\D*(\d+)", line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition, line
    lines = computations[condition[1]]
    limits = [m[1] for each in lines if (m := re.search(r"= s32\[\]\S* constant\((\d+)\)", each))]
    assert len(limits) == 1, (line, lines)
    return int(limits[0])


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the entry."""
    computations, entry, name = {}, "", ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _collective(match: re.Match, computation: str, loops: int, times: int) -> Collective:
    result, kind, start, rest = match.groups()
    arrays = _ARRAY.findall(result)
    if start and (kind != "all-reduce" or result.startswith("((")):  # operands, results, contexts
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    groups, parts = replica_groups(rest), 1
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # TPU: an all-reduce (of this shape) and the slice of it, fused
        parts = max(1, *map(len, groups))
    width = lambda t: 1 if t == "pred" else int(re.sub(r"\D*(\d+).*", r"\1", t)) / 8
    size = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
    return Collective(
        kind, tuple(f"{t}[{dims}]" for t, dims in arrays),
        int(sum(width(t) * size(dims) for t, dims in arrays) / parts), groups, loops, times,
    )  # fmt: skip


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


def mesh_axes(groups: tuple[tuple[int, ...], ...], layout: Layout) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    shape = [size for _, size in layout.axes]
    groups = groups or (tuple(range(math.prod(shape))),)
    places = [np.array(np.unravel_index(group, shape)) for group in groups]
    varies = [any(len(set(p[i])) > 1 for p in places) for i in range(len(shape))]
    return tuple(axis for (axis, _), does in zip(layout.axes, varies, strict=True) if does)


SUMS = ("count", "arrays", "scalars", "bytes", "step_bytes")


def summarize(found: list[Collective], layout: Layout) -> list[dict]:
    """Collectives of one kind, axes and loop depth as one row each, largest first."""
    rows = collections.defaultdict(lambda: dict.fromkeys(SUMS, 0))
    for one in found:
        row = rows[one.kind, mesh_axes(one.groups, layout), one.loops]
        row["count"] += 1
        row["arrays"] += len(one.shapes)
        row["scalars"] += one.scalars
        row["bytes"] += one.bytes
        row["step_bytes"] += one.bytes * one.times
    names = ("kind", "axes", "loops")
    table = [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]
    return sorted(table, key=lambda row: -row["step_bytes"])
