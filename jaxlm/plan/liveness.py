"""What lies in device memory at the peak of a compiled program: its buffers, replayed in order.

The schedule fixes when each array is made and last used. Arrays that XLA keeps in one buffer are
one here too: what a loop carries, what is updated in place, what a donated argument becomes. The
compiler's own figure is larger by what its packing of buffers loses (fragmentation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxlm.plan.hlo import Computation, Instruction, Module, Shape

# Results that lie where an operand lies; the number is the operand's.
_ALIAS = {
    "bitcast": 0, "optimization-barrier": 0, "copy-done": 0, "all-gather-done": 0,
    "all-reduce-done": 0, "collective-permute-done": 0, "domain": 0,
}  # fmt: skip
# Operations that may write over an operand of the same size which is not used any more.
_SHARES = (
    "fusion", "add", "multiply", "subtract", "divide", "select", "convert", "copy", "all-reduce",
    "all-reduce-start", "negate", "maximum", "minimum", "exponential", "tanh", "scatter",
    "dynamic-update-slice", "custom-call",
)  # fmt: skip


@dataclasses.dataclass(eq=False, slots=True)
class Buffer:
    """A place in device memory."""

    bytes: float
    shape: Shape
    maker: Instruction
    computation: Computation
    argument: int = -1  # number of the program's argument that it is; -1: a temporary


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment at which most is in use."""

    bytes: float  # temporaries
    live: tuple[Buffer, ...]  # arguments, and temporaries at that moment


def find_peak(module: Module) -> Peak:
    """Replay a program."""
    arguments = {}
    for number, each in module.entry.parameters().items():
        arguments[number] = tuple(
            Buffer(_size(shape), shape, each, module.entry, number) for shape in each.shapes
        )
    peak = _replay(module, module.entry, arguments, _outputs(module))
    fixed = tuple(buffer for leaves in arguments.values() for buffer in leaves if buffer.bytes)
    return Peak(peak.bytes, fixed + peak.live)


def _size(shape: Shape) -> float:
    return shape.padded_bytes if shape.space == 0 else 0.0


def _outputs(module: Module) -> frozenset[int]:
    """Leaves of the program's result that lie in a donated argument."""
    return frozenset(module.aliases)


def _replay(
    module: Module, computation: Computation, parameters: dict[int, tuple[Buffer, ...]],
    placed: frozenset[int],
) -> Peak:  # fmt: skip
    """The peak of temporaries inside; `placed`: leaves of its result that have a place outside."""
    made: dict[str, tuple[Buffer, ...]] = {}
    inner: dict[int, Peak] = {}
    own: list[tuple[int, Buffer]] = []
    for index, each in enumerate(computation.instructions):
        leaves, nested = _run(module, computation, each, made, parameters)
        made[each.name] = leaves
        if nested is not None:
            inner[index] = nested
        known = {id(buffer) for buffer in _known(computation, each, made, parameters)}
        own += [(index, buffer) for buffer in leaves if id(buffer) not in known]
    ends = made[computation.root.name]
    outside = {id(ends[leaf]) for leaf in placed if leaf < len(ends)}
    last = {id(buffer): index for index, buffer in own}
    for index, each in enumerate(computation.instructions):
        if each.opcode in ("tuple", "get-tuple-element"):
            continue  # names, not uses
        for name in each.operands:
            last |= {id(buffer): index for buffer in made.get(name, ()) if id(buffer) in last}
    last |= {id(buffer): len(computation.instructions) for buffer in ends if id(buffer) in last}
    counted = [(index, b) for index, b in own if b.bytes and id(b) not in outside]
    return _sweep(computation, counted, last, inner)


def _known(computation, each: Instruction, made, parameters) -> Iterator[Buffer]:
    """Buffers that were there before an instruction."""
    for name in each.operands:
        yield from made.get(name, ())
    if each.opcode == "parameter":
        yield from parameters.get(int(each.arguments), ())


def _run(module, computation: Computation, each: Instruction, made, parameters):
    """(buffers of the result's leaves, the peak inside of what it calls)."""
    operands = [made.get(name, ()) for name in each.operands]
    fresh = lambda: tuple(Buffer(_size(s), s, each, computation) for s in each.shapes)
    if each.opcode == "parameter":
        return parameters.get(int(each.arguments)) or fresh(), None
    if each.opcode == "tuple":
        return tuple(buffer for leaves in operands for buffer in leaves), None
    if each.opcode == "get-tuple-element":
        return _element(computation, each, operands[0]), None
    if each.opcode in _ALIAS and operands:
        return _part(operands[_ALIAS[each.opcode]], each.shapes), None
    if each.opcode == "while":
        body = module.called(each, "body")
        state = operands[0]
        inside = {0: state}
        placed = frozenset(range(len(state)))
        return state, _replay(module, body, inside, placed)
    if each.opcode == "conditional":
        result = fresh()
        peaks = [
            _replay(module, branch, {0: leaves}, frozenset(range(len(result))))
            for branch, leaves in zip(module.branches(each), operands[1:], strict=False)
        ]
        return result, max(peaks, key=lambda peak: peak.bytes, default=None)
    called = module.called(each, "to_apply") if each.opcode == "call" else None
    if called is not None:
        result = fresh()
        bound = dict(enumerate(operands))
        return result, _replay(module, called, bound, frozenset(range(len(result))))
    return _results(module, each, operands, fresh()), None


