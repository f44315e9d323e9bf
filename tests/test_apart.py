"""Islands that are separate jobs: each trains in a thread on a device of its own, and a merger runs
beside them; against plain runs, and against numpy."""

import dataclasses
import json
import socket
import threading
import time
from types import SimpleNamespace

import jax
import meeting_place as place
import numpy as np
import pytest
import tiny

from jaxlm import checkpoint, optim, outer
from jaxlm import run as run_dirs
from jaxlm.config import UserError
from jaxlm.data import load, open_split
from jaxlm.outer import about as facts
from jaxlm.outer import adopt, courier, presence, records, serve, snapshots
from jaxlm.outer import ledger as books
from jaxlm.outer.courier import Contribution
from jaxlm.outer.island import Island, Outstanding
from jaxlm.outer.presence import Process, Watch
from jaxlm.outer.records import MERGER, Identity
from jaxlm.outer.store import open_store
from jaxlm.program import make_program
from jaxlm.sharding import batch_shardings
from jaxlm.state import create_state
from jaxlm.validate import validate

STEPS = 12
PROGRAMS: dict = {}
OPEN: list["Run"] = []


def config(data, store, island: str = "a", *overrides: str):
    return tiny.config(
        "llama", f"data.path={data}", f"steps={STEPS}", "outer.every=3", "outer.rule=average",
        f"outer.store={store}", f"outer.island={island}", "outer.grace=4", "model.num_layers=2",
        "data.segments=false", "outer.defend=none", *overrides,
    )  # fmt: skip


def program_of(config, device: int):
    """A program on one device; that of the same model is compiled once for each device."""
    key = (repr(config.model), repr(config.optimizer), repr(config.batch), config.steps, device)
    if key not in PROGRAMS:
        PROGRAMS[key] = make_program(config, [jax.devices()[device]])
    return PROGRAMS[key]


class Run:
    """An island's loop, step by step."""

    def __init__(self, config, device: int, state=None):
        self.config, self.program = config, program_of(config, device)
        self.meeting, self.batches = outer.meet(config, self.program), None
        OPEN.append(self)
        self.split = open_split(config.data.path, "train")
        self.losses, self.items = [], []
        with jax.set_mesh(self.program.mesh):
            self.meeting.enter()
            first = create_state(
                config, self.program.layout, self.program.optimizer, self.program.mesh
            )
            self.state = self.meeting.begin(first) if state is None else state(self, first)
        self.start = int(self.state.step)
        self.batches = load.batches(
            self.split, config.batch, config.seed,
            batch_shardings(config, self.program.layout, self.program.mesh), self.start,
            segments=config.data.segments, places=self.place, prefetch=1,
        )  # fmt: skip

    def place(self, item: int) -> int:
        found = self.meeting.places(item)
        self.items.append((item, found))
        return found

    def step(self):
        with jax.set_mesh(self.program.mesh):
            self.state, values = self.meeting.step(self.state, next(self.batches))
        self.losses.append(self.meeting.read(values)["loss"])
        return values

    def finish(self, steps: int | None = None, pause: float = 0.0):
        steps = self.config.steps if steps is None else steps
        while int(self.state.step) < steps:
            self.step()
            time.sleep(pause)
        return self

    def read_items(self) -> set[int]:
        """Places of the stream that were trained on."""
        used = range(self.start * self.config.batch.sequences,
                     int(self.state.step) * self.config.batch.sequences)  # fmt: skip
        return {found for item, found in self.items if item in used}

    def merged(self) -> dict[str, np.ndarray]:
        with jax.set_mesh(self.program.mesh):
            state = self.meeting.merged(self.state)
        return {name: np.asarray(x) for name, x in (state.params | state.fixed).items()}

    def close(self):
        OPEN.remove(self)
        self.meeting.close()
        if self.batches is not None:
            self.batches.close()


@pytest.fixture(autouse=True)
def no_island_goes_on():
    """An island that outlives its test would write files during the next ones."""
    yield
    for run in list(OPEN):
        run.close()


class Merger:
    """A merger in a thread."""

    def __init__(self, url: str, folder):
        self.stop, self.folder = threading.Event(), folder
        self.store = open_store(url)
        self.error = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            while "about.json" not in self.store.list(""):
                if self.stop.wait(0.02):
                    return
            _, about, identity = facts.read(self.store, Identity(MERGER, ""))
            process = Process(self.store, identity, 1.0)
            self.folder.mkdir(exist_ok=True)
            ledger = None
            while ledger is None and not self.stop.wait(0.02):
                ledger = snapshots.open_ledger(process, about, self.folder)
            if ledger is None:
                return
            desk = serve.Desk(ledger, Watch())
            while not self.stop.wait(0.02):
                serve.turn(desk)
        except Exception as error:
            self.error = error
            for run in list(OPEN):  # or they would wait for ever
                run.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        if self.error is not None:
            raise self.error


