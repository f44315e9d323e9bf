"""Documents packed into sequences by a seeded index: any item is found by bisection.

Letters: D documents, S tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.shards import Split, read_tokens
from jaxlm.data.tokenize import load_tokenizer, token_bytes

Item = dict[str, np.ndarray]  # tokens, targets, weights, segments, positions, each of shape (S,)
FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,  # the token after each
    "weights": np.float32,  # 0: not predicted
    "segments": np.int32,  # document within the sequence, from 1; 0: padding
    "positions": np.int32,  # place within the segment
}


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A split as one stream of documents, cut into sequences."""

    split: Split
    sequence_length: int
    segments: bool
    num_items: int
    shard_D: np.ndarray  # which shard holds each document of the stream
    start_D: np.ndarray  # where it starts there
    ends_D: np.ndarray  # where it ends in the stream


def count_items(split: Split, sequence_length: int) -> int:
    """Sequences that a split is packed into; a last part that fills none is left out."""
    return max((split.tokens - 1) // sequence_length, 0)


def pack(split: Split, sequence_length: int, seed: int, segments: bool = True) -> Packed:
    """Documents in a seeded order; a last part that fills no sequence is left out."""
    num_items = count_items(split, sequence_length)
    if num_items < 1:
        raise UserError(
            f"data.path={split.path}: split {split.name} has {split.tokens} tokens, fewer than"
            f" batch.sequence_length + 1 = {sequence_length + 1}; prepare more text, or use shorter"
            " sequences"
        )
    _check_targets(split)
    # Raw bits, since NumPy promises their stream for all versions but not that of permutation().
    order_D = np.argsort(np.random.PCG64(seed).random_raw(split.documents), kind="stable")
    return _packed(split, sequence_length, segments, num_items, order_D)


def evaluation_items(split: Split, sequence_length: int, segments: bool = True) -> Packed:
    """Documents in their order, every token but the first predicted once, the last item padded."""
    _check_targets(split)
    num_items = -(-(split.tokens - 1) // sequence_length)
    order_D = np.arange(split.documents)
    return _packed(split, sequence_length, segments, num_items, order_D)


READ = 1 << 22  # tokens at a time


@functools.lru_cache(maxsize=4)
def predicted_bytes(split: Split, places: int) -> float:
    """UTF-8 bytes of the text that evaluation predicts in its first `places` targets.

    A separator holds no text. The first token of a document is not predicted, so that where it is
    text (no bos) its bytes do not count. Bytes of a part of the text are its share of split.bytes
    by the sizes of its tokens: exact where a tokenizer keeps every byte of a text.
    """
    if places >= split.tokens - 1 and split.bos is not None:
        return float(split.bytes)
    bytes_V = token_bytes(load_tokenizer(split.path))
    predicted = total = 0.0
    for shard in split.shards:
        starts_D = np.concatenate([[0], shard.ends_D[:-1]])
        empty_D = [starts_D] if split.bos is not None else []
        if split.eos is not None and not _joined(split):
            empty_D.append(shard.ends_D - 1)
        for low in range(0, int(shard.ends_D[-1]), READ):
            high = min(low + READ, int(shard.ends_D[-1]))
            tokens_T = read_tokens(shard, low, high)
            bytes_T = bytes_V.take(tokens_T, mode="clip")  # a damaged token is named by item()
            for places_D in empty_D:
                bytes_T[_within(places_D, low, high)] = 0.0
            total += bytes_T.sum()
            bytes_T[_within(starts_D, low, high)] = 0.0
            predicted += bytes_T[: max(places + 1, 0)].sum()
            places -= high - low
    return float(split.bytes * predicted / total) if total else 0.0


def _within(places_D: np.ndarray, low: int, high: int) -> np.ndarray:
    """Increasing places that are in [low, high), counted from low."""
    first, last = np.searchsorted(places_D, [low, high])
    return places_D[first:last] - low


def _joined(split: Split) -> bool:
    """Whether one separator is the end of a document and the start of the next."""
    return split.bos is not None and split.bos == split.eos


def _check_targets(split: Split) -> None:
    """Refuse a split whose documents are too short for any token to be predicted."""
    if split.tokens <= (1 if _joined(split) else split.documents):
        raise UserError(
            f"data.path={split.path}: split {split.name} has nothing to predict: {split.tokens}"
            f" tokens in {split.documents} documents; prepare it with longer documents"
        )


def _packed(
    split: Split, sequence_length: int, segments: bool, num_items: int, order_D: np.ndarray
) -> Packed:
    """Lay out the stream for an order of documents."""
    starts = [np.concatenate([[0], shard.ends_D[:-1]]) for shard in split.shards]
    lengths = [np.diff(shard.ends_D, prepend=0) for shard in split.shards]
    shards = [np.full(len(each), index, np.int32) for index, each in enumerate(starts)]
    return Packed(
        split=split,
        sequence_length=sequence_length,
        segments=segments,
        num_items=num_items,
        shard_D=np.concatenate(shards)[order_D],
        start_D=np.concatenate(starts)[order_D],
        ends_D=np.cumsum(np.concatenate(lengths)[order_D]),
    )


def item(packed: Packed, index: int) -> Item:
    """Make item i: tokens i*S to i*S + S of the stream, and what follows each."""
    length = packed.sequence_length
    begin = index * length
    end = min(begin + length + 1, int(packed.ends_D[-1]))
    first, last = np.searchsorted(packed.ends_D, [begin, end - 1], side="right")
    text = _gather(packed, begin, end, int(first), int(last))
    starts = packed.ends_D[first:last] - begin  # in the window, where another document starts
    made = padding(length)
    count = len(text) - 1
    made["tokens"][:count] = text[:-1]
    made["targets"][:count] = text[1:]
    made["weights"][:count] = 1.0
    if not _joined(packed.split):  # a first token cannot be told from what precedes it
        made["weights"][starts - 1] = 0.0
    if not packed.segments:
        starts = starts[:0]
    starts = np.concatenate([[0], starts[starts < count]])
    lengths = np.diff(starts, append=count)
    made["segments"][:count] = np.repeat(np.arange(1, len(starts) + 1), lengths)
    made["positions"][:count] = np.arange(count) - np.repeat(starts, lengths)
    return made


def padding(sequence_length: int) -> Item:
    """An item that counts for nothing."""
    return {name: np.zeros(sequence_length, dtype) for name, dtype in FIELDS.items()}


def _gather(packed: Packed, begin: int, end: int, first: int, last: int) -> np.ndarray:
    """Copy tokens [begin, end) of the stream, which are in documents first to last."""
    split, pieces = packed.split, []
    for document in range(first, last + 1):
        shard = split.shards[packed.shard_D[document]]
        start = int(packed.ends_D[document - 1]) if document else 0
        stop = int(packed.ends_D[document])
        offset = int(packed.start_D[document]) - start  # from the stream to the shard
        low, high = max(begin, start) + offset, min(end, stop) + offset
        tokens = read_tokens(shard, low, high)
        if tokens.max() >= split.vocab_size:
            bad = int(np.argmax(tokens >= split.vocab_size))
            raise UserError(
                f"{shard.file}: token {int(tokens[bad])} at offset {low + bad} is beyond the"
                f" vocabulary of {split.vocab_size}; the file is damaged, prepare the data again"
            )
        pieces.append(tokens)
    return np.concatenate(pieces)
