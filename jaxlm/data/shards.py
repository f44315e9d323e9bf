"""Read what prepare.py wrote: a split as open shards, checked against its manifest.

Letters: D documents.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.prepare import FORMAT, SPLITS

TOTALS = ("tokens", "documents", "bytes")


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """One open file of tokens, and where its documents end."""

    file: Path
    handle: BinaryIO
    start: int  # bytes before the first token
    dtype: np.dtype  # uint16 or uint32
    ends_D: np.ndarray  # int64, increasing; the last is the number of tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A part of a dataset, with the facts of its manifest."""

    path: str  # data.path
    name: str  # train | validation
    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    bytes: int  # UTF-8 bytes of the text, separators not counted
    vocab_size: int
    bos: int | None
    eos: int | None
    tokenizer_sha256: str
    fingerprint: str  # of all that decides the sample stream


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The checked manifest of a dataset."""
    file = Path(path, "manifest.json")
    if not os.path.exists(path):
        raise UserError(
            f"data.path={path} does not exist; make it with"
            f" `jaxlm data prepare --out {shlex.quote(os.fspath(path))} FILES`"
        )
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"data.path={path}: {file.name} cannot be read: {error.strerror}; name a directory that"
            " `jaxlm data prepare` wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.path={path}: {file.name} is not JSON: {error}") from None
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != FORMAT:
        raise UserError(f"data.path={path}: {file.name} has format {form!r}; {FORMAT} is known")
    problem = _problem(manifest)
    if problem:
        raise UserError(f"data.path={path}: {file.name} is damaged: {problem}; prepare it again")
    return manifest


def _problem(manifest: dict[str, Any]) -> str:
    """What is wrong with a manifest's fields; empty when nothing is."""
    try:
        if manifest["dtype"] not in ("uint16", "uint32"):
            return f"dtype {manifest['dtype']!r}"
        facts = [manifest["vocab_size"]]
        for split in SPLITS:
            part = manifest["splits"][split]
            facts += [part[total] for total in TOTALS]
            for shard in part["shards"]:
                facts += [shard[total] for total in TOTALS]
                digests = shard["sha256"], shard["documents_sha256"], manifest["tokenizer_sha256"]
                name = shard["file"]
                if not all(isinstance(each, str) for each in (name, *digests)):
                    return "a file name or checksum that is not text"
                if os.path.basename(name) != name or not name.endswith(".npy"):
                    return f"file {name!r} is not a name in this directory"
            if any(part[total] != sum(each[total] for each in part["shards"]) for total in TOTALS):
                return f"the totals of split {split} are not those of its shards"
        facts += [manifest[key] for key in ("bos", "eos") if manifest[key] is not None]
        good = all(type(fact) is int and fact >= 0 for fact in facts)
        return "" if good else "a count that is not a whole number"
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} {error}"


def open_split(path: str | os.PathLike, split: str) -> Split:
    """Open the shards of a split, every file checked against the manifest."""
    manifest = read_manifest(path)
    if split not in SPLITS:
        raise UserError(f"split {split!r}: there is {' and '.join(SPLITS)}")
    part = manifest["splits"][split]
    if not part["tokens"]:
        raise UserError(f"data.path={path}: split {split} has no tokens")
    dtype = np.dtype(manifest["dtype"])
    decisive = [manifest[key] for key in ("tokenizer_sha256", "bos", "eos", "dtype")]
    decisive += [[shard["sha256"], shard["documents_sha256"]] for shard in part["shards"]]
    return Split(
        path=os.fspath(path),
        name=split,
        shards=tuple(_open_shard(Path(path), shard, dtype) for shard in part["shards"]),
        fingerprint=hashlib.sha256(json.dumps(decisive).encode()).hexdigest(),
        **{total: part[total] for total in TOTALS},
        **{key: manifest[key] for key in ("vocab_size", "bos", "eos", "tokenizer_sha256")},
    )


