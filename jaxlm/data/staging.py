"""Write a directory whole or not at all: beside its place first, then moved there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlm.config import UserError


@contextlib.contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends well."""
    final = Path(os.path.realpath(out))
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"  # several hosts may share the disk
    temporary = final.with_name(f".{final.name}.preparing-{unique}")
    old = final.with_name(f".{final.name}.replaced-{unique}")
    made = [parent for parent in final.parents if not parent.exists()]  # the innermost first
    try:
        _check_free(out, overwrite)
        temporary.mkdir(parents=True)
        yield temporary
        _sync_directory(temporary)
        _check_free(out, overwrite)
        if overwrite and final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        _sync_directory(final.parent)
    except BrokenPipeError:  # the program that read our output has ended; the disk is fine
        raise
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from None
    finally:  # after Ctrl-C too
        if old.exists() and not final.exists():
            os.rename(old, final)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: it holds the dataset
                parent.rmdir()


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse a directory that holds something, but for a dataset that may be overwritten."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out={out} is a file; name a directory that does not exist")
    if not any(out.iterdir()):
        return
    if not (out / "manifest.json").is_file():
        raise UserError(f"--out={out} is not empty and no dataset; name a new directory")
    if not overwrite:
        raise UserError(f"--out={out} holds a dataset; name another, or use --overwrite")


def write_array(file: Path, array: np.ndarray) -> str:
    """Write an array, flushed to the disk, and return the SHA-256 of the file."""
    with open(file, "wb+") as handle:
        np.save(handle, array, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
        handle.seek(0)
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_file(file: Path, data: bytes) -> None:
    """Write bytes, flushed to the disk."""
    with open(file, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
