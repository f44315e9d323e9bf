"""The merger's arrays: what the islands start from, and what the rule of merging remembers.

They are files of a scratch folder, read and written one array at a time. The folder is a cache: the
records and payloads of the store say all, and merging.py makes the same bits of them again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.outer import about as facts
from jaxlm.outer import merge, parts, records
from jaxlm.outer.about import About, Array
from jaxlm.outer.merge import Rule
from jaxlm.outer.presence import Process
from jaxlm.outer.records import Body, Damaged, Identity
from jaxlm.outer.store import Store

logger = logging.getLogger("jaxlm")
KINDS = ("base", "momentum", "buffer", "error")


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the merges are; a pure function of their records."""

    number: int = 0  # merges made: the number of the next
    chain: str = ""  # hash of the record of the last, which names that of the one before
    step: int = 0  # the largest local step of what was merged
    tokens: int = 0
    steps: int = 0  # of all islands together
    next: tuple[tuple[str, int], ...] = ()  # delayed: island -> its contribution to come
    shares: tuple[tuple[str, float], ...] = ()  # delayed: island -> weight of its latest
    pushes: int = 0  # delayed: since the momentum was applied


@dataclasses.dataclass
class Ledger:
    """The arrays at a position."""

    process: Process
    about: About
    folder: Path
    position: Position = Position()

    @property
    def store(self) -> Store:
        return self.process.store

    @property
    def identity(self) -> Identity:
        return self.process.identity


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contribution whose payloads are sound and lie decoded in a folder."""

    body: Body
    folder: Path

    @property
    def weight(self) -> float:
        """tokens^2 / steps: what an island learnt grows with its tokens and with its batch."""
        return self.body["tokens"] ** 2 / max(1, self.body["steps"])


def delayed(about: About) -> bool:
    """Whether contributions are merged one by one as they come."""
    return about.outer.rule == "delayed"


def wires(about: About) -> tuple[str, str]:
    """Formats of what islands send and of what they receive."""
    return about.outer.wire[0], about.outer.wire[-1]


def form_of(array: Array, form: str) -> str:
    """The format in which an array travels: small `fixed` ones are not worth an error."""
    return "float32" if array.kind == "fixed" else form


def rule_of(about: About, array: Array) -> Rule:
    """The rule of an array: `fixed` ones are averaged."""
    rule = merge.make_rule(about.outer)
    if array.kind != "fixed":
        return rule
    return Rule("delayed" if delayed(about) else "average", 1.0, 0.0, rule.defend)


def link(identity: Identity, number: int, body: Body) -> str:
    """The hash that stands for a merge in the record of the next."""
    unsigned = dataclasses.replace(identity, private=None)
    return records.digest(records.seal(unsigned, records.numbered("merges", number), body))


def advance(position: Position, identity: Identity, body: Body) -> Position:
    """The position after a merge."""
    used = [each for each in body["islands"] if not each["refused"]]
    following, shares = dict(position.next), dict(position.shares)
    for each in body["islands"]:
        following[each["island"]] = each["number"] + 1
        shares[each["island"]] = each["share"]
    for island, each in body["damaged"].items():
        following[island] = each["number"] + 1
    return Position(
        position.number + 1, link(identity, position.number, body),
        max([position.step, *(each["step"] for each in used)]),
        position.tokens + sum(each["tokens"] for each in used),
        position.steps + sum(each["steps"] for each in used),
        tuple(sorted(following.items())), tuple(sorted(shares.items())),
        0 if body["flush"] else position.pushes + len(used),
    )  # fmt: skip


# --- contributions -------------------------------------------------------------------------------


def contribution_name(island: str, number: int) -> str:
    """The record of an island's contribution: to merge `number`, or of delayed its `number`-th."""
    return records.numbered(f"contributions/{island}", number)


def take(ledger: Ledger, island: str, number: int) -> Entry:
    """Read, check and decode a contribution; Damaged, naming the object, where it is not sound."""
    name = contribution_name(island, number)
    body = records.read_record(ledger.store, ledger.identity, name, island)
    fragment = body.get("fragment")
    expected = (island, number, fragment if delayed(ledger.about) else fragment_of(ledger, number))
    counts = [body.get(key) for key in ("tokens", "steps", "step", "items", "base")]
    numeric = all(isinstance(count, int) and count >= 0 for count in counts)
    fits = (body.get("island"), body.get("number"), fragment) == expected and numeric
    fits = fits and isinstance(fragment, int) and 0 <= fragment < ledger.about.outer.fragments
    if not fits or not isinstance(body.get("payloads"), list):
        raise Damaged(f"{name}: not a contribution to this merge")
    return take_again(ledger, body)


def take_again(ledger: Ledger, body: Body) -> Entry:
    """Decode a contribution, as its record or that of its merge describes it."""
    folder = ledger.folder / "in" / body["island"] / str(body["number"])
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _decode(ledger, contribution_name(body["island"], body["number"]), body, folder)
        (folder / "whole").touch()
    return Entry(body, folder)


def fragment_of(ledger: Ledger, number: int) -> int:
    """The fragment of a merge of islands that meet in rounds."""
    return number % ledger.about.outer.fragments


def _decode(ledger: Ledger, name: str, body: Body, folder: Path) -> None:
    up = wires(ledger.about)[0]
    pieces = {
        a.name: (i, a, shape) for i, a, _, shape in facts.pieces(ledger.about, body["fragment"])
    }
    shapes = tuple((n, shape) for n, (_, _, shape) in pieces.items())
    missing = {n: math.prod(shape) for n, (_, _, shape) in pieces.items()}
    for sha256 in body["payloads"]:
        for key, fields in parts.grouped(_payload(ledger.store, name, sha256)).items():
            each, index = parts.checked_part(key, shapes)
            place, array, shape = pieces[each]
            box = parts.decode(fields, parts.box_shape(index), form_of(array, up))
            file = folder / f"{place}.npy"
            target = np.load(file, mmap_mode="r+") if file.exists() else zeros(file, shape)
            target[index] = box
            missing[each] -= box.size
    if any(missing.values()):
        absent = [n for n, count in missing.items() if count]
        raise Damaged(f"{name}: {len(absent)} arrays are not whole, as {absent[0]}")


def _payload(store: Store, record: str, sha256: Any) -> dict[str, np.ndarray]:
    if not isinstance(sha256, str) or len(sha256) != 64 or not sha256.isalnum():
        raise Damaged(f"{record}: names a payload that is none")
    return records.read_payload(store, record, sha256)


def zeros(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new file of float32 zeros, open for writing."""
    return np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)


# --- arrays --------------------------------------------------------------------------------------


def file_of(ledger: Ledger, kind: str, place: int) -> Path:
    """The file of an array: of KINDS, and by its place in about.json. Absent: zeros."""
    return ledger.folder / f"{kind}.{place}.npy"


def read_array(ledger: Ledger, kind: str, place: int) -> np.ndarray:
    """A whole array."""
    file = file_of(ledger, kind, place)
    if file.exists():
        return np.load(file)
    return np.zeros(ledger.about.arrays[place].shape, np.float32)


def forget_inputs(ledger: Ledger, merged: Body) -> None:
    """Remove the decoded contributions of a merge."""
    numbers = [(each["island"], each["number"]) for each in merged["islands"]]
    numbers += [(island, each["number"]) for island, each in merged["damaged"].items()]
    for island, number in numbers:
        shutil.rmtree(ledger.folder / "in" / island / str(number), ignore_errors=True)
