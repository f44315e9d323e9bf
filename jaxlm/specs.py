"""The parts of a sharding, and the type of sums: words that all code on arrays shares."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import PartitionSpec


def wide(dtype) -> jnp.dtype:
    """The type of sums, norms and softmax: float32, or float64 in a program of float64 (verify)."""
    return jnp.promote_types(dtype, jnp.float32)


def partitions(spec: PartitionSpec) -> tuple:
    """The per-dimension entries of a spec, without its reduced and unreduced sets."""
    return tuple(getattr(spec, "partitions", None) or getattr(spec, "_partitions", ()))


def entry_axes(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
