"""Compiled train steps, kept by `jaxlm plan` and loaded by `train` on the same kind of devices.

jax.experimental.serialize_executable writes programs for CPU, TPU and NVIDIA GPUs, the latter two
without the hardware. Loading is tried on CPU; where a runtime refuses, the step is compiled.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxlm import config as cfg
from jaxlm.plan import cache
from jaxlm.plan.target import Target, local_target

logger = logging.getLogger("jaxlm")


def save(config: cfg.Config, target: Target, compiled: jax.stages.Compiled) -> str:
    """Keep a program; returns what went wrong, or nothing."""
    try:
        payload = pickle.dumps(serialize_executable.serialize(compiled))
    except (ValueError, NotImplementedError, RuntimeError, pickle.PicklingError) as error:
        return f"the program cannot be kept: {' '.join(str(error).split())[:200]}"
    cache.write_bytes(config, _name(config, target), payload)
    return ""


def load(config: cfg.Config, mesh: Mesh) -> Any:
    """The train step that a plan compiled for these devices, or None; says which."""
    if jax.process_count() > 1:  # each process would need its own part of the program
        return None
    devices = list(mesh.devices.flat)
    try:
        target = local_target(devices)
    except cfg.UserError:  # no plan can be for them
        return None
    settled = cache.settled(config, target)
    payload = cache.read_bytes(settled, _name(settled, target))
    if payload is None:
        return None
    try:
        step = serialize_executable.deserialize_and_load(
            *pickle.loads(payload), execution_devices=devices
        )
    except Exception as error:  # of any kind: the file is damaged, or the runtime refuses it
        reason = " ".join(str(error).split())[:200]
        logger.info("the train step that was planned cannot be loaded, and is compiled: %s", reason)
        return None
    logger.info("the train step comes from plan.cache=%s, compiled", cache.directory(config))
    return step


def _name(config: cfg.Config, target: Target) -> str:
    host = _cpu() if target.platform == "cpu" else ""
    return cache.key(config, "executable", target=target.text, host=host) + ".pickle"


def _cpu() -> str:
    """A hash of this processor's instructions: a program for others would not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
