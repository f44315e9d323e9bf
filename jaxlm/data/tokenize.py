"""Tokenizers, all in the tokenizer.json format of the `tokenizers` library.

A document becomes [bos] + tokens, and + [eos] where eos is another token. Where bos == eos (GPT-2's
<|endoftext|>) the first token of the next document is the end of the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from jaxlm.config import UserError
from jaxlm.data import separators, text_cuts
from jaxlm.data.separators import END_OF_TEXT, Separators

logger = logging.getLogger("jaxlm")

# If this is not set, the library warns when a process that has used its threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

BYTES = 256
PIECES = 8  # of a long text that are encoded together
LONG = 16  # pieces without a cut between them: worth a warning


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer.json and the tokens that separate documents."""

    engine: Engine
    data: bytes  # contents of tokenizer.json
    sha256: str  # of data
    vocab_size: int  # largest id + 1
    separators: Separators

    @property
    def bos(self) -> int | None:
        """The token that starts a document; None: absent."""
        return self.separators.bos

    @property
    def eos(self) -> int | None:
        """The token that ends a document; equal to bos where one does both; None: absent."""
        return self.separators.eos


def _tokenizer(engine: Engine, data: bytes, around: Separators) -> Tokenizer:
    """Wrap an engine set up so that text is encoded whole and never as a special token."""
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True  # "<|endoftext|>" within a text is text
    vocab_size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return Tokenizer(engine, data, hashlib.sha256(data).hexdigest(), vocab_size, around)


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts in threads, without separators, into uint32 arrays."""
    short = iter(_encode(tokenizer, [text for text in texts if len(text) <= text_cuts.PIECE]))
    return [
        next(short) if len(text) <= text_cuts.PIECE else _encode_long(tokenizer, text)
        for text in texts
    ]


def _encode_long(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode a text in pieces, to the tokens of the whole: memory is that of a few pieces.

    Where the tokenizer gives no sure place for a cut, a piece is as long as it must be.
    """
    parts, pieces = [], _pieces(tokenizer, text)
    while batch := list(itertools.islice(pieces, PIECES)):
        encoded = _encode(tokenizer, [text[begin.left : end.right] for begin, end in batch])
        for (begin, end), ids in zip(batch, encoded, strict=True):
            own = slice(len(begin.before), len(ids) - len(end.after))
            same = np.array_equal(ids[: own.start], begin.before)
            if not (same and np.array_equal(ids[own.stop :], end.after)):
                logger.warning(
                    "a text of %d characters is encoded whole, since its tokenizer looks too far"
                    " around: this takes over 100 bytes of memory for each token",
                    len(text),
                )
                return _encode(tokenizer, [text])[0]
            parts.append(ids[own])
    return np.concatenate(parts)


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[tuple[text_cuts.Cut, text_cuts.Cut]]:
    """The cuts where each piece of a long text begins and ends."""
    nothing = np.zeros(0, np.uint32)
    begin = text_cuts.Cut(0, 0, 0, nothing, nothing)
    last = text_cuts.Cut(len(text), len(text), len(text), nothing, nothing)
    cuts = text_cuts.find_cuts(tokenizer.engine, text, _joined(tokenizer))
    for end in itertools.chain(cuts, [last]):
        if end.place - begin.place > LONG * text_cuts.PIECE:
            logger.warning(
                "%d characters are encoded at once, since their tokenizer gives no sure place for"
                " a cut: this takes over 100 bytes of memory for each token",
                end.place - begin.place,
            )
        yield begin, end
        begin = end


