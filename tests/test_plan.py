"""`jaxlm plan`: its report, cache, worker, and the prediction that stands next to a measurement."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from jaxlm import cli, configfile, metrics, train
from jaxlm import config as cfg
from jaxlm.hardware.target import AbsentDevice, local_target, parse_target
from jaxlm.plan import (
    cache,
    calibrate,
    command,
    compiled,
    estimate,
    page,
    plan,
    report,
    roofline,
    units,
)

CONFIGS = Path(__file__).parent / "configs"
TINY = CONFIGS / "llama.yaml"


def load(tmp_path, *overrides: str) -> cfg.Config:
    return configfile.load(TINY, [f"plan.cache={tmp_path}/cache", *overrides])


def jaxlm(*arguments, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, as users start it."""
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent.parent)} | variables
    environment = {name: value for name, value in environment.items() if value}
    command_ = [sys.executable, "-m", "jaxlm", *map(str, arguments)]
    return subprocess.run(command_, env=environment, capture_output=True, text=True)


# The whole way, on CPU.


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A plan, the same again, and the run that it was for."""
    folder = tmp_path_factory.mktemp("plan")
    overrides = ["mesh.fsdp=-1", f"plan.cache={folder}/cache", f"data.path={data}", "log.every=2"]
    own = {"XDG_CACHE_HOME": str(folder), "JAX_COMPILATION_CACHE_DIR": ""}
    first = jaxlm(
        "plan", TINY, "target=cpu:8", "--json", "--html", folder / "p.html", *overrides, **own
    )
    again = jaxlm("plan", TINY, "target=cpu:8", "mesh.fsdp=8", "--json", *overrides[1:])
    train = ["train", TINY, "devices.simulate=8", *overrides]
    trained = jaxlm(*train, f"run.dir={folder}/run", **own)
    assert trained.returncode == 0, trained.stderr
    return folder, first, again, trained


def test_a_plan_is_one_json_object(run):
    folder, first, again, _ = run
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["method"] == "compiled" and not found["cached"] and found["mesh"] == {"fsdp": 8}
    memory, step, flops = found["memory"], found["step"], found["flops"]
    assert sum(memory["classes"].values()) == pytest.approx(memory["peak_bytes"])
    assert memory["fits"] and 0 < memory["peak_bytes"] < memory["usable_bytes"]
    assert memory["classes"]["optimizer"] == pytest.approx(2 * memory["classes"]["parameters"], 0.1)
    assert sum(flops["parts"].values()) == pytest.approx(flops["total"])
    assert flops["ratio"] == pytest.approx(flops["total"] / flops["ideal"]) and flops["ratio"] > 1
    assert step["seconds"] > 0 and step["limit"]
    assert step["tokens_per_second"] == pytest.approx(8 * 32 / step["seconds"])
    assert found["run"]["tokens"] == 20 * 8 * 32
    assert found["run"]["chip_hours"] == pytest.approx(20 * step["seconds"] / 3600 * 8)
    assert found["run"]["checkpoint_bytes"] == pytest.approx(12 * found["parameters"], 0.01)
    assert {tuple(row["axes"]) for row in found["collectives"]} == {("fsdp",)}
    assert found["largest"] and found["largest"][0]["bytes"] >= found["largest"][-1]["bytes"] > 0
    text = (folder / "p.html").read_text()
    assert all(name in text for name in memory["classes"]) and "http" not in text
    assert "prefers-color-scheme: dark" in text and "<script" not in text


def test_a_repeated_plan_comes_from_the_cache(run):
    _, first, again, _ = run
    one, two = json.loads(first.stdout), json.loads(again.stdout)
    assert two["cached"] and one | {"cached": True} == two  # fsdp=-1 and fsdp=8 are the same


def test_train_loads_what_plan_compiled(run):
    folder, _, _, trained = run
    assert f"a program is loaded from {folder}/jaxlm/programs (saves" in trained.stdout
    assert not trained.stderr
    assert list(folder.glob("jaxlm/programs/jit_train_step-*-cache"))


def test_a_loaded_program_trains_as_a_compiled_one(run, data):
    folder, *_ = run
    config = configfile.load(folder / "run" / "config.yaml")
    found = {r["step"]: r["loss"] for r in tiny.records(folder / "run") if "loss" in r}
    losses, *_ = tiny.run(config, 8)
    assert found and all(losses[step - 1] == loss for step, loss in found.items())


def test_a_run_records_prediction_and_measurement(run):
    folder, _, _, trained = run
    record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 20 and record["plan/target"] == "cpu:8"
    for key in ("plan/step_seconds", "plan/peak_bytes", "measured/step_seconds"):
        assert record[key] > 0
    assert "plan: a step of" in trained.stdout
    assert re.search(r"plan: step_seconds? .*|plan: step predicted .* s, measured", trained.stdout)


def test_calibrated_efficiencies_are_named_by_later_plans(run):
    folder, *_ = run
    done = jaxlm("plan", "--calibrate", folder / "run")
    assert done.returncode == 0, done.stderr
    assert "kept in" in done.stdout and "predicted" in done.stdout
    config = configfile.load(folder / "run" / "config.yaml")
    made = plan.make_plan(config, parse_target("cpu:8"), analytic=True)
    record = calibrate.read_measurement(folder / "run")
    assert made.time.seconds == pytest.approx(record["measured/step_seconds"], rel=0.25)
    assert any("calibrat" in known.origin or "run" in known.origin
               for known in made.efficiencies.values())  # fmt: skip


def test_runs_without_a_measurement_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(cfg.UserError, match="has no measured/step_seconds; train writes it"):
        calibrate.read_measurement(tmp_path)
    with pytest.raises(cfg.UserError, match="cannot be read"):
        calibrate.read_measurement(tmp_path / "absent")


# The worker.


def test_a_crash_and_a_timeout_are_one_line(tmp_path, monkeypatch):
    config, target = load(tmp_path, "mesh.fsdp=8"), parse_target("cpu:8")
    with pytest.raises(compiled.CompileError, match="took longer than plan.timeout=1 s"):
        short = dataclasses.replace(config, plan=dataclasses.replace(config.plan, timeout=1.0))
        compiled.measure(short, target)
    crash = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    monkeypatch.setattr(
        compiled, "_run_worker", lambda *_: subprocess.run(crash, capture_output=True, text=True)
    )
    with pytest.raises(compiled.CompileError, match=r"cpu:8: the compiler crashed \(signal 11\)"):
        compiled.measure(config, target)
    noisy = [sys.executable, "-c", "import sys; print('noise\\nreason', file=sys.stderr); exit(1)"]
    monkeypatch.setattr(
        compiled, "_run_worker", lambda *_: subprocess.run(noisy, capture_output=True, text=True)
    )
    with pytest.raises(compiled.CompileError, match="compiling failed: reason$"):
        compiled.measure(config, target)


def test_what_the_worker_says_of_a_mistake_is_kept(tmp_path):
    last_words = lambda code, text: compiled._last_words(
        subprocess.CompletedProcess([], code, "", text), parse_target("cpu:8")
    )
    assert last_words(2, "noise\njaxlm: libtpu is missing\nlast\n") == "libtpu is missing"
    assert last_words(-6, "noise\n") == "target=cpu:8: the compiler crashed (signal 6)"
    assert last_words(1, "") == "target=cpu:8: compiling failed: no message"
    refused = (
        "  raise e\njax.errors.JaxRuntimeError: E1001: Oom:\nRan out of vmem.\nSee https://x.\n"
    )
    assert last_words(1, refused) == (
        "target=cpu:8: compiling failed: "
        "jax.errors.JaxRuntimeError: E1001: Oom: Ran out of vmem. See https://x."
    )


# The cache.


def test_a_key_changes_with_the_program_and_nothing_else(tmp_path):
    key = lambda *overrides, target="cpu:8": cache.key(
        cache.settled(load(tmp_path, *overrides), parse_target(target)), "x", target=target
    )
    same = key("mesh.fsdp=8")
    assert key("mesh.fsdp=-1") == key("mesh.fsdp=8", "run.dir=there", "data.path=x") == same
    others = [
        key("mesh.data=8"), key("mesh.fsdp=8", "optimizer.b2=0.9"),
        key("mesh.fsdp=8", "batch.microbatches=1", "remat.policy=dots"),
        key("mesh.fsdp=4", target="cpu:4"), key("mesh.fsdp=8", "steps=21"),
    ]  # fmt: skip
    assert len({same, *others}) == 6


def test_damaged_files_count_as_absent(tmp_path):
    config = load(tmp_path)
    assert cache.read(config, "a") is None
    cache.write(config, "a", {"x": 1})
    assert cache.read(config, "a") == {"x": 1}
    for damage in ('{"x"', "[1]", "\x00"):
        (tmp_path / "cache" / "a.json").write_text(damage)
        assert cache.read(config, "a") is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.json"]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    cache.write(load(tmp_path), "a", {})
    assert "results are not kept" in caplog.text


def test_where_the_cache_is(monkeypatch):
    config = configfile.load(TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory(config) == Path("/somewhere/jaxlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory(config) == Path.home() / ".cache" / "jaxlm"


# The report.


@pytest.fixture(scope="module")
def large():
    config = configfile.load(CONFIGS.parent.parent / "configs" / "llama3-8b.yaml", ["plan.price=2"])
    return plan.make_plan(config, parse_target("v6e:16x16"), analytic=True)


def test_an_analytic_plan_needs_neither_data_nor_compiler(large):
    found = plan.to_dict(large)
    assert found["method"] == "analytic" and found["target"]["chips"] == 256
    assert found["parameters"] == pytest.approx(8.03e9, rel=0.001)
    ideal = 6 * (8.03e9 - 128256 * 4096) + 6 * 32 * 4096 * 8192
    assert found["flops"]["ideal"] == pytest.approx(ideal * 2 * 8192, rel=0.001)
    step, run_ = found["step"], found["run"]
    assert step["mfu"] == pytest.approx(found["flops"]["ideal"] / 918e12 / step["seconds"])
    assert 0.2 < step["mfu"] < 0.8
    assert run_["cost"] == pytest.approx(2 * run_["chip_hours"])
    assert run_["checkpoint_bytes"] == pytest.approx(12 * 8.03e9, rel=0.001)
    names = set(found["memory"]["classes"])
    assert {"parameters", "optimizer"} <= names
    json.dumps(found)


def test_the_table_says_whether_it_fits(large, capsys):
    from rich.console import Console

    report.show(Console(width=140), plan.to_dict(large))
    text = capsys.readouterr().out
    for words in ("256 x TPU v6e", "fits (plan.memory allows 30.4 GB)", "MFU", "a step: ",
                  "x ideal", "all-gather", "the whole run", "trace of the step",
                  "attention splash: the fused kernel of TPU v6 lite"):  # fmt: skip
        assert words in text, words
    tight = dataclasses.replace(
        large.config, plan=dataclasses.replace(large.config.plan, memory=0.1)
    )
    assert not dataclasses.replace(large, config=tight).fits
    assert "DOES NOT FIT" in report.verdict(plan.to_dict(dataclasses.replace(large, config=tight)))
    assert "DOES NOT FIT" in page.page(plan.to_dict(dataclasses.replace(large, config=tight)))


def test_quantities():
    assert units.size(12.34e9) == "12.3 GB" and units.size(0) == "0 B"
    assert units.duration(7200) == "2.0 h" and units.duration(0.0123) == "12.3 ms"
    assert units.number(8.03e9) == "8.03 B"


# Targets that are plugged in, arguments, running out of memory.


@pytest.mark.parametrize(
    "text", ["v5e:2x4", "v6e:16x16", "v5p:4x4x8", "2*v5p:2x2x2", "h100:4x8", "b200:1x8", "cpu:8"]
)
def test_devices_that_are_here_are_a_target(text):
    assert local_target(parse_target(text).absent_devices()).text == text


def test_an_unknown_kind_is_one_line():
    with pytest.raises(cfg.UserError, match="no description of 'NVIDIA T4' here; known: v4"):
        local_target([AbsentDevice(0, "gpu", "NVIDIA T4", 0)])


def test_mistakes_in_arguments(capsys):
    assert cli.main(["plan"]) == 2 and "needs a CONFIG" in capsys.readouterr().err
    assert cli.main(["plan", str(TINY), "--write", "x"]) == 2
    assert "--write x needs --search" in capsys.readouterr().err
    assert cli.main(["plan", str(TINY), "target=v9:8", "--analytic"]) == 2
    assert "is not known; use a TPU slice" in capsys.readouterr().err
    assert cli.main(["plan", str(TINY), "target=cpu:8", "mesh.fsdp=3", "--analytic"]) == 2
    assert "mesh.fsdp=3 uses 3 of 8 devices" in capsys.readouterr().err


def test_out_of_memory_ends_with_edits(tmp_path, monkeypatch, capsys):
    def full(config):
        raise RuntimeError("RESOURCE_EXHAUSTED: 17 GB of 16 GB\nmore")

    started = []
    monkeypatch.setattr(train, "train", full)
    monkeypatch.setattr(
        command.subprocess, "run",
        lambda line, **_: started.append(line) or subprocess.CompletedProcess(line, 1),
    )  # fmt: skip
    assert cli.main(["train", str(TINY), "mesh.fsdp=8", f"plan.cache={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "out of memory: RESOURCE_EXHAUSTED: 17 GB of 16 GB\n" in said
    assert f"jaxlm plan {TINY} --fit mesh.fsdp=8" in said and "target=cpu:8" in said
    assert started[0][1:5] == ["-m", "jaxlm", "plan", str(TINY)]
    assert "batch.microbatches" in said  # where the planner has no answer


def test_a_fault_in_the_advice_hides_nothing(tmp_path, monkeypatch, capsys, caplog):
    def full(config):
        raise RuntimeError("RESOURCE_EXHAUSTED: 17 GB of 16 GB")

    def fault(_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(train, "train", full)
    monkeypatch.setattr(command, "_advise", fault)
    assert cli.main(["train", str(TINY), "mesh.fsdp=8", f"plan.cache={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said == "jaxlm: out of memory: RESOURCE_EXHAUSTED: 17 GB of 16 GB\n"
    assert "edits that fit are not looked for: OSError: [Errno 12] Cannot allo" in caplog.text


def test_rates_that_cannot_be_are_not_used(tmp_path):
    path = tmp_path / "efficiencies.json"
    for value in (0.5, 0, -1, math.nan, "x", math.inf):
        rate = {"value": value, "origin": "?"}
        path.write_text(json.dumps({"TPU v5e": {"matmuls": rate, "overhead": rate | {"value": 0}}}))
        assert bool(roofline.load(path)) == (value == 0.5)


def test_measurements_leave_the_compile_out():
    class Device:
        process_index = 0

        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return self.peak and {"peak_bytes_in_use": self.peak}

    found = metrics.measurements([9.0, 1.0, 3.0, 2.0], [Device(5), Device(7)])
    assert found == {"measured/step_seconds": 2.0, "measured/peak_bytes": 7}
    assert metrics.measurements([9.0], [Device(None)]) == {}
    line = metrics.comparison({"plan/step_seconds": 1.5, **found, "plan/peak_bytes": 6e9})
    assert line.startswith(
        "plan: step predicted 1.5 s, measured 2 s; peak predicted 6 GB, measured"
    )


def test_no_estimate_for_devices_without_description(monkeypatch, caplog):
    def unknown(*_):
        raise cfg.UserError("target=local: there is no description")

    monkeypatch.setattr(estimate, "predict", unknown)
    caplog.set_level("INFO", "jaxlm")
    assert train.predict(None, None) == {}
    assert "plan: no prediction: target=local" in caplog.text
