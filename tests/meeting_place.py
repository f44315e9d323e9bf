"""Islands without training: they follow a store's protocol with made-up arrays of numpy."""

import dataclasses
import threading

import numpy as np

from jaxlm.keys_outer import Outer
from jaxlm.outer import about as facts
from jaxlm.outer import courier, parts, presence, serve, snapshots
from jaxlm.outer import ledger as books
from jaxlm.outer.courier import Contribution
from jaxlm.outer.presence import Process, Watch
from jaxlm.outer.records import MERGER, Identity
from jaxlm.outer.store import Store, open_store

SHAPES = {"embed": (7, 6), "groups.0.0.mlp": (3, 4, 5), "norm": (6,), "scale": ()}
KINDS = {"norm": "fixed"}
DATA = dict(
    tokenizer_sha256="t", fingerprint="f", seed=0, sequence_length=8, segments=True, items=1000
)


def memory() -> Store:
    """An object store in this process."""
    return open_store("memory:///")


def settings(**changes) -> Outer:
    """The settings of a store: averaging, in rounds of every island, at once."""
    default = dict(every=2, rule="average", defend="none", quorum=1, grace=0.0)
    return Outer(**(default | changes))


def begin(store: Store, outer: Outer, name: str = "a", private=None, keys=()) -> Process:
    """An island that is the first, or comes later; the patience of tests is short."""
    arrays = {name: (shape, KINDS.get(name, "params")) for name, shape in SHAPES.items()}
    identity = Identity(name, "", private, keys)
    facts.found(store, identity, facts.describe(arrays, outer, DATA, 4))
    _, _, identity = facts.read(store, identity)
    return Process(store, identity, 0.2, f"{name}0")


def about_of(process: Process):
    return facts.read(process.store, dataclasses.replace(process.identity, store=""))[1]


def initial(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def boxes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {parts.key_of(parts.whole(name, x.shape)): x for name, x in arrays.items()}


def publish_first(process: Process, arrays: dict[str, np.ndarray], step: int = 0) -> None:
    assert courier.announce_first(process, courier.upload_first(process, boxes(arrays)), step)


def delta(island: str, number: int, shape) -> np.ndarray:
    rng = np.random.default_rng([*island.encode(), number, 77])
    return (0.1 * rng.normal(size=shape)).astype(np.float32)


def deltas_of(about, island: str, number: int, fragment: int) -> dict[str, np.ndarray]:
    """What an island learnt, by array: rows of a fragment."""
    found = facts.pieces(about, fragment)
    return {array.name: np.asarray(delta(island, number, shape)) for _, array, _, shape in found}


def contribute(
    process: Process, about, number: int, base: int, made=None, errors=None, tokens: int = 64,
    fragment: int | None = None, announce: bool = True,
):  # fmt: skip
    """Publish a contribution; gives what was sent and whether it is the first of its number."""
    fragment = number % about.outer.fragments if fragment is None else fragment
    made = deltas_of(about, process.identity.name, number, fragment) if made is None else made
    own = Contribution(number, fragment, base, tokens, 2, 2 * number + 2, 4 * number + 4)
    sent = courier.upload(process, about, own, boxes(made), errors or {})
    return sent, announce and courier.announce(process, own, sent.payloads)


def beat(process: Process, count: int, **more) -> None:
    presence.write_beat(process, count, {"state": "training"} | more)


def merger(store: Store, folder, name: str = "m0", private=None, keys=()) -> serve.Desk:
    """A merger that has read the store, without its lease."""
    identity = Identity(MERGER, "", private, keys)
    _, about, identity = facts.read(store, identity)
    process = Process(store, identity, 0.2, name)
    folder.mkdir(exist_ok=True)
    ledger = snapshots.open_ledger(process, about, folder)
    assert ledger is not None
    return serve.Desk(ledger, Watch())


def arrays_of(desk: serve.Desk) -> dict[str, np.ndarray]:
    """Every array of a merger: what islands start from, and what the rule remembers."""
    ledger = desk.ledger
    return {
        f"{kind}:{array.name}": books.read_array(ledger, kind, place)
        for place, array in enumerate(ledger.about.arrays)
        for kind in books.KINDS
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether all arrays are the same bits."""
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


START = books.Position()


def every_merge(process: Process, about, position=START):
    """All merges after a position, as an island reads them."""
    return list(courier.read_merges(process, about, position, None, threading.Event(), 0.0))
