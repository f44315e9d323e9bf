"""Documents from text, JSON and Parquet files or the Python standard library, in a fixed order."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm import extras
from jaxlm.config import UserError
from jaxlm.data.contents import read_utf8
from jaxlm.data.files import JSON, BadRecord, File, check_regular, suffix_of

HEAD = 1 << 20  # bytes that tell which kind of JSON a file holds, where its first line is longer
MARK = "\ufeff"  # the byte order mark, decoded
VISIBLE = re.compile(r"[^ \t\r\n\ufeff]")  # what JSON does not skip, and byte order marks
OnBad = Callable[[BadRecord], object]
# Packages of the standard library that hold tests, or what is installed on top of it.
NOT_STDLIB = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ lib-dynload".split()
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and an id that stays the same when the files move together."""

    id: str
    text: str


def fail(error: BadRecord) -> None:
    """Stop at the first bad record."""
    raise UserError(f"{error}; to go on without such records use --on-bad=skip")


def read_documents(
    files: Sequence[File], text_field: str = "text", on_bad: OnBad = fail
) -> Iterator[Document]:
    """Stream the documents of files: a text file is one, each JSON object or Parquet row is one.

    What cannot be a document goes to on_bad, which raises, or else lets the reading go on.
    """
    for file in files:
        suffix = suffix_of(file.path)
        read = _json if suffix in JSON else _parquet if suffix == ".parquet" else _text
        try:
            yield from read(file, text_field, on_bad)
        except BadRecord as error:
            on_bad(error)


