"""The store on a disk and on S3, its records and signatures, leases, and claims of data."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import threading
import urllib.request
import uuid

import meeting_place as place
import numpy as np
import pytest
import tiny
from moto.server import ThreadedMotoServer

from jaxlm.outer import about as facts
from jaxlm.outer import claims, courier, parts, presence, records, serve
from jaxlm.outer.presence import Process, Watch
from jaxlm.outer.records import Damaged, Identity
from jaxlm.outer.store import Store, open_store, patient
from jaxlm.validate_outer import parse_keys


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket on a server of this process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = dict(
        AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_ALLOW_HTTP="true", AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="y", AWS_REGION="us-east-1",
    )  # fmt: skip
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    bucket = urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")
    urllib.request.urlopen(bucket).close()
    yield "s3://bucket"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["directory", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    return open_store(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


def together(number: int, call) -> list:
    """What a function of 0, 1, ... gives in as many threads that start at the same time."""
    barrier, found = threading.Barrier(number), [None] * number

    def one(i: int) -> None:
        barrier.wait()
        found[i] = call(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# --- the store -----------------------------------------------------------------------------------


def test_objects_are_written_read_listed_and_deleted(store):
    with pytest.raises(KeyError):
        store.read("merges/1.json")
    assert store.create("merges/1.json", b"one")
    assert not store.create("merges/1.json", b"two")
    store.write("beats/a.json", b"1")
    store.write("beats/a.json", b"2" * 100_000)
    store.write("payloads/merges/1/abc", b"\0\1")
    assert store.read("merges/1.json") == b"one" and store.read("beats/a.json") == b"2" * 100_000
    assert store.list("") == ["beats/a.json", "merges/1.json", "payloads/merges/1/abc"]
    assert store.list("merges/") == ["merges/1.json"] and store.list("leases/") == []
    store.delete("merges/1.json")
    store.delete("merges/1.json")
    assert store.create("merges/1.json", b"two")


def test_of_many_that_create_a_name_one_does(store):
    data = [bytes([i]) * 5000 for i in range(8)]
    for name in ("a/1.json", "a/2.json", "a/3.json"):
        won = together(8, lambda i, name=name: store.create(name, data[i]))
        assert sum(won) == 1 and store.read(name) == data[won.index(True)]


def test_a_reader_of_a_directory_never_sees_half_an_object(tmp_path):
    store = open_store(str(tmp_path))
    whole = {bytes([i]) * 300_000 for i in range(4)}
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            for data in whole:
                store.write("beats/a.json", data)
        done.set()

    store.write("beats/a.json", next(iter(whole)))
    thread = threading.Thread(target=write)
    thread.start()
    seen = [store.read("beats/a.json") for _ in iter(done.is_set, True)]
    thread.join()
    assert seen and set(seen) <= whole


def test_a_killed_writer_leaves_nothing_that_is_read_and_its_file_goes(tmp_path):
    open_store(str(tmp_path))
    left = tmp_path / ".tmp" / "left"
    left.write_bytes(b"half")
    assert open_store(str(tmp_path)).list("") == [] and left.exists()
    os.utime(left, (0, 0))
    open_store(str(tmp_path))
    assert not left.exists()


def test_places_that_cannot_be_stores_are_refused(tmp_path, s3):
    (tmp_path / "file").write_text("")
    for wrong, words in (
        ("", "outer.store='' must be"),
        (str(tmp_path / "file" / "x"), "cannot be made or written"),
        ("ftp://there/x", "no store of that scheme"),
        ("s3://absent-bucket/x", "cannot be read"),
    ):
        assert words in tiny.message(open_store, wrong)


def test_a_store_out_of_reach_is_waited_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("jaxlm.outer.store.time.sleep", lambda _: None)
    store = open_store(str(tmp_path))
    calls = []

    def create(name: str, data: bytes) -> bool:
        calls.append(name)
        made = store.create(name, data)
        if len(calls) == 1:  # it reached the store, and its answer did not reach us
            raise OSError(110, "Connection timed out")
        return made

    assert patient(dataclasses.replace(store, create=create)).create("a/1.json", b"mine")
    assert len(calls) == 2 and "Connection timed out; trying again" in caplog.text
    assert not patient(store).create("a/1.json", b"another's")


# --- records -------------------------------------------------------------------------------------

HERE = Identity("a", "this store")


def test_a_record_is_what_was_written_under_its_name_in_its_store():
    data = records.seal(HERE, "merges/1.json", {"x": [1, 0.1], "y": "z"})
    assert records.unseal(HERE, "merges/1.json", data) == {"x": [1, 0.1], "y": "z"}
    for name, identity, changed in (
        ("merges/2.json", HERE, data),
        ("merges/1.json", Identity("a", "other store"), data),
        ("merges/1.json", HERE, data.replace(b"0.1", b"0.2")),
        ("merges/1.json", HERE, data[: len(data) // 2]),
        ("merges/1.json", HERE, b""),
        ("merges/1.json", HERE, b"[1]"),
        ("merges/1.json", HERE, b'{"body": {}, "sha256": NaN}'),
        ("merges/1.json", HERE, b"[" * 100_000),
        ("merges/1.json", HERE, b" " * (records.LARGEST_RECORD + 1)),
    ):
        with pytest.raises(Damaged, match="merges/"):
            records.unseal(identity, name, changed)


def test_every_flipped_bit_of_a_signed_record_is_found(tmp_path):
    private, public, _ = records.load_private_key(tmp_path / "key", "--key")
    identity = dataclasses.replace(HERE, private=private, keys=(("a", public),))
    data = records.seal(identity, "merges/1.json", {"x": 1})
    body = records.unseal(identity, "merges/1.json", data, "a")
    for i in range(8 * (len(data) - 1)):  # the last byte ends the line
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with contextlib.suppress(Damaged):  # the case of a hexadecimal digit may change nothing
            assert records.unseal(identity, "merges/1.json", bytes(flipped), "a") == body


def test_signatures(tmp_path):
    keys, private = [], {}
    for name in ("a", "b"):
        private[name], public, made = records.load_private_key(tmp_path / name, "--key")
        assert made and (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert records.load_private_key(tmp_path / name, "--key")[1:] == (public, False)
        keys.append((name, public))
    a = Identity("a", "s", private["a"], tuple(keys))
    stranger = records.load_private_key(tmp_path / "c", "--key")[0]
    name, body = "contributions/a/000000000001.json", {"island": "a"}
    assert records.unseal(a, name, records.seal(a, name, body), "a") == body
    for wrong, words in (
        (dataclasses.replace(a, private=None), "not signed"),
        (dataclasses.replace(a, private=stranger), "its signature is not a's"),
        (dataclasses.replace(a, name="b", private=private["b"]), "signed by 'b', not by a"),
        (dataclasses.replace(a, name="c", private=stranger), "signed by 'c'"),
    ):
        with pytest.raises(Damaged, match=words):
            records.unseal(a, name, records.seal(wrong, name, body), "a")
    replayed = records.seal(a, name, body)
    with pytest.raises(Damaged):
        records.unseal(a, name.replace("1.json", "2.json"), replayed, "a")
    with pytest.raises(Damaged):
        records.unseal(dataclasses.replace(a, store="t"), name, replayed, "a")


def test_mistakes_with_keys(tmp_path):
    public = records.load_private_key(tmp_path / "key", "--key")[1]
    assert "NAME:PUBLIC_KEY" in tiny.message(parse_keys, ["a"])
    assert "NAME:PUBLIC_KEY" in tiny.message(parse_keys, [f"a/b:{public}"])
    assert "named twice" in tiny.message(parse_keys, [f"a:{public}", f"a:{public}"])
    other = Identity("b", "", None, (("a", public),))
    assert f"b:{public}: list that" in tiny.message(
        records.check_own_key, other, public, tmp_path / "key"
    )
    (tmp_path / "key").chmod(0o644)
    assert "others can read" in tiny.message(records.load_private_key, tmp_path / "key", "--key")
    (tmp_path / "bad").write_text("xyz")
    (tmp_path / "bad").chmod(0o600)
    assert "not a private key" in tiny.message(records.load_private_key, tmp_path / "bad", "--key")


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "int2", "topk"])
def test_payloads_travel_whole_or_are_refused(store, form):
    rng = np.random.default_rng(0)
    shape = (9, 17)
    x = rng.normal(size=shape).astype(np.float32)
    payload, arrives, error = parts.send(x, None, form)
    part = parts.whole("embed", shape)
    [data] = parts.packed("merges/1.json", [(part, payload)])
    sha256 = records.put_payload(store, "merges/1.json", data)
    read = parts.grouped(records.read_payload(store, "merges/1.json", sha256))
    got = parts.decode(read[parts.key_of(part)], shape, form)
    assert got.tobytes() == arrives.tobytes()
    if form == "float32":
        assert error is None and got.tobytes() == x.tobytes()
    else:
        assert (arrives + error).tobytes() == (arrives + (x - arrives)).tobytes()
    with pytest.raises(Damaged):
        parts.decode(read[parts.key_of(part)], (99, 300), form)
    name = records.payload_name("merges/1.json", sha256)
    for changed in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        store.write(name, changed)
        with pytest.raises(Damaged, match=sha256):
            records.read_payload(store, "merges/1.json", sha256)
    store.delete(name)
    with pytest.raises(Damaged, match="absent"):
        records.read_payload(store, "merges/1.json", sha256)


def test_boxes_of_a_fragment_are_its_rows():
    """Against numpy: any shard of any array, in any number of fragments."""
    whole = np.arange(23)
    for fragments in range(1, 7):
        for start in range(0, 23, 4):
            for fragment in range(fragments):
                shard = slice(start, min(start + 5, 23))
                found = courier.fragment_box((shard, slice(0, 2)), fragment, fragments)
                expected = [i for i in whole[shard] if i % fragments == fragment]
                if found is None:
                    assert not expected
                    continue
                inside, (rows, _) = found
                assert whole[shard][inside].tolist() == expected
                assert whole[fragment::fragments][rows].tolist() == expected


# --- what islands agree on -----------------------------------------------------------------------


def test_an_island_that_disagrees_is_told_the_key(tmp_path):
    store = open_store(str(tmp_path))
    place.begin(store, place.settings())
    place.begin(store, place.settings(store="x", island="y"))
    for change, words in (
        (dict(every=3), "outer.every=3: .*use 2"),
        (dict(wire=("int8",)), "outer.wire=.*int8"),
        (dict(quorum=2), "outer.quorum=2"),
        (dict(keys=("a:b",)), "outer.keys is set"),
    ):
        text = tiny.message(place.begin, store, place.settings(**change))
        assert re.search(words, text), text
    body = json.loads(store.read("about.json"))["body"]
    for key, value, words in (
        ("arrays", body["arrays"][1:], "embed has"),
        ("data", body["data"] | {"seed": 1}, "seed is 1"),
        ("data", body["data"] | {"fingerprint": "g"}, "data.path"),
    ):
        text = tiny.message(facts.found, store, Identity("a", ""), body | {key: value})
        assert words in text, text


def test_a_damaged_about_stops_everybody(tmp_path):
    store = open_store(str(tmp_path))
    process = place.begin(store, place.settings())
    data = store.read("about.json")
    store.write("about.json", data.replace(b'"every":2', b'"every":3'))
    text = tiny.message(facts.read, store, process.identity)
    assert "about.json: altered" in text
    store.delete("about.json")
    assert "no island has begun" in tiny.message(facts.read, store, process.identity)


# --- who is there --------------------------------------------------------------------------------


def processes(store: Store, number: int) -> list[Process]:
    return [Process(store, Identity("m", "s"), 10.0, f"{i}") for i in range(number)]


def test_one_of_many_takes_a_lease_and_keeps_it_while_its_beat_changes(store):
    clock, many = [0.0], processes(store, 6)
    watches = [Watch(lambda: clock[0]) for _ in many]
    for process in many:
        presence.write_beat(process, 0, {})
    take = lambda i: presence.take_lease(many[i], "merger", watches[i])
    won = together(6, take)
    assert sum(won) == 1
    holder, other = won.index(True), won.index(False)
    for count in range(1, 6):
        clock[0] += 9.0
        presence.write_beat(many[holder], count, {})
        assert not take(other) and take(holder)
    clock[0] += 9.0
    assert not take(other)
    clock[0] += 1.0
    assert take(other) and presence.holds_lease(many[other], "merger")
    assert not presence.holds_lease(many[holder], "merger") and not take(holder)
    assert len(store.list("leases/")) == 1


def test_a_holder_that_left_or_whose_record_is_damaged_is_followed(tmp_path):
    store, clock = open_store(str(tmp_path)), [0.0]
    one, two, three = processes(store, 3)
    watch = Watch(lambda: clock[0])
    assert presence.take_lease(one, "x", watch)
    presence.write_beat(one, 0, {"left": True})
    assert presence.take_lease(two, "x", watch)
    [name] = store.list("leases/")
    store.write(name, b"torn")
    assert not presence.take_lease(three, "x", watch)
    clock[0] += 11.0
    assert presence.take_lease(three, "x", watch)


def test_who_slept_between_listing_and_creating_holds_nothing(tmp_path):
    store, watch = open_store(str(tmp_path)), Watch(lambda: 0.0)
    one, two, sleeper = processes(store, 3)
    assert presence.take_lease(one, "x", watch)
    presence.write_beat(one, 0, {"left": True})

    def slow_create(name: str, data: bytes) -> bool:
        for process, following in ((one, two), (two, one), (one, two)):
            presence.write_beat(process, 0, {"left": True})
            assert presence.take_lease(following, "x", Watch(lambda: 0.0))
        return store.create(name, data)

    asleep = dataclasses.replace(sleeper, store=dataclasses.replace(store, create=slow_create))
    assert not presence.take_lease(asleep, "x", watch)
    assert presence.holds_lease(two, "x")


def test_islands_live_while_their_beats_change(tmp_path):
    store, clock = open_store(str(tmp_path)), [0.0]
    a, b = (Process(store, Identity(name, "s"), 10.0, "0") for name in "ab")
    watch = Watch(lambda: clock[0])
    for count in range(3):
        presence.write_beat(a, count, {"speed": 2.0})
        if not count:
            presence.write_beat(b, count, {})
        beats = presence.read_beats(store, a.identity)
        assert set(presence.living(beats, watch, 10.0)) == ({"a", "b"} if count < 2 else {"a"})
        clock[0] += 6.0
    end = presence.start_beats(b, lambda: {"state": "training"})
    assert set(presence.living(presence.read_beats(store, a.identity), watch, 99.0)) == {"a", "b"}
    end(True)
    left = presence.read_beats(store, a.identity)["b.0"]
    assert left["left"] and left["state"] == "training"


# --- the stream of data --------------------------------------------------------------------------


def test_streams_of_islands_are_disjoint_and_together_the_whole_stream(store):
    """Islands come and go and come back; each place of the stream is read by one of them."""
    size, read = 5, {name: [] for name in "abc"}

    def open_island(name: str) -> claims.Claims:
        return claims.open_claims(Process(store, Identity(name, "s"), 1.0), size, [])

    def take(island: claims.Claims, count: int) -> None:
        own = read[island.process.identity.name]
        own += [claims.place(island, item) for item in range(len(own), len(own) + count)]

    a, b = open_island("a"), open_island("b")
    take(a, 7)
    take(b, 12)
    take(a, 4)
    again, c = open_island("a"), open_island("c")
    assert again.blocks == a.blocks
    assert [claims.place(again, item) for item in range(11)] == read["a"]
    take(again, 9)
    take(c, 3)
    places = sum(read.values(), [])
    assert len(set(places)) == len(places)
    blocks = {p // size for p in places}
    assert blocks == set(range(len(blocks)))
    together(3, lambda i: take((again, b, c)[i], 50))
    places = sum(read.values(), [])
    assert len(set(places)) == len(places) and {p // size for p in places} == set(
        range(len({p // size for p in places}))
    )


def test_other_processes_of_an_island_find_its_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL", 0.01)
    store = open_store(str(tmp_path))
    first, second = (Process(store, Identity("a", "s"), 1.0) for _ in range(2))
    leads = claims.open_claims(first, 4, [])
    follows = claims.open_claims(second, 4, [], leads=False)
    one = claims.open_claims(Process(store, Identity("b", "s"), 1.0), 4, [])
    claims.place(one, 0)
    found = together(2, lambda i: [claims.place((leads, follows)[i], item) for item in range(20)])
    assert found[0] == found[1]


def test_a_damaged_claim_is_never_read_by_another(tmp_path):
    store = open_store(str(tmp_path))
    a, b = (
        claims.open_claims(Process(store, Identity(name, "s"), 1.0), 2, []) for name in ("a", "b")
    )
    assert [claims.place(a, item) for item in range(4)] == [0, 1, 2, 3]
    store.write("blocks/000000000001.json", b"torn")
    assert [claims.place(b, item) for item in range(2)] == [4, 5]
    again = claims.open_claims(a.process, 2, a.blocks)
    assert [claims.place(again, item) for item in range(6)] == [0, 1, 2, 3, 6, 7]


def test_rounds_over_an_object_store(s3, tmp_path):
    """Islands and a merger that know only a URL, each with a connection of its own."""
    url = f"{s3}/{uuid.uuid4().hex}"
    a = place.begin(open_store(url), place.settings(wire=("int8",)), "a")
    b = place.begin(open_store(url), place.settings(wire=("int8",)), "b")
    place.publish_first(a, place.initial())
    about = place.about_of(b)
    desk = place.merger(open_store(url), tmp_path / "m")
    position, base = courier.read_snapshot(b, about)
    for number in range(2):
        for island in (a, b):
            place.beat(island, number)
            place.contribute(island, about, number, number)
        serve.turn(desk)
        for merge in place.every_merge(b, about, position):
            for name, update in merge.update.items():
                base[name] -= update
            position = merge.position
    assert position.number == 2
    found = place.arrays_of(desk)
    assert all(found[f"base:{name}"].tobytes() == x.tobytes() for name, x in base.items())
