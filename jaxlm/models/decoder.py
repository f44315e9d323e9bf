"""The decoder: embedding, groups of stacked blocks run by scan, final norm.

Shapes: B batch, S sequence, D embed, V padded vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from jaxlm import config as cfg
from jaxlm.models import family_module, staged_group
from jaxlm.models.layers import normal
from jaxlm.sharding import PRODUCT, SUMMED, Layout, wide_einsum

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)


class Decoder(nnx.Module):
    """A causal transformer; `groups[i][j]` is block j of pattern i, stacked over its repeats."""

    def __init__(self, config: cfg.Model, layout: Layout, key: jax.Array):
        family = family_module(config.family)
        keys = jax.random.split(key, 4)
        table = (cfg.padded_vocab(config), config.embed_dim)
        init = lambda k: normal(k, config.init_std)
        self.config = nnx.static(config)
        self.embed = layout.param(init(keys[0]), table, "vocab embed")
        length = config.learned_positions
        shape = (length, config.embed_dim)
        self.positions = layout.param(init(keys[1]), shape, "positions embed") if length else None
        homes = {staged_group(config): layout}
        beside = layout.beside_stages() if layout.size("layers") > 1 else layout
        self.groups = nnx.List(
            nnx.List(
                _stack(block, config, home, jax.random.fold_in(keys[2], 1000 * i + j), repeats)
                for j, block in enumerate(pattern)
            )
            for i, (pattern, repeats) in enumerate(family.groups(config))
            for home in [homes.get(i, beside)]
        )
        self.final_norm = family.Norm(config, layout)
        tied = config.tie_embeddings
        self.head = None if tied else layout.param(init(keys[3]), table, "vocab embed")

    def __call__(self, tokens_BS, positions_BS, segments_BS, layout: Layout, cache=None):
        """Hidden states [B, S, D] after the final norm, the cache, and aux (a flat dict)."""
        x_BSD = self.embed_tokens(tokens_BS, positions_BS, layout)
        table = family_module(self.config.family).encode_positions(self.config, positions_BS)
        caches, aux = [], {}
        for i, group in enumerate(self.groups):
            group_cache = None if cache is None else cache[i]
            x_BSD, group_cache, group_aux = run_group(
                list(group), x_BSD, table, positions_BS, segments_BS, layout, group_cache
            )
            caches.append(group_cache)
            aux |= {f"group{i}/{name}": value for name, value in group_aux.items()}
        return self.finish(x_BSD, layout), None if cache is None else caches, aux

    @jax.named_scope("embedding")
    def embed_tokens(self, tokens_BS, positions_BS, layout: Layout) -> jax.Array:
        """The residual stream [B, S, D] that enters the first block."""
        x_BSD = layout.take(layout.gather(self.embed), tokens_BS, "batch seq _")
        if self.config.embedding_scale != 1:
            x_BSD *= jnp.asarray(self.config.embedding_scale, x_BSD.dtype)
        if self.positions is not None:
            x_BSD += layout.take(layout.gather(self.positions), positions_BS, "batch seq _")
        return layout.move(x_BSD, "batch residual_seq _")

    def finish(self, x_BSD, layout: Layout) -> jax.Array:
        """Hidden states [B, S, D] that meet the head, of what leaves the last block."""
        return layout.move(self.final_norm(x_BSD, layout), "batch seq _")

    def head_weight(self, layout: Layout) -> jax.Array:
        """The output matrix [V, D], gathered."""
        return layout.gather(self.embed if self.head is None else self.head)


def _stack(block: type, config: cfg.Model, layout: Layout, key: jax.Array, repeats: int):
    """A block's repeats, stacked; each is made where it will live."""
    keys = reshard(jax.random.split(key, repeats), layout.spec("layers"))
    inside = layout.without("stage") if layout.size("layers") > 1 else layout
    return jax.vmap(lambda key: block(config, inside, key))(keys)


def run_group(blocks: list, x_BSD, table, positions_BS, segments_BS, layout: Layout, cache):
    """Scan over the repeats of a pattern; aux is stacked per repeat, and so is the cache."""

    def body(x_BSD, repeat):
        blocks, caches = repeat
        new, aux = [], {}
        for j, block in enumerate(blocks):
            own = None if caches is None else (*caches[j], positions_BS)
            x_BSD, kept, values = block(x_BSD, table, segments_BS, layout, own)
            new.append(kept)
            aux |= {f"{j}/{name}": value for name, value in values.items()}
        return x_BSD, (None if caches is None else new, aux)

    if cache is None:
        body = rematerialize(body, layout.remat, once=len(jax.tree.leaves(blocks)[0]) == 1)
    x_BSD, (cache, aux) = jax.lax.scan(body, x_BSD, (blocks, cache))
    return x_BSD, cache, aux


def rematerialize(body, remat: cfg.Remat, once: bool):
    """Wrap a scan body so that the backward pass recomputes what the policy does not keep.

    XLA dissolves a loop that runs `once`. It would then take the recomputation out of the backward
    pass: kept in memory after all, and on CPUs at the same time as the head's backward pass, where
    devices that meet their collectives in another order wait for each other for ever.
    """
    policies = jax.checkpoint_policies
    if remat.policy == "none":
        return body
    policy = None
    if remat.policy == "dots":
        policy = _keep_dots
    elif remat.policy == "names" and remat.offload:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[n for n in remat.names if n not in remat.offload],
            names_which_can_be_offloaded=list(remat.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif remat.policy == "names":
        policy = policies.save_only_these_names(*remat.names)
    else:
        assert remat.policy == "full", remat.policy
    return jax.checkpoint(body, policy=policy, prevent_cse=once)


def _keep_dots(primitive, *operands, **params) -> bool:
    """Keep products with weights; of those whose sum is still spread over devices, the sum."""
    if primitive.name == "name":
        return params["name"] in (SUMMED, PRODUCT)
    if primitive.name == "dot_general" and not params["dimension_numbers"][0][0]:
        return False  # a bias: nothing is summed
    sharding = params.get("out_sharding")
    whole = sharding is None or not sharding.spec.unreduced
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params)
    return bool(keep) and whole


def logits(hidden: jax.Array, head_VD: jax.Array, config: cfg.Model) -> jax.Array:
    """Scores over the padded vocabulary, float32; padding is -inf."""
    return cap_logits(wide_einsum("...d,vd->...v", hidden, head_VD), config)


def cap_logits(scores: jax.Array, config: cfg.Model) -> jax.Array:
    """Scores after the soft cap and without the padding of the vocabulary."""
    if config.logit_softcap:
        scores = config.logit_softcap * jnp.tanh(scores / config.logit_softcap)
    real = jnp.arange(scores.shape[-1]) < config.vocab_size
    return jnp.where(real, scores, -jnp.inf)
