"""Merges of a store, made and made again: contributions in, an update out, arrays moved.

A merge counts from the moment that its record is created. Until then nothing has changed: the
payloads of its update are in the store and unnamed, the new arrays are files beside the old ones.
Of two mergers that try, one creates the record, and the other follows it. What a record says, with
the payloads that it names, decides every bit of the next state, so that a merger that starts again
comes to the same arrays.

Letters: K contributions, N elements of an array's piece, n of a chunk of it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.outer import about as facts
from jaxlm.outer import ledger as books
from jaxlm.outer import merge, parts, records
from jaxlm.outer.about import About, Array
from jaxlm.outer.ledger import Entry, Ledger
from jaxlm.outer.merge import Verdict
from jaxlm.outer.records import Body, Damaged
from jaxlm.outer.store import Store

logger = logging.getLogger("jaxlm")
CHUNK = 1 << 22  # elements of contributions that are in memory at a time
NEXT = ".next"  # ends the name of a file that replaces another once a merge counts


def judge(ledger: Ledger, fragment: int, entries: Sequence[Entry]) -> Verdict:
    """What the rule makes of each contribution, from all arrays of the fragment."""
    rule = merge.make_rule(ledger.about.outer)
    largest = max(each.weight for each in entries) or 1.0
    weights_K = jnp.asarray([each.weight / largest for each in entries], jnp.float32)
    squares_K = np.zeros(len(entries))
    for deltas_Kn in _all_chunks(ledger, fragment, entries):
        squares_K += np.asarray(merge.squares(deltas_Kn), np.float64)
    with np.errstate(over="ignore"):
        verdict = merge.judge(jnp.asarray(squares_K.astype(np.float32)), weights_K, rule)
    if rule.defend != "cosine":
        return verdict
    dots_K, square = np.zeros(len(entries)), 0.0
    for deltas_Kn in _all_chunks(ledger, fragment, entries):
        dots, median = merge.directions(deltas_Kn, verdict)
        dots_K += np.asarray(dots, np.float64)
        square += float(median)
    dots_K = jnp.asarray(dots_K.astype(np.float32))
    return merge.judge_directions(verdict, dots_K, jnp.float32(square))


def _all_chunks(ledger: Ledger, fragment: int, entries: Sequence[Entry]):
    folders = [each.folder for each in entries]
    for place, _, _, shape in facts.pieces(ledger.about, fragment):
        for _, deltas_Kn in _chunks(folders, place, shape):
            yield deltas_Kn


def _chunks(folders: Sequence[Path], place: int, shape: tuple[int, ...]):
    """(slice, contributions [K, n]) over one flat array."""
    files = [np.load(folder / f"{place}.npy", mmap_mode="r").reshape(-1) for folder in folders]
    count, step = math.prod(shape), max(1, CHUNK // len(files))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part, jnp.asarray(np.stack([file[part] for file in files]))


def make_merge(
    ledger: Ledger, fragment: int, entries: Sequence[Entry], damaged: Body,
    present: Sequence[str] = (),
) -> bool:  # fmt: skip
    """Merge these contributions as the next merge; False where another merger was first.

    `damaged`: island -> {number, reason} of what is left out. `present`: the islands that are there
    now, among which a contribution of `delayed` has its share.
    """
    _discard(ledger)
    position = ledger.position
    name = records.numbered("merges", position.number)
    body: Body = {
        "number": position.number, "previous": position.chain, "fragment": fragment,
        "islands": [], "damaged": damaged, "payloads": [], "count": 0.0, "flush": False,
    }  # fmt: skip
    with parts.on_cpu():
        if entries:
            verdict = judge(ledger, fragment, entries)
            body["islands"] = [
                _judged(ledger, entry, verdict, k) for k, entry in enumerate(entries)
            ]
        if any(not each["refused"] for each in body["islands"]):
            body |= _cadence(ledger, body["islands"], present)
            coded = _updates(ledger, body, [each.folder for each in entries])
            body["payloads"] = [
                records.put_payload(ledger.store, name, data) for data in parts.packed(name, coded)
            ]
    if not records.create_record(ledger.store, ledger.identity, name, body):
        _discard(ledger)
        return False
    _commit(ledger, body)
    return True


def _judged(ledger: Ledger, entry: Entry, verdict: Verdict, k: int) -> Body:
    """What a merge's record says of a contribution."""
    code = int(verdict.refused[k])
    copied = ("island", "number", "fragment", "tokens", "steps", "step", "items", "base",
              "payloads")  # fmt: skip
    return {key: entry.body[key] for key in copied} | {
        "share": entry.weight, "weight": float(verdict.weights[k]),
        "scale": float(verdict.scales[k]), "norm": records.finite(float(verdict.norms[k])),
        "refused": code, "reason": merge.REASONS[code],
        "staleness": ledger.position.number - entry.body["base"],
    }  # fmt: skip


