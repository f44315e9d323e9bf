"""The values in a Hugging Face config.json, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxlm.config import UserError

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def read(
    hf: Mapping[str, Any], defaults: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of the keys in `defaults`, which transformers takes where a key is missing, and
    of those in `optional` (key -> type), which are None where they are missing or null.

    Raises UserError for a value of another type: null too is refused by transformers there.
    """
    values = {key: hf.get(key, default) for key, default in defaults.items()}
    for key, value in values.items():
        default = defaults[key]
        if not has_type(value, type(default)):
            raise UserError(
                f"{key}={json.dumps(value)} is not {KINDS[type(default)]}, and transformers too "
                f"refuses it; write the model's value, or remove the key if that is the default, "
                f"{json.dumps(default)}"
            )
    for key, kind in (optional or {}).items():
        value = values[key] = hf.get(key)
        if value is not None and not has_type(value, kind):
            raise UserError(f"{key}={json.dumps(value)} is neither {KINDS[kind]} nor null")
    return values


def layer_types(hf: Mapping[str, Any], number: int) -> list[str] | None:
    """The kind of each of so many layers; None where the key is missing or null."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != number:
        raise UserError(f"layer_types={json.dumps(kinds)} is no list of {number} kinds of layers")
    return kinds


def has_type(value: Any, kind: type) -> bool:
    """Whether a JSON value is of this type; an integer is a number too, and true is neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
