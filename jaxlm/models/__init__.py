"""The decoder and its families; a family is one module: Config, Block, Norm and its name map."""

from __future__ import annotations

import importlib
from types import ModuleType

from jaxlm import config as cfg


def family_module(name: str) -> ModuleType:
    """The module of a family: `llama` is jaxlm/models/llama.py."""
    return importlib.import_module(f"jaxlm.models.{name}")


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
