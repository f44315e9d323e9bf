"""Write a corpus as a directory of token shards, whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import UserError
from jaxlm.data import sources
from jaxlm.data.files import BadRecord, Tally, add, find_files, in_words, shared
from jaxlm.data.sources import Document
from jaxlm.data.staging import staged, write_array, write_file
from jaxlm.data.tokenize import (
    Tokenizer,
    encode_batch,
    load_tokenizer,
    make_bytes,
    make_characters,
    separate,
    train_bpe,
)

FORMAT = 1  # of manifest.json
SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 27  # 256 MiB of uint16; also what is held in memory
BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer's threads at once
REPORT_EVERY = 10.0  # seconds between lines of progress
CORPORA = ("python-stdlib",)
ON_BAD = ("fail", "skip")

Report = Callable[[str], object]
Source = Callable[[], Iterator[tuple[str, Document]]]  # (split, document); read once or twice
say: Report = functools.partial(print, flush=True)


def prepare(
    out: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    tokenizer: str = "bpe",  # bpe | bytes | characters | a tokenizer.json or its directory
    *,
    vocab_size: int = 8192,  # bpe only, tokens
    validation_fraction: float = 0.01,  # of the documents
    validation_inputs: Sequence[str | os.PathLike] = (),  # held out instead of a fraction
    split_within: bool = False,  # the fraction is cut from the end of each document
    text_field: str = "text",
    on_bad: str = "fail",  # fail | skip: what to do with a record that cannot be a document
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,  # which documents are held out
    bos: str = "auto",
    eos: str = "auto",
    overwrite: bool = False,
    report: Report = say,
) -> dict[str, Any]:
    """Tokenize files into the directory `out` and return its manifest."""
    _check_options(validation_fraction, shard_tokens, validation_inputs, split_within)
    if on_bad not in ON_BAD:
        raise UserError(f"--on-bad={on_bad}: choose {' or '.join(ON_BAD)}")
    unread: Tally = {}
    files = find_files(inputs, unread, out)
    held_out = find_files(validation_inputs, unread, out) if validation_inputs else []
    if both := shared(held_out, files):
        raise UserError(f"--validation={both.path} is among the training inputs too")
    report(f"{len(files) + len(held_out):,} files to read")
    if unread:
        report(f"not read: {in_words(unread)}")
    skipped: Tally = {}

    def skip(error: BadRecord) -> None:
        add(skipped, error.kind, error.example, error.count)

    def source() -> Iterator[tuple[str, Document]]:
        skipped.clear()  # a source is read more than once
        read = functools.partial(
            sources.read_documents, text_field=text_field,
            on_bad=skip if on_bad == "skip" else sources.fail,
        )  # fmt: skip
        yield from _assign(
            read(files), 0.0 if held_out else validation_fraction, seed, split_within
        )
        yield from (("validation", each) for each in read(held_out))

    make = functools.partial(make_tokenizer, tokenizer, source, vocab_size, bos, eos)
    asked = bool(held_out) or (split_within and validation_fraction > 0)
    needed = ("train", "validation") if asked else ("train",)
    manifest = _write(Path(out), source, make, shard_tokens, overwrite, report, skipped, needed)
    if unread or skipped:
        report(f"left out: {in_words(unread | skipped)}")
    return manifest


def corpus_path(name: str) -> Path:
    """Where `jaxlm train` makes a built-in corpus, below the working directory."""
    return Path("data", name)


def prepare_corpus(
    name: str, out: str | os.PathLike, *, overwrite: bool = False, report: Report = say
) -> dict[str, Any]:
    """Write a built-in corpus, 8192 BPE tokens, about 2 % of its files held out."""
    if name not in CORPORA:
        raise UserError(f"data.corpus={name}: no such corpus; there is {' '.join(CORPORA)}")

    def source() -> Iterator[tuple[str, Document]]:
        yield from _assign(sources.python_stdlib(), 0.02, 0, False)

    make = functools.partial(make_tokenizer, "bpe", source, 8192)
    manifest = Path(out, "manifest.json")
    existed = manifest.is_file()
    report(f"preparing {name} in {out}")
    try:
        return _write(Path(out), source, make, SHARD_TOKENS, overwrite, report, {}, ("train",))
    except UserError:
        if existed or not manifest.is_file():
            raise
        return json.loads(manifest.read_bytes())  # another process was faster


def _check_options(
    fraction: float, shard_tokens: int, validation_inputs: Sequence, split_within: bool
) -> None:
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"--validation-fraction={fraction} is not in [0, 1)")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens={shard_tokens} is below 1; e.g. {SHARD_TOKENS}")
    if validation_inputs and split_within:
        raise UserError("--validation and --split-within exclude each other; use one")


def _assign(
    documents: Iterable[Document], fraction: float, seed: int, split_within: bool
) -> Iterator[tuple[str, Document]]:
    """Give each document its split, by a seeded hash of its id, or cut each in two."""
    for document in documents:
        if split_within and document.text:
            cut = int(len(document.text) * (1 - fraction))
            for split, text in (
                ("train", document.text[:cut]),
                ("validation", document.text[cut:]),
            ):
                if text:
                    yield split, Document(document.id, text)
            continue
        digest = hashlib.sha256(f"{seed}:{document.id}".encode(errors="surrogatepass")).digest()
        held_out = int.from_bytes(digest[:8]) < fraction * 2.0**64
        yield "validation" if held_out else "train", document


def make_tokenizer(
    name: str, source: Source, vocab_size: int, bos: str = "auto", eos: str = "auto"
) -> Tokenizer:
    """The tokenizer that a name or path stands for; bpe learns from the training split only."""
    if name in ("bpe", "bytes", "characters"):
        for flag, text in (("bos", bos), ("eos", eos)):
            if text != "auto":
                raise UserError(
                    f"--{flag}={text} is for a tokenizer that is loaded; --tokenizer={name} has"
                    f" separators of its own; leave --{flag} out"
                )
    if name == "bpe":
        texts = (document.text for split, document in source() if split == "train")
        return train_bpe(texts, vocab_size)
    if name == "bytes":
        return make_bytes()
    if name == "characters":
        return make_characters(document.text for _, document in source())
    return load_tokenizer(name, bos=bos, eos=eos)


def _write(
    out: Path,
    source: Source,
    make: Callable[[], Tokenizer],
    shard_tokens: int,
    overwrite: bool,
    report: Report,
    skipped: Tally,  # filled as source is read
    needed: Sequence[str],  # splits that must not be empty
) -> dict[str, Any]:
    """Build a dataset beside `out` and move it there when it is whole."""
    with staged(out, overwrite) as directory:
        try:
            tokenizer = make()
        except UserError as error:
            words = f"; left out: {in_words(skipped)}" if skipped else ""
            raise UserError(f"{error}{words}") from None
        report(f"tokenizer: {tokenizer.vocab_size} tokens")
        write_file(directory / "tokenizer.json", tokenizer.data)
        splits = _write_splits(directory, source, tokenizer, shard_tokens, report, skipped)
        manifest = {
            "format": FORMAT,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
            "dtype": _dtype(tokenizer).name,
            "splits": splits,
            "left_out": skipped,
        }
        _report_splits(splits, report)
        _refuse_empty(splits, needed, skipped)
        write_file(directory / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def _report_splits(splits: dict[str, Any], report: Report) -> None:
    """Say what was written."""
    for split, facts in splits.items():
        ratio = facts["bytes"] / max(facts["tokens"], 1)
        report(
            f"{split}: {facts['tokens']:,} tokens, {facts['documents']:,} documents,"
            f" {facts['bytes']:,} bytes, {ratio:.2f} bytes per token"
        )
    if not splits["validation"]["tokens"]:
        report(
            "the validation split is empty; to have one raise --validation-fraction, name files"
            " with --validation, or cut documents with --split-within"
        )


def _refuse_empty(splits: dict[str, Any], needed: Sequence[str], skipped: Tally) -> None:
    """Refuse a dataset with an empty split that was asked for."""
    words = f" (left out: {in_words(skipped)})" if skipped else ""
    if not splits["train"]["tokens"]:
        raise UserError(
            f"the training split would be empty{words}: the inputs have no text, or their only"
            " document was held out; use --split-within, or a smaller --validation-fraction"
        )
    if "validation" in needed and not splits["validation"]["tokens"]:
        raise UserError(
            f"the validation split would be empty{words}: name files with text with --validation,"
            " raise the --validation-fraction of --split-within, or leave that flag out"
        )


def _write_splits(
    directory: Path,
    source: Source,
    tokenizer: Tokenizer,
    shard_tokens: int,
    report: Report,
    skipped: Tally,
) -> dict[str, Any]:
    """Encode every document and write the shards of all splits in one pass."""
    pending: dict[str, list[tuple[np.ndarray, int]]] = {split: [] for split in SPLITS}
    filled: dict[str, int] = dict.fromkeys(SPLITS, 0)
    shards: dict[str, list[dict]] = {split: [] for split in SPLITS}

    def flush(split: str) -> None:
        if pending[split]:
            name = f"{split}-{len(shards[split]):05d}"
            shards[split].append(_write_shard(directory, name, pending[split], _dtype(tokenizer)))
            pending[split].clear()
            filled[split] = 0

    for split, tokens, size in _progress(_encoded(source(), tokenizer, skipped), report):
        if filled[split] + len(tokens) > shard_tokens:
            flush(split)  # a document never spans shards
        pending[split].append((tokens, size))
        filled[split] += len(tokens)
    for split in SPLITS:
        flush(split)
    totals = ("tokens", "documents", "bytes")
    return {
        split: {"shards": shards[split]}
        | {total: sum(shard[total] for shard in shards[split]) for total in totals}
        for split in SPLITS
    }


def _encoded(
    documents: Iterator[tuple[str, Document]], tokenizer: Tokenizer, skipped: Tally
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Encode documents in batches: (split, tokens, bytes of text).

    One without tokens is skipped: it holds nothing to learn, and where there are no separators it
    would have no place in a shard.
    """
    dtype = _dtype(tokenizer)
    for batch in _batched(documents):
        try:
            encoded = encode_batch(tokenizer, [document.text for _, document in batch])
        except UserError as error:
            raise UserError(f"{batch[0][1].id} to {batch[-1][1].id}: {error}") from None
        for (split, document), ids in zip(batch, encoded, strict=True):
            if not len(ids):
                add(skipped, "documents without tokens", document.id)
                continue
            yield split, separate(tokenizer, ids.astype(dtype)), _utf8_bytes(document.text)


