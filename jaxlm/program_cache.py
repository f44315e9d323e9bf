"""Compiled programs kept from one process to the next, by jax's persistent compilation cache.

A kept program is machine code: whoever can write it can make its reader run anything. So it is kept
in a directory that only the user can enter, or nowhere. jax finds it by a hash of
the computation, the compiler's options and version, and the devices (a CPU's with its
instructions), and reads it without pickle. https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

import jax

from jaxlm import config as cfg

logger = logging.getLogger("jaxlm")

MAX_BYTES = 4 << 30  # of all programs; the least recently used go first


def keep() -> None:
    """Keep compiled programs in the user's cache and load them from there; says why where not.

    A directory that the user chose himself (JAX_COMPILATION_CACHE_DIR) is left as it is.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    own_size = "JAX_COMPILATION_CACHE_MAX_SIZE" in os.environ
    try:
        folder = (user_cache() / "programs").resolve()
        _make(folder)
        _refuse_open(folder)
        if not own_size:
            _drop_unfinished(folder)
    except (OSError, RuntimeError, cfg.UserError) as error:  # RuntimeError: links in a circle
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        logger.info("compiled programs are not kept: %s", reason)
        return
    if not own_size:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.monitoring.register_event_duration_secs_listener(_say_loaded)


def _say_loaded(event: str, duration_secs: float, **_) -> None:
    if event == "/jax/compilation_cache/compile_time_saved_sec":
        folder = jax.config.values["jax_compilation_cache_dir"]
        logger.info("a program is loaded from %s (saves %.0f s)", folder, max(duration_secs, 0.0))


def user_cache() -> Path:
    """jaxlm's directory in the user's cache, made if it can be; UserError without a home.

    A relative XDG_CACHE_HOME is ignored, as https://specifications.freedesktop.org/basedir says.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = base if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:  # a user without an entry in the system's list, as in containers
        raise cfg.UserError(
            "there is no home directory; set HOME or XDG_CACHE_HOME to a directory"
        ) from error
    folder = Path(base) / "jaxlm"
    with contextlib.suppress(OSError):  # who writes there says so
        _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Make a directory and those above it for the user alone, whatever the umask."""
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def _refuse_open(folder: Path) -> None:
    """UserError where another user could put a file here, or a directory in this one's place."""
    user, facts = os.geteuid(), folder.stat()
    if facts.st_uid != user:
        raise cfg.UserError(f"{folder} belongs to another user; remove it")
    if facts.st_mode & 0o077:
        mode = stat.S_IMODE(facts.st_mode)
        raise cfg.UserError(f"{folder} is open to others (mode {mode:04o}); remove it")
    if not os.access(folder, os.W_OK):
        raise cfg.UserError(f"{folder} cannot be written")
    for parent in folder.parents:
        facts = parent.stat()
        if facts.st_uid not in (0, user):
            raise cfg.UserError(f"{parent}, which holds {folder}, belongs to another user")
        if facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX:
            raise cfg.UserError(
                f"{parent}, which holds {folder}, can be written by others; chmod go-w {parent}"
            )


def _drop_unfinished(folder: Path) -> None:
    """Remove entries that a kill cut off, which jax would fail to read at every start.

    jax writes a program and then the time of its last use. An entry that another process is
    writing just now may go too: it is compiled again.
    """
    for entry in folder.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)