@functools.lru_cache(maxsize=1)
def _joined(tokenizer: Tokenizer) -> frozenset[str] | None:
    return text_cuts.joined_characters(tokenizer.engine)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts at once, each whole."""
    try:
        encodings = tokenizer.engine.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(_unknown(tokenizer, texts) or f"cannot be encoded: {error}") from None
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode one text, without separators, into a uint32 array."""
    return encode_batch(tokenizer, [text])[0]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text to continue, with those that stand around a prompt."""
    own = tokenizer.separators.prompt
    if own is None:
        start = [] if tokenizer.bos is None else [tokenizer.bos]
        return start + encode(tokenizer, text).tolist()
    tokenizer.engine.encode_special_tokens = not own.special
    try:
        ids = [*own.before, *encode(tokenizer, text).tolist(), *own.after]
    finally:
        tokenizer.engine.encode_special_tokens = True
    return ids or list(own.alone)


def decode(tokenizer: Tokenizer, ids: Iterable[int] | np.ndarray) -> str:
    """The text of tokens, special tokens dropped."""
    return tokenizer.engine.decode([int(token) for token in ids], skip_special_tokens=True)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for, float64 [vocab_size].

    Exact for byte-level tokens, bytes and characters; others may drop or change letters of a text,
    and then this is the size of what they write for it.
    """
    byte_level = "ByteLevel" in repr(tokenizer.engine.decoder)
    prefix = getattr(tokenizer.engine.model, "continuing_subword_prefix", None) or ""
    added = tokenizer.engine.get_added_tokens_decoder()
    bytes_V = np.zeros(tokenizer.vocab_size)
    for token, index in tokenizer.engine.get_vocab(with_added_tokens=True).items():
        if index in added:
            bytes_V[index] = len(token.encode())
        elif byte_level:
            bytes_V[index] = len(token)  # a character for each byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            bytes_V[index] = 1
        else:
            text = token.removeprefix(prefix).replace("\u2581", " ")  # SentencePiece's space
            bytes_V[index] = len(text.encode())
    return bytes_V


def separate(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Add the tokens that begin and end a document."""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    end = [] if tokenizer.eos is None or tokenizer.eos == tokenizer.bos else [tokenizer.eos]
    return np.concatenate([np.array(begin, ids.dtype), ids, np.array(end, ids.dtype)])


def _unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """The message for a character outside a character vocabulary, or nothing."""
    if not isinstance(tokenizer.engine.model, models.WordLevel):
        return ""
    known = tokenizer.engine.get_vocab()
    for text in texts:
        for character in text:
            if character not in known:
                return (
                    f"character {character!r} is not among the {len(known)} characters of the"
                    " tokenizer; a bytes or bpe tokenizer knows every text"
                )
    return ""


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary: id 0 is <|endoftext|>, then the bytes, then merges."""
    if vocab_size < BYTES + 1:
        raise UserError(f"--vocab-size={vocab_size} is below 257, the bytes and one separator")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(_words(texts), trainer)
    return _tokenizer(engine, engine.to_str().encode(), Separators(0, 0))


def _words(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces that begin and end with whole words of the byte-level pre-tokenizer."""
    engine = make_bytes().engine  # of the same words as the tokenizer that is learnt
    for text in texts:
        start = 0
        for each in text_cuts.find_cuts(engine, text, None):
            yield text[start : each.place]
            start = each.place
        yield text[start:]


def make_bytes() -> Tokenizer:
    """The tokenizer whose token b + 1 is byte b; token 0 is <|endoftext|>."""
    vocab = {END_OF_TEXT: 0} | {letter: byte + 1 for byte, letter in enumerate(_byte_letters())}
    engine = Engine(models.BPE(vocab=vocab, merges=[]))
    engine.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return _tokenizer(engine, engine.to_str().encode(), Separators(0, 0))


def _byte_letters() -> list[str]:
    """The character that byte-level BPE (GPT-2) writes for each byte: itself where printable."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(BYTES) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(BYTES + place) for place, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(BYTES)]


def make_characters(texts: Iterable[str]) -> Tokenizer:
    """The tokenizer whose tokens are the distinct characters of texts, sorted; no separator."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise UserError("no character in the input; a character tokenizer needs text")
    vocab = {character: index for index, character in enumerate(sorted(characters))}
    engine = Engine(models.WordLevel(vocab=vocab))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    engine.decoder = decoders.Fuse()
    return _tokenizer(engine, engine.to_str().encode(), Separators(None, None))


def load_tokenizer(path: str | os.PathLike, *, bos: str = "auto", eos: str = "auto") -> Tokenizer:
    """Load a tokenizer.json, or a directory with one: prepared data, or a Hugging Face model.

    bos and eos are a token's text, "none", or "auto": from the files beside it (separators.find).
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        data = file.read_bytes()
        engine = Engine.from_buffer(data)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror}; name a tokenizer.json or its directory"
        ) from None
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: not a tokenizer.json of the tokenizers library: {reason}"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    made = separators.read_json(file.parent / "manifest.json").get("tokenizer_sha256", digest)
    if made != digest:
        raise UserError(f"{file}: is not the tokenizer that made the data beside it")
    found = Separators(None, None)
    if "auto" in (bos, eos):
        found = separators.find(file.parent, engine, digest)
    flags = [(key, text) for key, text in (("bos", bos), ("eos", eos)) if text != "auto"]
    ids = {key: separators.named(engine, text, f"--{key}") for key, text in flags}
    return _tokenizer(engine, data, dataclasses.replace(found, **ids))
