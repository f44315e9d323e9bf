"""Islands that are separate jobs: each trains in a thread on a device of its own, and a merger runs
beside them; against plain runs, and against numpy."""

import threading
import time

import jax
import meeting_place as place
import numpy as np
import pytest
import tiny

from jaxlm import outer
from jaxlm.config import UserError
from jaxlm.data import load, open_split
from jaxlm.outer import about as facts
from jaxlm.outer import apart, serve, snapshots
from jaxlm.outer.presence import Process, Watch
from jaxlm.outer.records import MERGER, Identity
from jaxlm.outer.store import open_store
from jaxlm.program import make_program
from jaxlm.sharding import batch_shardings
from jaxlm.state import create_state

STEPS = 12
PROGRAMS: dict = {}


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
        self.meeting = outer.meet(config, self.program)
        self.split = open_split(config.data.path, "train")
        self.losses, self.items = [], []
        with jax.set_mesh(self.program.mesh):
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
        self.meeting.close()
        self.batches.close()


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
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        assert self.error is None


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
    ["outer.rule=diloco", "outer.learning_rate=1", "outer.momentum=0"],
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
