"""The mesh of a config, made of devices and checked against them."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlm import attention
from jaxlm import config as cfg
from jaxlm.models import experts
from jaxlm.sharding import Layout, make_layout
from jaxlm.validate import resolve_mesh, validate


def open_mesh(config: cfg.Config, devices: list | None = None) -> tuple[Mesh, Layout]:
    """The mesh and layout that a config names, checked against the devices that there are."""
    devices = jax.devices() if devices is None else devices
    validate(config, len(devices))
    sizes = resolve_mesh(config.mesh, len(devices))
    mesh = make_mesh(sizes, config.mesh.dcn, devices)
    return mesh, make_layout(config, sizes, attention.choose(config, mesh), experts.choose(mesh))


def make_mesh(sizes: dict[str, int], dcn: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh with all seven axes; `dcn` factors run across slices (TPU) or processes (others)."""
    from jax.experimental import mesh_utils

    devices = list(jax.devices()) if devices is None else list(devices)
    shape = [sizes[axis] for axis in cfg.AXES]
    outer = [dcn.get(axis, 1) for axis in cfg.AXES]
    slices = len({getattr(d, "slice_index", None) for d in devices})
    if math.prod(outer) == 1 and slices > 1:
        raise cfg.UserError(
            f"mesh.dcn is empty, and the devices are in {slices} slices; name the axis that runs "
            f"across them, as in mesh.dcn={{data: {slices}}} with mesh.data={slices} or a multiple"
        )
    if math.prod(outer) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = _hybrid_grid(shape, outer, devices)
    return Mesh(grid, cfg.AXES, axis_types=(AxisType.Explicit,) * len(cfg.AXES))


def _hybrid_grid(shape: list[int], outer: list[int], devices: list) -> np.ndarray:
    """Devices of one granule (slice or process) stay together in the inner factor of every axis."""
    from jax.experimental import mesh_utils

    inner = [size // factor for size, factor in zip(shape, outer, strict=True)]
    sliced = len({getattr(d, "slice_index", None) for d in devices}) > 1
    count = len({d.slice_index if sliced else d.process_index for d in devices})
    if count > 1 and math.prod(outer) != count:
        factors = " x ".join(f"{a}={n}" for a, n in zip(cfg.AXES, outer, strict=True) if n > 1)
        raise cfg.UserError(
            f"mesh.dcn: {factors} is {math.prod(outer)}, and the devices are in {count} "
            f"{'slices' if sliced else 'processes'}; make the product {count}"
        )
    if count > 1:
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=not sliced,
            allow_split_physical_axes=True,
        )  # fmt: skip
    # One process simulating several: consecutive devices form a granule.
    grid = np.array(devices).reshape([*outer, *inner])
    order = [
        i
        for pair in zip(range(len(outer)), range(len(outer), 2 * len(outer)), strict=True)
        for i in pair
    ]
    return grid.transpose(order).reshape(shape)
