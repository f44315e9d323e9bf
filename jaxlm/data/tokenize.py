"""Tokenizers, all in the tokenizer.json format of the `tokenizers` library.

A document becomes [bos] + tokens, and + [eos] where eos is another token. Where bos == eos (GPT-2's
<|endoftext|>) the first token of the next document is the end of the one before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

# Set in words, so that the library does not warn when a process that used threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as Engine  # noqa: E402

from jaxlm.config import UserError  # noqa: E402
from jaxlm.data import separators  # noqa: E402
from jaxlm.data.separators import END_OF_TEXT, Separators  # noqa: E402

BYTES = 256
# The library needs over 100 bytes of memory for each token that it returns, so that a long text is
# cut into pieces of this many characters, and this many pieces are encoded at once.
PIECE = 1 << 18
PIECES = 8
# A newline after a visible character and before a word: pre-tokenizers of the GPT-2 and Llama 3
# kind always cut there, so that encoding piece by piece changes nothing.
CUT = re.compile(r"(?<=\S\n)(?=\w)")


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
    if max(map(len, texts), default=0) <= PIECE:
        return _encode(tokenizer, texts)
    encoded = []
    for text in texts:
        batches = _pieces(text) if _may_cut(tokenizer, text) else [[text]]
        parts = [ids for batch in batches for ids in _encode(tokenizer, batch)]
        encoded.append(np.concatenate(parts))
    return encoded


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts at once, each whole."""
    try:
        encodings = tokenizer.engine.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(_unknown(tokenizer, texts) or f"cannot be encoded: {error}") from None
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def _may_cut(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a tokenizer is indifferent to CUT: not so one that marks where a text starts."""
    cut = CUT.search(text)
    if cut is None:
        return False
    before, after = (
        text[max(cut.start() - 16, 0) : cut.start()],
        text[cut.start() : cut.start() + 16],
    )
    whole, *parts = _encode(tokenizer, [before + after, before, after])
    return np.array_equal(whole, np.concatenate(parts))


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


def separate(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Add the tokens that begin and end a document."""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    end = [] if tokenizer.eos is None or tokenizer.eos == tokenizer.bos else [tokenizer.eos]
    return np.concatenate([np.array(begin, np.uint32), ids, np.array(end, np.uint32)])


def _pieces(text: str) -> Iterator[list[str]]:
    """Cut a long text where tokens are cut anyway, into batches of pieces."""
    batch, start = [], 0
    while len(text) - start > PIECE and (cut := CUT.search(text, start + PIECE)):
        batch.append(text[start : cut.start()])
        start = cut.start()
        if len(batch) == PIECES:
            yield batch
            batch = []
    yield [*batch, text[start:]]


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
    pieces = (piece for text in texts for batch in _pieces(text) for piece in batch)
    engine.train_from_iterator(pieces, trainer)
    return _tokenizer(engine, engine.to_str().encode(), Separators(0, 0))


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
