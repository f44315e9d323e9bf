"""Which results of a compiled program lie where an operand lay, and of what they are copies.

As XLA decides it: hlo_dataflow_analysis.cc (CanShareOperandBufferWithUser) of xla/service.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jaxlm.xla.hlo import Computation, Instruction, Module

COPIES = ("bitcast", "copy", "convert", "reshape", "transpose")
IN_PLACE = ("dynamic-update-slice", "scatter", "all-reduce-start")
# An output may overwrite an operand that it reads element by element, or of a slice's update.
ELEMENTWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp compare convert copy cosine divide erf exponential "
    "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply "
    "negate not or power reduce-precision remainder round-nearest-afz round-nearest-even rsqrt "
    "select shift-left shift-right-arithmetic shift-right-logical sign sine sqrt subtract tan tanh "
    "xor".split()
)


def in_place(module: Module, each: Instruction) -> Iterator[tuple[int, int]]:
    """(result, operand) pairs that lie in one buffer by definition."""
    if each.opcode in IN_PLACE:
        yield 0, 0
    found = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", each.attributes)
    for result, operand in re.findall(r"\{([\d, ]*)\}: \((\d+),", found[1]) if found else ():
        yield int(result or 0), int(operand)
    if each.opcode == "fusion":
        called = module.computations[each.attribute("calls")]
        for i, root in enumerate(called.outputs()):
            source = _through(called, root)
            if source.opcode in IN_PLACE:
                target = _through(called, called.by_name[source.operands[0]])
                if target.opcode == "parameter":
                    yield i, int(target.arguments)


def _through(computation: Computation, each: Instruction) -> Instruction:
    """The instruction that made a value, seen through bitcasts."""
    while each.opcode == "bitcast":
        each = computation.by_name[each.operands[0]]
    return each


def may_overwrite(module: Module, each: Instruction) -> Iterator[tuple[int, int]]:
    """(result, operand) pairs of which the result may lie where an operand was read last."""
    if each.opcode in ELEMENTWISE:
        yield from ((0, i) for i in range(len(each.operands)))
    if each.opcode == "sort":  # each array where it lies
        yield from ((i, i) for i in range(len(each.operands)))
    if each.opcode != "fusion":
        return
    called = module.computations[each.attribute("calls")]
    outputs = called.outputs()
    users: dict[str, list[Instruction]] = {}
    for one in called.instructions:
        for name in one.operands:
            users.setdefault(name, []).append(one)
    for parameter in called.instructions:
        if parameter.opcode == "parameter" and len(parameter.shapes) == 1:
            if _elementwise(parameter, users):
                mine = parameter.shapes[0]
                for i, output in enumerate(outputs):
                    other = output.shapes[0]
                    if other.dims == mine.dims and other.padded_bytes == mine.padded_bytes:
                        yield i, int(parameter.arguments)


def _elementwise(parameter: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether all that is computed of a parameter takes the same element of it."""
    stack, seen = [parameter], set()
    while stack:
        one = stack.pop()
        for user in users.get(one.name, ()):
            if user.opcode not in ("tuple", "bitcast") and not (
                user.opcode in ELEMENTWISE and user.shapes[0].size == parameter.shapes[0].size
                and (user.opcode != "copy" or user.shapes[0].order == one.shapes[0].order)
            ):  # fmt: skip
                return False
            if user.name not in seen:
                seen.add(user.name)
                stack.append(user)
    return True


def origin(
    module: Module, computation: Computation, each: Instruction, leaf: int
) -> tuple[Instruction, int | None]:
    """What computed a result, through copies and updates of slices; or the operand it came from."""
    if each.opcode in ("fusion", "fusion-start"):
        called = module.computations[each.attribute("calls")]
        outputs = called.outputs()
        found = _computed(called, outputs[min(leaf, len(outputs) - 1)])
        if found.opcode == "parameter":
            return each, int(found.arguments)
        return (found if found.op_name else each), None
    if each.opcode in ("copy-start", *COPIES):
        return each, 0
    return each, 1 if each.opcode == "dynamic-update-slice" else None


def _computed(computation: Computation, each: Instruction) -> Instruction:
    while each.opcode == "dynamic-update-slice" or each.opcode in COPIES:
        each = computation.by_name[each.operands[each.opcode == "dynamic-update-slice"]]
    return each
