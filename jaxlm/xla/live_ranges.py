"""When every array of a compiled program is live, from its schedule: what its peak is made of.

XLA's buffer assignment is followed (xla/service: hlo_live_range.cc, hlo_dataflow_analysis.cc,
heap_simulator.cc): the schedule is flattened, a loop's body once and before the loop itself; what
a loop carries, and what is updated in place, lies in one buffer; an instruction may write over an
operand of its shape that nobody reads later.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxlm.xla.hlo import Computation, Instruction, Module, Shape
from jaxlm.xla.sharing import in_place, may_overwrite, origin

DEVICE = 0  # the memory space that counts; on TPU 1 is VMEM, 5 the host's
FREE = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "constant", "after-all")
HOLDS = ("while", "parameter", "conditional", "call", "copy", "copy-start", "broadcast")


@dataclasses.dataclass(slots=True)
class Value:
    """One array that an instruction makes, and the part of the schedule in which it is needed."""

    instruction: Instruction
    computation: Computation
    shape: Shape
    bytes: int
    start: int
    end: int
    buffer: int  # where it lies: all values of a buffer share its bytes
    origin: Instruction  # what computed it, seen through copies, fusions and updates of slices
    source: int = -1  # the value that it is a copy of, or takes an update from
    chunk: int = -1  # its place in memory: what overwrites a buffer has its place too
    first: int = 0  # `start`, before it was known to overwrite an operand
    argument: bool = False  # of the program: it is there from the start to the end

    @property
    def scope(self) -> str:
        """The op_name of what computed it; empty for what only holds a place."""
        name = self.origin.op_name  # "broadcast.99": one that the compiler made up
        return name if self.origin.opcode not in HOLDS and "/" in name else ""


@dataclasses.dataclass
class Liveness:
    """All values of a program, and how many bytes are live at each place of the schedule."""

    module: Module
    values: list[Value]
    bytes: np.ndarray  # by time
    readers: dict[int, set[str]]  # buffer -> the op_names of what reads it

    @property
    def time(self) -> int:
        """The moment of the peak."""
        return int(self.bytes.argmax())

    def live(self, time: int) -> dict[int, list[Value]]:
        """All values of each buffer that is live at a time."""
        now = {v.buffer for v in self.values if v.start <= time <= v.end and v.bytes}
        found: dict[int, list[Value]] = {}
        for value in self.values:
            if value.buffer in now and value.bytes:
                found.setdefault(value.buffer, []).append(value)
        return found

    def writers(self, members: list[Value]) -> list[Value]:
        """The values of a buffer that are computed; of a copy, those of what it is a copy of."""
        for _ in range(8):
            writers = [value for value in members if value.scope]
            sources = {self.values[v.source].buffer for v in members if v.source >= 0}
            if writers or not sources:
                return writers
            members = [value for value in self.values if value.buffer in sources]
        return []

    def carried(self, members: list[Value]) -> bool:
        """Whether a buffer collects what a loop carries from one trip to the next."""
        for value in members:
            while value.source >= 0:
                value = self.values[value.source]
                if value.instruction.opcode == "parameter" and not value.argument:
                    return True
        return False

    def is_temporary(self, value: Value) -> bool:
        """Whether a value lies in no argument's buffer."""
        return value.buffer not in self.argument_buffers

    @functools.cached_property
    def argument_buffers(self) -> set[int]:
        """The buffers that arguments lie in."""
        return {value.buffer for value in self.values if value.argument}


def simulate(module: Module) -> Liveness:
    """Follow the schedule of a program once."""
    walk = _Walk(module)
    walk.run()
    readers: dict[int, set[str]] = {}
    for value, scopes in walk.readers.items():
        readers.setdefault(walk.values[value].buffer, set()).update(scopes)
    for old, new in reversed(walk.unnamed):  # who reads a copy reads what it was made from
        source, copy = walk.values[old].buffer, walk.values[new].buffer
        if source != copy:
            readers.setdefault(source, set()).update(readers.get(copy, ()))
    return Liveness(module, walk.values, _timeline(walk.values, walk.clock), readers)


