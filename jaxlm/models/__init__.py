"""The decoder and its families; a family is one module: Config, Block, Norm and its name map."""

from __future__ import annotations

import importlib
from types import ModuleType

from jaxlm import config as cfg


def family_module(name: str) -> ModuleType:
    """The module of a family: `llama` is jaxlm/models/llama.py."""
    return importlib.import_module(f"jaxlm.models.{name}")


def layer_windows(config: cfg.Model) -> list[int]:
    """The window of each layer's attention, tokens, as its block tells it; 0: all before it."""
    groups = family_module(config.family).groups(config)
    return [
        b.window(config) for pattern, repeats in groups for _ in range(repeats) for b in pattern
    ]
