"""No command unpickles anything or runs code of a file: neither it nor the processes it starts."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import cache

AUDIT = Path(__file__).parent / "audit"
LLAMA = str(tiny.CONFIGS / "llama.yaml")
COMMANDS = """
import json, sys
from jaxlm import cli
for command in json.loads(sys.argv[1]):
    print(command, cli.main(command), flush=True)
"""


class Planted:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def audited(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A Python process and those it starts, with what they did in folder/seen."""
    path = os.pathsep.join([str(AUDIT), str(AUDIT.parent.parent)])
    own = {"PYTHONPATH": path, "JAXLM_AUDIT": str(folder / "seen"), "XDG_CACHE_HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True,
        env={k: v for k, v in (os.environ | own | variables).items() if v},
    )  # fmt: skip


def seen(folder: Path) -> list[str]:
    return (folder / "seen").read_text().splitlines()


def plant(folder: Path, overrides: list[str]) -> None:
    """A pickle under each name that was ever looked for in plan.cache, and under its own."""
    target = parse_target("cpu:2")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    host = hashlib.sha256(flags.encode()).hexdigest()[:16]
    auto = configfile.load(LLAMA, overrides)
    names = ["efficiencies", cache.key(auto, "mesh", target=target.text, memory=auto.plan.memory)]
    for axis in ("data", "fsdp", "tensor"):  # that mesh: auto may choose
        config = cache.settled(configfile.load(LLAMA, [*overrides, f"mesh.{axis}=2"]), target)
        names += [cache.key(config, "executable", target=target.text, host=host)]
        names += [cache.key(config, "compiled", target=target.text)]
    where = folder / "planted"
    where.mkdir()
    for name in names:
        for suffix in ("pickle", "json"):
            (where / f"{name}.{suffix}").write_bytes(pickle.dumps(Planted(folder / "marker")))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every command, most of them in one process."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "texts").mkdir()
    for i in range(12):
        line = json.dumps({"text": f"mesh axis shard token layer batch {i} " * 40})
        (folder / "texts" / f"{i}.jsonl").write_text(line + "\n")
    tokens, run, hf = (str(folder / name) for name in ("tokens", "run", "hf"))
    own = [f"data.path={tokens}", f"run.dir={run}", "devices.simulate=2", "steps=2", "eval.every=2"]
    own += [f"plan.cache={folder}/planted", "mesh=auto", "sample.every=2", "sample.tokens=2"]
    plant(folder, own)
    sources = ["--validation-fraction", "0.2", str(folder / "texts")]
    commands = [
        ["data", "prepare", "--out", tokens, "--tokenizer", "bpe", "--vocab-size", "280", *sources],
        ["data", "info", tokens],
        ["data", "show", tokens],
        ["config", "show", LLAMA, *own],
        ["config", "check", LLAMA, *own],
        ["config", "explain"],
        ["train", LLAMA, *own],
        ["plan", LLAMA, "target=cpu:2", *own],
        ["plan", LLAMA, "target=cpu:2", *own, "--search", "--analytic"],
        ["train", LLAMA, *own, f"run.dir={folder}/again"],
        ["eval", run],
        ["generate", run, "--tokens", "2", "--prompt", "mesh"],
        ["export", run, hf],
        ["import", hf, str(folder / "imported")],
        ["verify-layout", LLAMA, "fsdp=2", "steps=5", "--json"],
    ]
    done = audited(
        folder, "-c", COMMANDS, json.dumps(commands), JAX_COMPILATION_CACHE_DIR="",
        XLA_FLAGS=cache.flags(),
    )  # fmt: skip
    return folder, commands, done


def test_no_command_unpickles(everything):
    folder, commands, done = everything
    for command in commands:
        assert f"{command} 0\n" in done.stdout, done.stderr[-3000:]
    starts = [line for line in seen(folder) if line.startswith("started ")]
    assert starts[0] == f"started {os.getpid()}" and len(starts) >= 2  # the worker of `plan` too
    assert seen(folder) == starts


def test_a_planted_pickle_is_not_run(everything):
    folder, _, done = everything
    assert f"a program is loaded from {folder}/jaxlm/programs (saves" in done.stdout + done.stderr
    assert list((folder / "jaxlm" / "programs").glob("jit_train_step-*-cache"))
    assert not (folder / "marker").exists()
    pickle.loads(next((folder / "planted").glob("*.pickle")).read_bytes()).close()
    assert (folder / "marker").exists()  # it would have shown


def test_verify_layout_compares_a_layout_in_a_process_of_its_own(everything):
    _, _, done = everything
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('[{"mesh"'))
    (row,) = json.loads(line)
    assert row["mesh"] == "fsdp=2" and row["equal"] and 0 < row["errors"]["gradient"] < 1e-5
    assert {"initial", "SGD update", "AdamW update"} <= row["errors"].keys()


def test_the_audit_sees_what_is_planted(tmp_path):
    (tmp_path / "kept.pickle").write_bytes(pickle.dumps(Planted(tmp_path / "marker")))
    (tmp_path / "stranger.py").write_text("pass")
    load = f"import pickle; pickle.load(open({str(tmp_path / 'kept.pickle')!r}, 'rb'))"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {load!r}], check=True)"
    assert audited(tmp_path, "-c", child).returncode == 0
    assert seen(tmp_path)[2:] == [f"unpickled {open.__module__}.open"]
    assert audited(tmp_path, str(tmp_path / "stranger.py")).returncode == 0
    assert seen(tmp_path)[-1] == f"ran {tmp_path / 'stranger.py'}"
