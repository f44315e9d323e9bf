"""Islands: sets of devices that train one copy of the model each and merge what they learnt.

The command line imports this package for the arguments of `jaxlm outer`, so that it loads what
trains when that is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm import config as cfg
    from jaxlm.outer.meeting import Meeting
    from jaxlm.program import Program


def meet(config: cfg.Config, program: Program) -> Meeting:
    """How the islands of a config meet; without islands, its train step."""
    from jaxlm.outer import apart, meeting, together

    if config.outer.store:
        return apart.meet(config, program)
    if config.outer.every:
        return together.meet(config, program)
    return meeting.alone(config, program)
