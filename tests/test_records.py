"""Records of compiled programs are true: jaxlm traces them today, and today's compilers agree."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest
import recorded

from jaxlm import xla

LIVE = {  # of each platform the program that is compiled again
    "fsdp x tensor": "jaxlib",
    "layout fsdp on TPU": "libtpu",
    "layout tensor on GPU": "jax_cuda12_plugin",
}


def test_every_program_is_recorded_with_its_source_and_versions():
    found = recorded.read_manifest()
    assert list(found) == list(recorded.SOURCES), recorded.COMMAND
    for name, row in found.items():
        assert row["source"] == recorded.SOURCES[name]._asdict() | {
            "overrides": list(recorded.SOURCES[name].overrides)
        }, recorded.COMMAND
        assert {"jax", "jaxlib"} <= set(row["versions"]) and row["date"]
    files = {file.name for file in recorded.FOLDER.glob("*.hlo.xz")}
    assert files == {recorded.path(name, "hlo").name for name in recorded.SOURCES}
    size = sum(file.stat().st_size for file in recorded.FOLDER.iterdir())
    assert size < 5e6, "records are small: tiny models"


# What a program computes and sends, whichever version of jax traces it; the rest differs.
COSTLY = re.compile(r"(dot_general|ppermute|all_to_all) |reshard (?!(\S+) -> \2 )|donated")


@pytest.mark.parametrize("name", recorded.SOURCES)
def test_jaxlm_traces_what_was_recorded(name):
    """A record must not hide a change of the program that it stands for."""
    today = recorded.describe_trace(recorded.SOURCES[name])
    then = recorded.read_text(name, "trace").splitlines()
    if recorded.read_manifest()[name]["versions"]["jax"] != jax.__version__:
        today, then = (list(filter(COSTLY.match, lines)) for lines in (today, then))
    changes = [f"- {line}" for line in sorted(set(then) - set(today))]
    changes += [f"+ {line}" for line in sorted(set(today) - set(then))]
    told = "\n".join(changes[:20])
    assert today == then, f"{name} is another program now; run {recorded.COMMAND}\n{told}"


def test_a_trace_says_what_changed():
    """Another width, trip count, axis or donation is another description; a name is not."""
    source = recorded.SOURCES["fsdp"]
    lines = recorded.describe_trace(source)
    for more in ("model.mlp_dim=128", "model.num_layers=3", "mesh.fsdp=4", "loss.chunks=4"):
        target = "cpu:4" if "mesh" in more else source.target
        other = source._replace(target=target, overrides=(*source.overrides, more))
        assert recorded.describe_trace(other) != lines, more
    named = source._replace(overrides=(*source.overrides, "name=other"))
    assert recorded.describe_trace(named) == lines


def claims(name: str, folder: Path) -> dict:
    """What tests read off a record."""
    found = recorded.report(name, folder)
    rows = Counter()
    for row in found["collectives"]:
        rows[row["kind"], row["axes"], row["loops"]] += row["arrays"] - row["scalars"]
    sent = Counter()
    for row in found["cost"]["traffic"]:
        sent[row["kind"], row["axes"]] += row["bytes"]
    return {
        "arrays": +rows, "bytes": sent, "flops": found["cost"]["flops"],
        "classes": set(found["cost"]["memory"]), "state": found["state_and_batch_bytes"],
    }  # fmt: skip


def peak(name: str, folder: Path) -> float:
    return sum(recorded.report(name, folder)["cost"]["memory"].values())


@pytest.mark.parametrize("name", LIVE)
def test_todays_compiler_agrees_with_its_record(name, tmp_path):
    """The claims, not the text; where it does not, record again and see which claims fail."""
    if importlib.util.find_spec(LIVE[name]) is None:
        pytest.skip(f"{LIVE[name]} is not installed")
    script = Path(recorded.__file__).with_name("record_hlo.py")
    environment = os.environ | {"PYTHONPATH": str(recorded.ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), "--folder", str(tmp_path), name],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert claims(name, tmp_path) == claims(name, recorded.FOLDER), recorded.COMMAND
    assert peak(name, tmp_path) == pytest.approx(peak(name, recorded.FOLDER), rel=0.02)


def test_the_reader_knows_nothing_of_jaxlm():
    """jaxlm.xla serves anyone with an HLO text: it imports no other part of jaxlm."""
    code = (
        "import sys; from jaxlm import xla; "
        "print(*sorted(m for m in sys.modules if m.startswith('jaxlm.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = {f"{xla.__name__}.{path.stem}" for path in Path(xla.__file__).parent.glob("[a-z]*.py")}
    assert set(done.stdout.split()) == own | {xla.__name__}
