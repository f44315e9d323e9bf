"""Tokenizers, all in the tokenizer.json format of the `tokenizers` library.

A document becomes [bos] + tokens, and + [eos] where eos is another token. Where bos == eos (GPT-2's
<|endoftext|>) the first token of the next document is the end of the one before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Set in words, so that the library does not warn when a process that used threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as Engine  # noqa: E402

from jaxlm.config import UserError  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
BEGINS = ("<|begin_of_text|>", "<s>", END_OF_TEXT)  # usual names, the likeliest first
ENDS = ("<|end_of_text|>", "</s>", END_OF_TEXT)
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
    bos: int | None  # starts a document; None: absent
    eos: int | None  # ends a document; equal to bos where one token does both; None: absent


def _tokenizer(engine: Engine, data: bytes, bos: int | None, eos: int | None) -> Tokenizer:
    """Wrap an engine set up so that text is encoded whole and never as a special token."""
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True  # "<|endoftext|>" within a text is text
    vocab_size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return Tokenizer(engine, data, hashlib.sha256(data).hexdigest(), vocab_size, bos, eos)


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
    return _tokenizer(engine, engine.to_str().encode(), 0, 0)


def make_bytes() -> Tokenizer:
    """The tokenizer whose token b + 1 is byte b; token 0 is <|endoftext|>."""
    vocab = {END_OF_TEXT: 0} | {letter: byte + 1 for byte, letter in enumerate(_byte_letters())}
    engine = Engine(models.BPE(vocab=vocab, merges=[]))
    engine.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return _tokenizer(engine, engine.to_str().encode(), 0, 0)


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
    return _tokenizer(engine, engine.to_str().encode(), None, None)


def load_tokenizer(path: str | os.PathLike, *, bos: str = "auto", eos: str = "auto") -> Tokenizer:
    """Load a tokenizer.json, or a directory with one: prepared data, or a Hugging Face model.

    bos and eos are a token's text, "none", or "auto": from manifest.json, tokenizer_config.json or
    config.json beside it, or else the usual names.
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
    digest = _read_json(file.parent / "manifest.json").get("tokenizer_sha256")
    if digest is not None and digest != hashlib.sha256(data).hexdigest():
        raise UserError(f"{file}: is not the tokenizer that made the data beside it")
    found_bos, found_eos = _find_separators(file.parent, engine)
    begin = found_bos if bos == "auto" else _named(engine, bos, "--bos")
    end = found_eos if eos == "auto" else _named(engine, eos, "--eos")
    return _tokenizer(engine, data, begin, end)


def _named(engine: Engine, name: str, flag: str) -> int | None:
    """The id of the token that a flag names."""
    if name == "none":
        return None
    token = engine.token_to_id(name)
    if token is None:
        raise UserError(f"{flag}={name}: the tokenizer has no such token; or none")
    return token


def _find_separators(directory: Path, engine: Engine) -> tuple[int | None, int | None]:
    """The bos and eos ids that files beside a tokenizer.json name, or else usual names."""
    for name, keys in (
        ("manifest.json", ("bos", "eos")),
        ("tokenizer_config.json", ("bos_token", "eos_token")),
        ("config.json", ("bos_token_id", "eos_token_id")),
    ):
        facts = _read_json(directory / name)
        values = [facts.get(key) for key in keys]
        if any(value is not None for value in values) or (keys[0] == "bos" and keys[0] in facts):
            bos, eos = (_token_id(engine, value, directory / name) for value in values)
            return bos, eos
    known = [[engine.token_to_id(name) for name in names] for names in (BEGINS, ENDS)]
    bos, eos = (next((token for token in ids if token is not None), None) for ids in known)
    return bos, eos


def _token_id(engine: Engine, value: Any, file: Path) -> int | None:
    """The id of a separator as Hugging Face files write it: text, object, id or list of ids."""
    value = value.get("content") if isinstance(value, dict) else value
    value = value[0] if isinstance(value, list) and value else value
    token = engine.token_to_id(value) if isinstance(value, str) else value
    known = isinstance(token, int) and engine.id_to_token(token) is not None
    if value is not None and not known:
        raise UserError(f"{file}: separator {value!r} is not in tokenizer.json; use --bos, --eos")
    return token


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    return facts if isinstance(facts, dict) else {}