def _cadence(ledger: Ledger, islands: list[Body], present: Sequence[str]) -> Body:
    """Of delayed, how a contribution counts among those of all islands; and the momentum's turn.

    N islands that are alike count 1/N each, and every N-th contribution moves the momentum.
    """
    if not books.delayed(ledger.about):
        return {"flush": True}
    [own] = islands
    latest = dict(ledger.position.shares) | {own["island"]: own["share"]}
    counted = {own["island"], *present}
    shares = [latest[each] if each in latest else own["share"] for each in sorted(counted)]
    count = sum(shares) / own["share"]
    return {"count": count, "flush": ledger.position.pushes + 1 >= len(shares)}


def follow(ledger: Ledger) -> bool:
    """Make the next merge by its record; False where there is no record yet.

    Raises Damaged, naming the object, where the record or what it names is not sound, or where it
    continues other merges than ours.
    """
    position = ledger.position
    name = records.numbered("merges", position.number)
    try:
        body = records.read_record(ledger.store, ledger.identity, name, records.MERGER)
    except KeyError:
        return False
    if body["number"] != position.number or body["previous"] != position.chain:
        raise Damaged(f"{name}: continues other merges than those before it here")
    _discard(ledger)
    if body["payloads"]:
        for place, _, update, _ in read_update(ledger.store, ledger.about, name, body):
            np.save(books.file_of(ledger, "update", place), update)
        try:
            folders = [books.take_again(ledger, each).folder for each in body["islands"]]
        except Damaged as error:
            logger.warning("warning: %s; what the rule remembers goes on without it", error)
            _subtract(ledger, body["fragment"])
        else:
            with parts.on_cpu():
                for _ in _updates(ledger, body, folders, recorded=True):
                    pass
    _commit(ledger, body)
    return True


def _subtract(ledger: Ledger, fragment: int) -> None:
    for place, _, index, _ in facts.pieces(ledger.about, fragment):
        base = books.read_array(ledger, "base", place)
        base[index] -= np.load(books.file_of(ledger, "update", place))
        _write_next(ledger, "base", place, base)


def read_update(
    store: Store, about: About, name: str, body: Body
) -> Iterator[tuple[int, Array, np.ndarray, int]]:
    """What a merge subtracts: (place in about.arrays, array, its rows of the fragment, bytes read).

    Raises Damaged where a payload is not sound; at the end, where an array is absent.
    """
    found = list(facts.pieces(about, body["fragment"]))
    pieces = {array.name: (place, array, shape) for place, array, _, shape in found}
    shapes = tuple((each, shape) for each, (_, _, shape) in pieces.items())
    seen = set()
    for sha256 in body["payloads"]:
        arrays = records.read_payload(store, name, sha256)
        for key, fields in parts.grouped(arrays).items():
            each, index = parts.checked_part(key, shapes)
            place, array, shape = pieces[each]
            if parts.box_shape(index) != shape:
                raise Damaged(f"{name}: an update of a part of {each}")
            form = books.form_of(array, books.wires(about)[1])
            size = sum(field.nbytes for field in fields.values())
            seen.add(each)
            yield place, array, parts.decode(fields, shape, form), size
    if body["payloads"] and seen != pieces.keys():
        raise Damaged(f"{name}: an update of {len(seen)} of {len(pieces)} arrays")


