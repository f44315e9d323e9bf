"""Documents from text, JSONL and Parquet files or the Python standard library, in a fixed order."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import zstandard

from jaxlm import extras
from jaxlm.config import UserError

CHUNK = 1 << 20  # bytes read at a time
COMPRESSED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")  # C4 and others name JSON lines .json
# What is taken from a directory besides JSONL and Parquet; a file named itself may have any suffix.
TEXT = frozenset(
    ".txt .text .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .sh"
    " .sql .csv .tsv .yaml .toml .ipynb".split()
)
# Packages of the standard library that hold tests, or what is installed on top of it.
NOT_STDLIB = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ lib-dynload".split()
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and an id that stays the same when the files move together."""

    id: str
    text: str


@dataclasses.dataclass(frozen=True)
class File:
    """An input file and its path below the common parent of all inputs."""

    id: str
    path: Path


def find_files(
    inputs: Sequence[str | os.PathLike], report: Callable[[str], object] = print
) -> list[File]:
    """List the files that paths, directories and globs name, sorted by id."""
    skipped: list[str] = []
    paths = {}
    for name in [os.fspath(each) for each in inputs]:
        found = _expand(name, skipped)
        if not found:
            raise UserError(f"{name}: no text, JSONL or Parquet file here; name one, or a glob")
        paths |= {os.path.abspath(path): path for path in found}
    if not paths:
        raise UserError("no input: name text, JSONL or Parquet files, directories or globs")
    if skipped:
        suffixes = sorted({os.path.splitext(path)[1] or "none" for path in skipped})
        report(f"skipped {len(skipped)} files of other kinds: suffix {' '.join(suffixes[:12])}")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = [
        File(Path(os.path.relpath(full, root)).as_posix(), path) for full, path in paths.items()
    ]
    return sorted(files, key=lambda file: file.id)


def _expand(name: str, skipped: list[str]) -> list[Path]:
    """Files that one input names; those of a directory that are of no known kind go to skipped."""
    if os.path.isdir(name):
        return _walk(name, skipped)
    if os.path.lexists(name):
        return [Path(name)]
    if not glob.has_magic(name):
        raise UserError(f"{name}: no such file or directory")
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise UserError(f"{name}: matches no file")
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    return files or [path for match in matches for path in _walk(match, skipped)]


def _walk(root: str, skipped: list[str]) -> list[Path]:
    """Files of known kind below a directory, hidden ones left out, links to directories too."""
    found = []

    def fail(error: OSError):
        raise UserError(f"{error.filename}: cannot be listed: {error.strerror}")

    for directory, children, names in os.walk(root, onerror=fail):
        children[:] = sorted(child for child in children if not child.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(directory, name)
            suffix = _suffix(name)
            known = suffix in TEXT or suffix in JSON_LINES or suffix == ".parquet"
            found.append(Path(path)) if known else skipped.append(path)
    return found


def _suffix(name: str) -> str:
    """The suffix that tells the format, below a suffix of compression."""
    stem, suffix = os.path.splitext(name)
    suffix = os.path.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix
    return suffix.lower()


def read_documents(files: Sequence[File], text_field: str = "text") -> Iterator[Document]:
    """Stream the documents of files: a text file is one, each JSON line or Parquet row is one."""
    for file in files:
        suffix = _suffix(file.path.name)
        if suffix in JSON_LINES:
            yield from _json_lines(file, text_field)
        elif suffix == ".parquet":
            yield from _parquet(file, text_field)
        else:
            data = b"".join(_chunks(file.path))
            yield Document(file.id, _decode(data, str(file.path)))


def _decode(data: bytes, place: str) -> str:
    """UTF-8 text, or an error that names the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 at byte {error.start}; convert it, or leave it out"
        ) from None


def _check_text(value: object, place: str, text_field: str) -> str:
    """The text of a record, which must be a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: field {text_field!r} is {type(value).__name__}, not text;"
            " choose with --text-field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field {text_field!r} has half a surrogate pair at character {error.start},"
            " which is not UTF-8"
        ) from None
    return value


def _regular(path: Path) -> None:
    """Refuse what is not a regular file: opening a FIFO would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file (a FIFO, device or socket)")


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file, in pieces."""
    _regular(path)
    suffix = path.suffix.lower()
    try:
        with gzip.open(path) if suffix == ".gz" else open(path, "rb") as file:
            pieces = iter(lambda: file.read(CHUNK), b"")
            yield from _unzstd(pieces) if suffix == ".zst" else pieces
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _unzstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress zstd frames; zstandard's own reader takes a truncated file for a whole one."""
    frame, fresh = zstandard.ZstdDecompressor().decompressobj(), True
    for piece in pieces:
        while piece:
            yield frame.decompress(piece)
            fresh, piece = frame.eof, frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if not fresh:
        raise EOFError("truncated zstd file")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split pieces at newlines."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _json_lines(file: File, text_field: str) -> Iterator[Document]:
    """One document for each line that is not blank."""
    for number, line in enumerate(_lines(_chunks(file.path)), 1):
        if not line.strip():
            continue
        place = f"{file.path}:{number}"
        try:
            record = json.loads(_decode(line, place))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON: {error}") from None
        if not isinstance(record, dict) or text_field not in record:
            has = " ".join(sorted(record)[:8]) if isinstance(record, dict) else "no fields"
            raise UserError(
                f"{place}: no field {text_field!r} (there is: {has}); choose with --text-field"
            )
        yield Document(f"{file.id}:{number}", _check_text(record[text_field], place, text_field))


def _parquet(file: File, text_field: str) -> Iterator[Document]:
    """One document for each row, a row group in memory at a time."""
    _regular(file.path)
    pyarrow = extras.load("pyarrow", "parquet", f"{file.path}: Parquet")
    extras.load("pyarrow.parquet", "parquet", f"{file.path}: Parquet")
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"{file.path}: no column {text_field!r} (there is: {' '.join(names[:8])});"
                    " choose with --text-field"
                )
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    text = _check_text(value, f"{file.path}: row {row}", text_field)
                    yield Document(f"{file.id}:{row}", text)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.path}: cannot be read as Parquet: {reason}") from None


def python_stdlib() -> Iterator[Document]:
    """Stream the sources of this Python's standard library, tests left out, about 12 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for directory, children, names in os.walk(root):
        children[:] = [child for child in children if child not in NOT_STDLIB]
        paths += [Path(directory, name) for name in names if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        # Written by whoever built or packaged this Python: paths and flags of a machine.
        if path.name.startswith("_sysconfigdata") or path.name == "sitecustomize.py":
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few files are in another encoding, on purpose
        yield Document(path.relative_to(root).as_posix(), text)
