"""What a run tells: its files, its progress line, and the loggers that are extras."""

import io
import json
import math
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from jaxlm import configfile, lint, metrics, train
from jaxlm.attention.xla import visible, visible_pairs
from jaxlm.config import UserError
from jaxlm.devices import launcher
from jaxlm.hardware.chips import kind
from jaxlm.mesh import open_mesh
from jaxlm.models import layer_windows, llama
from jaxlm.plan import estimate
from jaxlm.plan.estimate import structure_of
from jaxlm.state import model_structure


def open_run(config):
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return mesh, model_structure(config.model, layout)


def values(loss):
    return {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1}


def test_records_after_the_start_are_dropped_and_nan_is_null(tmp_path, capsys):
    config = tiny.config("llama", "steps=9")
    mesh, structure = open_run(config)
    old = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(record) + "\n" for record in old)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    with metrics.open_log(config, structure, mesh, tmp_path, start=2) as log:
        log.step((3, values(math.nan)))
        log.step(None)
        log.evaluation(3, {"loss": 2.0, "bits_per_byte": 1.5})
        log.samples(3, [("a", "b")])
    records = tiny.records(tmp_path)
    assert [(r["step"], r.get("loss")) for r in records] == [(1, 1), (2, 1), (3, None), (3, None)]
    assert records[-1]["eval/bits_per_byte"] == 1.5
    assert tiny.records(tmp_path, "samples.jsonl") == [{"step": 3, "prompt": "a", "text": "b"}]
    assert "step 3/9 loss nan" in capsys.readouterr().out


def test_files_that_cannot_be_written_are_one_line(tmp_path):
    config = tiny.config("llama")
    mesh, structure = open_run(config)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written: Is a directory"):
        with metrics.open_log(config, structure, mesh, tmp_path, start=0):
            pass
    with open("/dev/full", "ab", buffering=0) as full:
        with pytest.raises(UserError, match="No space left on device; the same command goes on"):
            metrics._append(full, {"step": 1})
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with metrics.open_log(config, structure, mesh, tmp_path, start=1):
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_what_only_informs_does_not_end_a_run(data, tmp_path, monkeypatch, caplog):
    def fault(*_):
        raise KeyError("planted\nhere")

    for module, names in {
        estimate: ["predict"], lint: ["warnings"],
        metrics: ["describe_run", "flops_per_token", "_duration", "comparison", "closing_words"],
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, fault)
    where = [f"data.path={data}", f"run.dir={tmp_path}/run", "mesh.fsdp=8", "steps=2"]
    train.train(tiny.config("llama", *where, "eval.every=0", "checkpoint.every=2"))
    assert [message for message in caplog.messages if "planted" in message] == [
        f"warning: {what}: KeyError: 'planted\\nhere'"
        for what in (
            "plan: no prediction", "no MFU", "the run is not described",
            "costly settings are not named", "no line of progress", "no line of progress",
            "plan: no comparison with the run", "no closing words",
        )
    ]  # fmt: skip
    assert sorted(tiny.losses(tmp_path / "run")) == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    for kind_ in (KeyboardInterrupt, BrokenPipeError):
        with pytest.raises(kind_), metrics.only_informs("nothing"):
            raise kind_


def test_a_sample_that_the_terminal_cannot_show_is_kept(tmp_path, monkeypatch, caplog):
    config = tiny.config("llama")
    mesh, structure = open_run(config)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with metrics.open_log(config, structure, mesh, tmp_path, start=0) as log:
        log.samples(1, [("a", "\u00e9")])
    assert "warning: no sample is shown: UnicodeEncodeError" in caplog.text
    assert tiny.records(tmp_path, "samples.jsonl") == [{"step": 1, "prompt": "a", "text": "\u00e9"}]


def test_a_run_longer_than_the_calendar_has_no_end():
    config = tiny.config("llama", "steps=2147483647")
    mesh, structure = open_run(config)
    record = {"step": 1, **values(1.0), "tokens_per_second": 1.0, "step_seconds": 200.0}
    line = metrics.describer(config, structure, mesh)(record)
    assert line.endswith(" left 119304647:00:00")


