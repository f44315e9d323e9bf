"""Reads XLA's own buffer assignment, which CPU's compiler gives away: an oracle for jaxlm.xla.

The messages are those of xla/service/hlo.proto: BufferAssignmentProto names instructions by number,
HloModuleProto has their names.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """Where an array lies in the block of temporaries."""

    instruction: str  # that makes it
    leaf: str  # which element of its result: "", "0", "1,0"
    offset: int
    bytes: int


def read_places(assignment: bytes, module: bytes) -> list[Place]:
    """The arrays in the block of temporaries, which is the largest allocation of its kind."""
    names = _instruction_names(module)
    fields = list(_fields(assignment))
    buffers = {}
    for buffer in (dict(_fields(value)) for number, value in fields if number == 1):
        where = dict(_fields(buffer[3]))
        buffers[buffer.get(1, 0)] = names[where[4]], ",".join(map(str, where.get(3, b"")))
    allocations = [list(_fields(value)) for number, value in fields if number == 3]
    # 3 thread-local, 5 parameter, 7 result, 12 constant; 2 its size
    temporaries = [each for each in allocations if not {3, 5, 7, 12} & set(dict(each))]
    block = max(temporaries, key=lambda each: dict(each)[2], default=[])
    rows = [dict(_fields(value)) for number, value in block if number == 9]
    return [Place(*buffers[row.get(1, 0)], row.get(2, 0), row.get(3, 0)) for row in rows]


def _instruction_names(module: bytes) -> dict[int, str]:
    computations = [value for number, value in _fields(module) if number == 3]
    found = {}
    for computation in computations:
        for value in (value for number, value in _fields(computation) if number == 2):
            instruction = dict(_fields(value))
            found[instruction[35]] = instruction[1].decode()
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message: protobuf.dev/programming-guides/encoding."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            length = {1: 8, 5: 4}[kind]
            value, at = int.from_bytes(data[at : at + length], "little"), at + length
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
