"""How often loops run, found by following their counters through the text."""

from __future__ import annotations

import functools
import operator
import re

from jaxlm.xla.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "copy-done", "copy-start", "optimization-barrier")
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}


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
    first = _number_inside(module, computation, loop.operands[0], callers, index)
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


def _number(module: Module, computation: Computation, name: str, callers) -> int | None:
    """The integer that a value always has; None if unknown."""
    each = computation.by_name.get(name)
    if each is None:
        return None
    again = functools.partial(_number, module)
    if each.opcode == "constant":
        return int(each.arguments) if re.fullmatch(r"-?\d+", each.arguments) else None
    if each.opcode in _SAME:
        return again(computation, each.operands[0], callers)
    if each.opcode == "get-tuple-element":
        index = int(each.attribute("index"))
        return _number_inside(module, computation, each.operands[0], callers, index)
    if each.opcode in _ARITHMETIC:
        left, right = (again(computation, operand, callers) for operand in each.operands)
        known = left is not None and right is not None
        return _ARITHMETIC[each.opcode](left, right) if known else None
    if each.opcode == "fusion":
        inner = module.called(each, "calls")
        assert inner
        return again(inner, inner.root.name, callers | {inner.name: (computation, each)})
    if each.opcode == "parameter" and computation.name in callers:
        outer, call = callers[computation.name]
        return again(outer, call.operands[int(each.arguments)], callers)
    return None


def _number_inside(
    module: Module, computation: Computation, name: str, callers, index: int
) -> int | None:
    """The integer that element `index` of a tuple always has; None if unknown."""
    each = computation.by_name.get(name)
    if each is None:
        return None
    again = functools.partial(_number_inside, module, index=index)
    if each.opcode == "tuple":
        return _number(module, computation, each.operands[index], callers)
    if each.opcode in _SAME:
        return again(computation, each.operands[0], callers)
    if each.opcode == "while" and _kept(module.called(each, "body"), index):
        return again(computation, each.operands[0], callers)
    if each.opcode == "parameter" and computation.name in callers:
        outer, call = callers[computation.name]
        if call.opcode == "while" and not _kept(module.called(call, "body"), index):
            return None
        return again(outer, call.operands[int(each.arguments)], callers)
    return None


def _kept(body: Computation | None, index: int) -> bool:
    """Whether a loop leaves an element of its state as it is."""
    assert body
    if body.root.opcode != "tuple":
        return False
    each = body.by_name[body.root.operands[index]]
    while each.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        each = body.by_name[each.operands[0]]
    same = each.opcode == "get-tuple-element" and int(each.attribute("index")) == index
    return same and body.by_name[each.operands[0]].opcode == "parameter"
