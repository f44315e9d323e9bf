"""Clipping: the norm of each row's gradient, and the weight that brings it under the limit.

The loss of a row is the sum over its tokens of what the loss section says (cross-entropy times the
token's weight, and z-loss), over batch.sequence_length: a constant, so that a row's gradient
depends on no other row. DP-SGD (arXiv:1607.00133, algorithm 1) sums g * min(1, C / |g|) over rows;
as g is linear in the weights of the row's tokens, that is the ordinary step on other weights.

Shapes: B batch, S sequence, M microbatches, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm import config as cfg
from jaxlm import ghost
from jaxlm.loss import split_batch, sum_losses
from jaxlm.privacy.head import probed_losses
from jaxlm.sharding import Layout, partitions, wide
from jaxlm.state import Arrays, Structure


def clip_rows(
    config: cfg.Config, structure: Structure, params: Arrays, fixed: Arrays, batch: Arrays,
    layout: Layout,
) -> Arrays:  # fmt: skip
    """The batch with weights of which the ordinary sum of gradients is that of clipped rows."""
    square_B = row_squares(config, structure, params, fixed, batch, layout)
    limit = config.privacy.clip_norm
    factor_B = limit / jnp.maximum(jnp.sqrt(square_B), limit) / config.batch.sequence_length
    weights_BS = batch["weights"] * factor_B[:, None]
    # Without it a compiler may run the forward pass of the ordinary step, which needs no norms,
    # beside this one, and keep the activations of both.
    return jax.lax.optimization_barrier(batch | {"weights": weights_BS})


@jax.named_scope("row norms")
def row_squares(
    config: cfg.Config, structure: Structure, params: Arrays, fixed: Arrays, batch: Arrays,
    layout: Layout,
) -> jax.Array:  # fmt: skip
    """Squared norm of the gradient of each row's loss, over all trained weights: [B], `wide`."""
    squares = lambda part: _squares(config, structure, params, fixed, part, layout)
    count = config.batch.microbatches
    if count == 1:
        return squares(batch)
    parts = split_batch(batch, count)
    _, square_MB = jax.lax.scan(lambda _, part: (None, squares(part)), None, parts)
    rows = partitions(jax.typeof(square_MB).sharding.spec)[1]
    # Part m has rows m, m + M, ...
    return jnp.reshape(square_MB.T, (-1,), out_sharding=P(rows))


def _squares(config: cfg.Config, structure: Structure, params, fixed, batch, layout: Layout):
    """Of one microbatch: a pass back that makes no gradient of a weight (ghost.py)."""

    def loss(norms: Arrays, link: tuple | None):
        weights: dict[str, Any] = {
            name: ghost.Probed(
                name, params[name], norms[name],
                ghost.Link(batch["tokens"], *link) if link and name == "embed" else None,
            )
            for name in params
        }  # fmt: skip
        model = structure.merge(weights, fixed)
        segments = batch.get("segments")
        hidden_BSD, _, _ = model(batch["tokens"], batch["positions"], segments, layout)
        head = model.head_weight(layout)
        nll_BS, z_BS = probed_losses(hidden_BSD, head, batch["targets"], config, layout)
        sums = sum_losses(config, nll_BS, z_BS, batch["weights"])
        return (sums["loss"] + sums["z_loss"]) / config.batch.sequence_length

    tied = "head" not in structure.dims and "embed" in params
    norms, link = jax.grad(loss, (0, 1))(
        {name: _zeros(structure.dims[name], params[name], batch, layout) for name in params},
        _link(config, batch, layout) if tied else None,
    )  # fmt: skip
    total_B = sum(jnp.sum(x, 0) if x.ndim > 1 else x for x in norms.values())
    if link is not None:
        looked_BSD, met_BSD = link
        total_B += 2 * jnp.sum(looked_BSD.astype(met_BSD.dtype) * met_BSD, (1, 2))
    return jnp.maximum(total_B, 0)


def _zeros(dims: str, weight, batch, layout: Layout):
    """[B], or [L, B] for a weight of stacked layers."""
    stack = weight.shape[:1] if dims.startswith("layers ") else ()
    spec = P(*(None for _ in stack), *layout.spec("batch"))
    shape = (*stack, batch["tokens"].shape[0])
    return jnp.zeros(shape, wide(weight.dtype), out_sharding=spec)


def _link(config: cfg.Config, batch, layout: Layout) -> tuple:
    """Zeros [B, S, D], whose cotangents tell what joins the uses of a tied embedding."""
    shape, spec = (*batch["tokens"].shape, config.model.embed_dim), layout.spec("batch seq _")
    compute = jnp.dtype(layout.compute)
    return tuple(jnp.zeros(shape, kind, out_sharding=spec) for kind in (compute, wide(compute)))
