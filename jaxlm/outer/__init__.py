"""Islands: sets of devices that train one copy of the model each and merge what they learnt."""

from __future__ import annotations

from jaxlm import checkpoint
from jaxlm import config as cfg
from jaxlm.outer import apart, together
from jaxlm.outer.meeting import Meeting
from jaxlm.program import Program
from jaxlm.state import State, abstract_state


def meet(config: cfg.Config, program: Program) -> Meeting:
    """How the islands of a config meet; without islands, its train step."""
    if config.outer.store:
        return apart.meet(config, program)
    if config.outer.every:
        return together.meet(config, program)
    return alone(config, program)


def alone(config: cfg.Config, program: Program) -> Meeting:
    """One copy of the model: its state, its step and its metrics as they are."""

    def restore(directory, step: int) -> State:
        abstract = abstract_state(config, program.layout, program.optimizer, program.mesh)
        return checkpoint.restore_state(directory, step, abstract)

    return Meeting(
        begin=lambda state: state, restore=restore, step=program.train_step,
        read=lambda values: {name: float(value) for name, value in values.items()},
        merged=lambda state: state, saved=lambda state: (state, {}),
    )  # fmt: skip
