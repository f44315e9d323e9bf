"""A store: where islands that are separate jobs meet. A directory, or an object store by URL.

Objects are bytes under a name such as "merges/000000000007.json". Small records are created once:
of several writers that create the same name at the same time exactly one succeeds, on local disks,
S3, GCS and Azure alike. An object is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jaxlm import extras
from jaxlm.config import UserError

logger = logging.getLogger("jaxlm")
T = TypeVar("T")
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "memory", "https")
TEMPORARY = ".tmp"  # folder of a directory store in which objects are written before they appear
LONGEST_WAIT = 60.0  # seconds between two tries of what failed
STALE = 86400.0  # seconds after which a file in TEMPORARY is what a killed process left


@dataclasses.dataclass(frozen=True)
class Store:
    """The operations on a store. Those on single objects raise KeyError where there is none."""

    url: str
    read: Callable[[str], bytes]
    create: Callable[[str, bytes], bool]  # False: the name is taken; small objects only
    write: Callable[[str, bytes], None]  # replaces what is there, as a whole
    list: Callable[[str], list[str]]  # sorted names of a folder at any depth: "merges/"
    delete: Callable[[str], None]  # absent: nothing happens


def is_url(place: str) -> bool:
    """Whether a place is the URL of an object store, and not a directory."""
    return "://" in place


def open_store(place: str, key: str = "outer.store", make: bool = True) -> Store:
    """The store at a directory, which is made where `make`, or at the URL of an object store.

    Raises UserError, naming the config key or argument `key`, where it cannot be used.
    """
    if not place.strip() or "\0" in place:
        raise UserError(f"{key}={place!r} must be a directory or the URL of an object store")
    if not (make or is_url(place) or os.path.isdir(place)):
        raise UserError(f"{key}={place}: there is no such directory; name that of outer.store")
    store = _open_objects(place, key) if is_url(place) else _open_directory(Path(place), key)
    try:
        store.list("snapshots/")
    except Exception as error:
        raise UserError(f"{key}={place}: cannot be read: {reason(error)}") from error
    return store


# --- a directory ---------------------------------------------------------------------------------


def _open_directory(root: Path, key: str) -> Store:
    try:
        (root / TEMPORARY).mkdir(parents=True, exist_ok=True)
        _sweep(root / TEMPORARY)
    except OSError as error:
        raise UserError(
            f"{key}={root}: cannot be made or written: {error.strerror}; name a directory that "
            "every island can write"
        ) from error
    return Store(
        str(root),
        functools.partial(_read_file, root),
        functools.partial(_create_file, root),
        functools.partial(_write_file, root),
        functools.partial(_list_files, root),
        lambda name: (root / name).unlink(missing_ok=True),
    )


def _sweep(folder: Path) -> None:
    """Remove what killed processes left, long ago."""
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < time.time() - STALE:
                file.unlink()


def _read_file(root: Path, name: str) -> bytes:
    try:
        return (root / name).read_bytes()
    except FileNotFoundError:
        raise KeyError(name) from None


@contextlib.contextmanager
def _written(root: Path, name: str, data: bytes) -> Iterator[Path]:
    """A temporary file with this content, on the disk; its folder-to-be is made."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    temporary = root / TEMPORARY / uuid.uuid4().hex
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder((root / name).parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A new name in a folder is on the disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_file(root: Path, name: str, data: bytes) -> bool:
    # A hard link appears with its content and fails where the name is taken; O_EXCL would show an
    # empty file first.
    with _written(root, name, data) as temporary:
        try:
            os.link(temporary, root / name)
        except FileExistsError:
            return False
    return True


def _write_file(root: Path, name: str, data: bytes) -> None:
    with _written(root, name, data) as temporary:
        os.replace(temporary, root / name)


def _list_files(root: Path, folder: str) -> list[str]:
    found = [file.relative_to(root) for file in (root / folder).rglob("*") if file.is_file()]
    return sorted(file.as_posix() for file in found if file.parts[0] != TEMPORARY)


# --- an object store -----------------------------------------------------------------------------


def _open_objects(url: str, key: str) -> Store:
    if url.partition("://")[0] not in SCHEMES:
        raise UserError(f"{key}={url}: no store of that scheme; use s3://, gs:// or az://")
    obstore = extras.load("obstore", "store", f"{key}={url}")
    exceptions = extras.load("obstore.exceptions", "store", f"{key}={url}")
    stores = extras.load("obstore.store", "store", f"{key}={url}")
    try:
        there = stores.from_url(url)
    except Exception as error:
        raise UserError(f"{key}={url}: {reason(error)}") from error

    def read(name: str) -> bytes:
        try:
            return bytes(obstore.get(there, name).bytes())
        except FileNotFoundError:
            raise KeyError(name) from None

    def create(name: str, data: bytes) -> bool:
        try:
            obstore.put(there, name, data, mode="create")
        except exceptions.AlreadyExistsError:
            return False
        return True

    def names(folder: str) -> list[str]:
        return sorted(str(each["path"]) for page in obstore.list(there, folder) for each in page)

    def delete(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(there, name)

    def write(name: str, data: bytes) -> None:
        obstore.put(there, name, data)

    return Store(url, read, create, write, names, delete)


# --- a store that is out of reach for a while ----------------------------------------------------


def patient(store: Store, stop: threading.Event | None = None) -> Store:
    """The store, whose operations are tried again until they succeed; a line says why they wait.

    A create that reached the store without our hearing of it is told from a lost race: what is
    there is what we wrote. `stop` ends the waiting: the error is then raised.
    """
    again = lambda operation: functools.partial(_until_it_works, store.url, operation, stop)
    read, create = again(store.read), again(store.create)

    def create_ours(name: str, data: bytes) -> bool:
        if create(name, data):
            return True
        try:
            return read(name) == data
        except KeyError:
            return False

    return Store(
        store.url, read, create_ours, again(store.write), again(store.list), again(store.delete)
    )


def _until_it_works(
    url: str, operation: Callable[..., T], stop: threading.Event | None, *arguments: Any
) -> T:
    wait = 1.0
    while True:
        try:
            return operation(*arguments)
        except KeyError:
            raise
        except Exception as error:  # of the disk, the network or the service
            if stop is not None and stop.is_set():
                raise
            logger.warning(
                "warning: outer.store=%s: %s: %s; trying again in %.0f s",
                url, arguments[0], reason(error), wait,
            )  # fmt: skip
        if stop is None:
            time.sleep(wait)
        else:
            stop.wait(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def reason(error: BaseException) -> str:
    """An error of a store in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).partition("\n\nDebug source")[0]
    return " ".join(text.split())[:300] or type(error).__name__
