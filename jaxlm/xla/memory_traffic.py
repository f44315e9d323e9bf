"""Bytes that a compiled program moves to and from the memory of its device and its host."""

from __future__ import annotations

from collections.abc import Iterable

from jaxlm.xla.flops import kernel_name
from jaxlm.xla.hlo import HOST, Computation, Instruction, Module
from jaxlm.xla.schedule import Visit

_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "partition-id", "replica-id", "after-all", "optimization-barrier", "iota", "async-done",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "copy", "convert", "reshape", "transpose")


def count_bytes(module: Module, visits: Iterable[Visit]) -> tuple[float, float]:
    """(bytes to and from device memory, bytes to and from host memory) of the scheduled operations.

    A fusion reads its operands and writes its result once; of a slice only what is read counts, of
    an update in place only what is written. Arrays in on-chip memory (TPU) are free.
    """
    hbm = host = 0.0
    for visit in visits:
        if visit.instruction is visit.scheduled:
            hbm += moved_bytes(module, visit.computation, visit.instruction) * visit.times
            host += moved_bytes(module, visit.computation, visit.instruction, HOST) * visit.times
    return hbm, host


def moved_bytes(
    module: Module, computation: Computation, each: Instruction, space: int = 0
) -> float:
    """Bytes that one scheduled operation moves in a memory space."""
    if each.opcode in _FREE or each.opcode.endswith("-done"):
        return 0.0
    return sum(size for one, size in _touched(module, computation, each) if one == space)


def _touched(module: Module, computation: Computation, each: Instruction):
    """(memory space, bytes) that one operation reads or writes."""
    made = [computation.by_name.get(name) for name in dict.fromkeys(each.operands)]
    operands = [one for one in made if one is not None]
    if each.opcode == "custom-call" and not kernel_name(each):
        return []
    if each.kind == "dynamic-update-slice":
        update = operands[1].shapes[0]
        return [(update.space, update.bytes), (each.shapes[0].space, update.bytes)]
    if each.kind in ("copy", "slice", "dynamic-slice") and each.opcode.endswith("-start"):
        whole = operands[0].shapes[0]
        arrays = [
            s for s in each.shapes if s.dtype == whole.dtype and len(s.dims) == len(whole.dims)
        ]
        moved = min(arrays, key=lambda shape: shape.size)
        others = {shape.space for shape in arrays} - {whole.space}
        return [(space, moved.bytes) for space in (whole.space, *(others or {whole.space}))]
    if each.opcode in _SLICES:
        return [(shape.space, 2 * shape.bytes) for shape in each.shapes]
    if each.kind == "fusion":
        called = module.called(each, "calls")
        assert called
        return _fusion_touched(module, computation, each, called)
    arrays = [shape for one in operands for shape in one.shapes]
    arrays += () if each.opcode.endswith("-start") else each.shapes
    twice = 2 if each.opcode.endswith("-start") else 1  # read here, written by its other half
    return [(shape.space, twice * shape.bytes) for shape in arrays]


def _fusion_touched(module: Module, computation: Computation, each: Instruction, called):
    outs = called.outputs()
    inside, found = called.parameters(), []
    in_place = set()
    results = each.shapes
    if each.opcode.endswith("-start"):  # its operands come first, and a context last
        skip = sum(len(made.shapes) for made in computation.operands(each))
        results = each.shapes[skip : skip + len(outs)]
    for shape, out in zip(results, outs, strict=False):
        last = _origin(called, out)
        if last.opcode == "dynamic-update-slice":
            found.append((shape.space, called.by_name[last.operands[1]].bytes))
            in_place.add(_origin(called, called.by_name[last.operands[0]]).name)
        else:
            found.append((shape.space, shape.bytes))
    for number, name in enumerate(each.operands):
        made, parameter = computation.by_name[name], inside.get(number)
        if parameter is None or parameter.name in in_place:
            continue
        size = _read(module, called, parameter.name, made.bytes)
        found += [(shape.space, size / len(made.shapes)) for shape in made.shapes]
    return found


def _origin(computation: Computation, each: Instruction) -> Instruction:
    while each.opcode in _SAME:
        each = computation.by_name[each.operands[0]]
    return each


def _read(module: Module, computation: Computation, name: str, whole: float) -> float:
    """Bytes of a value that a fused computation really reads."""
    total = 0.0
    for each in computation.instructions:
        if name not in each.operands:
            continue
        first = each.operands[0] == name
        if each.opcode in _SLICES and first:
            total += each.bytes
        elif each.opcode in ("bitcast", "reshape"):
            total += _read(module, computation, each.name, whole)
        elif inner := module.called(each, "calls"):
            inside = inner.parameters()
            places = [i for i, operand in enumerate(each.operands) if operand == name]
            total += sum(_read(module, inner, inside[i].name, whole) for i in places)
        elif not (each.opcode == "dynamic-update-slice" and first):
            return whole
    return min(total, whole)
