"""The Cost of a train step, read from its trace: what plans and predictions start from."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.config import AXES
from jaxlm.hardware.network import route
from jaxlm.hardware.target import Target
from jaxlm.plan import live, rewrite, walk, work
from jaxlm.plan.cost import Cost, Traffic, part_of
from jaxlm.plan.facts import Facts, find_facts
from jaxlm.plan.walk import Axes, Body, Op, Sizes
from jaxlm.xla import WIRE

# What a train step is called with -> class of memory.
ARGUMENTS = {
    "params": "parameters", "fixed": "parameters", "opt": "optimizer", "step": "optimizer",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """A traced train step, as the compiler of a platform will have it."""

    body: Body
    classes: dict[int, str]  # of its arguments
    donated: tuple[int, ...]
    facts: Facts
    unclear: frozenset[str] = frozenset()  # mesh axes for whose sizes alone it stands (shared.py)


def read_step(traced: jax.stages.Traced, target: Target) -> Step:
    """The step of a trace, for a platform."""
    facts = find_facts(target)
    body = walk.read(traced.jaxpr.jaxpr)
    rewrite.prune(body, [True] * len(body.outputs))
    if facts.merges:
        rewrite.scatter_sums(body)
        rewrite.merge_sums(body)
    rewrite.hoist(body, facts.hoists)
    arguments, _ = jax.tree_util.tree_flatten_with_path(traced.args_info)
    numbers = body.inputs[len(body.inputs) - len(arguments) :]
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").split(".") for path, _ in arguments
    ]
    kinds = [next((ARGUMENTS[n] for n in name if n in ARGUMENTS), "batch") for name in names]
    donated = [v for v, (_, info) in zip(numbers, arguments, strict=True) if info.donated]
    return Step(body, dict(zip(numbers, kinds, strict=True)), tuple(donated), facts)


def analyze(step: Step, sizes: Sizes, target: Target, dcn: dict[str, int]) -> Cost:
    """The Cost of one step on one device of the target."""
    read = _Reading(step, sizes)
    return read.cost(target, sizes, dcn, _classes(step, read.memory))


def analyze_all(
    step: Step, meshes: Sequence[tuple[Sizes, dict[str, int]]], target: Target
) -> list[Cost]:
    """The Cost on each of many meshes, (sizes, dcn), with their memory in one sum.

    They are read together; axes that are of size 1 in some of them tell them apart.
    """
    alike: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for i, (sizes, _) in enumerate(meshes):
        alike[tuple(axis for axis in AXES if sizes[axis] > 1 and axis != "data")].append(i)
    found: dict[int, Cost] = {}
    for places in alike.values():
        columns = {name: np.array([meshes[i][0][name] for i in places]) for name in meshes[0][0]}
        read = _Reading(step, columns)
        for n, i in enumerate(places):
            peak = {"workspace": float(np.broadcast_to(read.peak, len(places))[n])}
            found[i] = read.cost(target, *meshes[i], peak, n)
    return [found[i] for i in range(len(meshes))]


class _Reading:
    """What a step does on one device, of one mesh or (arrays) of many."""

    def __init__(self, step: Step, sizes: Sizes) -> None:
        self.memory = live.Memory(step.body, sizes, step.facts, _replaced(step))
        self.flops, self.kernels, self.grouped, self.notes = _flops(step.body, sizes)
        self.traffic = _traffic(step, sizes)
        self.hbm, self.hidden = _hbm_bytes(self.memory, 1.0)
        self.host = _host_bytes(step.body, sizes)
        arguments = (step.facts.bytes(step.body.arrays[v], sizes) for v in step.body.inputs)
        self.peak = self.memory.peak + sum(arguments)

    def cost(
        self, target: Target, sizes: Sizes, dcn: dict[str, int], memory: dict[str, float],
        place: int = 0,
    ) -> Cost:  # fmt: skip
        """The Cost of one of the meshes."""
        of = lambda value: float(value[place] if np.ndim(value) else value)
        traffic = []
        for (kind, axes), (count, size, blocked) in self.traffic.items():
            axes = tuple(axis for axis in axes if sizes[axis] > 1)
            group = math.prod(sizes[axis] for axis in axes)
            if group == 1:
                continue
            per_byte = WIRE[kind](group)
            traffic.append(Traffic(
                kind, axes, *route(target, sizes, dcn, axes), group, of(count), of(size),
                of(size) * per_byte, of(blocked) * per_byte,
            ))  # fmt: skip
        return Cost(
            memory=memory, flops={part: of(value) for part, value in self.flops.items()},
            kernel_flops=of(self.kernels), traffic=tuple(traffic), hbm_bytes=of(self.hbm),
            host_bytes=of(self.host), grouped_bytes=of(self.grouped),
            hidden_bytes=of(self.hidden), notes=tuple(self.notes),
        )  # fmt: skip


def _replaced(step: Step) -> dict[int, int]:
    """Result -> the donated argument of its type in whose place it is written."""
    free = collections.defaultdict(list)
    for v in step.donated:
        free[step.body.arrays[v]].append(v)
    pairs = {}
    for v in step.body.outputs:
        if v is not None and free[step.body.arrays[v]]:
            pairs[v] = free[step.body.arrays[v]].pop(0)
    return pairs


def _flops(body: Body, sizes: Sizes) -> tuple[dict[str, Any], Any, Any, list[str]]:
    """(FLOPs by part and pass, of those in kernels, bytes of the rows that grouped products go
    through, what could not be counted)."""
    total: dict[str, Any] = collections.defaultdict(float)
    kernels, grouped, notes = 0.0, 0.0, {}
    for inside, op, times in walk.loops(body, sizes):
        found = work.flops(inside, op, sizes)
        if op.name in work.KERNELS:
            declared = work.kernel_flops(inside, op, sizes)
            if declared is None:
                notes[f"FLOPs of kernel {op.params.get('name', op.name)} are not known"] = None
            found = 0.0 if declared is None else declared
            kernels = kernels + found * times
        elif op.name == "ragged_dot_general":
            rows, *_, groups = (inside.arrays[v] for v in op.inputs)
            size = math.prod(groups.local(sizes)) * rows.bytes(sizes)
            grouped = grouped + size * times
        if np.any(found):
            total[part_of(op.scope)] = total[part_of(op.scope)] + found * times
        if op.name == "while":
            notes["operations in a loop of unknown trips are counted once"] = None
    return dict(total), kernels, grouped, list(notes)


def _hbm_bytes(memory: live.Memory, times: Any) -> tuple[Any, Any]:
    """Device memory read and written; of that, by products and kernels."""
    total, hidden = 0.0, 0.0
    for op, size in memory.moved():
        total = total + times * size
        if op.name in (*work.PRODUCTS, *work.KERNELS):
            hidden = hidden + times * size
    for op in memory.body.ops:
        for inner in memory.inner.get(id(op), []):
            more, less = _hbm_bytes(inner, times * walk.trips(op, memory.sizes))
            total, hidden = total + more, hidden + less
    return total, hidden


def _host_bytes(body: Body, sizes: Sizes) -> Any:
    """Bytes that move to host memory, and back."""
    return sum(
        times * inside.arrays[v].bytes(sizes)
        for inside, op, times in walk.loops(body, sizes) if op.name == "device_put"
        for v in op.outputs
    )  # fmt: skip


def _traffic(step: Step, sizes: Sizes) -> dict[tuple[str, Axes], list[Any]]:
    """(kind, axes) -> how often it runs, bytes of results, and bytes that nothing hides."""
    rows: dict[tuple[str, Axes], list[Any]] = {}
    for body, op, times in walk.loops(step.body, sizes):
        for kind, over, size in work.collectives(body, op, sizes, step.facts):
            axes = tuple(axis for axis in AXES if axis in over)
            row = rows.setdefault((kind, axes), [0.0, 0.0, 0.0])
            blocked = step.facts.blocking(kind, _is_early(body, op), body is not step.body)
            for i, value in enumerate((times, times * size, times * size * blocked)):
                row[i] = row[i] + value
    return rows


def _is_early(body: Body, op: Op) -> bool:
    """Whether a collective could start at once: its operand is computed from nothing but views and
    casts of what its loop starts with."""
    made = {v: each for each in body.ops for v in each.outputs}
    (number, *_) = op.inputs
    while number in made and made[number].name in (*live.VIEWS, "convert_element_type"):
        number = made[number].inputs[0]
    return number not in made


def _classes(step: Step, found: live.Memory) -> dict[str, float]:
    """Class of cost.MEMORY -> bytes at the peak."""
    sizes, bodies = found.sizes, {}
    makers: dict[int, Op] = {}
    until = found.all_until()
    for body, op, _ in walk.loops(step.body, sizes):
        makers |= dict.fromkeys(op.outputs, op)
        bodies |= dict.fromkeys(op.outputs, body)
    weights = {
        shape for v, kind in step.classes.items() if kind == "parameters"
        for shape in _shapes(step.body.arrays[v].shape)
    }  # fmt: skip
    classes: dict[str, float] = collections.defaultdict(float)
    for v in step.body.inputs:
        classes[step.classes.get(v, "workspace")] += step.facts.bytes(step.body.arrays[v], sizes)
    for v, size in found.live.items():
        op = makers.get(v)
        if op is None:
            kind = "workspace"
        elif "jvp(" in op.scope and "transpose(" not in op.scope:
            reader = until.get(v)
            backward = reader is not None and "transpose(" in reader.scope
            kind = f"saved/{_name(op, v)}" if backward else "workspace"
        elif "transpose(" in op.scope and bodies[v].arrays[v].shape in weights:
            kind = "gradients"
        else:
            kind = "workspace"
        classes[kind] += size
    arguments = sum(step.facts.bytes(step.body.arrays[v], sizes) for v in step.body.inputs)
    classes["workspace"] += arguments + found.peak - sum(classes.values())
    return {kind: float(size) for kind, size in classes.items()}


def _shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A weight, and one layer's of it where it is stacked."""
    return [shape, shape[1:]] if len(shape) > 2 else [shape]


def _name(op: Op, number: int) -> str:
    """What a saved value is called: its name for remat, or the part of the model that made it."""
    if op.name == "scan":
        place = op.outputs.index(number)
        (body,) = op.bodies
        inner, value = {v: each for each in body.ops for v in each.outputs}, body.outputs[place]
        while value in inner and inner[value].name in (*live.VIEWS, "reduce_precision"):
            if inner[value].name == "name":
                return str(inner[value].params["name"])
            value = inner[value].inputs[0]
        return part_of(inner[value].scope).split("/")[0] if value in inner else "block input"
    return part_of(op.scope).split("/")[0]
