"""The Cost of a train step, read from its trace: what plans and predictions start from."""

from __future__ import annotations

import collections
import dataclasses
import math

import jax

from jaxlm.config import AXES
from jaxlm.hardware.network import route
from jaxlm.hardware.target import Target
from jaxlm.plan import live, rewrite, walk, work
from jaxlm.plan.cost import Cost, Traffic, part_of
from jaxlm.plan.facts import Facts, find_facts
from jaxlm.plan.walk import Body, Op
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


def analyze(step: Step, sizes: dict[str, int], target: Target, dcn: dict[str, int]) -> Cost:
    """The Cost of one step on one device of the target."""
    found = live.Memory(step.body, sizes, step.facts, _replaced(step))
    flops, kernels, notes = _flops(step.body, sizes)
    return Cost(
        memory=_classes(step, found), flops=flops, kernel_flops=kernels,
        traffic=tuple(_traffic(step, sizes, target, dcn)), hbm_bytes=_hbm_bytes(found, 1.0),
        host_bytes=_host_bytes(step.body, sizes), notes=tuple(notes),
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


def _flops(body: Body, sizes: dict[str, int]) -> tuple[dict[str, float], float, list[str]]:
    """(FLOPs by part and pass, of those in kernels, what could not be counted)."""
    total: dict[str, float] = collections.defaultdict(float)
    kernels, notes = 0.0, {}
    for inside, op, times in walk.loops(body):
        found = work.flops(inside, op, sizes)
        if op.name in work.KERNELS:
            declared = work.kernel_flops(inside, op, sizes)
            if declared is None:
                notes[f"FLOPs of kernel {op.params.get('name', op.name)} are not known"] = None
            found = declared or 0.0
            kernels += found * times
        if found:
            total[part_of(op.scope)] += found * times
        if op.name == "while":
            notes["operations in a loop of unknown trips are counted once"] = None
    return dict(total), kernels, list(notes)


def _hbm_bytes(memory: live.Memory, times: float) -> float:
    """Device memory read and written."""
    total = times * sum(size for _, size in memory.moved())
    for op in memory.body.ops:
        for inner in memory.inner.get(id(op), []):
            total += _hbm_bytes(inner, times * walk.trips(op))
    return total


def _host_bytes(body: Body, sizes: dict[str, int]) -> float:
    """Bytes that move to host memory, and back."""
    return sum(
        times * inside.arrays[v].bytes(sizes)
        for inside, op, times in walk.loops(body) if op.name == "device_put"
        for v in op.outputs
    )  # fmt: skip


def _traffic(step: Step, sizes: dict[str, int], target: Target, dcn: dict[str, int]):
    rows: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for body, op, times in walk.loops(step.body):
        for kind, over, size in work.collectives(body, op, sizes, step.facts):
            axes = tuple(axis for axis in AXES if axis in over)
            row = rows.setdefault((kind, axes), [0.0, 0.0, 0.0])
            blocked = step.facts.blocking(kind, _is_early(body, op), body is not step.body)
            for i, value in enumerate((times, times * size, times * size * blocked)):
                row[i] += value
    for (kind, axes), (count, size, blocked) in rows.items():
        group = math.prod(sizes[axis] for axis in axes)
        per_byte = WIRE[kind](group)
        yield Traffic(
            kind, axes, *route(target, sizes, dcn, axes), group, count, size, size * per_byte,
            blocked * per_byte,
        )  # fmt: skip


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
    for body, op, _ in walk.loops(step.body):
        makers |= dict.fromkeys(op.outputs, op)
        bodies |= dict.fromkeys(op.outputs, body)
    weights = {
        shape for v, kind in step.classes.items() if kind == "parameters"
        for shape in _shapes(step.body.arrays[v].shape)
    }  # fmt: skip
    classes: dict[str, float] = collections.defaultdict(float)
    for v in step.body.inputs:
        classes[step.classes.get(v, "workspace")] += step.facts.bytes(step.body.arrays[v], sizes)
    backward = found.at is not None and "transpose(" in found.at.scope
    for v, size in found.live.items():
        op = makers.get(v)
        if op is None:
            kind = "workspace"
        elif "jvp(" in op.scope and "transpose(" not in op.scope:
            kind = f"saved/{_name(op, v)}" if backward else "workspace"
        elif "transpose(" in op.scope and bodies[v].arrays[v].shape in weights:
            kind = "gradients"
        else:
            kind = "workspace"
        classes[kind] += size
    arguments = sum(step.facts.bytes(step.body.arrays[v], sizes) for v in step.body.inputs)
    classes["workspace"] += arguments + found.peak - sum(classes.values())
    return dict(classes)


def _shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A weight, and one layer's of it where it is stacked."""
    return [shape, shape[1:]] if len(shape) > 2 else [shape]


def _name(op: Op, number: int) -> str:
    """What a saved value is called: its name for remat, or the part of the model that made it."""
    if op.name == "scan":
        place = op.outputs.index(number)
        (body,) = op.bodies
        inner, value = {v: each for each in body.ops for v in each.outputs}, body.outputs[place]
        while value in inner and inner[value].name in live.VIEWS:
            if inner[value].name == "name":
                return str(inner[value].params["name"])
            value = inner[value].inputs[0]
        return part_of(inner[value].scope).split("/")[0] if value in inner else "block input"
    return part_of(op.scope).split("/")[0]