def _text(file: File, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """A text file as one document; files that were concatenated leave marks at starts of lines."""
    text = _decode(file, "", b"".join(read_utf8(file))).removeprefix(MARK)
    yield Document(file.id, text.replace("\n" + MARK, "\n"))


def _decode(file: File, where: str, data: bytes) -> str:
    """UTF-8 text; BadRecord names the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}; convert it, or leave it out"
        raise BadRecord(file, where, "invalid UTF-8", reason) from None


def _document(file: File, number: int, where: str, record: Any, text_field: str) -> Document:
    """The document that a record holds; BadRecord where it holds none."""
    if not isinstance(record, dict):
        reason = f"no field {text_field!r}: it is {type(record).__name__} and no object"
        raise BadRecord(file, where, "not an object", reason)
    try:
        value = _find(record, text_field)
    except KeyError:
        has = " ".join(sorted(record)[:8])
        reason = f"no field {text_field!r} (there is: {has}); choose with --text-field"
        raise BadRecord(file, where, "missing field", reason) from None
    if isinstance(value, bytes):
        value = _decode(file, where, value)
    if not isinstance(value, str):
        kind = "null text" if value is None else "text not a string"
        reason = (
            f"field {text_field!r} is {type(value).__name__}, not text; choose with --text-field"
        )
        raise BadRecord(file, where, kind, reason)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = (
            f"field {text_field!r} has half a surrogate pair at character {error.start}, which is"
            " not UTF-8"
        )
        raise BadRecord(file, where, "half a surrogate pair", reason) from None
    return Document(f"{file.id}:{number}", value.removeprefix(MARK))


def _find(record: dict[str, Any], name: str) -> Any:
    """The value of a field; of a.b it is field b of the object a, where no field is named a.b.

    A null object has null fields. Raises KeyError where there is no such field.
    """
    if name in record:
        return record[name]
    null = False
    for place, character in enumerate(name):
        inner = record.get(name[:place], ()) if character == "." else ()
        null = null or inner is None
        if isinstance(inner, dict):
            try:
                return _find(inner, name[place + 1 :])
            except KeyError:
                continue
    if null:
        return None
    raise KeyError(name)


def _json(file: File, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """Documents of JSON lines, of a JSON array, or of objects that take several lines."""
    chunks, head = read_utf8(file), b""
    while b"\n" not in head.lstrip() and len(head) < HEAD and (chunk := next(chunks, b"")):
        head += chunk
    chunks = itertools.chain([head] if head else [], chunks)
    if not _spread(head):
        yield from _json_lines(file, chunks, text_field, on_bad)
        return
    for number, value in enumerate(_json_values(file, chunks), 1):
        try:
            yield _document(file, number, f": item {number}", value, text_field)
        except BadRecord as error:
            on_bad(error)


def _spread(head: bytes) -> bool:
    """Whether a JSON file that begins like this is something else than JSON lines.

    It holds an array, an object of several lines, or several objects on a line.
    """
    first, _, rest = head.lstrip().partition(b"\n")
    if first.startswith(b"{"):
        return _ends_elsewhere(first.decode("utf-8", "replace").rstrip(), rest)
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()  # an array with lines behind it is one of these lines


def _ends_elsewhere(line: str, rest: bytes) -> bool:
    """Whether the object that a line begins with ends on a later line, or before another one."""
    try:
        _, end = json.JSONDecoder().raw_decode(line)
        return line[end:].lstrip().startswith("{")
    except json.JSONDecodeError as error:  # a broken row has whole rows behind it
        return error.pos >= len(line) and not rest.lstrip().startswith(b"{")
    except (ValueError, RecursionError):
        return False


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split pieces at newlines; a line of many pieces is joined once, when it is whole."""
    parts: list[bytes] = []
    for chunk in chunks:
        end, *starts = chunk.split(b"\n")
        parts.append(end)
        for start in starts:
            yield b"".join(parts)
            parts = [start]
    if rest := b"".join(parts):
        yield rest


def _json_lines(
    file: File, chunks: Iterator[bytes], text_field: str, on_bad: OnBad
) -> Iterator[Document]:
    """One document for each line that is not blank."""
    for number, line in enumerate(_lines(chunks), 1):
        line = line.removeprefix(codecs.BOM_UTF8)  # of a file that was appended
        if not line.strip():
            continue
        where = f":{number}"
        try:
            record = json.loads(_decode(file, where, line))
            yield _document(file, number, where, record, text_field)
        except BadRecord as error:
            on_bad(error)
        except (ValueError, RecursionError) as error:
            on_bad(BadRecord(file, where, "invalid JSON", f"not JSON: {error}"))


def _json_values(file: File, chunks: Iterator[bytes]) -> Iterator[Any]:
    """The items of JSON arrays, and other values, of a file, with one of them in memory.

    Behind something that is not JSON no place is known to go on: BadRecord.
    """
    decode = json.JSONDecoder().raw_decode
    text, place, number = "", 0, 0
    inside = complete = ended = False  # an array; the last of its items; the file
    texts = codecs.iterdecode(chunks, "utf-8")
    try:
        while True:
            found = VISIBLE.search(text, place)
            place = found.start() if found else len(text)
            sign = text[place : place + 1]
            if not sign and ended:
                if inside:
                    raise ValueError("the array has no end")
                return
            if sign == "[" and not inside:
                inside, complete, place = True, False, place + 1
            elif sign == "]" and inside:
                inside, place = False, place + 1
            elif sign == "," and complete:
                complete, place = False, place + 1
            elif sign and complete and inside:
                raise ValueError("no comma behind the item")
            else:
                value, end = _first_value(decode, text, place, ended)
                if end is None:
                    text, place, ended = _more(texts, text[place:])
                    continue
                number, place, complete = number + 1, end, inside
                yield value
    except UserError:  # of the file, and not of its JSON
        raise
    except UnicodeDecodeError as error:
        kind, reason = "invalid UTF-8", f"not UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        kind, reason = "invalid JSON", f"not JSON: {error}"
    where = f": item {number + 1}"
    raise BadRecord(file, where, kind, f"{reason}; the file cannot be read from there on")


def _first_value(
    decode: Callable[[str, int], tuple[Any, int]], text: str, place: int, ended: bool
) -> tuple[Any, int | None]:
    """The JSON value at a place and where it ends; None where the text must go on for it."""
    try:
        value, end = decode(text, place)
        return (value, end) if ended or end < len(text) else (None, None)
    except json.JSONDecodeError as error:
        # Of a value that is cut off, the error is at the end of the text or is an open string.
        cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")
        if ended or not cut:
            raise
        return None, None


def _more(texts: Iterator[str], text: str) -> tuple[str, int, bool]:
    """Add as much text as there is already: (text, 0, whether the file has ended).

    A value of n characters is so decoded from its start log(n) times, and not n.
    """
    pieces, wanted = [text], len(text) + 1
    for piece in texts:
        pieces.append(piece)
        wanted -= len(piece)
        if wanted <= 0:
            return "".join(pieces), 0, False
    return "".join(pieces), 0, True


def _parquet(file: File, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """One document for each row, a row group in memory at a time."""
    check_regular(file.path)
    pyarrow = extras.load("pyarrow", "parquet", f"{file.path}: Parquet")
    extras.load("pyarrow.parquet", "parquet", f"{file.path}: Parquet")
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            try:
                _find(_columns(table.schema_arrow), text_field)
            except KeyError:
                has = " ".join(table.schema_arrow.names[:8])
                reason = f"no column {text_field!r} (there is: {has}); choose with --text-field"
                rows = table.metadata.num_rows
                raise BadRecord(file, "", "missing field", reason, rows) from None
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for index in range(batch.num_rows):
                    row += 1
                    try:
                        yield _row(file, row, columns, index, text_field)
                    except BadRecord as error:
                        on_bad(error)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"cannot be read as Parquet: {str(error).splitlines()[0]}"
        raise BadRecord(file, "", "damaged file", reason) from None


def _row(file: File, row: int, columns: dict[str, Any], index: int, text_field: str) -> Document:
    """The document of one row of columns of Arrow."""
    where = f": row {row}"
    try:
        record = {name: column[index].as_py() for name, column in columns.items()}
    except UnicodeDecodeError as error:  # Parquet's strings are bytes that nobody has checked
        reason = f"not UTF-8 at byte {error.start}; convert it, or leave it out"
        raise BadRecord(file, where, "invalid UTF-8", reason) from None
    return _document(file, row, where, record, text_field)


def _columns(fields: Any) -> dict[str, Any]:
    """Names of an Arrow schema or struct; those of a struct within it as a dict of their own."""
    import pyarrow.types

    return {
        field.name: _columns(field.type) if pyarrow.types.is_struct(field.type) else True
        for field in fields
    }


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
