"""Batches of global arrays from a random-access stream, each process making the rows it holds.

Row r of step n is item n*B + r of the stream, on every mesh and number of processes; the stream is
every item of the split in a seeded order, another order each epoch. So the state of the data is a
count of items, and a resumed run needs the same seed, batch and dataset, or it is refused.

Letters: B sequences of the global batch, S tokens of a sequence, R rows that this process makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from jaxlm.config import Batch, UserError
from jaxlm.data.pack import FIELDS, Item, Packed, evaluation_items, item, pack, padding
from jaxlm.data.shards import Split
from jaxlm.privacy import sampling

STATE_FORMAT = 1
MAX_STEPS = 1 << 40
Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding]


def item_order(num_items: int, seed: int) -> grain.MapDataset[int]:
    """The endless order of items: place k -> item, reshuffled each epoch, random access."""
    return grain.MapDataset.range(num_items).seed(seed).shuffle().repeat()


def local_rows(indices: Iterable[tuple[slice, ...]], num_rows: int) -> np.ndarray:
    """The rows that any of the shards at these indices holds, increasing, each once."""
    held = np.zeros(num_rows, bool)
    for index in indices:
        held[index[0]] = True
    return np.flatnonzero(held)


def batches(
    split: Split,
    batch: Batch,
    seed: int,
    sharding: Shardings,
    start_step: int = 0,
    *,
    order: np.ndarray | None = None,
    segments: bool = True,
    prefetch: int = 4,
    places: Callable[[int], int] = lambda place: place,
) -> Iterator[dict[str, jax.Array]]:
    """Training batches from start_step on, for ever, made ahead by two threads.

    `order` is the order of tokens within every row (sharding.sequence_order); None: as they are.
    `places` says where the n-th item of this run lies in the stream, which several may share.
    """
    packed = pack(split, batch.sequence_length, seed, segments)
    items = item_order(packed.num_items, seed)

    def make(place: int) -> Item:
        index = items[places(place)]
        assert index is not None  # None only after a filter, and there is none
        return item(packed, int(index))

    return _iterate(make, batch, sharding, order, start_step, MAX_STEPS, prefetch)


def private_batches(
    split: Split,
    batch: Batch,
    seed: int,
    sharding: Shardings,
    start_step: int = 0,
    *,
    secret: bytes,
    rate: float,
    order: np.ndarray | None = None,
    segments: bool = True,
    prefetch: int = 4,
) -> Iterator[dict[str, jax.Array]]:
    """As `batches`, with the rows of Poisson samples, and the key of each step's noise.

    Each row of the split is in a step's batch with chance `rate`, independently of all others; the
    places that are left hold padding. The documents are in the order of the seed.
    """
    packed = pack(split, batch.sequence_length, seed, segments)

    @functools.lru_cache(maxsize=8)
    def drawn(step: int) -> np.ndarray:
        return sampling.draw_rows(secret, step, packed.num_items, rate, batch.sequences)

    def make(place: int) -> Item:
        step, row = divmod(place, batch.sequences)
        rows = drawn(step)
        whole = row < len(rows)
        return item(packed, int(rows[row])) if whole else padding(batch.sequence_length)

    found = _iterate(make, batch, sharding, order, start_step, MAX_STEPS, prefetch)
    return _with_noise(found, _shardings(sharding)["tokens"], secret, start_step)


def _with_noise(
    found: Iterator[dict[str, jax.Array]], sharding: Any, secret: bytes, start: int
) -> Iterator[dict[str, jax.Array]]:
    """Batches with the key of their step's noise, on every device."""
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    for step, made in enumerate(found, start):
        words = sampling.noise_key(secret, step)
        noise = jax.make_array_from_callback(words.shape, everywhere, words.__getitem__)
        yield made | {"noise": noise}


