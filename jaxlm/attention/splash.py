"""Attention by the splash kernel of jax (TPU, Pallas): blocks of scores live in VMEM only.

Shapes: B batch, S queries, T keys, H query heads, K kv heads, C head_dim; local inside shard_map.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import Mesh

from jaxlm import config as cfg
from jaxlm.attention.compiled import shown_blocks
from jaxlm.attention.xla import repeat_heads
from jaxlm.sharding import Layout

LANES = 128
WIDEST = 256  # head_dim whose blocks fit 16 MiB of VMEM in float32


def obstacle(config: cfg.Config, mesh: Mesh) -> str:
    """Why the kernel cannot run here; empty if it can."""
    platform, length = mesh.devices.flat[0].platform, config.batch.sequence_length
    if platform != "tpu":
        return f"it is a TPU kernel and the mesh is of {platform} devices"
    if length % LANES:
        return f"batch.sequence_length={length} is not a multiple of {LANES}"
    if config.model.head_dim > WIDEST:
        return f"model.head_dim={config.model.head_dim} is above {WIDEST}, which fills its memory"
    return ""


def attend(
    q_BSHC, k_BTKC, v_BTKC, segments_BS, layout: Layout, softcap: float, window: int,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """As xla.attend, every device on its own rows and heads; `interpret` runs it on CPU."""
    batch, length, heads, width = q_BSHC.shape
    if layout.dim_axes("kv_heads") != layout.dim_axes("heads"):
        k_BTKC, v_BTKC = (repeat_heads(x, heads, layout) for x in (k_BTKC, v_BTKC))
    q_BSHC = q_BSHC * width**-0.5  # the kernel does not scale

    mask = masks.CausalMask((length, length))
    if window:
        mask = masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)

    def local(q_BSHC, k_BTKC, v_BTKC, *segments):  # local shards below
        attention = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * q_BSHC.shape[2]),
            block_sizes=block_sizes(length, width * q_BSHC.dtype.itemsize),
            head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=softcap or None, residual_checkpoint_name="attention",
            interpret=interpret,
        )  # fmt: skip
        q_BHSC, k_BKTC, v_BKTC = (jnp.swapaxes(x, 1, 2) for x in (q_BSHC, k_BTKC, v_BTKC))
        ids = kernel.SegmentIds(segments[0], segments[0]) if segments else None
        out_BHSC: jax.Array = jax.vmap(attention)(q_BHSC, k_BKTC, v_BKTC, ids)  # pyright: ignore
        return jnp.swapaxes(out_BHSC, 1, 2)

    # A Pallas kernel sees local arrays only, and it says nothing of varying axes: no check_vma.
    spec, rows = layout.spec("batch _ heads _"), layout.spec("batch _")
    segments = () if segments_BS is None else (segments_BS,)
    specs = (spec, spec, spec) + (rows,) * len(segments)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    with jax.named_scope(f"window_{window}"):  # compiled.py counts the kernel's FLOPs by it
        return mapped(q_BSHC, k_BTKC, v_BTKC, *segments)


def block_sizes(length: int, row_bytes: int) -> kernel.BlockSizes:
    """Tiles of queries and keys, for rows of this many bytes; all divide the sequence.

    The fused backward pass (5 matmuls, not 7) writes one partial dq for each block of keys, so it
    is used while those are at most eight: beyond that memory would grow with the length squared.
    """
    # Wider rows, in larger blocks, do not fit 16 MiB of VMEM (found by compiling for v4 and v5e).
    small, large = _block(length, 512), _block(length, 1024 if row_bytes <= 512 else 512)
    keys = _block(length, 2048) if length > 8192 and row_bytes <= 256 else large
    fused = length <= 8 * keys
    return kernel.BlockSizes(
        block_q=small, block_kv=large, block_kv_compute=_block(large, 512),
        block_q_dkv=small, block_kv_dkv=keys, block_kv_dkv_compute=_block(keys, 512),
        block_q_dq=None if fused else small, block_kv_dq=None if fused else large,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip


def kernel_flops(name: str, scope: str, shapes: list[tuple[tuple[int, ...], int]]) -> float:
    """FLOPs of a kernel with operands and results of these (shape, bytes of an element).

    Of all scores it computes the blocks that the mask does not hide whole. Forward is two products,
    dq three, dkv four, and five where it makes dq too: a third result.
    """
    large = [(shape, size) for shape, size in shapes if len(shape) >= 3 and size >= 2]
    (*_, length, width), size = large[0]
    sizes = block_sizes(length, width * size)
    products, block = 2, sizes.block_kv
    if "dkv" in name:
        products, block = 5 if sizes.use_fused_bwd_kernel else 4, sizes.block_kv_dkv
    elif "dq" in name:
        products, block = 3, sizes.block_kv_dq
    rows, columns = length // sizes.block_q, length // (block or length)
    window = re.search(r"\bwindow_(\d+)\b", scope)
    part = shown_blocks(rows, columns, length, int(window[1]) if window else 0)
    return 2.0 * products * math.prod(large[0][0]) * length * part


def _block(length: int, limit: int) -> int:
    """The largest multiple of the lane count, up to `limit`, that divides the length."""
    return max(n for n in range(LANES, min(limit, length) + 1, LANES) if length % n == 0)