def _verdict(islands: list[Body]) -> Verdict:
    """A verdict as a merge's record tells it; the same bits as it had when it was made."""
    column = lambda key, dtype: jnp.asarray([each[key] for each in islands], dtype)
    scales_K = column("scale", jnp.float32)
    return Verdict(column("weight", jnp.float32), scales_K, column("refused", jnp.int32), scales_K)


def _updates(
    ledger: Ledger, body: Body, folders: Sequence[Path], recorded: bool = False
) -> Iterator[tuple[parts.Part, dict[str, np.ndarray]]]:
    """Compute the update of each array, write its new files, and give what travels.

    `recorded`: the merge was made before, and what islands received is in files. On another kind
    of processor ours may differ in the last bit; theirs is what counts.
    """
    verdict = _verdict(body["islands"])
    fragment = body["fragment"]
    for place, array, index, shape in facts.pieces(ledger.about, fragment):
        update = _new_memory(ledger, body, folders, verdict, (place, array, index, shape))
        form = books.form_of(array, books.wires(ledger.about)[1])
        error = None if form == "float32" else books.read_array(ledger, "error", place)
        before = None if error is None else error[index]
        if not recorded:
            payload, arrives, after = parts.send(update, before, form)
            yield parts.whole(array.name, shape), payload
        else:
            arrives = np.load(books.file_of(ledger, "update", place))
            after = None if before is None else update + before - arrives
        if error is not None:
            error[index] = after
            _write_next(ledger, "error", place, error)
        base = books.read_array(ledger, "base", place)
        base[index] -= arrives
        _write_next(ledger, "base", place, base)


def _new_memory(
    ledger: Ledger, body: Body, folders: Sequence[Path], verdict: Verdict,
    piece: tuple[int, Array, Any, tuple[int, ...]],
) -> np.ndarray:  # fmt: skip
    """The update of one array before the wire; what the rule remembers goes to new files."""
    place, array, index, shape = piece
    rule = books.rule_of(ledger.about, array)
    whole = {kind: books.read_array(ledger, kind, place) for kind in rule.remembers}
    part = {kind: np.array(x[index]).reshape(-1) for kind, x in whole.items()}
    update_N = np.empty(math.prod(shape), np.float32)
    for chunk, deltas_Kn in _chunks(folders, place, shape):
        state = {kind: jnp.asarray(x[chunk]) for kind, x in part.items()}
        made, state = merge.update(deltas_Kn, state, verdict, rule, body["flush"], body["count"])
        update_N[chunk] = made
        for kind, new in state.items():
            part[kind][chunk] = new
    for kind, x in whole.items():
        x[index] = part[kind].reshape(shape)
        _write_next(ledger, kind, place, x)
    return update_N.reshape(shape)


def _write_next(ledger: Ledger, kind: str, place: int, array: np.ndarray) -> None:
    with open(f"{books.file_of(ledger, kind, place)}{NEXT}", "wb") as file:
        np.save(file, array)


def _commit(ledger: Ledger, body: Body) -> None:
    """The merge counts: its files replace those before it."""
    for file in ledger.folder.glob(f"*{NEXT}"):
        os.replace(file, str(file).removesuffix(NEXT))
    for file in ledger.folder.glob("update.*"):
        file.unlink()
    ledger.position = books.advance(ledger.position, ledger.identity, body)
    books.forget_inputs(ledger, body)


def _discard(ledger: Ledger) -> None:
    """Nothing of a merge that was not made stays."""
    for file in ledger.folder.glob(f"*{NEXT}"):
        file.unlink()
