"""Results kept between commands: one file each, named by a hash of all that it depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from jaxlm import config as cfg
from jaxlm import configfile, program_cache
from jaxlm.hardware.target import Target
from jaxlm.validate import resolve_mesh

logger = logging.getLogger("jaxlm")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")


def directory(config: cfg.Config) -> Path:
    """Where results are kept: plan.cache, or jaxlm's part of the user's cache."""
    return Path(config.plan.cache) if config.plan.cache else program_cache.user_cache()


def settled(config: cfg.Config, target: Target) -> cfg.Config:
    """The config with every axis' size, so that fsdp=-1 and fsdp=8 are the same program."""
    sizes = resolve_mesh(config.mesh, target.size)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, auto=False, **sizes))


def flags() -> str:
    """XLA_FLAGS but for the number of CPU devices, which a target says."""
    text = os.environ.get("XLA_FLAGS", "")
    return re.sub(r"--xla_force_host_platform_device_count=\d+", "", text).strip()


def key(config: cfg.Config, what: str, **more: Any) -> str:
    """A hash of what a result depends on: the program's keys, versions, sources and `more`."""
    keys = configfile.schema(config.model.family).values()
    values = configfile.to_dict(config)
    facts = {
        "config": {k.name: _value(values, k.name) for k in keys if _matters(k)},
        "what": what, "flags": flags(), "versions": versions(), "source": _source(), "more": more,
    }  # fmt: skip
    text = json.dumps(facts, sort_keys=True)
    return f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _matters(item: configfile.Key) -> bool:
    """Whether the train step depends on a key; segments and steps enter it too."""
    changes = item.field.metadata["changes"]
    return "recompiles" in changes or item.name in ("steps", "batch.sequences")


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what makes a program; absent packages are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _source() -> str:
    """A hash of jaxlm's own files."""
    root, found = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def read(config: cfg.Config, name: str) -> dict | None:
    """A kept result; None where there is none, or where its file is damaged."""
    try:
        found = json.loads((directory(config) / f"{name}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write(config: cfg.Config, name: str, result: dict) -> None:
    """Write a file whole or not at all: others may read and write it at the same time."""
    folder, file = directory(config), f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as own:
            Path(own, file).write_text(json.dumps(result))
            os.replace(Path(own, file), folder / file)
    except OSError as error:  # a plan is worth showing all the same
        logger.warning("plan.cache=%s: results are not kept: %s", folder, error.strerror)
