"""Scheduled HLO text as data: instructions and the computations that they call.

The text is what `compiled.as_text()` returns on any platform.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

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

    def outputs(self) -> list[Instruction]:
        """What made its results: the elements of a tuple, or the root itself."""
        root = self.root
        return [self.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]

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
