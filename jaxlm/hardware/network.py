"""Which wires a collective over some mesh axes uses, and how fast they are at their peak."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxlm.config import AXES
from jaxlm.hardware.target import Target


class Route(NamedTuple):
    """The slowest wires of a group."""

    network: str  # "links" (a torus, NVLink), "network" (between slices, hosts), "memory" (CPU)
    bandwidth: float  # bytes/s that one device sends with, at their peak


def route(
    target: Target, sizes: dict[str, int], dcn: dict[str, int], axes: tuple[str, ...]
) -> Route:
    """The wires of groups along these mesh axes; traces and compiled programs share it.

    On a torus every side that a group spans has links of its own (jax-ml.github.io/scaling-book,
    "sharding"); between slices and hosts its members share the ways out of theirs.
    """
    kind, group = target.kind, math.prod(sizes[axis] for axis in axes)
    if target.platform == "cpu":
        return Route("memory", kind.link)
    if target.platform == "tpu":
        far = math.prod(dcn.get(axis, 1) for axis in axes)
        near = group // far
        if far > 1:
            return Route("network", min(kind.link, kind.network * max(1, near)))
        reach, sides = 1, 0
        for side in sorted(target.shape, reverse=True):
            if reach < near:
                reach, sides = reach * side, sides + 1
        return Route("links", kind.link * max(1, sides))
    # Devices are numbered host by host, and the last mesh axis varies fastest.
    strides = {axis: math.prod(sizes[a] for a in AXES[AXES.index(axis) + 1 :]) for axis in axes}
    gpus = target.shape[-1]
    near = math.prod(max(1, min(sizes[axis], gpus // strides[axis] or 1)) for axis in axes)
    if near < group:
        return Route("network", min(kind.link, kind.network * near))
    return Route("links", kind.link)
