"""Causal attention within segments; one file per backend, chosen once from the mesh's device kind.

Shapes: B batch, S queries, T keys, H query heads, K kv heads, G queries per kv head, C head_dim.
"""

from __future__ import annotations

import dataclasses
import logging

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxlm import config as cfg
from jaxlm.attention import chunked, cudnn, ring, splash, xla
from jaxlm.sharding import Layout

BACKENDS = {"xla": xla, "chunked": chunked, "splash": splash, "cudnn": cudnn}
SHORT = 1024  # tokens up to which whole scores are held


@jax.named_scope("attention")
def attend(
    q_BSHC, k_BSKC, v_BSKC, segments_BS, layout: Layout, softcap: float, window: int, cache=None
):
    """Attention output [B, S, H, C] and the cache, which queries see up to their position."""
    if cache is not None:
        whole = chunked.attend if q_BSHC.shape[1] > SHORT else xla.attend
        return xla.attend_cached(q_BSHC, k_BSKC, v_BSKC, layout, softcap, window, cache, whole)
    arrays, split = (q_BSHC, k_BSKC, v_BSKC, segments_BS), layout.dim_axes("seq")
    if split and layout.attention.context != "all_to_all":  # it names what it keeps
        return ring.attend(*arrays, layout, softcap, window), None
    backend = BACKENDS[layout.attention.backend]
    if split:
        out_BSHC = ring.attend_whole(*arrays, layout, softcap, window, backend.attend)
    else:
        out_BSHC = backend.attend(*arrays, layout, softcap, window)
    if backend is splash:  # it names what its own backward pass needs
        return out_BSHC, None
    return checkpoint_name(out_BSHC, "attention"), None


def kernel_flops(name: str, scope: str, shapes: list) -> float | None:
    """FLOPs that a kernel declares; None where `name` is none of ours.

    `shapes`: of its operands and results on one device, with the bytes of an element.
    """
    if name.startswith("splash"):
        return splash.kernel_flops(name, scope, shapes)
    if name.startswith("dot_product_attention"):
        return cudnn.kernel_flops(name, shapes)
    return None


def choose(config: cfg.Config, mesh: Mesh) -> cfg.Attention:
    """Resolve `auto` from the mesh's devices, and say why; refuse what cannot run there."""
    chosen, why = pick(config, mesh)
    logging.getLogger("jaxlm").info("attention: %s (%s)", chosen.backend, why)
    return chosen


def pick(config: cfg.Config, mesh: Mesh) -> tuple[cfg.Attention, str]:
    """What `choose` resolves to, and why; of the mesh only shape and devices matter."""
    backend, context = config.attention.backend, config.attention.context
    split, names = _split(config, mesh), ("xla", "chunked")
    if split and context != "all_to_all" and backend in ("auto", *names):
        why = f"{split} split the sequence, by attention.context={context}"
        return dataclasses.replace(config.attention, backend=context), why
    if backend == "auto":
        backend, why = _auto(config, mesh)
    else:
        why, problem = "as configured", obstacle(backend, config, mesh)
        if problem:
            works = [name for name in BACKENDS if not obstacle(name, config, mesh)]
            raise cfg.UserError(
                f"attention.backend={backend}: {problem}; use attention.backend=auto"
                + "".join(f" or {name}" for name in works)
            )
    if split:
        why += f"; {split} split the sequence, by attention.context={context}"
    return dataclasses.replace(config.attention, backend=backend), why


def obstacle(backend: str, config: cfg.Config, mesh: Mesh) -> str:
    """Why a backend cannot run this config on this mesh; empty if it can."""
    if backend in ("xla", "chunked"):
        return ""
    split = _split(config, mesh)
    if split and config.attention.context != "all_to_all":
        return f"it needs whole sequences and they are split ({split}) by attention.context=" + (
            f"{config.attention.context}, not all_to_all"
        )
    return BACKENDS[backend].obstacle(config, mesh)


def _split(config: cfg.Config, mesh: Mesh) -> str:
    """The axes that split the sequence, in words; empty if it is whole."""
    axes = (cfg.RULES | config.rules)["seq"]
    return " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)


def _auto(config: cfg.Config, mesh: Mesh) -> tuple[str, str]:
    """The backend for the mesh's kind of device, and the reason in words."""
    device, length = mesh.devices.flat[0], config.batch.sequence_length
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(device.platform)
    problem = obstacle(kernel, config, mesh) if kernel else ""
    if kernel and not problem:
        return kernel, f"the fused kernel of {device.device_kind}"
    missing = f"; not {kernel}: {problem}" if kernel else ""
    if length > SHORT:
        return "chunked", f"scores of {length} tokens are not held whole{missing}"
    return "xla", f"scores of {length} tokens are small{missing}"
