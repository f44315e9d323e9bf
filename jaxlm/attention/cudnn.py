"""Attention by cuDNN's flash kernel (NVIDIA), as jax.nn exposes it.

Shapes: B batch, S queries, T keys, H query heads, K kv heads, C head_dim; local inside shard_map.
"""

from __future__ import annotations

import importlib.util

import jax
from jax.sharding import Mesh

from jaxlm import config as cfg
from jaxlm.attention.xla import repeat_heads
from jaxlm.sharding import Layout


def obstacle(config: cfg.Config, mesh: Mesh) -> str:
    """Why the kernel cannot run here; empty if it can (limits: jax's check_is_flash_attention)."""
    device, width = mesh.devices.flat[0], config.model.head_dim
    if device.platform not in ("gpu", "cuda"):
        return f"it is a CUDA kernel and the mesh is of {device.platform} devices"
    capability = float(getattr(device, "compute_capability", 0))
    limit = 256 if capability >= 9 and _is_here(device) else 128
    if capability < 8:
        return f"it needs compute capability 8.0 and {device.device_kind} has {capability}"
    if config.precision.compute != "bfloat16":
        return f"it has no precision.compute={config.precision.compute}"
    if width % 8 or width > limit:
        return f"model.head_dim={width} is not a multiple of 8 up to {limit}"
    if config.model.attention_softcap:
        return f"it has no model.attention_softcap={config.model.attention_softcap}"
    if config.model.sliding_window:
        return f"it has no model.sliding_window={config.model.sliding_window}"
    if config.data.segments:
        return "data.segments=true would take a dense [sequence, sequence] mask"
    if mesh.shape["stage"] > 1:
        return f"its lowering fails under the map over mesh.stage={mesh.shape['stage']}"
    if not _is_here(device) and not _has_library():
        return "compiling it without the GPU takes the cuDNN library (nvidia-cudnn-cu12)"
    return ""


def attend(
    q_BSHC, k_BTKC, v_BTKC, segments_BS, layout: Layout, softcap: float, window: int
) -> jax.Array:
    """As xla.attend, every device on its own rows and heads."""
    assert segments_BS is None and not softcap and not window
    if layout.dim_axes("kv_heads") != layout.dim_axes("heads"):
        heads = q_BSHC.shape[2]
        k_BTKC, v_BTKC = (repeat_heads(x, heads, layout) for x in (k_BTKC, v_BTKC))

    def local(q_BSHC, k_BTKC, v_BTKC):  # local shards below
        return jax.nn.dot_product_attention(
            q_BSHC, k_BTKC, v_BTKC, is_causal=True, implementation="cudnn"
        )

    # Mapped, so that the call is local and the partitioner's own rules for it play no part.
    spec = layout.spec("batch _ heads _")
    mapped = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return mapped(q_BSHC, k_BTKC, v_BTKC)


def kernel_flops(name: str, shapes: list[tuple[tuple[int, ...], int]]) -> float:
    """FLOPs of a call with operands and results of these (shape, bytes of an element), causal.

    Forward two products of scores with half of them shown; backward five.
    """
    (batch, length, heads, width), _ = shapes[0]
    keys = shapes[1][0][1]
    return 2.0 * batch * length * keys * heads * width * (2.5 if "bwd" in name else 1.0)


def _is_here(device) -> bool:
    """Whether the device exists; a topology to compile for does not."""
    return device in jax.devices()


def _has_library() -> bool:
    return importlib.util.find_spec("nvidia") is not None and (
        importlib.util.find_spec("nvidia.cudnn") is not None
    )
