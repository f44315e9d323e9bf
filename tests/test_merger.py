"""The merger of a store: killed anywhere, run twice, fed damage; its sums against numpy."""

import contextlib
import dataclasses
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import threading
import uuid

import meeting_place as place
import numpy as np
import pytest
import tiny

from jaxlm.cli import main
from jaxlm.config import UserError
from jaxlm.outer import about as facts
from jaxlm.outer import courier, merging, presence, records, serve, snapshots, wire
from jaxlm.outer import ledger as books
from jaxlm.outer.presence import Process, Watch
from jaxlm.outer.records import Damaged, Identity
from jaxlm.outer.store import Store, open_store

RULES = {
    "average": dict(rule="average"),
    "diloco": dict(rule="diloco", momentum=0.9, learning_rate=0.7, fragments=2, wire=("int8",)),
    "delayed": dict(rule="delayed", momentum=0.5, learning_rate=0.5, wire=("float32", "int4")),
}
ISLANDS = "ab"


def begin(store: Store, **changes):
    """(processes of the islands, facts) of a store with its first snapshot."""
    outer = place.settings(**changes)
    processes = [place.begin(store, outer, name) for name in ISLANDS]
    place.publish_first(processes[0], place.initial())
    return processes, place.about_of(processes[0])


def publish(processes, about, number: int, **more) -> None:
    for process in processes:
        place.beat(process, number)
        place.contribute(process, about, number, number, **more)


def rounds(store: Store, folder, count: int, **changes) -> serve.Desk:
    """A store in which nothing goes wrong."""
    processes, about = begin(store, **changes)
    desk = place.merger(store, folder)
    for number in range(count):
        publish(processes, about, number)
        serve.turn(desk)
    return desk


# --- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_merges_are_those_of_numpy(tmp_path, rule):
    """Rounds of two islands against the published formulas in float64."""
    changes = RULES[rule] | dict(wire=("float32",), fragments=1)
    store = place.memory()
    desk = rounds(store, tmp_path / "m", 5, **changes)
    about, outer = desk.ledger.about, desk.ledger.about.outer
    expected = {name: x.astype(np.float64) for name, x in place.initial().items()}
    eta, mu = outer.learning_rate, outer.momentum
    momentum = {name: np.zeros_like(x) for name, x in expected.items()}
    for number in range(5):
        learnt = [place.deltas_of(about, island, number, 0) for island in ISLANDS]
        for name in expected:
            mean = np.mean([each[name].astype(np.float64) for each in learnt], axis=0)
            if rule == "average" or place.KINDS.get(name) == "fixed":
                expected[name] -= mean
                continue
            momentum[name] = mu * momentum[name] + mean
            expected[name] -= eta * (mean + mu * momentum[name])
    found = place.arrays_of(desk)
    for name, x in expected.items():
        np.testing.assert_allclose(found[f"base:{name}"], x, rtol=1e-6, atol=1e-6)


def test_islands_that_read_the_merges_hold_what_the_merger_holds(tmp_path):
    """Bit for bit, in any format, also when they come late and begin with a snapshot."""
    store = place.memory()
    (a, b), about = begin(store, **RULES["diloco"])
    desk = place.merger(store, tmp_path / "m")
    position, base = courier.read_snapshot(a, about)
    for number in range(30):
        publish((a, b), about, number)
        serve.turn(desk)
        for merge in place.every_merge(a, about, position):
            for _, array, index, _ in facts.pieces(about, merge.body["fragment"]):
                base[array.name][index] -= merge.update[array.name]
            position = merge.position
    assert position == desk.ledger.position and position.number == 30
    newest, late = courier.read_snapshot(b, about)
    assert 0 < newest.number < 30
    for merge in place.every_merge(b, about, newest):
        for _, array, index, _ in facts.pieces(about, merge.body["fragment"]):
            late[array.name][index] -= merge.update[array.name]
    own = {n.removeprefix("base:"): x for n, x in place.arrays_of(desk).items() if "base:" in n}
    assert place.same(base, own) and place.same(late, own)


