"""What a layout costs that its author may not have meant: warnings, before anything is compiled.

Rooflines as in "How to Scale Your Model" (jax-ml.github.io/scaling-book): with C a chip's FLOP/s
and W its bytes/s, a gather of weights, or a reduction of their gradients, is hidden behind
computing from C / W tokens for each part of the batch that it serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from jaxlm import config as cfg
from jaxlm.hardware import chips
from jaxlm.interop import carried
from jaxlm.sharding import Layout
from jaxlm.state import Structure
from jaxlm.validate_outer import warn_outer

LARGE = 1 << 24  # elements of a weight (64 MiB at rest) that is worth splitting
SHARDING = ("stage", "fsdp", "context", "expert", "tensor")  # axes that split weights by default


def warnings(config: cfg.Config, mesh: Mesh, layout: Layout, structure: Structure) -> Iterator[str]:
    """One line for each thing that works and is likely to be a mistake."""
    yield from carried.length_beyond(config)
    yield from _copies(layout, structure)
    yield from _tensor_across_hosts(mesh)
    yield from _too_few_tokens(config, mesh, layout)
    yield from warn_outer(config, 0 if config.outer.store else mesh.shape["replica"])


def _copies(layout: Layout, structure: Structure) -> Iterator[str]:
    """Large weights that an axis holds copies of, though it splits others."""
    sizes, found = dict(layout.axes), {}
    for name, dims in structure.dims.items():
        if math.prod(structure.shapes[name]) < LARGE:
            continue
        used = structure.home(name, layout).stored_axes(dims)
        idle = tuple(axis for axis in SHARDING if sizes[axis] > 1 and axis not in used)
        dim = "embed" if "embed" in dims.split() else dims.split()[-1]
        if idle:
            found.setdefault((idle, dim), []).append(name)
    for (axes, dim), names in found.items():
        count = math.prod(sizes[axis] for axis in axes)
        largest = max(math.prod(structure.shapes[name]) for name in names) >> 18
        rest = [*dict(layout.storage).get(dim, ()), *axes]
        yield (
            f"{', '.join(names)} (up to {largest} MiB of float32) rest in {count} copies each, "
            f"because {_product(axes, sizes)} splits none of their dimensions; "
            f"storage.{dim}=[{', '.join(rest)}] does"
        )


def _tensor_across_hosts(mesh: Mesh) -> Iterator[str]:
    """Sums over tensor run in every layer: within a host's links (GPU) or a slice's (TPU)."""
    position, size = cfg.AXES.index("tensor"), mesh.shape["tensor"]
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    near, name = ("slice_index", "slices") if on_tpu else ("process_index", "hosts")
    places = np.vectorize(lambda device: getattr(device, near, 0))(mesh.devices)
    groups = places.swapaxes(position, -1).reshape(-1, size)
    if (groups != groups[:, :1]).any():
        together = mesh.size // len(np.unique(places))
        yield (
            f"mesh.tensor={size}: a tensor group spans {name}, and its sums run in every layer "
            f"over the slow network; use mesh.tensor={math.gcd(size, together)} or less, and "
            f"mesh.fsdp, mesh.stage or mesh.data across {name}"
        )


def _too_few_tokens(config: cfg.Config, mesh: Mesh, layout: Layout) -> Iterator[str]:
    """Batches too small to hide the gathers of weights, or the gradients' way across slices."""
    kind, sizes = chips.kind(mesh), dict(layout.axes)
    if not (kind.bf16_flops and kind.link):
        return
    b, dcn = config.batch, config.mesh.dcn
    tokens = b.sequences * b.sequence_length
    parts = layout.size("batch") * layout.size("seq")
    near = {axis: sizes[axis] // dcn.get(axis, 1) for axis in sizes}
    gathered = [axis for axis in ("fsdp", "context", "expert") if near[axis] > 1]
    if gathered:
        often = b.microbatches if config.gather_at == "layer" else 1
        links = _bandwidth(kind, mesh, gathered)
        need, have = kind.bf16_flops / links, tokens / (often * parts)
        if have < need:
            at = f" and {often} microbatches" if often > 1 else ""
            yield (
                f"{tokens} tokens a step over {_product(gathered, sizes)}{at}: {have:.0f} tokens a "
                f"chip for each gather of the weights, and {kind.name} computes longer than it "
                f"gathers from {need:.0f}; use a larger batch.sequences, fewer "
                "batch.microbatches, or mesh.tensor"
            )
    far = {axis: n for axis, n in dcn.items() if n > 1}
    if far and kind.network:
        split = math.prod(n for axis, n in far.items() if axis in layout.dim_axes("batch"))
        per_slice = mesh.size // math.prod(far.values())
        # A slice's chips share the sum: each sends its own part of the gradients.
        need, have = kind.bf16_flops / kind.network, tokens / split
        if have < need:
            yield (
                f"mesh.dcn={far}: {have:.0f} tokens a step for each slice or host of {per_slice} "
                f"chips, and computing takes longer than the gradients' way across the network "
                f"from {need:.0f}; use a larger batch.sequences or fewer slices"
            )


def _bandwidth(kind: chips.Kind, mesh: Mesh, axes: list[str]) -> float:
    """Bytes/s with which a chip gathers over these mesh axes."""
    index = tuple(slice(None) if axis in axes else 0 for axis in cfg.AXES)
    group = list(mesh.devices[index].flat)
    if mesh.devices.flat[0].platform == "tpu":  # every axis of the torus has links of its own
        coords = zip(*(device.coords for device in group), strict=True)
        return kind.link * max(1, sum(len(set(values)) > 1 for values in coords))
    hosts = len({device.process_index for device in group})
    return min(kind.link, kind.network * len(group) / hosts) if hosts > 1 else kind.link


def _product(axes, sizes: dict[str, int]) -> str:
    return " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
