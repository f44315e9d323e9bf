"""Scheduled HLO text as data: instructions, the computations they call, the trips of loops.

The text is what `compiled.as_text()` returns on any platform.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

HOST = 5  # the memory space of arrays that are kept in host memory; 0 is the device's
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One array of a result."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()  # dimensions, the fastest varying first
    tile: tuple[int, ...] = ()  # TPU: the fastest dimensions are padded to multiples of it
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without padding."""
        return self.size * bits(self.dtype) / 8

    @property
    def padded_bytes(self) -> float:
        """As it lies in memory."""
        dims = [self.dims[i] for i in reversed(self.order or range(len(self.dims)))]
        if self.tile:
            count = min(len(dims), len(self.tile))
            for i in range(1, count + 1):
                dims[-i] = -(-dims[-i] // self.tile[-i]) * self.tile[-i]
        return math.prod(dims) * bits(self.dtype) / 8


@functools.cache
def bits(dtype: str) -> int:
    """Bits of an element: the first number in the name of the type."""
    number = re.search(r"\d+", dtype)
    return _BITS[dtype] if dtype in _BITS else int(number[0]) if number else 0


@dataclasses.dataclass(slots=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, a tuple's leaves in order
    starts: tuple[int, ...]  # where each element of a tuple begins among them
    operands: tuple[str, ...]
    arguments: str  # what stands in the parentheses
    attributes: str  # what follows them
    root: bool

    @property
    def bytes(self) -> float:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def kind(self) -> str:
        """The opcode, of an asynchronous half without -start, -update and -done."""
        return re.sub(r"-(start|update|done)$", "", self.opcode)

    def attribute(self, name: str) -> str:
        """The word after `name=`; empty where there is none."""
        found = re.search(rf"[ ,]{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """The numbers of `name={1,2}`."""
        found = re.search(rf"[ ,]{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def target(self) -> str:
        """The function of a custom-call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Scopes and primitive of the line of Python that it comes from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""


@dataclasses.dataclass(slots=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    by_name: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The one whose result is the computation's."""
        return next(each for each in reversed(self.instructions) if each.root)

    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        found = (each for each in self.instructions if each.opcode == "parameter")
        return {int(each.arguments): each for each in found}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """What made its operands."""
        return [self.by_name[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int  # devices
    aliases: dict[int, int]  # leaf of the result -> donated parameter whose buffer it reuses
    frames: dict[int, tuple[tuple[str, int], ...]]  # stack frame -> (file, line), innermost first

    def called(self, instruction: Instruction, role: str) -> Computation | None:
        """The computation that an attribute names: calls, body, condition, to_apply."""
        return self.computations.get(instruction.attribute(role))

    def branches(self, instruction: Instruction) -> list[Computation]:
        """Those of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"[\w.\-]+", found[1]) if found else []
        names += [instruction.attribute(f"{side}_computation") for side in ("true", "false")]
        return [self.computations[name] for name in names if name]

    def source(self, instruction: Instruction) -> tuple[tuple[str, int], ...]:
        """(file, line) of the Python that made it, innermost first."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if frame:
            return self.frames.get(int(frame[1]), ())
        found = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        return ((found[1], int(found[2])),) if found else ()


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Module:
    """Read an HLO module."""
    computations: dict[str, Computation] = {}
    entry, current, buffer = None, None, ""
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations.setdefault(head[2], Computation(head[2]))
                entry = current if head[1] else entry
            continue
        closes = line.startswith("}") and not line.startswith("}}")
        if _open(buffer) or not (closes or _LINE.match(line)):
            buffer += " " + line.strip()  # attributes may go over several lines
            continue
        if buffer:
            _append(current, buffer)
        current, buffer = (None, "") if closes else (current, line)
    assert entry is not None, "no entry computation"
    count = lambda key: int((re.search(rf"\b{key}=(\d+)", text[: 1 << 20]) or "01")[1])
    head = text[: text.index("\n")]
    listed = re.search(r"input_output_alias=\{(.*?)\}, entry", head)
    aliases = re.findall(r"\{(\d*)\}: \((\d+),", listed[1]) if listed else []
    return Module(
        computations, entry, max(1, count("num_partitions")) * max(1, count("replica_count")),
        {int(leaf or 0): int(number) for leaf, number in aliases}, _frames(text),
    )  # fmt: skip


def _open(buffer: str) -> bool:
    """Whether braces of the metadata of a kernel are still open."""
    if "kernel_metadata={" not in buffer:
        return False
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", buffer[buffer.index("kernel_metadata={") :])
    return rest.count("{") > rest.count("}")


def _append(computation: Computation, line: str) -> None:
    head = _LINE.match(line)
    assert head, line
    start = head.end()
    end = _close(line, start) if line[start] == "(" else line.index(" ", start)
    bracket = line.index("(", end)
    close = _close(line, bracket)
    opcode, arguments = line[end:bracket].strip(), line[bracket + 1 : close - 1]
    named = opcode not in ("constant", "parameter")
    instruction = Instruction(
        head[2], opcode, parse_shapes(line[start:end]), _element_starts(line[start:end]),
        tuple(re.findall(r"%([\w.\-]+)", arguments)) if named else (),
        arguments, line[close:], bool(head[1]),
    )  # fmt: skip
    computation.instructions.append(instruction)
    computation.by_name[instruction.name] = instruction


def _close(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(line, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise AssertionError(line)


@functools.lru_cache(1 << 14)
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a result as HLO writes it: bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, or a tuple."""
    return tuple(_shape(*match.groups()) for match in _ARRAY.finditer(text))


@functools.lru_cache(1 << 14)
def _element_starts(text: str) -> tuple[int, ...]:
    """Leaves before each element of the outermost tuple: ((a, b), c) has 0 and 2."""
    if not text.startswith("("):
        return (0,)
    starts, depth, count, begins = [], 0, 0, True
    for match in re.finditer(rf"{_ARRAY.pattern}|[(),]", text):
        token = match[0]
        if token == "," and depth == 1:
            begins = True
        elif token not in "(),":
            starts += [count] if begins and depth == 1 else []
            begins = begins and depth != 1
            count += 1
        elif token != ",":
            if token == "(" and depth == 1 and begins:
                starts.append(count)
                begins = False
            depth += 1 if token == "(" else -1
    return tuple(starts)


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    numbers = lambda text: tuple(int(n) for n in text.split(",") if n.strip())
    order, _, rest = (layout or "").partition(":")
    tile, space = re.search(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype, numbers(dims.replace("<=", "")), numbers(order), numbers(tile[1]) if tile else (),
        int(space[1]) if space else 0,
    )  # fmt: skip


def _frames(text: str) -> dict[int, tuple[tuple[str, int], ...]]:
    """Stack frame -> places in Python, from the tables at the head of a module."""
    start = text.find("\nFileNames")
    if start < 0:
        return {}
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] = {}
    for line in text[start + 1 :].splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables.setdefault(line, {})
        elif match := re.match(r"(\d+) (.*)", line):
            rows[int(match[1])] = match[2]
        elif line.strip():
            break
    field = lambda row, name: int((re.search(rf"\b{name}=(\d+)", row) or "00")[1])
    places = {
        key: (tables["FileNames"][field(row, "file_name_id")].strip('"'), field(row, "line"))
        for key, row in tables["FileLocations"].items()
    }
    frames: dict[int, tuple[tuple[str, int], ...]] = {}
    for key, row in sorted(tables["StackFrames"].items()):
        parent = field(row, "parent_frame_id") - 1  # 1: there is none
        frames[key] = (places[field(row, "file_location_id")], *frames.get(parent, ()))
    return frames


class Visit(NamedTuple):
    """An instruction as a program runs it."""

    instruction: Instruction
    computation: Computation
    scheduled: Instruction  # itself, or the fusion or asynchronous call that it is a part of
    place: Computation  # where that stands
    loops: int  # while loops around it
    times: int  # that it runs
    known: bool  # whether the trips of all loops around it are


def walk(module: Module) -> Iterator[Visit]:
    """Every instruction, wherever it is called, in the order of the schedule."""
    yield from _walk(module, module.entry, None, 0, 1, True, {})


def _walk(module, computation, outer, loops, times, known, callers) -> Iterator[Visit]:
    for each in computation.instructions:
        scheduled, place = outer or (each, computation)
        yield Visit(each, computation, scheduled, place, loops, times, known)
        if each.opcode == "while":
            trips = trip_count(module, computation, each, callers)
            for role in ("condition", "body"):
                called = module.called(each, role)
                assert called, each
                inner = callers | {called.name: (computation, each)}
                state = (loops + 1, times * (trips or 1), known and trips is not None)
                yield from _walk(module, called, outer, *state, inner)
            continue
        for branch in module.branches(each):
            yield from _walk(module, branch, outer, loops, times, known, callers)
        for role in ("calls", "to_apply"):
            called = module.called(each, role)
            if called is None or (role == "to_apply" and each.opcode != "call"):
                continue  # what a reduction applies is a scalar function
            inner = callers | {called.name: (computation, each)}
            fused = each.opcode != "call"
            yield from _walk(
                module, called, (scheduled, place) if fused else outer, loops, times, known, inner
            )


def trip_count(module: Module, computation: Computation, loop: Instruction, callers) -> int | None:
    """How often a while loop runs; None if the text does not say."""
    if known := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
        return int(known[1])
    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    assert condition and body
    found = _comparison(module, condition, callers | {condition.name: (computation, loop)})
    if found is None:
        return None
    index, limit, less = found
    first = _number(module, computation, loop.operands[0], callers, index)
    step = _step(module, body, index)
    if first is None or not step:
        return None
    return max(0, -(-(limit - first) // step) + (not less))


def _comparison(module, condition: Computation, callers) -> tuple[int, int, bool] | None:
    """(element of the loop's state, limit, whether the limit ends it) of `counter < limit`."""
    computation, root = condition, condition.root
    while root.opcode == "fusion":
        inner = module.called(root, "calls")
        callers = callers | {inner.name: (computation, root)}
        computation, root = inner, inner.root
    direction = root.attribute("direction")
    if root.opcode != "compare" or direction not in ("LT", "LE", "NE", "GT", "GE"):
        return None
    left, right = root.operands
    if direction in ("GT", "GE"):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    index = _element(computation, left, condition, callers)
    limit = _number(module, computation, right, callers)
    return None if index is None or limit is None else (index, limit, direction != "LE")


def _element(computation, name: str, condition: Computation, callers) -> int | None:
    """Which element of the loop's state a value of its condition is."""
    each = computation.by_name[name]
    while each.opcode in ("copy", "bitcast", "convert"):
        each = computation.by_name[each.operands[0]]
    if each.opcode == "get-tuple-element" and computation is condition:
        return int(each.attribute("index"))
    if each.opcode == "parameter" and computation is not condition:
        outer, call = callers[computation.name]
        return _element(outer, call.operands[int(each.arguments)], condition, callers)
    return None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a trip adds to an element of the loop's state."""
    root = body.root
    if root.opcode != "tuple":
        return None
    return _added(module, body, root.operands[index], {}, index, body)


def _added(module, computation, name: str, callers, index: int, body) -> int | None:
    each = computation.by_name[name]
    again = functools.partial(_added, module, index=index, body=body)
    if each.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        return again(computation, each.operands[0], callers)
    if each.opcode == "get-tuple-element" and computation is body:
        start = computation.by_name[each.operands[0]]
        same = start.opcode == "parameter" and int(each.attribute("index")) == index
        return 0 if same else None
    if each.opcode == "parameter" and computation.name in callers:
        outer, call = callers[computation.name]
        return again(outer, call.operands[int(each.arguments)], callers)
    if each.opcode == "fusion":
        inner = module.called(each, "calls")
        return again(inner, inner.root.name, callers | {inner.name: (computation, each)})
    if each.opcode == "add":
        for mine, other in (each.operands, each.operands[::-1]):
            base = again(computation, mine, callers)
            more = _number(module, computation, other, callers)
            if base is not None and more is not None:
                return base + more
    return None


def _number(module, computation, name: str, callers, index: int | None = None) -> int | None:
    """The integer that a value (or element `index` of a tuple) always has; None if unknown."""
    each = computation.by_name.get(name)
    again = functools.partial(_number, module)
    if each is None:
        return None
    if each.opcode == "constant" and index is None:
        return int(each.arguments) if re.fullmatch(r"-?\d+", each.arguments) else None
    if each.opcode in (
        "copy",
        "bitcast",
        "convert",
        "copy-done",
        "copy-start",
        "optimization-barrier",
    ):
        return again(computation, each.operands[0], callers, index)
    if each.opcode == "tuple" and index is not None:
        return again(computation, each.operands[index], callers)
    if each.opcode == "get-tuple-element" and index is None:
        return again(computation, each.operands[0], callers, int(each.attribute("index")))
    if each.opcode in ("add", "subtract", "multiply") and index is None:
        left, right = (again(computation, name, callers) for name in each.operands)
        if left is None or right is None:
            return None
        return {"add": left + right, "subtract": left - right, "multiply": left * right}[
            each.opcode
        ]
    if each.opcode == "parameter" and computation.name in callers:
        outer, call = callers[computation.name]
        if call.opcode == "while":
            body = module.called(call, "body")
            if index is None or not _kept(body, index):
                return None
            return again(outer, call.operands[0], callers, index)
        return again(outer, call.operands[int(each.arguments)], callers, index)
    if each.opcode == "while" and index is not None and _kept(module.called(each, "body"), index):
        return again(computation, each.operands[0], callers, index)
    if each.opcode == "fusion" and index is None:
        inner = module.called(each, "calls")
        return again(inner, inner.root.name, callers | {inner.name: (computation, each)})
    return None


def _kept(body: Computation, index: int) -> bool:
    """Whether a loop leaves an element of its state as it is."""
    if body.root.opcode != "tuple":
        return False
    each = body.by_name[body.root.operands[index]]
    while each.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        each = body.by_name[each.operands[0]]
    same = each.opcode == "get-tuple-element" and int(each.attribute("index")) == index
    return same and body.by_name[each.operands[0]].opcode == "parameter"
