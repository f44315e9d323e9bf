"""When every buffer of a compiled program is live, from its schedule: what the peak is made of.

XLA's buffer assignment is followed (xla/service: hlo_live_range.cc, hlo_dataflow_analysis.cc,
heap_simulator.cc): the schedule is flattened, a loop's body once and before the loop itself; what
a loop carries, and what is updated in place, lies in one buffer; an instruction may write over an
operand of its shape that nobody reads later.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from jaxlm.plan.hlo import Computation, Instruction, Module, Shape

DEVICE = 0  # the memory space that counts; on TPU 1 is VMEM, 5 the host's
FREE = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "constant", "after-all")
IN_PLACE = ("dynamic-update-slice", "scatter", "all-reduce-start")
# An output may overwrite an operand that it reads element by element, or of a slice's update.
ELEMENTWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp compare convert copy cosine divide erf exponential "
    "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply "
    "negate not or power remainder round-nearest-afz round-nearest-even rsqrt select shift-left "
    "shift-right-arithmetic shift-right-logical sign sine sqrt subtract tan tanh xor".split()
)


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
    argument: bool = False  # of the program: it is there from the start to the end


@dataclasses.dataclass
class Liveness:
    """All values of a program, and how many bytes are live at each place of the schedule."""

    module: Module
    values: list[Value]
    bytes: np.ndarray  # by time
    place: dict[str, tuple[int, ...]]  # "computation/instruction" -> values of its result

    @property
    def time(self) -> int:
        """The moment of the peak."""
        return int(self.bytes.argmax())

    def live(self, time: int) -> dict[int, list[Value]]:
        """The values of each buffer that is live at a time, those of that moment first."""
        found: dict[int, list[Value]] = {}
        for value in self.values:
            if value.start <= time <= value.end and value.bytes:
                found.setdefault(value.buffer, []).append(value)
        return found


def simulate(module: Module) -> Liveness:
    """Follow the schedule of a program once."""
    walk = _Walk(module)
    walk.run()
    return Liveness(module, walk.values, _timeline(walk.values, walk.clock), walk.place)


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
        for one, other in self.overwrites:
            if self.values[other].end == self.values[one].start:
                self.values[one].start += 1
        for i, value in enumerate(self.values):
            value.buffer = self._find(i)

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
            called = list(called_computations(self.module, each))
            if called:
                return self._call(computation, each, operands, called)
        self.clock += 1
        for operand in operands if each.opcode not in ("tuple", "bitcast") else ():
            self._use(operand, self.clock)
        return self._result(computation, each, operands)

    def _while(self, computation, each, carried) -> tuple[int, ...]:
        before = self._new(computation, each, range(len(each.shapes)))
        for new, old in zip(before, carried, strict=True):
            self._join(new, old)
        self.clock += 1
        self._use(carried, self.clock)
        condition, body = called_computations(self.module, each)
        for called in (condition, body):
            inside = self._new(called, called.instructions[0], (), each.shapes)
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
            self.values.append(
                Value(each, computation, shape, size, self.clock, self.clock, len(self.values))
            )
            self.parents.append(len(self.parents))
        return tuple(range(first, len(self.values)))

    def _use(self, values, time: int) -> None:
        for value in values:
            self.values[value].end = max(self.values[value].end, time)

    def _find(self, value: int) -> int:
        while self.parents[value] != value:
            self.parents[value] = self.parents[self.parents[value]]
            value = self.parents[value]
        return value

    def _join(self, one: int, other: int) -> None:
        self.parents[self._find(one)] = self._find(other)


def called_computations(module: Module, each: Instruction) -> Iterator[Computation]:
    """What runs inside an instruction, in the order of the schedule."""
    if each.opcode == "while":
        yield module.computations[each.attribute("condition")]
        yield module.computations[each.attribute("body")]
        return
    found = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
    names = re.findall(r"[\w.\-]+", found[1]) if found else []
    roles = ("true_computation", "false_computation", "to_apply", "calls")
    for name in names or [each.attribute(role) for role in roles]:
        if name:
            yield module.computations[name]


def in_place(module: Module, each: Instruction) -> Iterator[tuple[int, int]]:
    """(result, operand) pairs that lie in one buffer by definition."""
    if each.opcode in IN_PLACE:
        yield 0, 0
    found = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", each.attributes)
    for result, operand in re.findall(r"\{([\d, ]*)\}: \((\d+),", found[1]) if found else ():
        yield int(result or 0), int(operand)
    if each.opcode == "fusion":
        called = module.computations[each.attribute("calls")]
        for i, root in enumerate(_outputs(called)):
            source = _through(called, root)
            if source.opcode in IN_PLACE:
                target = _through(called, called.by_name[source.operands[0]])
                if target.opcode == "parameter":
                    yield i, int(target.arguments)


def _outputs(computation: Computation) -> list[Instruction]:
    root = next(each for each in reversed(computation.instructions) if each.root)
    return [computation.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]


def _through(computation: Computation, each: Instruction) -> Instruction:
    """The instruction that made a value, seen through bitcasts."""
    while each.opcode == "bitcast":
        each = computation.by_name[each.operands[0]]
    return each


def may_overwrite(module: Module, each: Instruction) -> Iterator[tuple[int, int]]:
    """(result, operand) pairs of which the result may lie where an operand was read last."""
    if each.opcode in ELEMENTWISE:
        yield from ((0, i) for i in range(len(each.operands)))
    if each.opcode != "fusion":
        return
    called = module.computations[each.attribute("calls")]
    outputs = _outputs(called)
    users: dict[str, list[Instruction]] = {}
    for one in called.instructions:
        for name in one.operands:
            users.setdefault(name, []).append(one)
    for parameter in called.instructions:
        if parameter.opcode == "parameter" and len(parameter.shapes) == 1:
            if _elementwise(parameter, users):
                for i, output in enumerate(outputs):
                    if output.shapes[0].padded_bytes == parameter.shapes[0].padded_bytes:
                        yield i, int(parameter.arguments)


def _elementwise(parameter: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether all that is computed of a parameter takes the same element of it."""
    stack, seen = [parameter], set()
    while stack:
        one = stack.pop()
        for user in users.get(one.name, ()):
            same = user.opcode in ELEMENTWISE and user.shapes[0].dims == parameter.shapes[0].dims
            if not same and user.opcode not in ("tuple", "bitcast"):
                return False
            if user.name not in seen:
                seen.add(user.name)
                stack.append(user)
    return True