def _element(computation: Computation, each: Instruction, leaves: tuple[Buffer, ...]):
    """The leaves of one element of a tuple, by the number of leaves of each."""
    index, source = int(each.attribute("index")), computation.by_name[each.operands[0]]
    if len(source.shapes) == len(leaves):
        start = source.starts[index]
        return leaves[start : start + len(each.shapes)]
    return leaves[index : index + len(each.shapes)]


def _part(leaves: tuple[Buffer, ...], shapes: tuple[Shape, ...]) -> tuple[Buffer, ...]:
    """The leaves that a -done returns of what its -start made: the last ones that fit."""
    if len(leaves) <= len(shapes):
        return leaves
    wanted = [(shape.dtype, shape.dims, shape.space) for shape in shapes]
    for start in range(len(leaves) - len(shapes), -1, -1):
        found = [
            (b.shape.dtype, b.shape.dims, b.shape.space) for b in leaves[start:][: len(shapes)]
        ]
        if found == wanted:
            return leaves[start : start + len(shapes)]
    return leaves[: len(shapes)]


def _results(module: Module, each: Instruction, operands, fresh: tuple[Buffer, ...]):
    """Buffers of a result; those that are updated in place, or begun from an operand, are its."""
    if each.opcode == "dynamic-update-slice":
        return operands[0]
    if each.opcode.endswith("-start"):  # ((operands), results, contexts)
        given = [buffer for leaves in operands for buffer in leaves]
        result = []
        for buffer in fresh:
            same = next((g for g in given if g.shape == buffer.shape), None)
            if same is not None:
                given.remove(same)
            result.append(same or buffer)
        return tuple(result)
    if each.opcode == "fusion":
        return _fused(module, each, operands, fresh)
    return fresh


def _fused(module: Module, each: Instruction, operands, fresh: tuple[Buffer, ...]):
    """A fusion that ends in an update of a slice writes into the operand that it updates."""
    called = module.called(each, "calls")
    assert called is not None, each
    root = called.root
    outs = [called.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    result = list(fresh)
    for leaf, out in enumerate(outs[: len(fresh)]):
        number = _updated(module, called, out)
        if (
            number is not None
            and operands[number]
            and operands[number][0].bytes == fresh[leaf].bytes
        ):
            result[leaf] = operands[number][0]
    return tuple(result)


def _updated(module: Module, computation: Computation, out: Instruction) -> int | None:
    """The parameter of a fused computation that a value is an update of, in place."""
    updates = False
    while True:
        if out.opcode == "parameter":
            return int(out.arguments) if updates else None
        if out.opcode == "fusion":
            inner = module.called(out, "calls")
            assert inner
            number = _updated(module, inner, inner.root)
            if number is None:
                return None
            updates, out = True, computation.by_name[out.operands[number]]
            continue
        updates = updates or out.opcode == "dynamic-update-slice"
        if out.opcode not in ("dynamic-update-slice", "bitcast", "convert", "copy"):
            return None
        out = computation.by_name[out.operands[0]]


def _sweep(computation: Computation, own, last: dict[int, int], inner: dict[int, Peak]) -> Peak:
    """Walk the schedule, making and freeing buffers."""
    starts: dict[int, list[Buffer]] = {}
    ends: dict[int, list[Buffer]] = {}
    for index, buffer in own:
        starts.setdefault(index, []).append(buffer)
        ends.setdefault(last[id(buffer)], []).append(buffer)
    live: dict[int, Buffer] = {}
    total, best = 0.0, Peak(0.0, ())
    for index, each in enumerate(computation.instructions):
        shared = 0.0
        if each.opcode in _SHARES:  # what dies here may hold what is made here
            free = [buffer.bytes for buffer in ends.get(index, ()) if id(buffer) in live]
            for buffer in starts.get(index, ()):
                if buffer.bytes in free:
                    free.remove(buffer.bytes)
                    shared += buffer.bytes
        for buffer in starts.get(index, ()):
            live[id(buffer)] = buffer
            total += buffer.bytes
        within = inner.get(index, Peak(0.0, ()))
        if total - shared + within.bytes > best.bytes:
            best = Peak(total - shared + within.bytes, (*live.values(), *within.live))
        for buffer in ends.get(index, ()):
            if live.pop(id(buffer), None) is not None:
                total -= buffer.bytes
    return best