def _utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8, counted in parts, since a text may be very long."""
    return sum(
        len(text[start : start + BATCH_CHARACTERS].encode())
        for start in range(0, len(text), BATCH_CHARACTERS)
    )


def _batched(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Group documents to about BATCH_CHARACTERS."""
    batch, size = [], 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text) + 1  # empty ones count too, so that a batch ends
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress(
    encoded: Iterable[tuple[str, np.ndarray, int]], report: Report
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Pass documents on, with a line of totals every few seconds."""
    start = last = time.monotonic()
    documents = tokens = size = 0
    for split, ids, length in encoded:
        documents, tokens, size = documents + 1, tokens + len(ids), size + length
        if (now := time.monotonic()) - last > REPORT_EVERY:
            rate = size / 1e6 / (now - start)
            report(f"{documents:,} documents, {tokens:,} tokens, {rate:.1f} MB/s")
            last = now
        yield split, ids, length


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size < 65536 else np.uint32)


def _write_shard(
    directory: Path, name: str, documents: list[tuple[np.ndarray, int]], dtype: np.dtype
) -> dict[str, Any]:
    """Write the tokens of documents and where each ends; return what the manifest says of it."""
    tokens = np.concatenate([ids for ids, _ in documents]).astype(dtype, copy=False)
    ends = np.cumsum([len(ids) for ids, _ in documents], dtype=np.int64)
    return {
        "file": f"{name}.npy",
        "tokens": len(tokens),
        "documents": len(ends),
        "bytes": sum(size for _, size in documents),
        "sha256": write_array(directory / f"{name}.npy", tokens),
        "documents_sha256": write_array(directory / f"{name}.documents.npy", ends),
    }
