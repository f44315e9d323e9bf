"""Plugins of absent hardware are neither loaded nor heard; those of present hardware are kept."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny

from jaxlm import devices

INSTALLED = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))
HERE = devices._any_file(devices.NVIDIA_FILES) or devices._any_file(devices.TPU_FILES)
LLAMA = str(tiny.CONFIGS / "llama.yaml")
RUN = """
import sys
from jaxlm.cli import main
code = main(sys.argv[1:])
maps = open("/proc/self/maps").read()
print("loaded:", [name for name in ("libtpu.so", "xla_cuda_plugin.so") if name in maps])
sys.exit(code)
"""


@pytest.mark.skipif(not INSTALLED or HERE, reason="needs plan-tpu, plan-gpu and no accelerator")
@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "check", LLAMA],
        ["train", LLAMA, "steps=1", "model.num_layers=1"],
        ["plan", LLAMA, "target=v5e:2x4", "mesh.fsdp=8", "--analytic"],
        ["plan", LLAMA, "target=local", "--analytic"],
    ],
    ids=lambda arguments: " ".join(a for a in arguments if a != LLAMA),
)
def test_no_plugin_is_probed_without_its_hardware(data, tmp_path, arguments):
    keep = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    keep = {k: v for k, v in keep.items() if k != "TPU_LIBRARY_PATH"}  # jax sets it itself
    place = [f"data.path={data}", f"run.dir={tmp_path / 'run'}", f"plan.cache={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, *place], env=keep, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Traceback" not in done.stdout
    assert done.stdout.endswith("loaded: []\n")
    if arguments[0] == "train":
        assert "no such device: the CUDA plugin, libtpu" in done.stdout


def test_simulated_devices_have_threads_for_several_waiting_collectives():
    """With one for each, stage=2 fsdp=2 expert=2 of test_every_layout may wait for ever."""
    code = (
        "import os, jax\nfrom jaxlm import devices\nfrom jaxlm.config import Devices\n"
        "devices.start(Devices(simulate=4))\nbefore = len(os.listdir('/proc/self/task'))\n"
        "jax.devices()\nprint(len(os.listdir('/proc/self/task')) - before)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    started = lambda **given: int(
        subprocess.check_output([sys.executable, "-c", code], env=env | given, text=True)
    )
    assert started() - started(PJRT_NPROC="4") >= 16 - 4


@pytest.mark.parametrize(
    "platforms, files, left",
    [
        (None, [], ["cuda", "tpu"]),
        ("", [], ["cuda", "tpu"]),
        (None, ["nvidia0"], ["tpu"]),
        (None, ["nvidia7"], ["tpu"]),  # a container that was given one of eight
        (None, ["nvidiactl"], ["tpu"]),
        (None, ["dxg"], ["tpu"]),  # WSL
        (None, ["accel0"], ["cuda"]),
        (None, ["vfio/3"], ["cuda"]),
        (None, ["vfio/vfio"], ["cuda", "tpu"]),
        (None, ["nvidia0", "accel0"], []),
        (None, ["kfd"], ["cuda", "tpu"]),  # AMD: its plugin is not touched
        ("cuda", [], []),
        ("tpu,cpu", [], []),
    ],
)
def test_hardware_that_is_there_is_kept(tmp_path, monkeypatch, platforms, files, left):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("NVIDIA_FILES", "TPU_FILES"):
        patterns = [pattern.replace("/dev", str(tmp_path)) for pattern in getattr(devices, name)]
        monkeypatch.setattr(devices, name, [p for p in patterns if not p.startswith("/proc")])
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(devices, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(devices, "_cuda_plugins", lambda: ["jax_plugins.xla_cuda99"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    replaced = []
    register = lambda name, factory, **settings: replaced.append(name)
    monkeypatch.setattr(devices.backend, "register_backend_factory", register)
    assert len(devices.leave_out_absent()) == len(left)
    if "jax_plugins.xla_cuda99" in sys.modules:
        sys.modules["jax_plugins.xla_cuda99"].initialize()  # as jax does: registers nothing
        replaced.append("cuda")
    assert sorted(replaced) == left