def _timeline(values: list[Value], end: int) -> np.ndarray:
    """Bytes that are live at each time; the values of a buffer count once."""
    steps = np.zeros(end + 2)
    spans: dict[int, list[Value]] = {}
    for value in values:
        if value.bytes and value.end >= value.start:
            spans.setdefault(value.buffer, []).append(value)
    for members in spans.values():
        size, last = max(value.bytes for value in members), -1
        for value in sorted(members, key=lambda value: value.start):
            start = max(value.start, last + 1)
            if value.end >= start:
                steps[start] += size
                steps[value.end + 1] -= size
                last = value.end
    return steps.cumsum()[:-1]


class _Walk:
    """The state of `simulate`: a clock, and the values that each instruction's result holds."""

    def __init__(self, module: Module):
        self.module = module
        self.clock = 0
        self.values: list[Value] = []
        self.place: dict[str, tuple[int, ...]] = {}
        self.parents: list[int] = []  # of a value, towards that which names its buffer
        self.readers: dict[int, list[str]] = {}  # of a value, the op_names of what uses it
        self.unnamed: list[tuple[int, int]] = []  # operands and results that no scope names
        self.overwrites: list[tuple[int, int]] = []  # a result, an operand that it may overwrite

    def run(self) -> None:
        """Walk the entry; arguments, and what is written over them, live throughout."""
        entry = self.module.entry
        results = self._computation(entry, None)
        for value in self.values:
            if value.argument:
                value.start, value.end = 0, self.clock
        self._use(results, self.clock)
        self._alias_outputs(results)
        for i, value in enumerate(self.values):
            value.buffer, value.first = self._find(i), value.start
        for one, other in self.overwrites:
            if self.values[other].end == self.values[one].start:
                self.values[one].start += 1
                self._join(one, other)
        for i, value in enumerate(self.values):
            value.chunk = self._find(i)

    def _alias_outputs(self, results: tuple[int, ...]) -> None:
        arguments = {
            int(each.arguments): self.place[f"{self.module.entry.name}/{each.name}"]
            for each in self.module.entry.instructions
            if each.opcode == "parameter"
        }
        for output, parameter in self.module.aliases.items():
            self._join(results[output], arguments[parameter][0])

    def _computation(self, computation: Computation, given: list | None) -> tuple[int, ...]:
        """Values of a computation's result; `given`: those of its parameters, None: new ones."""
        results: tuple[int, ...] = ()
        for each in computation.instructions:
            operands = [self.place[f"{computation.name}/{name}"] for name in each.operands]
            if each.opcode == "parameter" and given is not None:
                made = given[int(each.arguments)]
            else:
                made = self._instruction(computation, each, operands)
            self.place[f"{computation.name}/{each.name}"] = made
            if each.root:
                results = made
        self._use(results, self.clock)
        return results

    def _instruction(self, computation, each, operands) -> tuple[int, ...]:
        if each.opcode == "while":
            return self._while(computation, each, operands[0])
        if each.opcode in ("call", "conditional") or each.opcode == "async-start":
            called = called_computations(self.module, each)
            if called:
                return self._call(computation, each, operands, called)
        self.clock += 1
        if each.opcode not in FREE:  # others are names, not uses
            for operand in operands:
                self._use(operand, self.clock, each.op_name)
        made = self._result(computation, each, operands)
        if "/" not in each.op_name and each.opcode not in FREE:
            self.unnamed += [(old, new) for group in operands for old in group for new in made]
        return made

    def _while(self, computation, each, carried) -> tuple[int, ...]:
        before = self._new(computation, each, range(len(each.shapes)))
        for new, old in zip(before, carried, strict=True):
            self._join(new, old)
        self.clock += 1
        self._use(carried, self.clock)
        condition, body = called_computations(self.module, each)
        for called in (condition, body):
            inside = self._new(called, called.parameters()[0], (), each.shapes)
            for new, old in zip(inside, before, strict=True):
                self._join(new, old)
            results = self._computation(called, [inside])
            if called is condition:  # the body's parameter needs what the condition saw
                self._use(inside, self.clock)
                continue
            for new, old in zip(results, before, strict=True):
                self._join(new, old)
        self.clock += 1
        for one in before:
            self.values[one].start = self.values[one].end = self.clock
        return before

    def _call(self, computation, each, operands, called) -> tuple[int, ...]:
        given = operands if each.opcode != "conditional" else operands[1:]
        made: tuple[int, ...] = ()
        for i, one in enumerate(called):
            results = self._computation(
                one, list(given) if each.opcode != "conditional" else [given[i]]
            )
            if not made:
                made = self._new(computation, each, (), each.shapes[: len(results)])
            for new, old in zip(made, results, strict=True):
                self._join(new, old)
        self.clock += 1
        for operand in operands:
            self._use(operand, self.clock)
        for one in made:
            self.values[one].start = self.values[one].end = self.clock
        return made

    def _result(self, computation, each, operands) -> tuple[int, ...]:
        """Values of an instruction that calls nothing: new ones, or those of its operands."""
        flat = tuple(value for operand in operands for value in operand)
        opcode = each.opcode
        if opcode == "get-tuple-element":
            source = computation.by_name[each.operands[0]]
            first = source.starts[int(each.attribute("index"))]
            return flat[first : first + len(each.shapes)]
        if opcode in ("tuple", "optimization-barrier"):
            return flat
        if opcode in ("bitcast", "bitcast-convert") and len(flat) == 1:
            return flat
        if opcode.endswith("-done"):
            return flat[: len(each.shapes)]
        if opcode.endswith("-start"):
            return self._start(computation, each, flat)
        made = self._new(computation, each, range(len(each.shapes)))
        self._trace(computation, each, made, operands)
        if opcode == "parameter":
            for one in made:
                self.values[one].argument = True
        for result, operand in in_place(self.module, each):
            if operand < len(operands) and result < len(made):
                self._join(made[result], operands[operand][0])
        for result, operand in may_overwrite(self.module, each):
            if len(operands[operand]) == 1:
                self.overwrites.append((made[result], operands[operand][0]))
        return made

    def _start(self, computation, each, flat) -> tuple[int, ...]:
        """An asynchronous half: its results first, then its operands, which it goes on reading."""
        shapes = each.shapes
        if each.opcode == "copy-start":  # (result, operand, context)
            shapes = shapes[:1]
        elif each.opcode != "all-reduce-start" or len(shapes) > len(flat):
            shapes = shapes[len(flat) :]  # ((operands), results, contexts)
        made = self._new(computation, each, (), shapes)
        self._trace(computation, each, made, [(one,) for one in flat])
        if each.opcode == "all-reduce-start":
            for new, old in zip(made, flat, strict=True):
                self._join(new, old)
        return (*made, *flat)

    def _new(self, computation, each, leaves, shapes=None) -> tuple[int, ...]:
        shapes = tuple(each.shapes[i] for i in leaves) if shapes is None else shapes
        first = len(self.values)
        for shape in shapes:
            counts = shape.space == DEVICE and each.opcode not in FREE
            size = int(shape.padded_bytes) if counts else 0
            now, number = self.clock, len(self.values)
            self.values.append(Value(each, computation, shape, size, now, now, number, each))
            self.parents.append(len(self.parents))
        return tuple(range(first, len(self.values)))

    def _trace(self, computation, each, made, operands) -> None:
        """Remember what computed the results, and of which values they are copies."""
        for leaf, one in enumerate(made):
            found, number = origin(self.module, computation, each, leaf)
            if number is not None and number < len(operands) and operands[number]:
                self.values[one].source = operands[number][0]
                found = self.values[operands[number][0]].origin
            self.values[one].origin = found

    def _use(self, values, time: int, reader: str = "") -> None:
        for value in values:
            self.values[value].end = max(self.values[value].end, time)
            if reader:
                self.readers.setdefault(value, []).append(reader)

    def _find(self, value: int) -> int:
        while self.parents[value] != value:
            self.parents[value] = self.parents[self.parents[value]]
            value = self.parents[value]
        return value

    def _join(self, one: int, other: int) -> None:
        self.parents[self._find(one)] = self._find(other)


def called_computations(module: Module, each: Instruction) -> list[Computation]:
    """What runs inside an instruction, in the order of the schedule."""
    roles = ("condition", "body") if each.opcode == "while" else ("to_apply", "calls")
    found = module.branches(each) or [module.called(each, role) for role in roles]
    return [computation for computation in found if computation]