@pytest.mark.parametrize("rule", RULES)
def test_a_replay_of_the_store_gives_the_same_bits(tmp_path, rule):
    """From the older snapshot, merge by merge, to the newer: also what the rule remembers."""
    store = place.memory()
    desk = rounds(store, tmp_path / "m", 3, **RULES[rule])
    snapshots.write(desk.ledger)
    process, about, ledgers = desk.ledger.process, desk.ledger.about, []
    for name, body in list(snapshots.newest(store, desk.ledger.identity))[:2]:
        (tmp_path / name[-6]).mkdir(exist_ok=True)
        ledgers.append(snapshots.load_from(process, about, tmp_path / name[-6], name, body))
    while ledgers[1].position.number < ledgers[0].position.number:
        assert merging.follow(ledgers[1])
    one, other = (place.arrays_of(serve.Desk(ledger, Watch())) for ledger in ledgers)
    assert ledgers[0].position == ledgers[1].position and place.same(one, other)


@pytest.mark.parametrize("up, down, least", [
    ("float32", "float32", 50), ("int4", "bfloat16", 130), ("int4", "int4", 300),
])  # fmt: skip
def test_what_an_island_sends_and_receives(tmp_path, monkeypatch, up, down, least):
    """All that it reads from a store and writes there for a merge, beside an all-reduce of bfloat16
    gradients between eight islands in each of 100 steps."""
    monkeypatch.setattr(place, "SHAPES", {"embed": (512, 256), "groups.0.0.mlp": (4, 256, 384)})
    crossed = {"sent": 0, "received": 0}

    def sending(operation):
        def send(name: str, data: bytes):
            crossed["sent"] += len(data)
            return operation(name, data)

        return send

    def read(name: str) -> bytes:
        data = store.read(name)
        crossed["received"] += len(data)
        return data

    store = place.memory()
    (process, _), about = begin(store, rule="average", wire=(up, down))
    desk = place.merger(store, tmp_path / "m")
    position, _ = courier.read_snapshot(process, about)
    link = dataclasses.replace(
        store, read=read, create=sending(store.create), write=sending(store.write)
    )
    island = dataclasses.replace(process, store=link)
    place.beat(island, 0)
    place.contribute(island, about, 0, 0)
    serve.turn(desk)
    assert len(place.every_merge(island, about, position)) == 1
    size = sum(np.prod(shape) for shape in place.SHAPES.values())
    for bytes_, form in ((crossed["sent"], up), (crossed["received"], down)):
        assert wire.num_bytes(size, form) < bytes_ < 1.01 * wire.num_bytes(size, form)
    all_reduce = 2 * 7 / 8 * 2 * size  # what each of eight sends, and receives
    assert 100 * 2 * all_reduce / sum(crossed.values()) >= least


