"""What one train step takes on one device: the common language of the planner.

`traced.py` reads a Cost off a traced step, `compiled.py` off a compiled program,
`roofline.py` makes seconds of it, `report.py` shows it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

# Classes of memory, in the order in which they are shown; activations kept for the backward pass
# are "saved/<name>": the names of remat.names, "block input", "residuals" where remat keeps all.
MEMORY = ("parameters", "optimizer", "gradients", "batch", "saved", "logits", "workspace", "outer")
# Parts of the model that FLOPs are counted for, each "<part>/<pass>": forward, backward, recompute.
PARTS = (
    "projections", "attention", "mlp", "experts", "router", "head", "optimizer", "other",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes, in one step, on one device."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute, ...
    axes: tuple[str, ...]  # mesh axes along which the members of a group differ
    network: str  # the slowest that it uses (network.py): "links" or "network"
    bandwidth: float  # bytes/s that a device sends with there, at its peak
    size: int  # devices of a group
    count: float  # how often it runs
    bytes: float  # results
    wire: float  # what the device sends, by the ring algorithm
    blocking: float  # of `wire`: the part that the compiler lets nothing overlap


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step on one device."""

    memory: dict[str, float]  # class -> bytes at the moment of the peak; their sum is the peak
    flops: dict[str, float]  # "<part>/<pass>" -> FLOPs of matmuls, kernels included
    kernel_flops: float  # of those, in fused attention kernels
    traffic: tuple[Traffic, ...]
    hbm_bytes: float  # read from and written to device memory
    host_bytes: float  # to and from host memory
    grouped_bytes: float = 0.0  # of the rows of grouped products, once for each group of theirs
    hidden_bytes: float = 0.0  # of hbm_bytes, of matmuls and kernels, which read while they compute
    compute_seconds: float = 0.0  # the compiler's own estimate of all but collectives; 0: none
    notes: tuple[str, ...] = ()  # what could not be counted

    @property
    def peak(self) -> float:
        """Peak memory, bytes."""
        return sum(self.memory.values())

    @property
    def total_flops(self) -> float:
        """FLOPs of matmuls, kernels included."""
        return sum(self.flops.values())


def to_json(cost: Cost) -> dict[str, Any]:
    """Plain data, for files and for the way between processes."""
    return dataclasses.asdict(cost)


def from_json(data: dict[str, Any]) -> Cost:
    """The inverse of `to_json`."""
    traffic = tuple(Traffic(**(row | {"axes": tuple(row["axes"])})) for row in data["traffic"])
    return Cost(**(data | {"traffic": traffic, "notes": tuple(data["notes"])}))


def part_of(op_name: str) -> str:
    """ "<part>/<pass>" of an operation, from its named scopes and autodiff's marks."""
    scopes = re.findall(r"[\w.]+", op_name)
    name = next((scope for scope in reversed(scopes) if scope in PARTS), "other")
    when = "forward"
    if "rematted_computation" in scopes:
        when = "recompute"
    elif "transpose(" in op_name:
        when = "backward"
    return f"{name}/{when}"
