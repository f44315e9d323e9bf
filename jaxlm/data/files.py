"""Which files the inputs of a dataset name: one rule for files, directories, globs and links.

- A file that is named itself is read, whatever its suffix is.
- A directory gives the files of known suffix below it, at any depth and through links.
- A glob gives what matches it, directories with all below them. Where its last part is only * or **
  it stands for the contents of a directory; any other last part names files of any suffix.
- Hidden names are left out, and so are links that lead nowhere or to a directory above them.
- A file on the disk is read once, whatever number of names, links and hard links lead to it.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import UserError

COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
JSON = (".jsonl", ".jsonlines", ".ndjson", ".json")  # C4 and others name JSON lines .json
# What is taken from a directory besides JSON and Parquet; a file named itself may have any suffix.
TEXT = frozenset(
    ".txt .text .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .sh"
    " .sql .csv .tsv .yaml .toml .ipynb".split()
)
ALL = ("**",)  # the pattern that matches all below a directory

Pattern = tuple[str, ...]  # the parts of a glob that are still to be matched
Notes = dict[str, dict[str, str]]  # reason -> one spelling of a path -> path, of what is left out
Note = Callable[[str, str], None]  # (reason, path): keep a note
Tally = dict[str, dict[str, Any]]  # reason -> count, and the first example


@dataclasses.dataclass(frozen=True)
class File:
    """An input file and its path below the common parent of all inputs."""

    id: str
    path: Path


class BadRecord(UserError):
    """A record, or the rest of a file, that cannot be a document."""

    def __init__(self, file: File, where: str, kind: str, reason: str, count: int = 1):
        super().__init__(f"{file.path}{where}: {reason}")
        self.kind = kind
        self.count = count  # records that this stands for
        self.example = f"{file.id}{where}: {reason}"  # without the place of the inputs


def add(tally: Tally, reason: str, example: str, count: int = 1) -> None:
    """Count something that is left out; the first example of a reason is kept."""
    tally.setdefault(reason, {"count": 0, "first": example})["count"] += count


def in_words(tally: Tally) -> str:
    """A tally as words on one line; odd bytes of names, which no terminal takes, are escaped."""
    words = ", ".join(
        f"{facts['count']:,} {reason} (first: {facts['first']})" for reason, facts in tally.items()
    )
    return words.encode(errors="backslashreplace").decode()


def suffix_of(path: str | os.PathLike) -> str:
    """The suffix that tells the format, below a suffix of compression; that of a link's target
    where the link itself has none that is known."""
    own = _suffix(os.path.basename(path))
    return own if _known(own) or not os.path.islink(path) else _suffix(os.path.realpath(path))


def _suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    suffix = os.path.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix
    return suffix.lower()


def _known(suffix: str) -> bool:
    return suffix in TEXT or suffix in JSON or suffix == ".parquet"


def find_files(
    inputs: Sequence[str | os.PathLike],
    left_out: Tally | None = None,
    out: str | os.PathLike | None = None,
) -> list[File]:
    """The files that inputs name, sorted by id, none of them in the directory `out`.

    What lies in the directories, or matches the globs, and is not read is added to `left_out`.
    """
    notes: Notes = {}
    out = None if out is None else os.path.realpath(out)
    chosen: dict[Any, tuple[bool, str, str]] = {}
    for candidate in sorted(_candidates(inputs, out, notes)):  # names without a link come first
        first = chosen.setdefault(_identity(candidate[2]), candidate)
        if _place(first[2]) != _place(candidate[2]):
            _note(notes, "other names of files that are read", candidate[2])
    if not chosen:
        raise UserError("no input: name text, JSONL or Parquet files, directories or globs")
    names = {full: Path(path) for _, full, path in chosen.values()}
    if left_out is not None:
        places = {_place(path) for path in names.values()}
        for reason, paths in notes.items():  # but for what another input names
            notes[reason] = {place: paths[place] for place in paths if place not in places}
        for reason, facts in _counted(notes).items():
            add(left_out, reason, facts["first"], facts["count"])
    root = os.path.commonpath([os.path.dirname(full) for full in names])
    files = [File(Path(os.path.relpath(full, root)).as_posix(), names[full]) for full in names]
    return sorted(files, key=lambda file: file.id)


def _candidates(
    inputs: Sequence[str | os.PathLike], out: str | None, notes: Notes
) -> Iterator[tuple[bool, str, str]]:
    """What inputs name: whether a link leads there, the absolute path, the path."""
    for name in [os.path.expanduser(os.fspath(each)) for each in inputs]:
        own: Notes = {}
        found = list(_expand(name, out, functools.partial(_note, own)))
        if not found:
            raise UserError(_nothing(name, _counted(own)))
        for reason, paths in own.items():
            notes.setdefault(reason, {}).update(paths)
        yield from ((linked, os.path.abspath(path), path) for linked, path in found)


def _note(notes: Notes, reason: str, path: str) -> None:
    notes.setdefault(reason, {})[_place(path)] = path


def _place(path: str | os.PathLike) -> str:
    """The one spelling of a name in its directory; where the name is a link it is not followed."""
    directory, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(directory), name)


def _nothing(name: str, left_out: Tally) -> str:
    """The message for an input without a file to read."""
    if left_out:
        words = in_words(left_out)
        return (
            f"{name}: no text, JSONL or Parquet file here; left out: {words}; name one, or a glob"
        )
    if os.path.isdir(name):
        return f"{name}: no text, JSONL or Parquet file here; name one, or a glob"
    return f"{name}: matches no file"


def _counted(notes: Notes) -> Tally:
    """Notes as a tally; the example is the first path of the alphabet."""
    return {
        reason: {"count": len(paths), "first": paths[min(paths)]}
        for reason, paths in sorted(notes.items())
        if paths
    }


def _identity(path: str) -> Any:
    """What two names of one file have in common, hard links too; refuses an unreadable file."""
    facts = os.stat(path)
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read: Permission denied")
    if facts.st_nlink > 1:
        return facts.st_dev, facts.st_ino
    return os.path.realpath(path)


def shared(files: Sequence[File], others: Sequence[File]) -> File | None:
    """The first of files that others hold too, under the same or another name."""
    known = {_identity(str(file.path)) for file in others}
    return next((file for file in files if _identity(str(file.path)) in known), None)


def _expand(name: str, out: str | None, note: Note) -> Iterator[tuple[bool, str]]:
    """The files that one input names, each with whether a link led to it."""
    if os.path.lexists(name):
        base, pattern = name, ALL
    elif parts := _split_glob(name):
        base, pattern = parts
        if not os.path.isdir(base):
            raise UserError(f"{name}: matches no file")
    else:
        raise UserError(f"{name}: no such file or directory")
    if out is not None and os.path.isdir(out) and _inside(os.path.realpath(base), out):
        raise UserError(f"--out={out} holds the input {name}; name another directory to write")
    if os.path.isdir(base):
        yield from _walk(base, pattern, out, note)
    else:
        check_regular(name)
        yield os.path.islink(name), name


def _split_glob(name: str) -> tuple[str, Pattern] | None:
    """The directory before the first wildcard, and the parts from there on; None: no wildcard.

    A part that exists as it is written, such as a directory named "a [1]", is no wildcard.
    """
    parts = name.split("/")
    first = 0
    while first < len(parts) and (
        not glob.has_magic(parts[first]) or os.path.lexists("/".join(parts[: first + 1]))
    ):
        first += 1
    if first == len(parts):
        return None
    base = "/".join(parts[:first]) or ("/" if first else ".")
    pattern: list[str] = [part for part in parts[first:] if part not in ("", ".")]
    if ".." in pattern:
        raise UserError(f"{name}: .. cannot follow a wildcard; name the directory itself")
    if pattern in (["*"], ["**", "*"]):  # the directory, in other words
        pattern[:] = ALL
    if name.endswith("/"):  # only directories match: all that is in them
        pattern.append("*")
    return base, tuple(pattern)


def _advance(patterns: frozenset[Pattern], name: str, hidden: bool) -> frozenset[Pattern]:
    """What is left of patterns below an entry of a directory; empty where none matches it."""
    left = set()
    for pattern in patterns:
        while pattern[:1] == ALL:  # stands for any number of directories, and for none
            if not hidden:
                left.add(pattern)
            pattern = pattern[1:]
        if pattern and (not hidden or pattern[0].startswith(".")):
            if fnmatch.fnmatchcase(name, pattern[0]):
                left.add(pattern[1:])
    return frozenset(left)


def _matched(patterns: frozenset[Pattern]) -> bool:
    return any(all(part == "**" for part in pattern) for pattern in patterns)


def _walk(root: str, pattern: Pattern, out: str | None, note: Note) -> Iterator[tuple[bool, str]]:
    """Files below a directory that match a pattern, each with whether a link led to it.

    A directory is read once, and links after all else, so that cycles of links end.
    """
    named = bool(pattern[-1].strip("*?"))  # the pattern names files, not a directory's contents
    waiting = collections.deque([(root, frozenset([pattern]), False)])
    seen = set()
    while waiting:
        directory, patterns, linked = waiting.popleft()
        if (place := (os.path.realpath(directory), patterns)) in seen:
            note("links to directories that are read already", directory)
            continue
        seen.add(place)
        for name in _list(directory):
            path = os.path.join(directory, name)
            hidden = name.startswith(".")
            left = _advance(patterns, name, hidden)
            if hidden and not left and _matched(_advance(patterns, name, False)):
                note("hidden", path)
            link = os.path.islink(path)
            if os.path.isdir(path) and left:
                if reason := _no_entry(path, place[0], out):
                    note(reason, path)
                    continue
                below = frozenset([ALL]) if _matched(left) else left
                step = (path, below, linked or link)
                waiting.append(step) if link else waiting.appendleft(step)
            elif _matched(left):
                if reason := _no_document(path, named and () in left):
                    note(reason, path)
                else:
                    yield linked or link, path


def _list(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory}: cannot be listed: {error.strerror}") from None


def _inside(real: str, parent: str) -> bool:
    """Whether a path is another or lies below it; both without links."""
    return real == parent or real.startswith(parent.rstrip("/") + "/")


def _no_entry(path: str, directory: str, out: str | None) -> str:
    """Why a directory is not entered; empty where it is."""
    real = os.path.realpath(path)
    if out is not None and _inside(real, out):
        return "directories that are the output"
    if os.path.islink(path) and _inside(directory, real):
        return "links to a directory above them"
    return ""


def _no_document(path: str, named: bool) -> str:
    """Why a file that was found is not read; empty where it is."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "broken links"
    if not stat.S_ISREG(mode):
        return "not regular files (FIFOs, devices, sockets)"
    return "" if named or _known(suffix_of(path)) else "of unknown suffix"


def check_regular(path: str | os.PathLike) -> None:
    """Refuse what is not a regular file: opening a FIFO would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file (a FIFO, device or socket)")
