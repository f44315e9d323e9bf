"""The manifest of a checkpoint: size and SHA-256 of each file, checked before it is read.

It is written last, before a checkpoint gets its name, so that a step that is listed has one.
Neither Orbax nor the formats that it writes notice a flipped bit of an array.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

FILE = "manifest.json"
FORMAT = 1
LARGEST = 64 << 20  # bytes of a manifest; a larger one is not parsed
THREADS = 4  # that hash files at the same time: hashing lets go of the interpreter


def write(directory: Path, about: dict[str, Any]) -> None:
    """Write the manifest of the items, which are folders, of a directory; `about`: what else it
    says. Orbax adds to the files beside them, and restores nothing from these."""
    files = sorted(path for path in directory.glob("*/**/*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in files]
    hashes = _in_threads(_digest, files)
    found = {
        name: [path.stat().st_size, sha256]
        for name, path, sha256 in zip(names, files, hashes, strict=True)
    }
    body = {"format": FORMAT, **about, "files": found}
    record = {"manifest": body, "sha256": _of(body)}
    with open(directory / FILE, "x") as file:
        json.dump(record, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> dict[str, Any]:
    """What a manifest says; FileNotFoundError where it is absent, ValueError where damaged."""
    path = directory / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{FILE} is missing")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{FILE} is too large")
    try:
        record = json.loads(path.read_bytes())
        body, told = record["manifest"], record["sha256"]
        whole = _of(body) == told and body["format"] <= FORMAT
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in body["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{FILE} is damaged") from error
    if not whole:
        raise ValueError(f"{FILE} is damaged")
    return body | {"files": files}


def problem(
    directory: Path, body: dict[str, Any], items: Collection[str], share: slice = slice(None)
) -> str:
    """What is wrong with the files of some items (none: all files), in a few words; "" if nothing.

    `share`: the part of the files that is looked at, in the order of their names.
    """
    names = [name for name in sorted(body["files"]) if not items or name.split("/")[0] in items]
    found = _in_threads(lambda name: _problem(directory / name, *body["files"][name]), names[share])
    for name, text in zip(names[share], found, strict=True):
        if text:
            return f"{name} {text}"
    return ""


def _problem(path: Path, size: int, sha256: str) -> str:
    if not path.is_file():
        return "is missing"
    there = path.stat().st_size
    if there != size:
        return f"has {there} bytes, not {size}"
    return "" if _digest(path) == sha256 else "is not what was written: its bytes have another hash"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _in_threads(function: Callable, values: list) -> Iterator:
    with concurrent.futures.ThreadPoolExecutor(THREADS, "manifest") as pool:
        return iter(list(pool.map(function, values)))
