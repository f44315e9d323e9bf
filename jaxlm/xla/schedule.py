"""The instructions of a compiled program in the order in which it runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.xla.hlo import Computation, Instruction, Module
from jaxlm.xla.trips import trip_count


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
