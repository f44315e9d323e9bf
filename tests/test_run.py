"""Whole runs from the command line: what they write, how they go on, where they stop."""

import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from jaxlm import checkpoint, metrics
from jaxlm.cli import main
from jaxlm.data import load_tokenizer, open_split
from jaxlm.data.prepare import prepare
from jaxlm.data.separators import Separators
from jaxlm.data.tokenize import make_characters
from jaxlm.run import example_prompt, keep_tokenizer, load_config, training_tokenizer

KEYS = {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "step_seconds"}
STEPS = 20
COMMON = ["devices.simulate=4", "mesh.fsdp=4", f"steps={STEPS}", "eval.every=10"]
COMMON += ["checkpoint.every=5", "checkpoint.keep=10"]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    output = tiny.finish(start(run_dir, data))
    return run_dir, output


def train(run_dir, data, common=COMMON):
    where = [f"run.dir={run_dir}", f"data.path={data}"]
    return ["train", str(tiny.CONFIGS / "llama.yaml"), *where, *common]


def start(run_dir, data, *overrides, common=COMMON):
    return tiny.command(*train(run_dir, data, common), *overrides)


def test_a_run_writes_what_is_promised(alone):
    run_dir, output = alone
    steps = [r for r in tiny.records(run_dir) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all(KEYS <= r.keys() for r in steps)
    assert steps[-1]["tokens"] == STEPS * 8 * 32
    evaluations = [r for r in tiny.records(run_dir) if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [10, 20]
    assert evaluations[1]["eval/bits_per_byte"] < evaluations[0]["eval/bits_per_byte"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["embed_dim"] == 32
    assert (run_dir / "checkpoints" / f"{STEPS}").is_dir()
    assert f"step 1/{STEPS} loss" in output and "\r" not in output


def test_killed_and_started_again_the_losses_are_the_same_bits(alone, data, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, data)
    wait_for(lambda: (run_dir / "checkpoints" / "5").exists())
    process.kill()
    process.communicate()
    assert max(tiny.losses(run_dir)) < STEPS
    output = tiny.finish(start(run_dir, data))
    assert "resumed at step" in output
    assert tiny.losses(run_dir) == tiny.losses(alone[0])
    assert len(tiny.records(run_dir)) == len(tiny.records(alone[0]))


def wait_for(reached):
    until = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < until, "the run did not come this far"
        time.sleep(0.05)


def test_resumed_on_another_mesh_the_losses_agree(alone, data, tmp_path, caplog):
    run_dir = tmp_path / "run"
    shutil.copytree(alone[0], run_dir)
    for step in range(10, STEPS + 1, 5):
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    here = ["devices.simulate=0", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert main([*train(run_dir, data), *here]) == 0
    assert "resumed at step 5" in caplog.text
    losses, expected = tiny.losses(run_dir), tiny.losses(alone[0])
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)


# Two processes share rows here; they share weights in test_checkpoint.py and test_generate.py.
@pytest.mark.parametrize("mesh", [tiny.nightly(["mesh.fsdp=4"]), ["mesh.context=4", "mesh.fsdp=1"]])
def test_two_processes_train_the_same_run(mesh, alone, data, tmp_path, capsys):
    run_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [f"devices.coordinator=localhost:{port}", "devices.num_processes=2"]
    common = ["devices.simulate=2", *COMMON[2:], *mesh]
    common += [f"checkpoint.every={STEPS}", f"eval.every={STEPS}"]
    processes = [
        start(run_dir, data, *together, f"devices.process_id={i}", common=common) for i in (0, 1)
    ]
    for process in processes:
        tiny.finish(process)
    losses, expected = tiny.losses(run_dir), tiny.losses(alone[0])
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    assert main(["eval", str(run_dir), "--json", "devices.simulate=0", "mesh.data=2"]) == 0
    one_process = json.loads(capsys.readouterr().out)["loss"]
    logged = [r["eval/loss"] for r in tiny.records(alone[0]) if "eval/loss" in r]
    assert one_process == pytest.approx(logged[-1], rel=1e-5)


def test_interrupt_says_how_to_go_on(data, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # where this process ignores it, as background jobs do, so would the one that it starts
        process = start(tmp_path / "run", data, "steps=100000")
    finally:
        signal.signal(signal.SIGINT, before)
    lines = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: lines.exists() and len(tiny.losses(lines.parent)) >= 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err and "Traceback" not in err


def test_eval_is_the_same_on_every_mesh_and_counts_each_token_once(alone, data, capsys):
    run_dir, _ = alone
    found = []
    wider = ["mesh.fsdp=8", "batch.sequences=56"]  # another number of rows to fill up
    for mesh in (["mesh.fsdp=8"], ["mesh.fsdp=2", "mesh.tensor=4"], ["mesh.fsdp=-1"], wider):
        assert main(["eval", str(run_dir), "--json", "devices.simulate=0", *mesh]) == 0
        found.append(json.loads(capsys.readouterr().out))
    np.testing.assert_allclose([f["loss"] for f in found], found[0]["loss"], rtol=1e-6)
    assert {f["tokens"] for f in found} == {open_split(data, "validation").tokens - 1}
    logged = [r["eval/loss"] for r in tiny.records(run_dir) if "eval/loss" in r]
    assert found[0]["loss"] == pytest.approx(logged[-1], rel=1e-6)
    assert found[0]["perplexity"] == pytest.approx(np.exp(found[0]["loss"]))


def test_generate_export_import_round_trip(alone, tmp_path, capsys):
    run_dir, _ = alone
    here = ["devices.simulate=0", "mesh.fsdp=8"]
    assert main(["generate", str(run_dir), "--prompt", "mesh ", "--temperature=0", *here]) == 0
    text = capsys.readouterr().out
    assert text.startswith("mesh ") and len(text) > 20
    assert main(["export", str(run_dir), str(tmp_path / "hf"), *here]) == 0
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "again"), "mesh.fsdp=8"]) == 0
    capsys.readouterr()
    again = ["generate", str(tmp_path / "again"), "--prompt", "mesh ", "--temperature=0"]
    assert main(again + ["precision.compute=float32"]) == 0
    assert capsys.readouterr().out == text


def test_a_terminal_of_few_characters_shows_escapes(alone, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("caf\u00e9 \u20ac5 " * 100)
    prepare(tmp_path / "data", [tmp_path / "text.txt"], "bytes", validation_fraction=0)
    capsys.readouterr()
    here = ["devices.simulate=0", "mesh.fsdp=8"]
    prompt = ["--prompt=caf\u00e9 \u20ac", "--tokens=2", "--temperature=0"]
    for command in (
        ["data", "show", str(tmp_path / "data"), "--sequence-length=16"],
        ["generate", str(alone[0]), *prompt, *here],
    ):
        for encoding in ("latin-1", "ascii"):
            screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
            monkeypatch.setattr("sys.stdout", screen)
            assert main(command) == 0
            screen.flush()
            text = screen.buffer.getvalue().decode(encoding)
            e = "\u00e9" if encoding == "latin-1" else r"\xe9"
            assert f"caf{e} \\u20ac" in text
    odd = os.fsdecode(b"caf\xe9")
    assert main(["generate", str(alone[0]), "--prompt", odd, *here]) == 2
    assert main(["train", str(alone[0]), f"sample.prompts=['{odd}']", *here]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and err.count("udce9") >= 2, err


def test_the_prompt_to_try_fits_the_data(alone, tmp_path):
    assert " --prompt 'caf\u00e9 it'\"'\"'s 5'" in closing(
        tmp_path, "\n\n caf\u00e9 it's 5 o'clock"
    )
    assert "generate run\n" in closing(tmp_path, " \n" * 40)
    assert "--prompt '\u65e5" in closing(tmp_path, "\u65e5\u672c (\u8a9e)" * 9)
    assert "def main(" not in alone[1] and "jaxlm generate" in alone[1]
    corpus = tmp_path / "python-stdlib"
    (tmp_path / "data").rename(corpus)
    assert "--prompt 'def main('" in closing(tmp_path, "", corpus)


def closing(tmp_path, text, data=None):
    """The last words of a run on this text."""
    made = data or tmp_path / "data"
    if data is None:
        (tmp_path / "text.txt").write_text(text)
        prepare(made, [tmp_path / "text.txt"], "bytes", validation_fraction=0, overwrite=True)
    config = tiny.config("llama", f"data.path={made}", "data.corpus=python-stdlib")
    prompt = example_prompt(config, load_tokenizer(made), open_split(made, "train"))
    words = metrics.closing_words(config, Path("run"), 0, prompt, True)
    unheld = metrics.closing_words(config, Path("run"), 0, prompt, False)
    assert "  jaxlm eval run\n" in words and "eval" not in unheld and "export run" in unheld
    return words


def test_texts_end_where_those_of_the_first_weights_did(tmp_path, data):
    """An import may have more ends than its data: a run that starts from it keeps them."""
    run, first = tmp_path / "run", tmp_path / "first"
    first.mkdir()
    around = Separators(bos=1, eos=2, stop=(3, 0))
    keep_tokenizer(first, dataclasses.replace(load_tokenizer(data), separators=around))
    where = [f"data.path={data}", f"run.dir={run}"]
    alone = training_tokenizer(tiny.config("llama", *where))
    assert alone.separators == Separators(0, 0)
    started = training_tokenizer(tiny.config("llama", *where, f"checkpoint.start_from={first}"))
    assert started.separators == Separators(0, 0, stop=(2, 3))
    run.mkdir()
    keep_tokenizer(run, started)
    assert load_tokenizer(run).separators == started.separators
    assert training_tokenizer(tiny.config("llama", *where)).separators == started.separators
    (first / "tokenizer.json").write_bytes(make_characters(["abc"]).data)
    (first / "separators.json").write_text('{"bos": null, "eos": null, "stop": [1]}')
    shutil.rmtree(run)
    other = training_tokenizer(tiny.config("llama", *where, f"checkpoint.start_from={first}"))
    assert other.separators == Separators(0, 0), "ids of another tokenizer"


def test_a_run_starts_from_given_weights_and_names_another_model(alone, data, tmp_path, caplog):
    run_dir, _ = alone
    arguments = ["train", str(tiny.CONFIGS / "llama.yaml"), f"data.path={data}", "steps=2"]
    arguments += [f"run.dir={tmp_path / 'tuned'}", f"checkpoint.start_from={run_dir}"]
    arguments += ["mesh.data=8", "optimizer.train=[groups.*]", "model.rope_theta=12000"]
    assert main(arguments) == 0
    tuned, scratch = tiny.losses(tmp_path / "tuned")[1], tiny.losses(run_dir)[1]
    assert tuned < 0.8 * scratch
    assert "checkpoint.start_from: model.rope_theta=10000.0 there, 12000.0 here" in caplog.text


def test_data_that_holds_nothing_out_is_trained_on(tmp_path, caplog):
    (tmp_path / "text.txt").write_text("mesh axis shard " * 100)
    prepare(tmp_path / "data", [tmp_path / "text.txt"], "bytes", validation_fraction=0.0)
    where = [f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "mesh.data=8"]
    assert main(["train", str(tiny.CONFIGS / "llama.yaml"), *where, "steps=2"]) == 0
    assert sorted(tiny.losses(tmp_path / "run")) == [1, 2]
    assert "no evaluation: the validation split" in caplog.text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_that_predicts_nothing_is_refused_before_the_run(split, tmp_path, capfd):
    """Characters have no separator, so that a document's first one is not predicted."""
    for i in range(99):
        (tmp_path / f"{i:02}.txt").write_text("x" if split == "train" else "long enough")
    (tmp_path / "held_out").write_text("long enough" if split == "train" else "x")
    texts = sorted(tmp_path.glob("*.txt"))
    held_out = [tmp_path / "held_out"]
    prepare(tmp_path / "data", texts, "characters", validation_inputs=held_out)
    where = [f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "mesh.data=8"]
    capfd.readouterr()
    assert main(["train", str(tiny.CONFIGS / "llama.yaml"), *where]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"split {split} has nothing to predict" in err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_as_it_is(alone, data, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(alone[0], run_dir)
    before = (run_dir / "config.yaml").read_bytes()
    arguments = ["train", str(run_dir), "steps=5", "devices.simulate=0", "mesh.fsdp=8"]
    assert main(arguments) == 0
    assert (run_dir / "config.yaml").read_bytes() == before


def test_eval_refuses_data_of_another_tokenizer(alone, tmp_path, capfd):
    (tmp_path / "text.txt").write_text("mesh axis shard " * 100)
    options = dict(validation_fraction=0.5, split_within=True)
    prepare(tmp_path / "data", [tmp_path / "text.txt"], "characters", **options)
    where = ["devices.simulate=0", "mesh.fsdp=8", f"data.path={tmp_path / 'data'}"]
    assert main(["eval", str(alone[0]), *where]) == 2
    assert "was made with another tokenizer" in capfd.readouterr().err


def test_a_run_directory_may_have_a_long_name_with_spaces(tmp_path):
    run_dir = tmp_path / ("word " * 30 + "end")
    run_dir.mkdir()
    shutil.copy(tiny.CONFIGS / "llama.yaml", run_dir / "config.yaml")
    assert load_config(run_dir).run.dir == str(run_dir)


def test_out_of_memory_is_one_line_and_advice(data, tmp_path, capfd, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore")

    monkeypatch.setattr("jaxlm.train.train", fail)
    monkeypatch.setattr("jaxlm.plan.command.advise", lambda *_: None)  # tests/test_plan.py
    assert main(["train", str(tiny.CONFIGS / "llama.yaml"), f"data.path={data}"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("jaxlm: out of memory: RESOURCE_EXHAUSTED") and err.count("\n") == 1


BAD = {
    "unknown key": (["modle.embed_dim=3"], "model.embed_dim"),
    "wrong type": (["steps=many"], "steps"),
    "indivisible": (["mesh.tensor=8"], "model.num_heads=4"),
    "too few devices": (["mesh.data=16"], "16"),
    "unused devices": (["mesh.data=2"], "8"),
    "batch": (["mesh.data=8", "batch.sequences=12"], "batch.sequences=12"),
    "missing data": (["data.path=nowhere"], "data.path=nowhere"),
    "sequence": (
        ["mesh.data=1", "mesh.context=8", "batch.sequence_length=24", "loss.chunks=1"],
        "batch.sequence_length=24 is not divisible by 2 x mesh.context=8",
    ),
    "NUL": (["run.dir='\"a\\0b\"'".replace("'", "")], "run.dir"),
    "vocabulary": (["model.vocab_size=100"], "model.vocab_size=100"),
    "unwritable": (["run.dir=/proc/run"], "run.dir=/proc/run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, data, tmp_path, capfd):
    overrides, expected = BAD[case]
    where = [f"data.path={data}", f"run.dir={tmp_path / 'run'}", "mesh.data=-1"]
    assert main(["train", str(tiny.CONFIGS / "llama.yaml"), *where, *overrides]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("jaxlm: ") and expected in err, err
    assert not (tmp_path / "run").exists()


def test_another_model_does_not_take_over_a_run_directory(alone, data, tmp_path, capfd):
    run_dir = tmp_path / "run"
    shutil.copytree(alone[0], run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    where = [f"data.path={data}", f"run.dir={run_dir}", "mesh.data=-1", "model.embed_dim=64"]
    assert main(["train", str(tiny.CONFIGS / "llama.yaml"), *where]) == 2
    assert "model.embed_dim=32 there, 64 here" in capfd.readouterr().err
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(alone, data, tmp_path, capfd):
    run_dir = tmp_path / "run"
    shutil.copytree(alone[0], run_dir)
    folder = run_dir / "checkpoints"
    newest = max(
        (folder / f"{STEPS}" / "params").rglob("d/*"), key=lambda path: path.stat().st_size
    )
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    output = tiny.finish(start(run_dir, data))
    assert f"checkpoints/{STEPS}: damaged: params/" in output
    assert f"it is now {STEPS}.damaged; step {STEPS - 5} is used" in output
    assert tiny.losses(run_dir) == tiny.losses(alone[0])
    for step in checkpoint.steps(folder):
        shutil.rmtree(folder / f"{step}" / "opt")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    capfd.readouterr()
    here = ["devices.simulate=0", "mesh.data=2"]
    for _ in range(2):  # it is never begun anew in silence
        assert main([*train(run_dir, data), *here]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and f"checkpoints/{STEPS}: damaged: opt/" in err, err
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
