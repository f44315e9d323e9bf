"""Where a long text may be cut without changing its tokens.

The library needs over 100 bytes of memory for each token that it returns, so a long text is encoded
in pieces. A piece must begin where a token begins in the whole text, whatever the tokenizer does to
a text before it looks words up. Two kinds of places, called stops, are such:

- between two words of the pre-tokenizer, or beside an added token: words are encoded alone;
- for BPE, between two characters that stand side by side in no token: no merge can join them.

Where words end depends on the text around (three digits at a time, spaces with the newline that
follows them), so stops are read from what the tokenizer makes of a window of the text, and count
where a window with other ends has the same. A piece is encoded with the stops around it, so that a
mark at the start of a text, or spaces stripped at its ends, touch only tokens that are dropped.
Not seen by this, and in no tokenizer that is known: words that depend on text farther off than the
windows reach; blocks of a fixed length, counted from where spaces were stripped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from tokenizers import Encoding, models
from tokenizers import Tokenizer as Engine

PIECE = 1 << 18  # characters, after which a cut is sought
REACHES = (1 << 9, 1 << 13)  # characters on either side of a place; the second where words are long
AROUND = 4  # stops on either side of a cut, within which two windows must agree


@dataclasses.dataclass(frozen=True)
class Cut:
    """A place between two pieces, and the text around it that both are encoded with."""

    left: int  # where the piece that begins here starts to be encoded
    place: int
    right: int  # where the piece that ends here stops to be encoded
    before: np.ndarray  # tokens of text[left:place], of the piece that begins here
    after: np.ndarray  # tokens of text[place:right], of the piece that ends here


@dataclasses.dataclass(frozen=True)
class Stops:
    """Stops of a window of the text, and its tokens."""

    places: np.ndarray  # increasing
    tokens: np.ndarray  # how many tokens lie before each
    ids: np.ndarray


def joined_characters(engine: Engine) -> frozenset[str] | None:
    """Pairs of characters that some token holds side by side; None where words alone may be cut.

    Only BPE is sure to build its tokens by joining neighbours, and by nothing else.
    """
    model = engine.model
    plain = isinstance(model, models.BPE) and not (
        model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout
    )
    if not plain:
        return None
    vocab = engine.get_vocab(with_added_tokens=False)
    return frozenset(token[i : i + 2] for token in vocab for i in range(len(token) - 1))


def find_cuts(engine: Engine, text: str, joined: frozenset[str] | None) -> Iterator[Cut]:
    """Cuts about every PIECE characters, or farther apart where there is no sure stop."""
    left = start = 0
    target = PIECE
    while target < len(text):
        cut = None
        for reach in REACHES:
            cut = cut or _cut(engine, text, target - reach, target, reach, start, joined)
        if cut is None and (target - start) // PIECE in (1, 4):
            # Words that depend on where others began, as of digits three at a time: read on from
            # the last cut. Not at each target, since a text may have no stop at all.
            cut = _cut(engine, text, left, target, REACHES[-1], start, joined, fixed=True)
        if cut:
            yield cut
            left, start = cut.left, cut.place
            target = max(target, start)
        target += PIECE


def _cut(
    engine: Engine,
    text: str,
    low: int,
    target: int,
    reach: int,
    start: int,
    joined: frozenset[str] | None,
    fixed: bool = False,  # low is a stop, and the windows need not agree about it
) -> Cut | None:
    """The stop nearest to target and after start that two windows with other ends agree on."""
    low, high = max(low, 0), min(target + reach, len(text))
    wide = _stops(engine, text, low, high, joined)
    if len(wide.places) <= 2 * AROUND or (fixed and start and start not in wide.places):
        return None
    inner = low if fixed or not low else low + 1, high if high == len(text) else high - 1
    narrow = _stops(engine, text, *inner, joined)
    first = low if fixed or not low else low + reach // 2
    last = high if high == len(text) else high - reach // 2
    agreed, other = (
        each.places[(each.places > first) & (each.places < last)] for each in (wide, narrow)
    )
    if not np.array_equal(agreed, other) or len(agreed) <= 2 * AROUND:
        return None
    index = int(np.argmin(np.abs(agreed - target)))
    index = min(max(index, AROUND), len(agreed) - 1 - AROUND)
    around = agreed[index - AROUND : index + AROUND + 1]
    if agreed[index] <= start:
        return None
    context = _stops(engine, text, int(around[0]), int(around[-1]), joined)
    if not np.array_equal(context.places, around[1:-1]):
        return None
    count = context.tokens[AROUND - 1]
    before, after = context.ids[:count], context.ids[count:]
    return Cut(int(around[0]), int(agreed[index]), int(around[-1]), before, after)


def _stops(engine: Engine, text: str, low: int, high: int, joined: frozenset[str] | None) -> Stops:
    """The stops of text[low:high], its ends left out; none where it cannot be encoded."""
    try:
        encoding = engine.encode(text[low:high], add_special_tokens=False)
    except Exception:  # half a word may be unknown; what the text lacks is said when it is encoded
        empty = np.zeros(0, np.int64)
        return Stops(empty, empty, empty.astype(np.uint32))
    ids = np.array(encoding.ids, np.uint32)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    starts, ends = spans[1:, 0], np.maximum.accumulate(spans[:, 1])[:-1]
    starts = np.minimum.accumulate(starts[::-1])[::-1]  # of this token and all that follow
    apart = (ends <= starts) & (starts > 0) & (starts < high - low)
    tokens = np.flatnonzero(apart & _between(encoding, joined)) + 1
    places, first = np.unique(starts[tokens - 1] + low, return_index=True)
    return Stops(places, tokens[first], ids)


def _between(encoding: Encoding, joined: frozenset[str] | None) -> np.ndarray:
    """Between which neighbouring tokens the library itself never joins."""
    words, strings = encoding.word_ids, encoding.tokens
    differ = [word != after for word, after in itertools.pairwise(words)]
    if joined is not None:
        pairs = [token[-1:] + after[:1] for token, after in itertools.pairwise(strings)]
        apart = [len(pair) == 2 and pair not in joined for pair in pairs]
        differ = [either or other for either, other in zip(differ, apart, strict=True)]
    return np.array(differ, bool)
