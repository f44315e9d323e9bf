"""How a loop trains where islands merge what they learnt, and where there are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxlm import checkpoint, metrics
from jaxlm import config as cfg
from jaxlm.program import Program
from jaxlm.state import Arrays, State, abstract_state


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What the loop calls; its state is a State, or what a way to meet makes of it."""

    begin: Callable[[State], Any]  # the state of a new run
    restore: Callable[[Any, int], Any]  # (directory, step) -> the state of a checkpoint
    step: Callable[[Any, Arrays], tuple[Any, Any]]  # (state, batch) -> (state, metrics)
    read: Callable[[Any], dict[str, float]]  # the numbers of such metrics; all processes call it
    merged: Callable[[Any], State]  # the model to evaluate, to sample from and to export
    saved: Callable[[Any], tuple[State, Arrays]]  # what a checkpoint keeps: its items, and `outer`
    places: Callable[[int], int] = lambda item: item  # this run's item -> place in the stream
    enter: Callable[[], None] = lambda: None  # before a checkpoint is looked for
    facts: Callable[[], dict[str, Any]] = dict  # JSON that a checkpoint keeps with its data
    close: Callable[[], None] = lambda: None  # at the end, also after an error


def alone(config: cfg.Config, program: Program) -> Meeting:
    """One copy of the model: its state, its step and its metrics as they are."""

    def restore(directory, step: int) -> State:
        abstract = abstract_state(config, program.layout, program.optimizer, program.mesh)
        return checkpoint.restore_state(directory, step, abstract)

    return Meeting(
        begin=lambda state: state, restore=restore, step=program.train_step,
        read=metrics.numbers, merged=lambda state: state, saved=lambda state: (state, {}),
    )  # fmt: skip
