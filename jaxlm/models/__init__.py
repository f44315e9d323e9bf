"""The decoder and its families; a family is one module: Config, Block, Norm and its name map."""

from __future__ import annotations

import importlib
from types import ModuleType


def family_module(name: str) -> ModuleType:
    """The module of a family: `llama` is jaxlm/models/llama.py."""
    return importlib.import_module(f"jaxlm.models.{name}")