def _open_shard(directory: Path, facts: dict[str, Any], dtype: np.dtype) -> Shard:
    """Open one shard; where its documents end is read and verified."""
    file = directory / facts["file"]
    start = _load(file, facts["tokens"], dtype, mapped=True).offset
    ends_file = file.with_suffix(".documents.npy")
    ends_D = _load(ends_file, facts["documents"], np.dtype(np.int64), mapped=False)
    increasing = len(ends_D) and ends_D[0] > 0 and bool(np.all(np.diff(ends_D) > 0))
    if not increasing or ends_D[-1] != facts["tokens"]:
        raise UserError(f"{ends_file}: does not describe {file.name}; prepare the data again")
    if _sha256(ends_file) != facts["documents_sha256"]:
        raise UserError(f"{ends_file}: was changed since it was written; prepare the data again")
    try:
        handle = open(file, "rb", buffering=0)  # noqa: SIM115  (as long as the split is used)
    except OSError as error:
        raise _unreadable(file, error) from None
    return Shard(file, handle, start, dtype, ends_D)


def _load(file: Path, count: int, dtype: np.dtype, *, mapped: bool) -> Any:
    """Load or map a one-dimensional array whose length and type are known."""
    try:
        if not file.is_file():
            reason = "not a regular file" if file.exists() else "no such file"
            raise UserError(f"{file}: {reason}, but the manifest names it; prepare the data again")
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except UserError:
        raise
    except OSError as error:
        raise _unreadable(file, error) from None
    except Exception as error:  # a damaged header: ValueError, EOFError, SyntaxError, tokenize's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: damaged ({reason}); prepare the data again") from None
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (count,):
        found = f"{getattr(array, 'dtype', 'an archive')}{list(getattr(array, 'shape', ()))}"
        raise UserError(f"{file}: holds {found}, the manifest says {dtype}[{count}]")
    if isinstance(array, np.memmap) and array.offset + array.nbytes != os.stat(file).st_size:
        raise UserError(f"{file}: longer than its {count} tokens; prepare the data again")
    return array


def _unreadable(file: Path, error: OSError) -> UserError:
    many = error.errno == errno.EMFILE
    advice = "; raise `ulimit -n`, or prepare with a larger --shard-tokens" if many else ""
    return UserError(f"{file}: cannot be read: {error.strerror or error}{advice}")


def read_tokens(shard: Shard, low: int, high: int) -> np.ndarray:
    """Tokens [low, high) of a shard; UserError where the file has shrunk or its disk fails.

    Read and not mapped: a page that is gone from a mapped file kills the process (SIGBUS).
    """
    width = shard.dtype.itemsize
    wanted = (high - low) * width
    try:
        data = os.pread(shard.handle.fileno(), wanted, shard.start + low * width)
    except OSError as error:
        raise _unreadable(shard.file, error) from None
    if len(data) != wanted:
        raise UserError(
            f"{shard.file}: has shrunk while it was read: {len(data)} of {wanted} bytes are left"
            f" at token {low}; restore it and start again"
        )
    return np.frombuffer(data, shard.dtype)


def check_vocab(split: Split, vocab_size: int) -> None:
    """Refuse data whose vocabulary is larger than the model's."""
    if split.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the data's vocabulary of"
            f" {split.vocab_size} tokens (data.path={split.path}); use {split.vocab_size} or more"
        )


def verify(path: str | os.PathLike) -> None:
    """Read every file of a dataset and compare it with the checksums of the manifest."""
    manifest = read_manifest(path)
    files = [("tokenizer.json", manifest["tokenizer_sha256"])]
    for part in manifest["splits"].values():
        for shard in part["shards"]:
            files.append((shard["file"], shard["sha256"]))
            ends_file = Path(shard["file"]).with_suffix(".documents.npy").name
            files.append((ends_file, shard["documents_sha256"]))
    for name, digest in files:
        if _sha256(Path(path, name)) != digest:
            raise UserError(f"{Path(path, name)}: was changed since it was written")


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
