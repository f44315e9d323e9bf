"""Estimates before any compile: what a config takes on a target, by the trace of its train step.

A search looks at hundreds of configs, of which many share a trace (shared.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlm import attention
from jaxlm import config as cfg
from jaxlm.hardware.target import AbsentDevice, Target, local_target, parse_target
from jaxlm.models import experts
from jaxlm.optim import make_optimizer
from jaxlm.outer.fleet import island_config
from jaxlm.plan import cache, roofline, traced
from jaxlm.plan.cost import Cost
from jaxlm.program import Program, make_program, trace_train_step
from jaxlm.sharding import Layout, make_layout
from jaxlm.state import Structure, init_state, model_structure


class Estimate(NamedTuple):
    """One train step on one device."""

    cost: Cost
    time: roofline.Time


class Sizes(NamedTuple):
    """Stands in for a Mesh where only its kind and sizes matter: a search looks at thousands."""

    shape: dict[str, int]
    devices: np.ndarray


def of_config(config: cfg.Config, target: Target) -> Estimate:
    """One step on a target, from the trace of the very program that would run there."""
    config = cache.settled(config, target)
    return of_program(config, make_program(config, target.absent_devices()), target)


def of_program(config: cfg.Config, program: Program, target: Target) -> Estimate:
    """One step of a program."""
    step = traced.read_step(trace_train_step(config, program), target)
    cost = traced.analyze(step, dict(program.mesh.shape), target, config.mesh.dcn)
    known = roofline.efficiencies(target.kind, efficiencies_path(config))
    return Estimate(cost, roofline.estimate(cost, target, known))


def one_device(target: Target) -> np.ndarray:
    """A device of the target, for what depends on its kind alone."""
    return np.array(target.absent_devices()[:1], object)


def layout_of(config: cfg.Config, sizes: dict[str, int], devices: np.ndarray) -> Layout:
    """The layout that open_mesh would make, without the mesh."""
    mesh: Any = Sizes(sizes, devices)
    backend, _ = attention_of(config, sizes, devices)
    return make_layout(config, sizes, backend, experts.choose(mesh))


def attention_of(
    config: cfg.Config, sizes: dict[str, int], devices: np.ndarray
) -> tuple[cfg.Attention, str]:
    """What attention.backend=auto resolves to there, and why."""
    mesh: Any = Sizes(sizes, devices)
    return attention.pick(config, mesh)


def structure_of(config: cfg.Config) -> Structure:
    """Names and shapes of a model's weights; they do not depend on the mesh."""
    mesh, layout = _one_device(config)
    with jax.set_mesh(mesh):
        return model_structure(config.model, layout)


def checkpoint_bytes(config: cfg.Config, structure: Structure) -> int:
    """Size of a checkpoint: the whole state, which any mesh can restore."""
    mesh, layout = _one_device(config)
    optimizer = make_optimizer(config.optimizer, config.steps, structure.dims)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config, layout, optimizer))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _one_device(config: cfg.Config) -> tuple[Mesh, Layout]:
    sizes: dict[str, int] = dict.fromkeys(cfg.AXES, 1)
    one: Any = np.array(AbsentDevice(0, "cpu", "cpu", 0), object).reshape((1,) * len(sizes))
    mesh = Mesh(one, cfg.AXES, axis_types=(AxisType.Explicit,) * len(sizes))
    return mesh, make_layout(config, sizes, cfg.Attention(backend="xla"))


def efficiencies_path(config: cfg.Config) -> Path:
    """The file of calibrated efficiencies."""
    return cache.directory(config) / "efficiencies.json"


def memory_limit(target: Target) -> float:
    """Bytes that a device has; simulated ones share their host's memory."""
    if target.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / target.size
    return target.kind.hbm_bytes


def find_target(config: cfg.Config) -> Target:
    """The target that plan.target names; of `local`, what jax finds plugged in."""
    if config.plan.target != "local":
        return parse_target(config.plan.target)
    return local_target(jax.devices())


def predict(config: cfg.Config, program: Program) -> tuple[Target, Estimate]:
    """What `train` may expect of the devices it has; where they are islands, of one's."""
    mesh = program.mesh
    if config.outer.every and not config.outer.store:
        target = local_target(list(mesh.devices[0].flat))  # replica is the first mesh axis
        return target, of_config(island_config(config, dict(mesh.shape)), target)
    target = local_target(list(mesh.devices.flat))
    return target, of_program(config, program, target)
