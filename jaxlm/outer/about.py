"""about.json: what all islands of a store agree on, written once by the first of them.

It says which arrays are merged, by which rule, and from which stream of data the islands take
turns. An island whose config says otherwise is refused. Fragments are defined here too.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

from jaxlm.config import UserError
from jaxlm.keys_outer import Outer
from jaxlm.outer import records
from jaxlm.outer.records import Body, Damaged, Identity
from jaxlm.outer.store import Store
from jaxlm.yaml_values import yaml_text

FILE = "about.json"
FORMAT = 1
OWN = ("store", "island", "keys")  # of `outer:`, in which islands may differ
BLOCKS = 256  # records of claimed data in an epoch, at most


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that is merged."""

    name: str
    shape: tuple[int, ...]
    kind: str  # params: by outer.rule; fixed (as a router's bias): averaged, in float32


@dataclasses.dataclass(frozen=True)
class About:
    """The facts of a store."""

    store: str  # hash of the record: the store's identity
    arrays: tuple[Array, ...]
    outer: Outer
    data: dict[str, Any]  # tokenizer_sha256, fingerprint, seed, sequence_length, segments, items
    block: int  # items that are claimed at once


def pieces(about: About, fragment: int) -> Iterator[tuple[int, Array, Any, tuple[int, ...]]]:
    """(place in about.arrays, array, its index, shape of the piece) of the arrays of a fragment.

    Every n-th row of dimension 0, as in fragments.py; it counts layers where a weight is stacked.
    """
    count = about.outer.fragments
    for place, array in enumerate(about.arrays):
        if not array.shape:
            if fragment == 0:
                yield place, array, (), ()
        elif fragment < array.shape[0]:
            rows = len(range(fragment, array.shape[0], count))
            yield place, array, slice(fragment, None, count), (rows, *array.shape[1:])


def describe(
    arrays: dict[str, tuple[tuple[int, ...], str]], outer: Outer, data: dict[str, Any],
    sequences: int,
) -> Body:  # fmt: skip
    """The body of about.json; `arrays`: name -> (shape, kind); `sequences`: items of a step."""
    settings = dataclasses.asdict(outer)
    return {
        "format": FORMAT,
        "store": uuid.uuid4().hex,  # two stores of the same config are different ones
        "arrays": [[name, list(shape), kind] for name, (shape, kind) in arrays.items()],
        "outer": {key: _plain(settings[key]) for key in settings if key not in OWN},
        "signed": bool(outer.keys),
        "data": data,
        "block": max(sequences, data["items"] // BLOCKS),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parse(body: Body, store: str) -> About:
    """The facts that a body holds; UserError where it is of another format."""
    if body.get("format") != FORMAT:
        raise UserError(
            f"the store's {FILE} has format {body.get('format')!r}; this jaxlm knows {FORMAT}"
        )
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in body["outer"].items()
    }
    arrays = tuple(Array(name, tuple(shape), kind) for name, shape, kind in body["arrays"])
    return About(store, arrays, Outer(**settings), body["data"], body["block"])


def found(store: Store, identity: Identity, body: Body) -> Body:
    """Create about.json with this body, or read the one that is there; both are then the same.

    Raises UserError, naming the key, where the store is of other islands than these.
    """
    if not records.create_record(store, identity, FILE, body):
        there = read(store, identity)[0]
        _compare(store.url, there, body)
    return body


def read(store: Store, identity: Identity) -> tuple[Body, About, Identity]:
    """(body, facts, the identity completed by the store's) of the about.json that is there.

    Raises UserError where there is none, or where it is not sound.
    """
    try:
        data = store.read(FILE)
        body = records.unseal(dataclasses.replace(identity, store=""), FILE, data)
    except KeyError:
        raise UserError(
            f"outer.store={store.url} has no {FILE}: no island has begun there"
        ) from None
    except Damaged as error:
        raise UserError(
            f"outer.store={store.url}: {error}; nothing there can be trusted: put the file back "
            "from a copy, or use another store"
        ) from None
    if body.get("signed") and not identity.keys:
        raise UserError(
            f"outer.keys is empty, and the records of outer.store={store.url} are signed; list "
            "the public keys of its islands and its merger"
        )
    about = parse(body, records.digest(records.seal(_nobody(), FILE, body)))
    return body, about, dataclasses.replace(identity, store=about.store)


def _nobody() -> Identity:
    return Identity("", "")


def _compare(url: str, there: Body, here: Body) -> None:
    """Raise UserError for the first fact in which an island differs from its store."""
    use = f"the islands of outer.store={url} agree on it; use"
    for key in here["outer"]:
        mine, theirs = here["outer"][key], there.get("outer", {}).get(key)
        if mine != theirs:
            raise UserError(f"outer.{key}={yaml_text(mine)}: {use} {yaml_text(theirs)}")
    if here["signed"] != there.get("signed"):
        raise UserError(
            f"outer.keys is set, and outer.store={url} was begun without; use a new one"
        )
    if here["arrays"] != there.get("arrays"):
        ours = {each[0]: each[1:] for each in here["arrays"]}
        other = {each[0]: each[1:] for each in there.get("arrays", [])}
        name = next(n for n in [*ours, *other] if ours.get(n) != other.get(n))
        kind = lambda table: f"has {table[name][0]}" if name in table else "is absent"
        raise UserError(
            f"outer.store={url} is of another model: {name} {kind(other)} there, "
            f"and {kind(ours)} here; use the config of that model, or another store"
        )
    keys = {
        "seed": "seed", "sequence_length": "batch.sequence_length", "segments": "data.segments",
        "tokenizer_sha256": "data.path: the tokenizer", "fingerprint": "data.path: its text",
        "items": "data.path: its size",
    }  # fmt: skip
    for name, key in keys.items():
        mine, theirs = here["data"][name], there.get("data", {}).get(name)
        if mine != theirs:
            raise UserError(f"{key} is {str(mine)[:12]} here: {use} {str(theirs)[:12]}")
    if here | {key: there.get(key) for key in ("store", "block")} != there:
        raise UserError(f"outer.store={url} is of another version of jaxlm; use the same, or a new")
