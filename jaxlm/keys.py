"""How a config key is declared: its default, meaning, limits, and what changing it alters."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

REQUIRED = object()
T = TypeVar("T")


class UserError(ValueError):
    """A mistake in a config, a command or an input file: shown as one line, exit code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def check_text(key: str, text: str) -> None:
    """Refuse text that UTF-8 cannot hold: a command line has such for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}={text!r} has a byte that is not UTF-8 text, {text[error.start]!r}; "
            "write it in UTF-8, and where the locale is another set PYTHONUTF8=1"
        ) from None


def key(
    default: Any,
    doc: str,
    *,
    changes: str = "",
    numbers_where: str = "",
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    path: bool = False,
    dim: str = "",
) -> Any:
    """Declare one config key: its default, meaning with unit, and what changing it alters.

    `numbers_where`: numbers change in some configs only, and in which (`configfile.changes`).
    A `path` may start with ~ or ~user, a home directory. `dim`: the dimensions of weights (DIMS)
    that are this large, which the mesh axes that split them must divide.
    """
    metadata = dict(doc=doc, changes=tuple(changes.split()), choices=choices, path=path)
    metadata |= dict(dim=dim)
    metadata |= dict(numbers_where=numbers_where)
    metadata |= dict(minimum=minimum, maximum=maximum, required=default is REQUIRED)
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, type) or isinstance(default, dict):
        factory = default if isinstance(default, type) else (lambda: dict(default))
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """A group of keys: a frozen dataclass."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
