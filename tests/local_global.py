"""A family with two kinds of blocks, for tests: five with a window, then one without, and again.

Layers that do not fill a pattern are a group of their own. Otherwise it is Llama.
"""

import dataclasses
import sys

from jaxlm import config as cfg
from jaxlm.models import llama

NAME = "local_global"
COMMON = llama.COMMON
Norm, encode_positions = llama.Norm, llama.encode_positions
MODEL_TYPES, PREFIX, IGNORED, NAMES = (NAME,), llama.PREFIX, llama.IGNORED, llama.NAMES
from_hugging_face, to_hugging_face = llama.from_hugging_face, llama.to_hugging_face


@cfg.section
class Config(llama.Config):
    """Llama's keys, and the pattern."""

    locals_per_global: int = cfg.key(5, "blocks with a window before one without", minimum=1)
    dense_layers: int = cfg.key(0, "layers before the first pattern, all global", minimum=0)


class Local(llama.Block):
    """Sees `sliding_window` tokens."""


class Global(llama.Block):
    """Sees all tokens."""

    def __init__(self, config, layout, key):
        super().__init__(dataclasses.replace(config, sliding_window=0), layout, key)


def groups(config: Config):
    """Whole patterns, and what is left."""
    pattern = (Local,) * config.locals_per_global + (Global,)
    whole, rest = divmod(config.num_layers - config.dense_layers, len(pattern))
    found = [((Global,), config.dense_layers), (pattern, whole), (pattern[:rest], 1)]
    return [(blocks, repeats) for blocks, repeats in found if blocks and repeats]


def check(config) -> None:
    """As the families of jaxlm refuse what they cannot be."""
    model = config.model
    if model.num_layers <= model.dense_layers:
        raise cfg.UserError(f"model.num_layers={model.num_layers} leaves no pattern")


def register(monkeypatch) -> None:
    """Make it a family, as a file in jaxlm/models would be."""
    monkeypatch.setitem(sys.modules, f"jaxlm.models.{NAME}", sys.modules[__name__])


def config(base: cfg.Config, **keys) -> cfg.Config:
    """A config of Llama's as one of this family."""
    values = vars(base.model) | dict(family=NAME) | keys
    return dataclasses.replace(base, model=Config(**values))
