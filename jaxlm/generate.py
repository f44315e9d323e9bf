"""Text generation: one program reads the prompts and then decodes with a sharded KV cache.

Prompts are padded on the right. A row's tokens sit at its own positions 0, 1, ..., and a query sees
keys up to its position, so that padding is never seen: it lies behind, until it is overwritten.

Shapes: B batch, S padded prompt, N tokens to generate, V padded vocabulary, D embed, E tokens that
end a text; in the cache L layers, T slots, K kv heads, C head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from jaxlm import config as cfg
from jaxlm.data import Tokenizer, decode, encode_prompt
from jaxlm.hardware import chips
from jaxlm.interop import carried
from jaxlm.models import family_module
from jaxlm.models.decoder import Decoder, logits
from jaxlm.sharding import Layout
from jaxlm.state import Arrays, Structure

SHORTEST = 64  # prompts are padded to a power of two, at least this: few lengths, few programs
NOTHING = -1  # in place of a token: the row has ended


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its scores."""

    temperature: float  # 0: the likeliest
    top_k: int  # from the k likeliest; 0: from all
    top_p: float  # then from the smallest set with this probability


def generate_text(
    config: cfg.Config, structure: Structure, layout: Layout, mesh: Mesh, params: Arrays,
    tokenizer: Tokenizer, prompts: list[str], *, tokens: int, temperature: float = 0.0,
    top_k: int = 0, top_p: float = 1.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """What follows each prompt, up to the end of the document or this many tokens."""
    inputs = encode_prompts(tokenizer, prompts)
    longest = max(map(len, inputs), default=0)
    if longest + tokens - 1 > config.batch.sequence_length:  # longer than what it was trained on
        what = f"a prompt of {longest} tokens and tokens={tokens} to generate"
        for line in carried.beyond(config, what, longest + tokens - 1):
            carried.warn_once(line)
    ends = [end for end in (tokenizer.eos, *tokenizer.separators.stop) if end is not None]
    rows = generate_tokens(
        config, structure, layout, mesh, params, inputs, tokens=tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed, eos=ends,
    )  # fmt: skip
    return [continuation(tokenizer, *one) for one in zip(prompts, inputs, rows, strict=True)]


def continuation(tokenizer: Tokenizer, prompt: str, read: list[int], made: list[int]) -> str:
    """The text of the tokens made after those read, so that prompt + text reads as one text.

    Decoded alone they would lose what a decoder drops at the start of a text: SentencePiece's
    first space.
    """
    before, whole = decode(tokenizer, read), decode(tokenizer, read + made)
    # Where a tokenizer drops spaces at the end of the prompt, the continuation may bring them back.
    for start in (prompt, before) if prompt.startswith(before) else (before,):
        if whole.startswith(start):
            return whole[len(start) :]
    # Bytes of an unfinished character made unreadable those of the prompt before them.
    return decode(tokenizer, made)


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """The tokens of each prompt, after those that start a text."""
    for prompt in prompts:
        cfg.check_text("prompt", prompt)
    found = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, found, strict=True):
        if not tokens:
            raise cfg.UserError(
                f"prompt {prompt!r} is empty, and the tokenizer has no token that starts a "
                "document; give it text to continue"
            )
    return found