def together(*calls):
    """Results of functions that run at the same time."""
    found, errors = [None] * len(calls), []

    def one(i):
        try:
            found[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.fixture(scope="module")
def plain(data):
    """Losses of a run without islands."""
    own = tiny.config("llama", f"data.path={data}", f"steps={STEPS}", "data.segments=false")
    return Run(own, 0).finish()


@pytest.mark.parametrize("rule", [
    ["outer.rule=average"],
    tiny.nightly(["outer.rule=diloco", "outer.learning_rate=1", "outer.momentum=0"]),
    ["outer.rule=average", "outer.fragments=2", "outer.every=4", "outer.overlap=1", "outer.mix=1"],
    ["outer.rule=delayed", "outer.learning_rate=1", "outer.momentum=0"],
    ["outer.rule=average", "outer.start_step=5"],
])  # fmt: skip
def test_an_island_alone_trains_as_a_plain_run(data, tmp_path, plain, rule):
    """Bit for bit: every loss and the stream of data."""
    with Merger(str(tmp_path / "store"), tmp_path / "m"):
        run = Run(config(data, tmp_path / "store", "a", *rule), 0)
        run.finish()
        run.close()
    assert run.losses == plain.losses
    assert run.read_items() == plain.read_items()


def run_pair(data, folder, *overrides, pauses=(0.0, 0.0), first: int = 1):
    """Two islands to the end, and a merger that reads what is left; both make `first` steps, for
    which they compile, before either makes more."""
    store = folder / "store"
    with Merger(str(store), folder / "m"):
        runs = together(*(
            lambda i=i: Run(config(data, store, "ab"[i], *overrides), i).finish(first)
            for i in range(2)
        ))  # fmt: skip
        together(*(lambda r=r, p=p: r.finish(pause=p) for r, p in zip(runs, pauses, strict=True)))
        for run in runs:
            run.close()
    desk = place.merger(open_store(str(store)), folder / "again")
    return runs, desk


def test_two_islands_end_with_the_same_bits_and_read_no_item_twice(data, tmp_path):
    rule = ["outer.rule=diloco", "outer.momentum=0.5", "outer.wire=[int8]", "outer.quorum=2"]
    (a, b), desk = run_pair(data, tmp_path, *rule, "outer.start_step=3", first=STEPS)
    assert place.same(a.merged(), b.merged())
    merged = place.arrays_of(desk)
    for name, x in a.merged().items():
        assert x.tobytes() == merged[f"base:{name}"].tobytes(), name
    read = [run.read_items() for run in (a, b)]
    assert not read[0] & read[1]
    assert sorted(run.start for run in (a, b)) == [0, 3]
    # Both learn: the merged model is better than what they started from.
    assert max(a.losses[-1], b.losses[-1]) < min(a.losses[0], b.losses[0]) - 1


def island_of(folder, mix: float, rule: str, name: str = "a"):
    """An island with made-up arrays, and the boxes of its parameters."""
    store = open_store(str(folder / "store"))
    outer_keys = place.settings(mix=mix, rule=rule, learning_rate=1.0, momentum=0.0)
    process = place.begin(store, outer_keys, name)
    about = place.about_of(process)
    base = place.boxes(place.initial())
    rng = np.random.default_rng(5)
    theta = {k: (x - 0.1 * rng.normal(size=x.shape)).astype(np.float32) for k, x in base.items()}
    isle = Island(process, about, None, 64, 4, 100, threading.Event(), None)
    isle.base, isle.taken, isle.step = dict(base), [0], 6
    return isle, base, theta


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("what", ["used", "late", "refused", "delayed"])
def test_merges_are_taken_in_as_stated(tmp_path, what, mix):
    """Against the formulas in float64; and D counts once: base - theta keeps what was not sent."""
    rule = "delayed" if what == "delayed" else "average"
    isle, base, theta = island_of(tmp_path, mix, rule)
    rng = np.random.default_rng(6)
    update = {n: (0.1 * rng.normal(size=s)).astype(np.float32) for n, s in place.SHAPES.items()}
    sent = {k: (0.5 * (base[k] - theta[k])).astype(np.float32) for k in base}
    record = dict(island="a", number=0, refused=2 * (what == "refused"), reason="", staleness=0)
    body = dict(number=0, fragment=0, islands=[] if what == "late" else [record])
    own = Contribution(0, 0, 0, 64, 2, 4, 16)
    waiting = Outstanding(own, sent, None, None)
    merge = courier.Merge(body, books.Position(1), update, 10)
    new = adopt.take(isle, theta, merge, waiting, courier.Sent([], 0, {}))
    for key, x in theta.items():
        name = key.partition("|")[0]
        x, u, b, d = (np.asarray(y, np.float64) for y in (x, update[name], base[key], sent[key]))
        expected = {
            "used": mix * x + (1 - mix) * (b - u), "late": x - u, "refused": b - u,
            "delayed": x + (1 - mix) * (d - u),
        }[what]  # fmt: skip
        np.testing.assert_allclose(new[key], expected, atol=1e-6)
        np.testing.assert_allclose(isle.base[key], b - u, atol=1e-6)
    counted = what != "late"
    assert isle.last == (4 if counted else 0) and isle.taken == [4 if counted else 0]


def test_error_feedback_is_kept_dropped_or_left(tmp_path):
    """What the wire lost goes with the next D; a refused one loses it, a late one leaves it."""
    for what, expected in (("used", 2.0), ("refused", 0.0), ("late", 1.0)):
        isle, base, theta = island_of(tmp_path / what, 0.0, "average")
        isle.error = {key: np.ones_like(x) for key, x in base.items()}
        record = dict(island="a", number=0, refused=2 * (what == "refused"), reason="", staleness=0)
        body = dict(number=0, fragment=0, islands=[] if what == "late" else [record])
        waiting = Outstanding(Contribution(0, 0, 0, 64, 2, 4, 16), {}, None, None)
        merge = courier.Merge(body, books.Position(1), place.initial(1), 10)
        sent = courier.Sent([], 0, {key: np.full_like(x, 2.0) for key, x in base.items()})
        adopt.take(isle, theta, merge, waiting, sent)
        assert {float(x) for box in isle.error.values() for x in np.ravel(box)} == {expected}


def test_one_who_joins_late_goes_on_with_the_newest(data, tmp_path):
    """The parameters, the step and the schedule of the others; fresh moments; data of its own."""
    store = tmp_path / "store"
    with Merger(str(store), tmp_path / "m"):
        a = Run(config(data, store, "a"), 0).finish(7)
        b = Run(config(data, store, "b"), 1)
        assert b.start == 6 and place.same(b.merged(), a.merged())
        own = {n: np.asarray(x) for n, x in b.state.params.items()}
        assert all(own[n].tobytes() == x.tobytes() for n, x in a.merged().items() if n in own)
        rate = float(b.step()[0]["learning_rate"])
        assert rate == pytest.approx(float(optim.schedule(b.config.optimizer, STEPS)(6)))
        adam, _, schedule = b.state.opt
        assert (int(adam.count), int(schedule.count)) == (1, 7)
        together(a.finish, b.finish)
        for run in (a, b):
            run.close()
    assert not a.read_items() & b.read_items()


def test_work_that_comes_late_enters_the_next_round(data, tmp_path):
    """A slow island keeps the steps that it made while rounds closed without it."""
    rule = ["outer.grace=0", "outer.every=2"]
    (a, b), desk = run_pair(data, tmp_path, *rule, pauses=(0.05, 0.4))
    store = open_store(str(tmp_path / "store"))
    used = {"a": 0, "b": 0}
    numbers = []
    for name in store.list("merges/"):
        body = records.read_record(store, desk.ledger.identity, name)
        for each in body["islands"]:
            used[each["island"]] += each["steps"]
            numbers.append((each["island"], each["number"]))
    first = snapshots.read_position(
        records.read_record(store, desk.ledger.identity, store.list("snapshots/")[0])
    )
    assert len(set(numbers)) == len(numbers)
    assert first.steps + sum(used.values()) == sum(len(run.losses) for run in (a, b))


def test_nobody_waits_where_contributions_are_merged_as_they_come(data, tmp_path, monkeypatch):
    """Delayed: a slower island makes fewer steps between its contributions."""
    sent, announce = {"a": [], "b": []}, courier.announce

    def watched(process, own, payloads):
        sent[process.identity.name].append(own.steps)
        return announce(process, own, payloads)

    speeds = {"a": 10.0, "b": 2.0}  # by the pauses, on a machine with nothing else to do
    known = lambda isle: setattr(isle, "speed", speeds[isle.name])
    monkeypatch.setattr(adopt, "measure_speed", known)
    monkeypatch.setattr(courier, "announce", watched)
    rule = ["outer.rule=delayed", "outer.learning_rate=0.7", "outer.momentum=0.5", "outer.every=2"]
    (a, b), desk = run_pair(data, tmp_path, *rule, pauses=(0.1, 0.5))
    assert np.median(sent["b"]) < 2 <= np.median(sent["a"][:-1])
    assert desk.ledger.position.steps == sum(len(run.losses) for run in (a, b))
    assert np.isfinite(a.losses + b.losses).all()


def test_an_island_s_speed_is_in_steps_a_second():
    isle = SimpleNamespace(step=202, clock=(2, time.monotonic() - 100), speed=0.0)
    adopt.measure_speed(isle)
    assert isle.speed == pytest.approx(2.0, rel=0.05) and isle.clock[0] == 202


def test_an_island_gone_bad_is_refused_and_starts_again_from_the_merged(data, tmp_path, caplog):
    store = tmp_path / "store"
    with Merger(str(store), tmp_path / "m"):
        run = Run(config(data, store, "a"), 0).finish(2)
        bad = {n: x + np.nan for n, x in run.state.params.items()}
        run.state = dataclasses.replace(run.state, params=bad)
        run.finish(3)
        assert "refused this island's contribution: it is not finite" in caplog.text
        assert all(np.isfinite(x).all() for x in run.merged().values())
        for name, x in run.state.params.items():
            assert np.asarray(x).tobytes() == run.merged()[name].tobytes()
        run.close()


# --- coming back ---------------------------------------------------------------------------------


def save(run: Run, folder) -> int:
    """A checkpoint, as the loop writes it."""
    manager = checkpoint.open_manager(folder, run.config.checkpoint)
    step = int(run.state.step)
    with jax.set_mesh(run.program.mesh):
        kept, islands = run.meeting.saved(run.state)
        state = load.data_state(step, run.split, run.config.batch, run.config.seed)
        facts_ = run.meeting.facts()
        checkpoint.save(manager, step, kept, state | facts_, {}, islands)
        checkpoint.finish(manager)
    return step


def back(folder, step: int):
    """What makes the state of a Run that comes back."""
    return lambda run, _: run.meeting.restore(folder, step)


@pytest.mark.parametrize("rule", [
    ["outer.wire=[int4]", "outer.rule=diloco", "outer.momentum=0.5"],
    ["outer.wire=[int8]", "outer.overlap=1", "outer.mix=0.5", "outer.every=3"],
    tiny.nightly(["outer.rule=average", "outer.start_step=9"]),
])  # fmt: skip
def test_a_run_that_is_killed_and_comes_back_is_the_same(data, tmp_path, rule):
    """Bit for bit, at any step of a round: also what the wire lost, and what was under way."""
    whole = []
    with Merger(str(tmp_path / "calm"), tmp_path / "m"):
        calm = Run(config(data, tmp_path / "calm", "a", *rule), 0).finish()
        calm.close()
    for at in (3, 7):
        store = tmp_path / f"store{at}"
        with Merger(str(store), tmp_path / f"m{at}"):
            first = Run(config(data, store, "a", *rule), 0).finish(at)
            step = save(first, tmp_path / f"checkpoints{at}")
            first.close()
            second = Run(
                config(data, store, "a", *rule), 0, back(tmp_path / f"checkpoints{at}", step)
            )
            assert second.start == at
            second.finish()
            second.close()
        whole = first.losses + second.losses
        assert whole == calm.losses, at
        assert second.read_items() == calm.read_items() - first.read_items()


def test_rounds_made_since_a_checkpoint_are_not_made_again(data, tmp_path):
    """A run that comes back goes on after what it contributed: no round twice, no item twice."""
    store = tmp_path / "store"
    with Merger(str(store), tmp_path / "m"):
        first = Run(config(data, store, "a"), 0).finish(2)
        step = save(first, tmp_path / "checkpoints")
        first.finish(8)
        merged = first.merged()
        first.close()
        second = Run(config(data, store, "a"), 0, back(tmp_path / "checkpoints", step))
        assert second.start == 6 and place.same(second.merged(), merged)
        contributed = set(range(6 * 8))
        second.finish()
        second.close()
    places = {found for item, found in first.items if item in contributed}
    assert not places & second.read_items()
    wrong = config(data, tmp_path / "other", "a")
    text = tiny.message(Run, wrong, 0, back(tmp_path / "checkpoints", step))
    assert "another outer.store" in text


def test_one_process_at_a_time_has_an_island_s_name(data, tmp_path):
    store = tmp_path / "store"
    with Merger(str(store), tmp_path / "m"):
        first = Run(config(data, store, "a"), 0).finish(2)
        first.meeting.close()  # its beats stop as if it had been stopped
        second = Run(config(data, store, "a"), 1)
        with pytest.raises(UserError, match="another process trains as this island"):
            first.finish(3)
        second.close()


def test_a_process_that_was_replaced_leaves_the_checkpoints_alone(data, tmp_path, monkeypatch):
    """The other one, which has waited for the name, takes the newest checkpoint."""
    store, folder = tmp_path / "store", tmp_path / "r/checkpoints"
    own = config(data, store, "a", f"run.dir={tmp_path / 'r'}", "checkpoint.keep=1")
    waits, take = threading.Event(), presence.take_lease

    def take_lease(*arguments) -> bool:
        taken = take(*arguments)
        if not taken:
            waits.set()
        return taken

    monkeypatch.setattr(presence, "take_lease", take_lease)
    with Merger(str(store), tmp_path / "m"):
        first = Run(own, 0).finish(3)
        save(first, folder)

        def later():
            assert waits.wait(100)
            first.finish(6)
            save(first, folder)
            first.meeting.close()  # its beats stop as if it had been stopped

        def resume(run, _):
            program = run.program
            return run_dirs.first_state(
                own, program.layout, program.optimizer, program.mesh, run.split,
                run.meeting.restore, run.meeting.begin,
            )[0]  # fmt: skip

        second, _ = together(lambda: Run(own, 1, resume), later)
        assert second.start == 6
        with pytest.raises(UserError, match="another process trains as this island"):
            save(first, folder)
        second.close()
    assert checkpoint.steps(folder) == [6]


def test_mistakes_name_their_key(data, tmp_path):
    for overrides, words in (
        (["outer.island=merger"], "outer.island='merger'"),
        (["outer.island=a/b"], "outer.island='a/b'"),
        (["outer.overlap=3"], "outer.overlap=3"),
        (["mesh.replica=2"], "mesh.replica=2 with outer.store"),
        (["outer.keys=[a]"], "outer.keys: 'a' must be NAME:PUBLIC_KEY"),
    ):
        own = config(data, tmp_path, "a", *overrides)
        assert words in tiny.message(validate, own)
    public = "0" * 64
    own = config(data, tmp_path / "s", "a", f"outer.keys=[a:{public}]", f"run.dir={tmp_path / 'r'}")
    assert "outer.keys has another key for a" in tiny.message(Run, own, 0)


# --- real processes ------------------------------------------------------------------------------


@pytest.mark.nightly
def test_an_island_of_two_processes_killed_and_back(data, tmp_path, plain):
    """Alone it trains as a plain run, to rounding; each process sends its own shards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    store, run_dir = tmp_path / "store", tmp_path / "run"
    merger = tiny.command("outer", "serve", str(store))
    common = [
        "train", str(tiny.CONFIGS / "llama.yaml"), f"run.dir={run_dir}", f"data.path={data}",
        f"steps={STEPS}", "data.segments=false", "outer.every=4", f"outer.store={store}",
        "outer.island=a", "outer.grace=4", "outer.rule=average", "outer.fragments=2",
        "outer.overlap=1", "outer.mix=1", "checkpoint.every=3", "eval.every=0", "mesh.fsdp=4",
        "devices.simulate=2", f"devices.coordinator=localhost:{port}", "devices.num_processes=2",
    ]  # fmt: skip
    start = lambda: [tiny.command(*common, f"devices.process_id={i}") for i in range(2)]
    try:
        processes = start()
        until = time.monotonic() + 200
        while checkpoint.latest(run_dir / "checkpoints") not in (6, 9, 12):
            assert time.monotonic() < until
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.communicate()
        for process in start():
            tiny.finish(process)
    finally:
        merger.kill()
        merger.communicate()
    losses = tiny.losses(run_dir)
    rtol = 1e-3 if len(losses) < STEPS else 1e-5  # merges since the checkpoint: moments are older
    for step, loss in losses.items():
        assert loss == pytest.approx(plain.losses[step - 1], rel=rtol)
    names = open_store(str(store)).list("contributions/")
    assert all(len(json.loads((store / n).read_text())["body"]["payloads"]) == 2 for n in names)