def test_weights_are_tokens_squared_over_steps(tmp_path):
    store = place.memory()
    (a, b), about = begin(store)
    desk = place.merger(store, tmp_path / "m")
    place.contribute(a, about, 0, 0, tokens=10)
    place.contribute(b, about, 0, 0, tokens=30)
    serve.turn(desk)
    body = records.read_record(store, a.identity, records.numbered("merges", 0))
    assert [each["weight"] for each in body["islands"]] == pytest.approx([0.1, 0.9])
    learnt = [place.deltas_of(about, island, 0, 0)["embed"] for island in ISLANDS]
    found = place.arrays_of(desk)["base:embed"]
    expected = place.initial()["embed"] - (0.1 * learnt[0] + 0.9 * learnt[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_delayed_counts_the_islands_that_are_there(tmp_path):
    """Each push counts 1/N, N the islands that train now; an island that works twice as much counts
    accordingly."""
    store = place.memory()
    (a, b), about = begin(store, rule="delayed", momentum=0.5, learning_rate=1.0)
    desk = place.merger(store, tmp_path / "m")
    read = lambda n: records.read_record(store, a.identity, records.numbered("merges", n))
    place.beat(a, 0)
    place.contribute(a, about, 0, 0)
    serve.turn(desk)
    assert (read(0)["count"], read(0)["flush"]) == (1.0, True)
    place.beat(b, 0)
    place.contribute(b, about, 0, 0)
    serve.turn(desk)
    assert (read(1)["count"], read(1)["flush"]) == (2.0, False)
    assert read(1)["islands"][0]["staleness"] == 1
    place.contribute(a, about, 1, 1, tokens=128)
    serve.turn(desk)
    assert (read(2)["count"], read(2)["flush"]) == (1.25, True)


# --- kills ---------------------------------------------------------------------------------------


def test_what_killed_mergers_left_is_removed(tmp_path, monkeypatch):
    """And what one that lives has is not."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    killed = """
import os
from jaxlm.outer import serve
with serve._scratch() as folder:
    (folder / "base.0.npy").touch()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    assert len(list(tmp_path.glob("*/base.0.npy"))) == 1
    with serve._scratch() as living, serve._scratch() as other:
        folders = {file for file in tmp_path.iterdir() if file.is_dir()}
        assert folders == {living, other}
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    pass


def mortal(store: Store, after: int) -> Store:
    """A store that dies instead of its (after + 1)-th change."""
    count = itertools.count()

    def dying(operation):
        def change(*arguments):
            if next(count) >= after:
                raise Killed
            return operation(*arguments)

        return change

    return dataclasses.replace(
        store, create=dying(store.create), write=dying(store.write), delete=dying(store.delete)
    )


def live(store: Store, folder, processes, about, count: int) -> serve.Desk:
    """A merger that starts, and islands that publish what is still to be published."""
    desk = place.merger(store, folder)
    for number in range(desk.ledger.position.number, count):
        for process in processes:
            place.contribute(process, about, number, number)
        for _ in range(2):
            serve.turn(desk)
    return desk


def objects(store: Store) -> dict[str, bytes]:
    kept = ("about", "contributions", "merges", "payloads", "snapshots")
    return {name: store.read(name) for name in store.list("") if name.startswith(kept)}


def test_a_merger_killed_before_any_change_of_the_store(tmp_path, monkeypatch):
    """The next one makes the same merges: records, payloads and arrays, bit for bit."""
    monkeypatch.setattr("jaxlm.outer.about.uuid.uuid4", lambda: uuid.UUID(int=1))
    count = 4
    calm = place.memory()
    processes, about = begin(calm, **RULES["diloco"])
    undisturbed = live(calm, tmp_path / "m", processes, about, count)
    snapshots.write(undisturbed.ledger)
    snapshots.prune(undisturbed.ledger)
    expected, arrays = objects(calm), place.arrays_of(undisturbed)
    for after in itertools.count():
        store = place.memory()
        processes, about = begin(store, **RULES["diloco"])
        for number in range(count):
            for process in processes:
                place.contribute(process, about, number, number)
        finished = False
        with contextlib.suppress(Killed):
            desk = place.merger(mortal(store, after), tmp_path / f"first{after}")
            for _ in range(count):
                serve.turn(desk)
            snapshots.write(desk.ledger)
            snapshots.prune(desk.ledger)
            finished = True
        desk = live(store, tmp_path / f"second{after}", processes, about, count)
        snapshots.write(desk.ledger)
        snapshots.prune(desk.ledger)
        assert place.same(place.arrays_of(desk), arrays), after
        assert objects(store) == expected, after
        if finished:
            break
    assert after > 10


@pytest.mark.parametrize("rule", RULES)
def test_two_mergers_at_once_make_each_merge_once(tmp_path, rule):
    """Without the lease that keeps them apart: who is second follows the record of the first."""
    store = place.memory()
    processes, about = begin(store, **RULES[rule])
    desks = [place.merger(store, tmp_path / f"m{i}", f"m{i}") for i in range(2)]
    for number in range(5):
        publish(processes, about, number)
        barrier = threading.Barrier(2)
        errors = []

        def run(desk, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                serve.turn(desk)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(desk,)) for desk in desks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for desk in desks:
            while merging.follow(desk.ledger):
                pass
    made = 10 if rule == "delayed" else 5
    assert [desk.ledger.position.number for desk in desks] == [made, made]
    assert desks[0].ledger.position == desks[1].ledger.position
    assert place.same(place.arrays_of(desks[0]), place.arrays_of(desks[1]))
    third = place.merger(store, tmp_path / "m3", "m3")
    assert place.same(place.arrays_of(desks[0]), place.arrays_of(third))


def test_of_two_mergers_that_know_different_contributions_one_counts(tmp_path):
    store = place.memory()
    processes, about = begin(store, **RULES["diloco"])
    first, second = (place.merger(store, tmp_path / f"m{i}", f"m{i}") for i in range(2))
    publish(processes, about, 0)
    a, b = (books.take(first.ledger, island, 0) for island in ISLANDS)
    assert merging.make_merge(first.ledger, 0, [a, b], {})
    before = place.arrays_of(second)
    assert not merging.make_merge(second.ledger, 0, [books.take(second.ledger, "a", 0)], {})
    assert second.ledger.position.number == 0 and place.same(place.arrays_of(second), before)
    assert merging.follow(second.ledger)
    assert second.ledger.position == first.ledger.position
    assert place.same(place.arrays_of(second), place.arrays_of(first))


def eventful(store: Store, operation: str, name: str, call: int, happens) -> Store:
    """A store in which something happens right after a call of an operation on a name."""
    calls = itertools.count(1)
    plain = getattr(store, operation)

    def watched(asked: str):
        try:
            return plain(asked)
        finally:
            if asked == name and next(calls) == call:
                happens()

    return dataclasses.replace(store, **{operation: watched})


@pytest.mark.parametrize("call", [1, 2])
def test_a_merger_that_starts_while_the_first_island_begins(tmp_path, call):
    """What comes while it looks is not taken for damage: at the latest it sees it the next time."""
    store = place.memory()
    island = place.begin(store, place.settings())
    about = place.about_of(island)
    happens = lambda: place.publish_first(island, place.initial())
    seen = eventful(store, "list", "snapshots/", call, happens)
    process = Process(seen, dataclasses.replace(island.identity, name=records.MERGER), 0.2, "m0")
    first = snapshots.load(process, about, tmp_path)
    ledger = first or snapshots.load(process, about, tmp_path)
    assert ledger is not None and ledger.position.number == 0
    assert place.same(
        place.initial(),
        {a.name: books.read_array(ledger, "base", i) for i, a in enumerate(about.arrays)},
    )


def test_a_merger_that_starts_while_another_merges_gives_nothing_up(tmp_path):
    store = place.memory()
    processes, about = begin(store, **RULES["diloco"])
    first = place.merger(store, tmp_path / "m0")

    def happens():
        for number in range(2):
            publish(processes, about, number)
            serve.turn(first)

    seen = eventful(store, "read", records.numbered("merges", 0), 1, happens)
    process = Process(seen, first.ledger.identity, 0.2, "m1")
    (tmp_path / "m1").mkdir()
    second = snapshots.open_ledger(process, about, tmp_path / "m1")
    assert second is not None and first.ledger.position.number == 2
    while merging.follow(second):
        pass
    assert second.position == first.ledger.position
    assert place.same(place.arrays_of(serve.Desk(second, Watch())), place.arrays_of(first))


# --- damage --------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


def damages(store: Store, name: str) -> dict[str, bytes | None]:
    """Every kind of damage to an object; a contribution that is absent was never made."""
    data = store.read(name)
    folder = name.rpartition("/")[0]
    others = [n for n in store.list("") if n != name and n.rpartition("/")[0] == folder]
    others = others or [n for n in store.list("") if n != name]
    made: dict[str, bytes | None] = {
        "flipped": flipped(data), "truncated": data[: len(data) // 2],
        "swapped": store.read(others[0]),
    }  # fmt: skip
    return made if name.startswith("contributions") else made | {"absent": None}


def put(store: Store, name: str, data: bytes | None) -> None:
    if data is None:
        store.delete(name)
    else:
        store.write(name, data)


@pytest.mark.parametrize("rule", ["diloco", tiny.nightly("delayed")])
def test_nothing_damaged_is_merged_silently(tmp_path, caplog, rule):
    """Each object of a store, damaged in each way: it is named, or nothing changes by it."""
    caplog.set_level(logging.WARNING)

    def build(store: Store):
        processes, about = begin(store, **RULES[rule])
        desk = place.merger(store, tmp_path / "maker")
        rounds = 2 if rule == "diloco" else 1
        for number in range(rounds):
            publish(processes, about, number)
            serve.turn(desk)
        if rule == "diloco":
            snapshots.write(desk.ledger)
        publish(processes, about, rounds)

    calm = place.memory()
    build(calm)
    healthy = place.merger(calm, tmp_path / "calm-m")
    serve.turn(healthy)
    expected = place.arrays_of(healthy)
    for case, name in enumerate(objects(calm)):
        store = place.memory()
        build(store)
        if name not in store.list(""):
            continue  # removed as old when the calm one made its last merge
        before = {each: store.read(each) for each in store.list("")}
        for kind, data in damages(store, name).items():
            for each in set(store.list("")) | before.keys():
                put(store, each, before.get(each))
            put(store, name, data)
            caplog.clear()
            said = ""
            try:
                desk = place.merger(store, tmp_path / f"m{case}{kind}")
                serve.turn(desk)
                merged = [store.read(n).decode() for n in store.list("merges/")]
                said = caplog.text + "".join(merged)
                unchanged = place.same(place.arrays_of(desk), expected)
            except (UserError, Damaged) as error:
                said, unchanged = caplog.text + str(error), False
            key = name if name.startswith("payloads") else name.rpartition("/")[2]
            if data is None and name.startswith("snapshots"):
                key = "no snapshot"
            assert unchanged or key in said, (name, kind, said[:2000])


def test_a_damaged_merge_is_overcome_without_a_hand(tmp_path, caplog):
    """Islands that cannot read a merge come back by a snapshot; a merger that cannot, gives up the
    merges since its newest snapshot, and islands that went further come back to that."""
    store = place.memory()
    (a, b), about = begin(store, **RULES["diloco"])
    desk = place.merger(store, tmp_path / "m")
    for number in range(4):
        publish((a, b), about, number)
        serve.turn(desk)
    name = records.numbered("merges", 2)
    store.write(name, flipped(store.read(name)))
    with pytest.raises(courier.Gone) as gone:
        place.every_merge(a, about)
    assert gone.value.number == 2 and "altered" in str(gone.value)
    assert courier.read_snapshot(a, about, gone.value.number) is None
    place.beat(a, 9, needs=gone.value.number + 1)
    serve.turn(desk)
    position, base = courier.read_snapshot(a, about, gone.value.number)
    assert position.number == desk.ledger.position.number >= 3
    assert place.same({f"base:{n}": x for n, x in base.items()},
                      {n: x for n, x in place.arrays_of(desk).items() if "base" in n})  # fmt: skip
    last = records.numbered("merges", desk.ledger.position.number)
    publish((a, b), about, desk.ledger.position.number)
    serve.turn(desk)
    further = desk.ledger.position
    store.write(last, b"torn")
    old, desk = desk, place.merger(store, tmp_path / "again")
    assert f"{last}: torn" in caplog.text and "given up" in caplog.text
    assert desk.ledger.position.number == further.number
    publish((a, b), about, further.number)
    serve.turn(desk)
    with pytest.raises(courier.Gone, match="continues other merges"):
        courier.read_merge(b, about, further)
    with pytest.raises(Damaged, match="continues other merges"):  # one that was at work meanwhile
        merging.follow(old.ledger)
    assert courier.read_snapshot(b, about, further.number - 1) is not None


# --- rounds --------------------------------------------------------------------------------------


def test_a_round_waits_for_its_quorum_and_then_a_grace_period(tmp_path):
    store, clock = place.memory(), [0.0]
    outer = place.settings(quorum=2, grace=10.0)
    a, b, c = (place.begin(store, outer, name) for name in "abc")
    place.publish_first(a, place.initial())
    about = place.about_of(a)
    desk = place.merger(store, tmp_path / "m")
    desk.watch.clock = lambda: clock[0]
    desk.ledger.process = dataclasses.replace(desk.ledger.process, patience=100.0)

    def after(seconds: float, *beating) -> int:
        clock[0] += seconds
        for process in beating:
            place.beat(process, int(clock[0]))
        serve.turn(desk)
        return desk.ledger.position.number

    place.contribute(a, about, 0, 0)
    assert after(1, a, b, c) == 0 and after(50, a, b, c) == 0  # no quorum, however long
    place.contribute(b, about, 0, 0)
    assert after(0, a, b, c) == 0 and after(9, a, b, c) == 0  # c may still come
    assert after(1, a, b, c) == 1  # its grace is over
    for process in (a, b, c):
        place.contribute(process, about, 1, 1)
    assert after(0, a, b, c) == 2  # all are there
    place.contribute(a, about, 2, 2)
    place.contribute(b, about, 2, 2)
    assert after(1, a, b, c) == 2
    assert after(101, a, b) == 3  # c is gone, and in the meantime its grace too
    place.contribute(a, about, 3, 3)
    place.contribute(b, about, 3, 3)
    assert after(1, a, b) == 4  # nobody waits for who is gone
    place.beat(b, 10**6, left=True)
    place.beat(c, 10**6, left=True)
    place.contribute(a, about, 4, 4)
    assert after(1, a) == 5  # those that have left are no part of the quorum


def test_late_and_repeated_contributions(tmp_path):
    """What comes after its round is in no merge; a number is published once."""
    store = place.memory()
    (a, b), about = begin(store)
    desk = place.merger(store, tmp_path / "m")
    place.contribute(a, about, 0, 0)
    serve.turn(desk)
    place.contribute(b, about, 0, 0)
    serve.turn(desk)
    assert desk.ledger.position.number == 1
    assert place.contribute(a, about, 1, 1)[1]
    assert not place.contribute(a, about, 1, 1, tokens=99)[1]
    serve.turn(desk)
    body = records.read_record(store, a.identity, records.numbered("merges", 1))
    assert [(each["island"], each["tokens"]) for each in body["islands"]] == [("a", 64)]


def test_bad_contributions_are_refused_with_their_reason(tmp_path):
    store = place.memory()
    outer = place.settings(defend="cosine")
    islands = [place.begin(store, outer, name) for name in "abcd"]
    place.publish_first(islands[0], place.initial())
    about = place.about_of(islands[0])
    desk = place.merger(store, tmp_path / "m")
    good = place.deltas_of(about, "a", 0, 0)
    made = [good, {n: 1.5 * x for n, x in good.items()}, {n: -10 * x for n, x in good.items()},
            {n: np.full_like(x, np.nan) for n, x in good.items()}]  # fmt: skip
    for process, each in zip(islands, made, strict=True):
        place.contribute(process, about, 0, 0, each)
    serve.turn(desk)
    body = records.read_record(store, islands[0].identity, records.numbered("merges", 0))
    reasons = {each["island"]: each["reason"] for each in body["islands"]}
    assert reasons == {
        "a": "", "b": "", "c": "it points away from the others", "d": "it is not finite",
    }  # fmt: skip
    assert all(np.isfinite(x).all() for x in place.arrays_of(desk).values())
    again = place.merger(store, tmp_path / "m2")
    assert place.same(place.arrays_of(again), place.arrays_of(desk))


def test_where_all_are_refused_the_rounds_go_on(tmp_path):
    store = place.memory()
    (a, _), about = begin(store, **RULES["diloco"])
    desk = place.merger(store, tmp_path / "m")
    bad = {n: np.full_like(x, np.inf) for n, x in place.deltas_of(about, "a", 0, 0).items()}
    before = place.arrays_of(desk)
    place.contribute(a, about, 0, 0, bad)
    serve.turn(desk)
    assert desk.ledger.position.number == 1 and place.same(place.arrays_of(desk), before)
    place.contribute(a, about, 1, 1)
    serve.turn(desk)
    assert desk.ledger.position.number == 2 and not place.same(place.arrays_of(desk), before)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_store_keeps_is_bounded(tmp_path, rule):
    store = place.memory()
    processes, about = begin(store, **RULES[rule] | dict(wire=("float32",)))
    desk = place.merger(store, tmp_path / "m")
    sizes, span = [], snapshots.interval(about)
    for number in range(4 * span):
        publish(processes, about, number)
        place.contribute(processes[0], about, number + 1, number, announce=False)  # killed there
        serve.turn(desk)
        sizes.append(len(store.list("")))
    assert sizes[-1] == sizes[-1 - span] and len(store.list("snapshots/")) == 2


# --- signatures ----------------------------------------------------------------------------------


def test_only_what_islands_signed_is_merged(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    private, keys = {}, []
    for name in ("a", "b", "merger", "stranger"):
        private[name], public, _ = records.load_private_key(tmp_path / name, "--key")
        keys.append((name, public))
    keys = tuple(keys[:3])
    outer = place.settings(keys=tuple(f"{name}:{public}" for name, public in keys))
    store = place.memory()
    a, b = (place.begin(store, outer, n, private[n], keys) for n in ISLANDS)
    place.publish_first(a, place.initial())
    about = place.about_of(a)
    assert "outer.keys is empty" in tiny.message(
        facts.read, store, dataclasses.replace(a.identity, store="", keys=(), private=None)
    )
    desk = place.merger(store, tmp_path / "m", private=private["merger"], keys=keys)
    foreign = dataclasses.replace(
        a, identity=dataclasses.replace(a.identity, name="c", private=private["stranger"])
    )
    forged = dataclasses.replace(
        b, identity=dataclasses.replace(b.identity, private=private["stranger"])
    )
    place.contribute(foreign, about, 0, 0)
    place.contribute(forged, about, 0, 0)
    place.contribute(a, about, 0, 0)
    serve.turn(desk)
    read = lambda n: records.read_record(store, a.identity, records.numbered("merges", n), "merger")
    assert [each["island"] for each in read(0)["islands"]] == ["a"]
    assert "its signature is not b's" in read(0)["damaged"]["b"]["reason"]
    assert "c is not one of --keys" in caplog.text
    # A contribution of an earlier round, put in the place of a later one.
    old = store.read("contributions/a/000000000000.json")
    store.write("contributions/a/000000000001.json", old)
    place.contribute(b, about, 1, 1)
    serve.turn(desk)
    assert [each["island"] for each in read(1)["islands"]] == ["b"]
    assert "not written for this name" in read(1)["damaged"]["a"]["reason"]
    # A merge that the merger did not sign.
    name = records.numbered("merges", 2)
    body = read(1) | {"number": 2, "previous": desk.ledger.position.chain}
    fake = Identity("merger", a.identity.store, private["stranger"], keys)
    assert records.create_record(store, fake, name, body)
    with pytest.raises(courier.Gone, match="signature"):
        courier.read_merge(a, about, desk.ledger.position)
    assert presence.read_beats(store, a.identity) == {}
    presence.write_beat(forged, 0, {})
    assert presence.read_beats(store, a.identity) == {}


# --- the command line ----------------------------------------------------------------------------


def test_status_tells_who_is_there_late_or_refused(tmp_path, capsys):
    folder = tmp_path / "store"
    store = open_store(str(folder))
    outer = place.settings(rule="diloco", momentum=0.5, fragments=2, quorum=3)
    a, b, c = (place.begin(store, outer, name) for name in "abc")
    place.publish_first(a, place.initial())
    about = place.about_of(a)
    desk = place.merger(store, tmp_path / "m")
    bad = {n: np.full_like(x, np.nan) for n, x in place.deltas_of(about, "b", 0, 0).items()}
    for process, made in ((a, None), (b, bad), (c, None)):
        place.beat(process, 0, step=7, round=1, total_bytes_sent=2.5e6, speed=1.5)
        place.contribute(process, about, 0, 0, made)
    serve.turn(desk)
    place.contribute(a, about, 1, 1)
    ends = [presence.start_beats(p, lambda: {"state": "training", "step": 8}) for p in (a, b)]
    place.beat(c, 9, left=True)
    assert main(["outer", "status", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["outer", "status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for end in ends:
        end(True)
    rows = {row["island"]: row for row in found["islands"]}
    assert {n: row["state"] for n, row in rows.items()} == dict(
        a="training", b="training", c="left"
    )
    assert (rows["b"]["refused"], rows["a"]["refused"], rows["a"]["step"]) == (1, 0, 8)
    assert found["merges"] == 1 and found["waiting_for"] == ["b"] and found["merger"] == "absent"
    assert found["tokens"] == 64  # of two, in one of two fragments
    assert lines[1].split()[:3] == ["island", "state", "step"] and len(lines) == 6
    assert lines[-1] == "merge 1 waits for: b"
    assert main(["outer", "status", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert main(["outer", "status", str(tmp_path / "m")]) == 2
    assert "has no about.json" in capsys.readouterr().err
    assert main(["outer", "serve", str(folder), "--key", str(tmp_path / "key")]) == 2
    assert "--key without --keys" in capsys.readouterr().err
