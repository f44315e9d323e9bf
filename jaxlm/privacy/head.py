"""The head in the pass for norms: its weight is met chunk by chunk, and its gradient is their sum.

Where the ordinary step keeps one gradient of the head, for all its rows, this pass keeps one for
the row that each device is at. So neither needs more memory than the other.

Shapes: B batch, S sequence, R rows of a device, W ways that the batch is split in, N chunks, s
tokens of a chunk, D embed, V padded vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm import config as cfg
from jaxlm import ghost
from jaxlm.loss import join_sequence, score_losses, split_sequence, token_losses
from jaxlm.models.decoder import cap_logits
from jaxlm.sharding import Layout, partitions, wide, wide_einsum
from jaxlm.specs import entry_axes


class _Head(NamedTuple):
    """What is known when the head is traced."""

    model: cfg.Model
    layout: Layout
    chunks: int


def probed_losses(hidden_BSD, head, targets_BS, config: cfg.Config, layout: Layout) -> Any:
    """loss.token_losses, where the head may be a weight whose rows' norms are wanted."""
    static = _Head(config.model, layout, config.loss.chunks)
    if not isinstance(head, ghost.Probed):
        return token_losses(hidden_BSD, head, targets_BS, *static)
    head.use("head")
    tokens_BS = met_BSD = None
    if head.link is not None:
        tokens_BS, met_BSD = head.link.tokens_BS, head.link.met_BSD
    return _losses(static, hidden_BSD, head.value, targets_BS, tokens_BS, head.norms_B, met_BSD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static: _Head, hidden_BSD, head_VD, targets_BS, tokens_BS, norms_B, met_BSD):
    return token_losses(hidden_BSD, head_VD, targets_BS, *static)


def _forward(static: _Head, hidden_BSD, head_VD, targets_BS, tokens_BS, norms_B, met_BSD):
    losses = _losses(static, hidden_BSD, head_VD, targets_BS, tokens_BS, norms_B, met_BSD)
    like = jnp.zeros((), norms_B.dtype)
    return losses, (hidden_BSD, head_VD, targets_BS, tokens_BS, like)


@jax.named_scope("head")
def _backward(static: _Head, saved, grads):
    """Row by row on each device: the gradient of the head, of which the norm is kept."""
    hidden_BSD, head_VD, targets_BS, tokens_BS, like = saved
    ways = static.layout.size("batch")
    static = static._replace(chunks=_chunks_of_row(static.chunks, targets_BS.shape[0] // ways))
    rows = {"hidden": hidden_BSD, "targets": targets_BS, "nll": grads[0], "z": grads[1]}
    rows |= {} if tokens_BS is None else {"tokens": tokens_BS}
    rows = jax.tree.map(lambda x: _by_row(x, ways), rows)
    _, found = jax.lax.scan(lambda _, row: (None, _row(static, head_VD, row)), None, rows)
    hidden_BSD, square_B, met_BSD = jax.tree.map(_together, found)
    return hidden_BSD, None, None, None, square_B.astype(like.dtype), met_BSD


_losses.defvjp(_forward, _backward)


def _chunks_of_row(chunks: int, rows: int) -> int:
    """Chunks in which one row has no more tokens than a chunk of all rows of a device."""
    return next(n for n in range(1, chunks + 1) if chunks % n == 0 and n * rows >= chunks)


def _by_row(x, ways: int):
    """[B, ...] -> [R, W, ...]: slice r has row r of every device."""
    b, *rest = partitions(jax.typeof(x).sharding.spec)
    shape = (ways, x.shape[0] // ways, *x.shape[1:])
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=P(b, None, *rest)), 1, 0)


def _together(x):
    """The inverse of `_by_row`."""
    _, b, *rest = partitions(jax.typeof(x).sharding.spec)
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return jnp.reshape(jnp.moveaxis(x, 0, 1), shape, out_sharding=P(b, *rest))


def _row(static: _Head, head_VD, row: dict):
    """Of one row of each device: the gradient of hidden states [W, S, D], the squared norm [W] of
    the head's, and the head's at the row's tokens [W, S, D] (None without tokens).
    """
    model, layout, chunks = static
    dtype = wide(head_VD.dtype)
    batch, seq, _ = partitions(jax.typeof(row["hidden"]).sharding.spec)
    vocab = partitions(jax.typeof(head_VD).sharding.spec)[0]

    def add(sum_WVD, piece):
        hidden_WsD, targets_Ws, *grads = piece
        scores = lambda hidden: wide_einsum("wsd,vd->wsv", hidden, head_VD)
        scores_WsV, pull_hidden = jax.vjp(scores, hidden_WsD)
        losses = lambda raw: score_losses(cap_logits(raw, model), targets_Ws)
        (grad_WsV,) = jax.vjp(losses, scores_WsV)[1](tuple(grads))
        sum_WVD += jnp.einsum(
            "wsv,wsd->wvd", grad_WsV.astype(hidden_WsD.dtype), hidden_WsD,
            preferred_element_type=dtype, out_sharding=jax.typeof(sum_WVD).sharding.spec,
        )  # fmt: skip
        return sum_WVD, *pull_hidden(grad_WsV)

    spec = P(batch, vocab, None, unreduced=frozenset(entry_axes(seq)))
    start = jnp.zeros((row["hidden"].shape[0], *head_VD.shape), dtype, out_sharding=spec)
    pieces = [split_sequence(row[n], chunks, layout) for n in ("hidden", "targets", "nll", "z")]
    sum_WVD, hidden = jax.lax.scan(add, start, pieces)
    sum_WVD = reshard(sum_WVD, P(batch, vocab, None))
    met_WSD = _rows_at(sum_WVD, row["tokens"]) if "tokens" in row else None
    return join_sequence(hidden, layout), jnp.sum(jnp.square(sum_WVD), (1, 2)), met_WSD


def _rows_at(table_WVD, tokens_WS):
    """table[w, tokens[w]]: each device takes what it holds of the vocabulary, and these are added.

    Mapped, because a gather along a sharded dimension would replicate the table.
    """
    batch, vocab, _ = partitions(jax.typeof(table_WVD).sharding.spec)
    axes, seq = entry_axes(vocab), partitions(jax.typeof(tokens_WS).sharding.spec)[1]

    def rows(table_WVD, tokens_WS):  # local shards below
        size = table_WVD.shape[1]
        index_WS = tokens_WS - (jax.lax.axis_index(axes) * size if axes else 0)
        here_WS = (index_WS >= 0) & (index_WS < size)
        take = lambda table, index: table.at[index].get(mode="clip")
        found = jnp.where(here_WS[..., None], jax.vmap(take)(table_WVD, index_WS), 0)
        return jax.lax.psum(found, axes) if axes else found

    specs = (P(batch, vocab, None), P(batch, seq))
    out = P(batch, seq, None)
    return jax.shard_map(rows, in_specs=specs, out_specs=out, check_vma=False)(table_WVD, tokens_WS)
