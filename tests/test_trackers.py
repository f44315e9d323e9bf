"""TensorBoard and Weights & Biases over several starts of a run."""

import sys
import types

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_metrics import open_run, values

from jaxlm import metrics
from jaxlm.config import UserError


def start_run(config, run_dir, start, stop):
    """Log the steps of one start, an evaluation after the last of them, and close."""
    mesh, structure = open_run(config)
    with metrics.open_log(config, structure, mesh, run_dir, start=start) as log:
        for step in range(start + 1, stop + 1):
            log.step((step, values(10.0 * start + step)))
        if stop > start:
            log.evaluation(stop, {"loss": 2.0, "bits_per_byte": 1.5})


class Server:
    """A stand-in for the module wandb: what runs it was asked for, and what each holds."""

    def __init__(self, **given):
        self.inits, self.runs = [], {}
        names = ("project", "run_name", "run_id", "resume", "resume_from", "fork_from")
        settings = types.SimpleNamespace(**dict.fromkeys(names) | given)
        self.setup = lambda: types.SimpleNamespace(settings=settings)
        self.online = True

    def init(self, **options):
        self.inits.append(options)
        name = options.get("id") or f"run{len(self.runs)}"
        rows = self.runs.setdefault(name, [])
        return types.SimpleNamespace(
            id=name, step=rows[-1][0] + 1 if self.online and rows else 0,
            log=lambda record, step: rows.append((step, record)), finish=lambda: None,
        )  # fmt: skip


def open_server(monkeypatch, **given):
    server = Server(**given)
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return server


@pytest.mark.parametrize("online", [True, False])
def test_the_starts_of_a_run_are_one_run_of_wandb(online, tmp_path, monkeypatch, caplog):
    """Four steps, again from the checkpoint of step 2, and once with nothing to do."""
    server = open_server(monkeypatch)
    server.online = online
    config = tiny.config("llama", "log.wandb=true", "steps=6")
    with caplog.at_level("INFO", "jaxlm"):
        for start, stop in ((0, 4), (2, 6), (6, 6)):
            start_run(config, tmp_path, start, stop)
    assert "W&B holds this run's steps up to 4; it is sent those after" in caplog.text
    assert [(i["id"], i["resume"], i["project"], i["name"]) for i in server.inits] == [
        (None, "allow", "jaxlm", "tiny-llama"), ("run0", "allow", "jaxlm", "tiny-llama"),
    ]  # fmt: skip
    assert server.inits[0]["dir"] == str(tmp_path) and server.inits[0]["config"]["steps"] == 6
    (rows,) = server.runs.values()
    assert [step for step, record in rows if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [step for step, record in rows if "eval/loss" in record] == [4, 6]
    assert [r["step"] for r in tiny.records(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_start_that_was_killed_leaves_no_gap(tmp_path, monkeypatch):
    """Nobody knows what W&B wrote of it, so all later steps are sent; it drops those it holds."""
    server = open_server(monkeypatch)
    server.online = False
    config = tiny.config("llama", "log.wandb=true", "steps=6")
    mesh, structure = open_run(config)
    killed = metrics.open_log(config, structure, mesh, tmp_path, start=0)
    killed.__enter__().step((3, values(1.0)))  # and no more: it is not closed
    start_run(config, tmp_path, 2, 6)
    assert [i["id"] for i in server.inits] == [None, "run0"]
    assert [step for step, record in server.runs["run0"] if "loss" in record] == [3, 3, 4, 5, 6]


def test_the_variables_of_wandb_come_first(tmp_path, monkeypatch):
    given = {"project": "theirs", "run_name": "named", "run_id": "abc", "resume": "must"}
    server = open_server(monkeypatch, **given)
    monkeypatch.setenv("WANDB_DIR", "/somewhere")
    config = tiny.config("llama", "log.wandb=true", "steps=6")
    start_run(config, tmp_path, 0, 4)
    (found,) = server.inits
    assert (found["project"], found["name"], found["id"]) == ("theirs", "named", "abc")
    assert (found["resume"], found["dir"]) == ("must", "/somewhere")
    server = open_server(monkeypatch)  # without the variable: the run that was, by its id
    start_run(config, tmp_path, 2, 6)
    assert server.inits[0]["id"] == "abc"
    server = open_server(monkeypatch, resume_from="abc?_step=2")
    start_run(config, tmp_path, 2, 6)
    assert not {"id", "resume"} & server.inits[0].keys()
    (rows,) = server.runs.values()
    assert [step for step, record in rows if "loss" in record] == [3, 4, 5, 6]


def test_mistakes_with_wandb_are_one_line(tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured (no-tty)")

    server = open_server(monkeypatch)
    server.init = refuse
    config = tiny.config("llama", "log.wandb=true", "steps=6")
    with pytest.raises(UserError, match="cannot start a run: RuntimeError: api_key not configured"):
        start_run(config, tmp_path, 0, 4)
    (tmp_path / "wandb.json").write_text('{"id": ')
    with pytest.raises(UserError, match="wandb.json: .* remove the file"):
        start_run(config, tmp_path, 0, 4)


def test_tensorboard_reads_every_step_once(tmp_path):
    """By TensorBoard's own reader, in one directory, after starts at steps 0, 2 and 6."""
    config = tiny.config("llama", "log.tensorboard=true", "steps=6")
    for start, stop in ((0, 4), (2, 6), (6, 6)):
        start_run(config, tmp_path, start, stop)
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2  # nothing of the start that trained nothing
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    steps = [(event.step, event.value) for event in found.Scalars("loss")]
    assert steps == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0), (6, 26.0)]
    assert [event.step for event in found.Scalars("eval/loss")] == [6]


def test_the_writer_of_tensorboard_is_told_where_the_run_goes_on(tmp_path, monkeypatch):
    seen = []
    writer = types.SimpleNamespace(
        add_scalar=lambda name, value, step: seen.append((name, value, step)),
        close=lambda: seen.append("closed"),
    )
    make = lambda path, purge_step, **_: seen.append((path, purge_step)) or writer
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=make))
    start_run(tiny.config("llama", "log.tensorboard=true"), tmp_path, 2, 3)
    assert seen[0] == (str(tmp_path / "tensorboard"), 3) and seen[-1] == "closed"
    assert ("loss", 23.0, 3) in seen


TRACKERS = [("tensorboard", "tensorboardX"), ("wandb", "wandb")]


@pytest.mark.parametrize("name, module", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    config = tiny.config("llama", f"log.{name}=true")
    with pytest.raises(UserError, match=f"log.{name}=true needs {module}: pip install '{module}>="):
        start_run(config, tmp_path, 0, 1)


@pytest.mark.parametrize("name, module", TRACKERS)
@pytest.mark.parametrize(
    "code, words",
    [
        ("raise ImportError('libz.so.1: cannot open')", "ImportError: libz.so.1: cannot open"),
        ("import no_such_part", "ModuleNotFoundError: No module named 'no_such_part'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_tracker_that_is_broken_says_why(tmp_path, monkeypatch, name, module, code, words):
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    config = tiny.config("llama", f"log.{name}=true")
    with pytest.raises(UserError) as caught:
        start_run(config, tmp_path, 0, 1)
    assert f"log.{name}=true: {module} is installed and fails to import: {words}" in str(
        caught.value
    )