def evaluation_batches(
    split: Split,
    batch: Batch,
    sharding: Shardings,
    limit: int = 0,  # batches; 0: the whole split
    *,
    order: np.ndarray | None = None,
    segments: bool = True,
    prefetch: int = 4,
) -> Iterator[dict[str, jax.Array]]:
    """Batches that predict each token of a split once; rows that fill the last have weight 0."""
    packed = evaluation_items(split, batch.sequence_length, segments)
    stop = -(-packed.num_items // batch.sequences)
    make = functools.partial(_item_or_padding, packed)
    return _iterate(make, batch, sharding, order, 0, min(stop, limit or stop), prefetch)


def _item_or_padding(packed: Packed, place: int) -> Item:
    whole = place < packed.num_items
    return item(packed, place) if whole else padding(packed.sequence_length)


def _iterate(
    make: Callable[[int], Item],
    batch: Batch,
    sharding: Shardings,
    order: np.ndarray | None,
    start: int,
    stop: int,
    prefetch: int,
) -> Iterator[dict[str, jax.Array]]:
    """Make steps [start, stop) in Grain's threads and place them on this process's devices."""
    shape = (batch.sequences, batch.sequence_length)
    shardings = _shardings(sharding)
    maps = [each.addressable_devices_indices_map(shape) for each in shardings.values()]
    rows_R = local_rows([index for each in maps for index in each.values() if index], shape[0])
    make_rows = functools.partial(_make_rows, make, rows_R, batch.sequences, order)
    options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
    steps = grain.MapDataset.range(start, stop).map(make_rows).to_iter_dataset(options)
    iterator = iter(steps)
    iterator.start_prefetch()
    return _place(iterator, rows_R, shape, shardings)


def _shardings(sharding: Shardings) -> dict[str, Any]:
    return dict(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(FIELDS, sharding)


def _make_rows(
    make: Callable[[int], Item],
    rows_R: np.ndarray,
    num_rows: int,
    order: np.ndarray | None,
    step: int,
) -> dict[str, np.ndarray]:
    """Stack the rows of a step that this process holds, their tokens in this order."""
    items = [make(int(step) * num_rows + int(row)) for row in rows_R]
    tokens = slice(None) if order is None else order
    return {name: np.stack([each[name] for each in items])[:, tokens] for name in FIELDS}


def _place(
    iterator: Any, rows_R: np.ndarray, shape: tuple[int, int], shardings: dict[str, Any]
) -> Iterator[dict[str, jax.Array]]:
    """Turn local rows into global arrays."""
    try:
        for made in iterator:
            yield {
                name: jax.make_array_from_callback(
                    shape, each, functools.partial(_shard, made[name], rows_R, shape[0])
                )
                for name, each in shardings.items()
            }
    finally:
        iterator.close()


def _shard(
    local_RS: np.ndarray, rows_R: np.ndarray, num_rows: int, index: tuple[slice, ...] | None
) -> np.ndarray:
    """The part of the local rows that a device at an index of the global batch holds."""
    assert index is not None  # asked of this process's devices only
    start, stop, _ = index[0].indices(num_rows)
    return local_RS[np.searchsorted(rows_R, start) : np.searchsorted(rows_R, stop), index[1]]


def data_state(step: int, split: Split, batch: Batch, seed: int) -> dict[str, Any]:
    """What a checkpoint keeps of the data, as JSON: which stream it is, and how far it was read."""
    return {
        "format": STATE_FORMAT,
        "next_item": step * batch.sequences,
        "seed": seed,
        "sequences": batch.sequences,
        "sequence_length": batch.sequence_length,
        "tokenizer_sha256": split.tokenizer_sha256,
        "fingerprint": split.fingerprint,
    }


def check_data_state(
    state: Mapping[str, Any], step: int, split: Split, batch: Batch, seed: int
) -> None:
    """Refuse to continue a stream that the config no longer describes, naming what differs."""
    if state.get("format") != STATE_FORMAT:
        raise UserError(f"data state of format {state.get('format')!r}; {STATE_FORMAT} is known")
    now = data_state(step, split, batch, seed)
    names = {"seed": "seed", "sequences": "batch.sequences"}
    names |= {"sequence_length": "batch.sequence_length"}
    differ = [
        f"{name}={now[key]} (checkpoint: {state.get(key)})"
        for key, name in names.items()
        if state.get(key) != now[key]
    ]
    if state.get("tokenizer_sha256") != now["tokenizer_sha256"]:
        differ.append(f"data.path={split.path} (another tokenizer than the checkpoint's)")
    elif state.get("fingerprint") != now["fingerprint"]:
        differ.append(f"data.path={split.path} (other tokens than the checkpoint's)")
    if not differ and state.get("next_item") != now["next_item"]:
        differ.append(
            f"step {step}, item {now['next_item']} (checkpoint: {state.get('next_item')})"
        )
    if differ:
        raise UserError(
            f"the sample stream cannot be continued: {'; '.join(differ)}; use the checkpoint's"
            " values, or start another run"
        )