def generate_tokens(
    config: cfg.Config, structure: Structure, layout: Layout, mesh: Mesh, params: Arrays,
    prompts: list[list[int]], *, tokens: int, temperature: float = 0.0, top_k: int = 0,
    top_p: float = 1.0, seed: int = 0, eos: int | Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Up to `tokens` tokens after each prompt, without the eos (any of them) that ends a row early.

    Every process calls this with the same prompts and gets all rows. A row's sample depends on the
    seed, its place in the list and its prompt, but not on other rows nor on the mesh.
    """
    sampling = Sampling(float(temperature), top_k, float(top_p))
    check_sampling(config.model, sampling, seed)
    check_lengths(config.model, prompts, tokens)
    if not prompts:
        return []
    layout = layout.replace(seq=(), residual_seq=())  # a single token cannot be split
    if layout.size("layers") > 1:
        layout = layout.unstaged()
        params = respread(params, structure, layout)
    prompts_BS, lengths_B = pad(prompts, math.lcm(layout.size("batch"), layout.size("cache_batch")))
    place = lambda array, dims: jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, layout.spec(dims)), lambda index: array[index]
    )
    with jax.set_mesh(mesh):
        program = make_program(layout, tokens, sampling, chips.kind(mesh).compiler_options)
        out_BN = program(
            structure.merge(params), place(prompts_BS, "batch _"), place(lengths_B, "batch"),
            np.uint32(seed), np.atleast_1d(np.asarray(NOTHING if eos is None else eos, np.int32)),
        )  # fmt: skip
        rows = np.asarray(out_BN)[: len(prompts)]
    return [row[row != NOTHING].tolist() for row in rows]


def respread(params: Arrays, structure: Structure, layout: Layout) -> Arrays:
    """The weights of the layers, moved to where `layout` has them at rest."""
    stacked = {name: a for name, a in params.items() if "layers" in structure.dims[name].split()}
    specs = {name: layout.stored(structure.dims[name]) for name in stacked}
    move = jax.jit(lambda arrays: {name: reshard(a, specs[name]) for name, a in arrays.items()})
    return params | move(stacked)


def check_sampling(model: cfg.Model, sampling: Sampling, seed: int) -> None:
    """Refuse settings that cannot be sampled with."""
    s, vocab = sampling, model.vocab_size
    if not 0 <= s.temperature < math.inf:
        raise cfg.UserError(f"temperature={s.temperature:g} must be at least 0 (greedy), as in 0.8")
    if not 0 <= s.top_k <= vocab:
        raise cfg.UserError(
            f"top_k={s.top_k} must be 0 (all) to {vocab}, which is model.vocab_size"
        )
    if not 0 < s.top_p <= 1:
        raise cfg.UserError(f"top_p={s.top_p:g} must be above 0 and at most 1 (all)")
    if not 0 <= seed < 2**32:
        raise cfg.UserError(f"seed={seed} must be 0 to {2**32 - 1}")


def check_lengths(model: cfg.Model, prompts: list[list[int]], tokens: int) -> None:
    """Refuse prompts that the model cannot read, or cannot continue for so many tokens."""
    if not 1 <= tokens < 2**31:
        raise cfg.UserError(f"tokens={tokens} must be 1 to {2**31 - 1}")
    if not all(prompts):
        raise cfg.UserError(
            f"prompt {prompts.index([])} of {len(prompts)} has no tokens; give it one to continue"
        )
    largest = max((max(prompt) for prompt in prompts), default=0)
    if largest >= model.vocab_size:
        raise cfg.UserError(
            f"a prompt has token {largest}, and model.vocab_size={model.vocab_size}: "
            "the tokenizer is not the model's"
        )
    positions = model.learned_positions
    length = max(map(len, prompts), default=1)
    if positions and length + tokens - 1 > positions:  # the last token is never read
        room = positions + 1 - length
        fix = f"use tokens={room}" if room > 0 else f"give at most {positions} tokens"
        raise cfg.UserError(
            f"a prompt of {length} tokens and tokens={tokens} to generate are above "
            f"model.max_positions={positions}; {fix}"
        )


def pad(prompts: list[list[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, S] and their lengths [B]; rows that fill up the batch have length 0."""
    longest = max(map(len, prompts))
    width = max(SHORTEST, 1 << (longest - 1).bit_length())
    rows = -(-len(prompts) // multiple) * multiple
    prompts_BS, lengths_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for i, prompt in enumerate(prompts):
        prompts_BS[i, : len(prompt)], lengths_B[i] = prompt, len(prompt)
    return prompts_BS, lengths_B


@functools.lru_cache
def make_program(layout: Layout, tokens: int, sampling: Sampling, options: tuple):
    """jit(model, prompts_BS, lengths_B, seed, eos_E) -> out_BN, on every device; made once."""

    def program(model: Decoder, prompts_BS, lengths_B, seed, eos_E):
        model = cast(model, layout.compute)
        scores_BV, cache = read_prompts(model, prompts_BS, lengths_B, layout, tokens)
        done_B, rank_N = lengths_B == 0, jnp.arange(tokens)

        def put(n, scores_BV, done_B, out_BN):
            token_B = choose(scores_BV, sampling, seed, n)
            done_B |= jnp.any(token_B[:, None] == eos_E, axis=1)
            new_BN = (rank_N == n) & ~done_B[:, None]
            return token_B, done_B, jnp.where(new_BN, token_B[:, None], out_BN)

        def step(carry):
            n, token_B, done_B, out_BN, cache = carry
            scores_BV, cache = read_token(model, token_B, lengths_B + n - 1, layout, cache)
            return n + 1, *put(n, scores_BV, done_B, out_BN), cache

        going = lambda carry: (carry[0] < tokens) & ~jnp.all(carry[2])
        out_BN = jnp.full((lengths_B.size, tokens), NOTHING, jnp.int32)
        first = jnp.int32(1), *put(0, scores_BV, done_B, out_BN), cache
        _, _, _, out_BN, _ = jax.lax.while_loop(going, step, first)
        return reshard(out_BN, P(None, None))

    return jax.jit(program, compiler_options=dict(options))


def cast(model: Decoder, dtype: str) -> Decoder:
    """The weights in the compute type: `gather` would cast them anew for every token."""
    is_param = lambda node: isinstance(node, nnx.Param)
    one = lambda node: jax.tree.map(lambda a: a.astype(dtype), node) if is_param(node) else node
    return jax.tree.map(one, model, is_leaf=is_param)


def read_prompts(model: Decoder, prompts_BS, lengths_B, layout: Layout, tokens: int):
    """Scores [B, V] of the token after each prompt, and a cache with room for `tokens` more."""
    batch, length = prompts_BS.shape
    cache = make_cache(model.config, batch, length + tokens, layout)
    positions_BS = layout.move(jnp.broadcast_to(jnp.arange(length), prompts_BS.shape), "batch _")
    hidden_BSD, cache, _ = model(prompts_BS, positions_BS, None, layout, cache)
    # Not a masked sum: of that, and of a bfloat16 head, XLA makes a product that CPUs cannot run.
    last_B1D = jnp.take_along_axis(hidden_BSD, lengths_B[:, None, None] - 1, axis=1)
    return scores(model, last_B1D[:, 0], layout), cache


def read_token(model: Decoder, token_B, position_B, layout: Layout, cache):
    """Scores [B, V] of the token after this one, which stands at each row's position."""
    hidden_BSD, cache, _ = model(token_B[:, None], position_B[:, None], None, layout, cache)
    return scores(model, hidden_BSD[:, 0], layout), cache


def make_cache(config: cfg.Model, batch: int, slots: int, layout: Layout) -> list:
    """Empty arrays, those that each block of each group's pattern keeps (`block.cache`)."""
    slots += -slots % layout.size("cache_seq")

    def empty(block, repeats: int) -> tuple[jax.Array, ...]:
        return tuple(
            jnp.zeros(
                (repeats, batch, slots, *sizes), layout.compute,
                out_sharding=P(None, *layout.spec(dims)),
            )
            for dims, sizes in block.cache(config)
        )  # fmt: skip

    groups = family_module(config.family).groups(config)
    return [[empty(block, repeats) for block in pattern] for pattern, repeats in groups]


def scores(model: Decoder, hidden_BD, layout: Layout) -> jax.Array:
    """Logits [B, V] with the vocabulary in one piece, as sort and cumsum want it."""
    scores_BV = logits(hidden_BD, model.head_weight(layout), model.config)
    return layout.move(scores_BV, "batch _")


def choose(scores_BV, sampling: Sampling, seed, n) -> jax.Array:
    """Token n of each row [B]: the likeliest, or a sample by the Gumbel-max trick."""
    if sampling.temperature == 0:
        return jnp.argmax(scores_BV, -1).astype(jnp.int32)
    scores_BV = likeliest(scores_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    batch, vocab = scores_BV.shape
    key = jax.random.fold_in(jax.random.key(seed), n)
    noise = lambda row: jax.random.gumbel(jax.random.fold_in(key, row), (vocab,), jnp.float32)
    noise_BV = jax.vmap(noise)(jnp.arange(batch))
    return jnp.argmax(scores_BV + noise_BV, -1).astype(jnp.int32)


def likeliest(scores_BV, top_k: int, top_p: float) -> jax.Array:
    """Scores with -inf for all but the top_k, and then for all but the first that make up top_p.

    Among equal scores the lower token counts as the likelier one, as in argmax.
    """
    if not top_k and top_p == 1:
        return scores_BV
    sorted_BV = jnp.sort(scores_BV, axis=-1, descending=True)
    kept_BV = jnp.broadcast_to(
        jnp.arange(scores_BV.shape[-1]) < (top_k or math.inf), sorted_BV.shape
    )
    if top_p < 1:
        p_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), -1)
        kept_BV &= jnp.cumsum(p_BV, -1) - p_BV < top_p
    count_B1 = jnp.sum(kept_BV, -1, keepdims=True)
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), -1, keepdims=True)
    above_BV, equal_BV = scores_BV > least_B1, scores_BV == least_B1
    equals_B1 = count_B1 - jnp.sum(above_BV, -1, keepdims=True)
    keep_BV = above_BV | (equal_BV & (jnp.cumsum(equal_BV, -1) <= equals_B1))
    return jnp.where(keep_BV, scores_BV, -jnp.inf)
