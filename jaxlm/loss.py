"""Cross-entropy over a vocabulary that may be sharded; full logits are never held.

Shapes: B batch, S sequence, M microbatches, N chunks, s tokens of a chunk, D embed, V padded
vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm import config as cfg
from jaxlm.models import family_module
from jaxlm.models.decoder import Decoder, logits
from jaxlm.sharding import Layout, wide

UPDATE = "update/"  # in aux: a sum over tokens by which a fixed variable changes
PEAK = "peak/"  # in aux: sums over tokens, [X], of which the largest over the mean is a metric


def split_batch(batch: dict, count: int) -> dict:
    """Every [B, S] as [M, B/M, S], each device keeping its own rows: part m has rows m, m+M, ..."""

    def one(x_BS):
        rows, length = x_BS.shape
        b, s = jax.typeof(x_BS).sharding.spec
        parts = jnp.reshape(x_BS, (rows // count, count, length), out_sharding=P(b, None, s))
        return jnp.moveaxis(parts, 1, 0)

    return jax.tree.map(one, batch)


def sum_losses(config: cfg.Config, nll_BS, z_BS, weights_BS) -> dict:
    """Sums over a batch, of the losses of its tokens."""
    return {
        "loss": jnp.sum(nll_BS * weights_BS),
        "weight": jnp.sum(weights_BS),
        "z_loss": config.loss.z_loss * jnp.sum(z_BS * weights_BS),
    }


def aux_weights(batch: dict, parts: dict) -> jax.Array:
    """The weight [M] of what blocks return for each microbatch; all add up to that of the batch.

    Blocks make means over the tokens of a microbatch that are no padding, so each has its part of
    these. Tokens whose target does not count are among them: the loss weights are another number.
    """
    weight = jnp.sum(batch["weights"])
    if "segments" not in parts:
        count = parts["tokens"].shape[0]
        return jnp.full(count, weight / count)
    real_M = jnp.sum(parts["segments"] > 0, axis=(1, 2))
    return weight * (real_M / jnp.maximum(jnp.sum(real_M), 1)).astype(weight.dtype)


def read_aux(aux: dict, weight: jax.Array) -> tuple[jax.Array, dict]:
    """(what to add to the loss, sums over the batch) of a microbatch, from what blocks returned.

    A name is "group0/1/router/z_loss": group, place in the pattern, the block's own name, and holds
    an array with a leading dimension of layers. `*_loss` is a mean over tokens that is added to the
    loss; `update/*` is a sum over tokens, for `update_fixed`, and `peak/*` one for `read_peaks`;
    all else are metrics, means over tokens. Losses are summed over layers and metrics averaged,
    and both weighted by `weight`, the microbatch's of `aux_weights`, so that the division by the
    total makes them means over the batch.
    """
    updates, values = {}, {}
    for path, stacked in aux.items():
        group, place, name = path.split("/", 2)
        if name.startswith(UPDATE):
            variable = f"groups.{group.removeprefix('group')}.{place}.{name.removeprefix(UPDATE)}"
            updates[UPDATE + variable] = stacked
        elif name.startswith(PEAK):
            updates[f"{PEAK}{group}/{place}/{name.removeprefix(PEAK)}"] = stacked
        else:
            values.setdefault(name, []).append(stacked)
    merge = lambda name: jnp.sum if name.endswith("_loss") else jnp.mean
    means = {name: merge(name)(jnp.concatenate(parts)) for name, parts in values.items()}
    sums = {name: mean * weight for name, mean in means.items()}
    loss = sum((x for name, x in sums.items() if name.endswith("_loss")), jnp.zeros(()))
    return loss, sums | updates


def read_peaks(aux: dict) -> dict:
    """aux of a whole batch, with metrics in place of the sums of `peak/*` [layers, X].

    Such a metric is the largest sum over the mean one, averaged over layers; as all metrics it is
    times the batch's weight. Averaged over microbatches it would grow with their number.
    """
    values = {}
    for path in (name for name in aux if name.startswith(PEAK)):
        sums_LX = aux[path]
        mean_L = jnp.maximum(jnp.mean(sums_LX, -1), 1 / sums_LX.shape[-1])
        name = path.removeprefix(PEAK).split("/", 2)[2]
        values.setdefault(name, []).append(jnp.max(sums_LX, -1) / mean_L)
    means = {name: jnp.mean(jnp.concatenate(parts)) for name, parts in values.items()}
    rest = {name: value for name, value in aux.items() if not name.startswith(PEAK)}
    return rest | {name: mean * aux["weight"] for name, mean in means.items()}


def update_fixed(model: cfg.Model, fixed: dict, aux: dict) -> tuple[dict, dict]:
    """Fixed variables after a step, and aux without the sums that they were updated by."""
    sums = {n.removeprefix(UPDATE): x for n, x in aux.items() if n.startswith(UPDATE)}
    family = family_module(model.family)
    new = {name: family.update_fixed(model, name, fixed[name], x) for name, x in sums.items()}
    return fixed | new, {n: x for n, x in aux.items() if not n.startswith(UPDATE)}


def batch_losses(config: cfg.Config, model: Decoder, batch: dict, layout: Layout):
    """-log p(target), log(Z)^2 of every token, float32 [B, S], and the aux of the forward pass."""
    hidden_BSD, _, aux = model(batch["tokens"], batch["positions"], batch.get("segments"), layout)
    nll_BS, z_BS = token_losses(
        hidden_BSD, model.head_weight(layout), batch["targets"], config.model, layout,
        config.loss.chunks,
    )  # fmt: skip
    return nll_BS, z_BS, aux


@jax.named_scope("head")
def token_losses(hidden_BSD, head_VD, targets_BS, model: cfg.Model, layout: Layout, chunks: int):
    """-log p(target) and log(Z)^2 of every token, float32 [B, S] each.

    The head runs chunk by chunk under remat: at any time the logits of one chunk exist.
    """

    # `wide` here is the type in which the gradients of all chunks are summed.
    dtype, head_VD = head_VD.dtype, head_VD.astype(wide(head_VD.dtype))

    @functools.partial(jax.checkpoint, prevent_cse=chunks == 1)
    def one(hidden_BsD, targets_Bs):
        return score_losses(logits(hidden_BsD, head_VD.astype(dtype), model), targets_Bs)

    if chunks == 1:
        return one(hidden_BSD, targets_BS)
    step = lambda _, chunk: (None, one(*chunk))
    split = lambda x: split_sequence(x, chunks, layout)
    _, outputs = jax.lax.scan(step, None, (split(hidden_BSD), split(targets_BS)))
    return tuple(join_sequence(x_NBs, layout) for x_NBs in outputs)


def score_losses(scores_BsV, targets_Bs):
    """-log p(target) and log(Z)^2 of tokens with these scores over the vocabulary."""
    top_Bs = jax.lax.stop_gradient(jnp.max(scores_BsV, -1))
    log_z_Bs = top_Bs + jnp.log(jnp.sum(jnp.exp(scores_BsV - top_Bs[..., None]), -1))
    # A gather along a sharded vocabulary would replicate it: a masked sum does not.
    hit_BsV = targets_Bs[..., None] == jnp.arange(scores_BsV.shape[-1])
    score_Bs = jnp.sum(jnp.where(hit_BsV, scores_BsV, 0.0), -1)
    return log_z_Bs - score_Bs, log_z_Bs**2


def split_sequence(x, chunks: int, layout: Layout):
    """[B, S, ...] -> [N, B, S/N, ...]; a device keeps its own part of the sequence in each."""
    batch, length, *rest = x.shape
    ways = layout.size("seq")
    b, s, *r = jax.typeof(x).sharding.spec
    shape = (batch, ways, chunks, length // (ways * chunks), *rest)
    x = jnp.reshape(x, shape, out_sharding=P(b, s, None, None, *r))
    x = jnp.moveaxis(x, 2, 0)
    return jnp.reshape(x, (chunks, batch, length // chunks, *rest), out_sharding=P(None, b, s, *r))


def join_sequence(x, layout: Layout):
    """The inverse of `split_sequence`: [N, B, s, ...] -> [B, S, ...]."""
    chunks, batch, size, *rest = x.shape
    ways = layout.size("seq")
    _, b, s, *r = jax.typeof(x).sharding.spec
    shape = (chunks, batch, ways, size // ways, *rest)
    x = jnp.moveaxis(jnp.reshape(x, shape, out_sharding=P(None, b, s, None, *r)), 0, 2)
    return jnp.reshape(x, (batch, chunks * size, *rest), out_sharding=P(b, s, *r))
