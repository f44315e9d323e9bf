"""The decoder and its families. A family is one file here, found because it is there.

Every file is a family, named as the file, but for the pieces that families share: those of
config.SHARED. A family file has the names of PARTS:

  Config             its keys of `model:`, over those of config.Model, and properties of that
  check(config)      UserError for a config that it cannot be
  groups(model)      its layers as (pattern of blocks, repeats), first to last
  Norm               the norm before the head
  encode_positions   what its blocks need to know of the positions, such as rotary tables
  MODEL_TYPES ...    what transformers calls it, and the translation (jaxlm/interop)

A block is an nnx.Module, block(config, layout, key). Its call takes (x, what encode_positions gave,
segments, layout, cache) and returns (x, cache, aux); `block.window(config)` tells the tokens that a
query sees, `block.cache(config)` what is kept of each token for generation.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from jaxlm import config as cfg

PARTS = (
    "Config", "check", "groups", "Norm", "encode_positions", "MODEL_TYPES", "PREFIX", "IGNORED",
    "NAMES", "from_hugging_face", "to_hugging_face",
)  # fmt: skip


def family_module(name: str) -> ModuleType:
    """The module of a family: `llama` is jaxlm/models/llama.py. UserError for a broken file."""
    file = f"jaxlm/models/{name}.py"
    try:
        module = importlib.import_module(f"jaxlm.models.{name}")
    except Exception as error:  # whatever a file can raise
        what = f"{type(error).__name__}: {error}"
        raise cfg.UserError(f"{file}: the model family cannot be imported: {what}") from error
    if missing := [part for part in PARTS if not hasattr(module, part)]:
        raise cfg.UserError(
            f"{file}: a model family has {', '.join(missing)} too; a file that is no family "
            "stands in config.SHARED"
        )
    return module


def staged_group(config: cfg.Model) -> int:
    """The group of layers that pipeline stages are cut from: the first with the most layers.

    All stages run one program, so their layers are of one pattern; other groups are on no stage.
    """
    groups = family_module(config.family).groups(config)
    return max(range(len(groups)), key=lambda i: len(groups[i][0]) * groups[i][1])


def staged_pattern(config: cfg.Model) -> tuple[tuple[type, ...], int]:
    """The blocks and repeats of that group."""
    return family_module(config.family).groups(config)[staged_group(config)]


def layer_windows(config: cfg.Model) -> list[int]:
    """The window of each layer's attention, tokens, as its block tells it; 0: all before it."""
    groups = family_module(config.family).groups(config)
    return [
        b.window(config) for pattern, repeats in groups for _ in range(repeats) for b in pattern
    ]