def test_only_every_kth_step_is_logged_and_pauses_do_not_count(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    config = tiny.config("llama", "steps=20", "log.every=5")
    mesh, structure = open_run(config)
    with metrics.open_log(config, structure, mesh, tmp_path, start=0) as log:
        for step in range(1, 21):
            now[0] += 2.0
            log.step((step, values(1.0)))
            if step == 12:
                with log.paused():
                    now[0] += 100.0
    records = tiny.records(tmp_path)
    assert [r["step"] for r in records] == [1, 5, 10, 15, 20]
    assert {r["step_seconds"] for r in records} == {2.0}
    assert records[-1]["tokens_per_second"] == 8 * 32 / 2.0
    assert records[-1]["tokens"] == 20 * 8 * 32


def test_flops_are_six_per_matmul_parameter_and_causal_attention():
    config = tiny.config("llama", "model.tie_embeddings=false")
    _, structure = open_run(config)
    block = 32 * 4 * 8 * 2 + 2 * 32 * 2 * 8 + 3 * 32 * 64  # q and o, kv, mlp
    pairs = sum(range(1, 129))  # a query sees itself and all before it
    expected = 6 * (2 * block + 384 * 32) + 12 * 2 * 4 * 8 * pairs / 128
    assert metrics.flops_per_token(config.model, structure, 128) == expected
    tied = tiny.config("llama")
    assert metrics.flops_per_token(tied.model, open_run(tied)[1], 128) == expected


def test_the_first_and_the_last_step_are_printed(tmp_path, capsys):
    """In a run too short for another line in between."""
    config = tiny.config("llama", "steps=30", "log.every=10")
    mesh, structure = open_run(config)
    for start, stop in ((0, 30), (21, 30)):
        with metrics.open_log(config, structure, mesh, tmp_path, start=start) as log:
            for step in range(start + 1, stop + 1):
                log.step((step, values(1.0)))
        printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert printed == [f"{start + 1}/30", "30/30"]


def test_pairs_are_those_that_the_mask_shows():
    places = np.arange(40)
    for window in (0, 1, 7, 39, 40, 41, 1000):
        assert visible_pairs(40, window) == int(visible(places, places, window).sum())


def test_a_window_bounds_what_attention_counts_for():
    """Llama 3 8B at 32k tokens, from its published sizes; a longer window changes nothing."""
    D, L, H, C, F, V, S, W = 4096, 32, 32, 128, 14336, 128256, 32768, 1024
    N = V * D + L * (2 * D * H * C + 2 * D * 8 * C + 3 * D * F)
    for window, pairs in ((0, S * (S + 1) / 2), (W, W * S - W * (W - 1) / 2), (S, S * (S + 1) / 2)):
        config = configfile.load(
            Path(__file__).parent.parent / "configs" / "llama3-8b.yaml",
            [f"batch.sequence_length={S}", f"model.sliding_window={window}"],
        )
        found = metrics.flops_per_token(config.model, structure_of(config), S)
        assert found == pytest.approx(6 * N + 12 * L * H * C * pairs / S, rel=1e-12)
        assert round(found / 1e9, 1) == {0: 70.8, W: 46.6, S: 70.8}[window]


class Local(llama.Block):
    """A block of a family in which others see all: it does not see far."""

    @staticmethod
    def window(config):
        return 8


def test_every_layer_counts_by_the_window_of_its_block(monkeypatch):
    """Five local layers and one global one, twice; the blocks attend by the same windows."""
    pattern = (Local,) * 5 + (llama.Block,)
    monkeypatch.setattr(llama, "groups", lambda config: [(pattern, config.num_layers // 6)])
    config = tiny.config("llama", "model.num_layers=12")
    assert layer_windows(config.model) == ([8] * 5 + [0]) * 2
    _, structure = open_run(config)
    block = 32 * 4 * 8 * 2 + 2 * 32 * 2 * 8 + 3 * 32 * 64
    pairs = 10 * (8 * 32 - 28) + 2 * 32 * 33 / 2
    expected = 6 * (12 * block + 384 * 32) + 12 * 4 * 8 * pairs / 32
    assert metrics.flops_per_token(config.model, structure, 32) == expected
    model = structure.merge({name: name for name in structure.shapes})  # pyright: ignore
    assert [block.attention.window for block in model.groups[0]] == [8] * 5 + [0]


def test_flops_of_experts_are_of_those_that_a_token_meets():
    """Qwen3-MoE with a shared expert, tied: the table counts once, as the head."""
    config = tiny.config("qwen3_moe", "model.shared_expert_dim=16", "model.sliding_window=4")
    D, F, E, H, K, C, S = 32, 64, 4, 4, 2, 16, 32
    layer = D * C * (2 * H + 2 * K) + D * E + 2 * 3 * D * F + 3 * D * 16
    expected = 6 * (384 * D + 2 * layer) + 12 * 2 * H * C * (4 * S - 6) / S
    assert config.model.tie_embeddings
    assert metrics.flops_per_token(config.model, open_run(config)[1], S) == expected


def test_mfu_is_shown_where_the_peak_is_known(monkeypatch):
    config = tiny.config("llama")
    mesh, structure = open_run(config)
    record = {"step": 10, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1}
    record |= {"tokens_per_second": 1000.0, "step_seconds": 30.0}
    line = metrics.describer(config, structure, mesh)(record)
    assert "MFU" not in line and "left 5:00" in line and " ends " in line
    flops = metrics.flops_per_token(config.model, structure, 32)
    known = types.SimpleNamespace(bf16_flops=2000.0 * flops)
    monkeypatch.setattr(metrics.chips, "kind", lambda mesh: known)
    assert "MFU 50.0%" in metrics.describer(config, structure, mesh)(record)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ""),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]"}, "slurm"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, ""),
        ({"SLURM_NTASKS": "8"}, ""),  # an allocation, but not within srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "openmpi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, ""),
        ({"MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ],
)
def test_the_launcher_is_found_from_its_variables(environment, expected):
    assert launcher(environment) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"), ("TPU v4", "TPU v4"), ("TPU7x", "TPU7x"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("cpu", "cpu"),
    ],
)  # fmt: skip
def test_kinds_of_devices(name, expected):
    device = types.SimpleNamespace(device_kind=name)
    mesh = types.SimpleNamespace(devices=np.array([device], object))
    assert kind(mesh).name == expected
