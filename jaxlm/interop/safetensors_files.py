"""Safetensors directories that strangers wrote: found, checked, and read slice by slice.

The safetensors library checks types, shapes and offsets against the file; here are the checks that
it leaves out: repeated names, and file names that lead out of the directory. Pickle is never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy know bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.config import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SNAPSHOTS = "snapshots"
JSON_LIMIT = 1 << 27  # bytes; an index of a million tensors is below it


@contextlib.contextmanager
def open_tensors(directory: Path, not_needed: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Tensor name -> slice (get_shape, get_dtype, [...]) of all files; nothing is read yet.

    The index and its files must agree but for what matches a pattern of `not_needed`: there
    transformers writes, and reads, indexes that do not.
    """
    weight_map = _weight_map(directory)
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {}
        for name in sorted(set(weight_map.values())):
            file = inside(directory, name)
            opened = stack.enter_context(_open(file))
            for tensor in opened.keys():
                if tensor in found:
                    raise UserError(f"{file}: {tensor} is in another file too")
                found[tensor] = opened.get_slice(tensor)
        lost = [] if set(weight_map) == {""} else sorted(set(weight_map) ^ set(found))
        lost = [n for n in lost if not any(fnmatchcase(n, pattern) for pattern in not_needed)]
        if lost:
            raise UserError(
                f"{directory / INDEX}: does not agree with its files: {first(lost)}; "
                "download the directory again"
            )
        yield found


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> file of the index; {"": file} where one file has them all."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; download the model there first")
    if (directory / SINGLE).exists():
        return {"": SINGLE}
    if (directory / INDEX).exists():
        weight_map = read_json(directory, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or "" in weight_map:
            raise UserError(f"{directory / INDEX}: it has no weight_map")
        for tensor, name in weight_map.items():
            if not isinstance(name, str):
                raise UserError(
                    f"{directory / INDEX}: {name!r}, for {tensor}, is not the plain name of a file"
                )
        return weight_map
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise UserError(
            f"{directory}: {first(pickles)}: pickle can run any code and is never read; "
            "convert it to safetensors"
        )
    raise UserError(f"{directory}: neither {SINGLE} nor {INDEX} is there")


def inside(directory: Path, name: Any) -> Path:
    """The regular file of this plain name; UserError if it leads out of the directory.

    The links of a Hugging Face cache (snapshots/<revision>/<name> -> blobs/<hash>) are followed.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
    if not plain or "\\" in name or "\0" in name or not _encodes(name):
        raise UserError(f"{directory}: {name!r} is not the plain name of a file in it")
    home, file = directory.resolve(), (directory / name).resolve()
    homes = [home]
    homes += [p.parent.parent / "blobs" for p in (home, home.parent) if p.parent.name == SNAPSHOTS]
    if file.parent not in homes:
        raise UserError(f"{directory}: {name} is a link that leads out of it")
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        raise UserError(f"{directory / name}: cannot be read: {error.strerror}") from None
    if not regular:
        raise UserError(f"{directory / name}: not a file")
    return directory / name


def _encodes(name: str) -> bool:
    """Whether a name can be a file's: lone surrogates cannot."""
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file; UserError where it is anything else, or repeats a key."""
    file = inside(directory, name)
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise ValueError(f"larger than {JSON_LIMIT} bytes")
        return _parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _parse(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it repeats {next(n for n in names if names.count(n) > 1)!r}")
        return values

    try:
        values = json.loads(data, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """An open safetensors file whose header names every tensor once."""
    try:
        opened = safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        text = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{file}: not a sound safetensors file: {text[:200]}") from None
    with opened as handle:
        with file.open("rb") as stream:  # the library has checked the length
            header = stream.read(struct.unpack("<Q", stream.read(8))[0])
        try:
            _parse(header)
        except ValueError as error:
            raise UserError(f"{file}: not a sound safetensors file: {error}") from None
        yield handle


def save_tensors(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file with the permissions that new files have here; the library's are 0600."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(arrays, file, metadata={"format": "pt"})
    file.chmod(mode)


def first(names: Iterable[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
