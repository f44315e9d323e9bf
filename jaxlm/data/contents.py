"""The contents of a text file as UTF-8: decompressed, decoded, and named where they are no text."""

from __future__ import annotations

import bz2
import codecs
import itertools
import lzma
import operator
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from jaxlm.config import UserError
from jaxlm.data.files import COMPRESSED, BadRecord, File, check_regular

# Bytes read at a time: decompressed they may be a thousand times as many, and each part of a
# concatenated file copies what is left of its piece.
READ = 1 << 14
HEAD = 512  # bytes that tell what a file is
MARKS = (  # byte order mark -> encoding; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
Decompressor = Any  # has decompress(bytes), eof and unused_data
COMPRESSIONS: tuple[tuple[bytes, str, Callable[[], Decompressor]], ...] = (
    (b"\x1f\x8b", "gzip", lambda: zlib.decompressobj(wbits=31)),
    (b"\x28\xb5\x2f\xfd", "zstd", lambda: _zstd()),
    *((bytes([0x50 + n]) + b"\x2a\x4d\x18", "zstd", lambda: _zstd()) for n in range(16)),
    (b"BZh", "bzip2", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\0", "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
)
BZIP2_BLOCK = b"1AY&SY", b"\x17rE8P\x90"  # follow "BZh" and a digit: a block, or the end
ADVICE = "unpack it, and name the files in it"
FORMATS = (  # place in the file, what stands there, what it is
    (0, b"PK\x03\x04", f"a zip archive; {ADVICE}"),
    (0, b"PK\x05\x06", f"an empty zip archive; {ADVICE}"),
    (257, b"ustar", f"a tar archive; {ADVICE}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {ADVICE}"),
    (0, b"Rar!\x1a\x07", f"a rar archive; {ADVICE}"),
    (0, b"\x1f\x9d", f"compress (.Z) data; {ADVICE}"),
    (0, b"\x04\x22\x4d\x18", f"lz4 data; {ADVICE}"),
    (0, b"\xff\x06\x00\x00sNaPpY", f"snappy data; {ADVICE}"),
    (0, b"PAR1\x15", "a Parquet file; name it .parquet"),
    (0, b"ARROW1\0\0", "an Arrow file; convert it to Parquet"),
    (0, b"Obj\x01", "an Avro file; convert it to Parquet"),
    (0, b"SQLite format 3\0", "a SQLite database; export its texts"),
    (0, b"%PDF-", "a PDF; extract its text"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document; extract its text"),
    (0, b"\x93NUMPY", "a NumPy array, not text"),
    (0, b"\x89PNG\r\n", "a PNG image, not text"),
    (0, b"\xff\xd8\xff", "a JPEG image, not text"),
    (0, b"\x7fELF", "a program, not text"),
)


def _zstd() -> Decompressor:
    """A decompressor with the largest window that zstd has (2 GiB, as of `zstd --long=31`)."""
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def read_utf8(file: File) -> Iterator[bytes]:
    """The bytes of a text file, decompressed, in UTF-8 and without byte order marks, in pieces.

    Each part of a concatenated file (gzip member, zstd frame) may have a mark of its own. That the
    bytes of a file without a mark are UTF-8 is for the caller to check. Raises BadRecord where the
    contents are damaged or no text, and UserError where the file cannot be opened or read.
    """
    decoder = None
    parts = itertools.groupby(_parts(file), key=operator.itemgetter(0))
    for number, (_, part) in enumerate(parts):
        pieces = (piece for _, piece in part)
        head = _head(pieces)
        mark, encoding = next(
            ((mark, name) for mark, name in MARKS if head.startswith(mark)), (b"", "")
        )
        if number == 0:
            _refuse_other_formats(file, head, encoding)
        if decoder is not None and not encoding and head:
            raise BadRecord(
                file, "", "not text",
                f"part {number + 1} has no byte order mark, but the one before is UTF-16; convert"
                " it to UTF-8",
            )  # fmt: skip
        wide = encoding not in ("", "utf-8")
        decoder = codecs.getincrementaldecoder(encoding)() if wide else None
        for piece in itertools.chain([head[len(mark) :]], pieces):
            yield _decode(file, decoder, piece) if decoder else piece
        if decoder:
            yield _decode(file, decoder, b"", final=True)


def _decode(file: File, decoder: codecs.IncrementalDecoder, piece: bytes, final=False) -> bytes:
    try:
        return decoder.decode(piece, final).encode()
    except UnicodeDecodeError as error:
        reason = f"not {error.encoding.upper()}, as its byte order mark says: {error.reason}"
        raise BadRecord(file, "", "not text", reason) from None


def _head(pieces: Iterator[bytes]) -> bytes:
    """The first bytes of pieces, HEAD or more where there are as many."""
    head = b""
    while len(head) < HEAD and (piece := next(pieces, b"")):
        head += piece
    return head


def _refuse_other_formats(file: File, head: bytes, encoding: str) -> None:
    """Raise BadRecord that says what a file is that is not text."""
    for place, signature, what in FORMATS:
        if head.startswith(signature, place):
            raise BadRecord(file, "", "not text", f"is {what}")
    if found := _compression(head):
        raise BadRecord(file, "", "not text", f"is {found[0]} data that is compressed twice")
    even, odd = head[0:HEAD:2].count(0), head[1:HEAD:2].count(0)
    if not encoding and max(even, odd) > max(1, len(head[:HEAD]) // 4) and min(even, odd) == 0:
        reason = "looks like UTF-16 without a byte order mark; convert it to UTF-8 (iconv)"
        raise BadRecord(file, "", "not text", reason)


def _compression(head: bytes) -> tuple[str, Callable[[], Decompressor]] | None:
    """How data is compressed that begins like this: the name and a maker of decompressors."""
    for magic, name, make in COMPRESSIONS:
        if head.startswith(magic) and (name != "bzip2" or head.startswith(BZIP2_BLOCK, 4)):
            return name, make
    return None


def _parts(file: File) -> Iterator[tuple[int, bytes]]:
    """The decompressed pieces of a file, each with the number of its part."""
    check_regular(file.path)
    try:
        with open(file.path, "rb") as handle:
            pieces = iter(lambda: handle.read(READ), b"")
            head = _head(pieces)
            pieces = itertools.chain([head] if head else [], pieces)
            found = _compression(head)
            if found:
                yield from _decompress(file, *found, pieces)
            elif head and file.path.suffix.lower() in COMPRESSED:
                reason = f"cannot be read: not {file.path.suffix} data, but named so"
                raise BadRecord(file, "", "damaged file", reason)
            else:
                yield from ((0, piece) for piece in pieces)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror or error}") from None


def _decompress(
    file: File, name: str, make: Callable[[], Decompressor], pieces: Iterator[bytes]
) -> Iterator[tuple[int, bytes]]:
    """Decompress parts that follow each other; padding with zero bytes may stand between them.

    The libraries' own readers of files take a truncated zstd file, and others with something else
    behind them, for whole ones.
    """
    number, engine = 0, None
    for piece in pieces:
        while piece:
            piece = piece if engine else piece.lstrip(b"\0")
            if not piece:
                break
            engine = engine or make()
            try:
                data = engine.decompress(piece)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:
                reason = f"cannot be read: damaged {name} data ({error})"
                raise BadRecord(file, "", "damaged file", reason) from None
            if data:
                yield number, data
            piece = engine.unused_data if engine.eof else b""
            number, engine = (number + 1, None) if engine.eof else (number, engine)
    if engine:
        raise BadRecord(file, "", "damaged file", f"cannot be read: truncated {name} file")
