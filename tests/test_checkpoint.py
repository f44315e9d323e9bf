"""Checkpoints: bitwise round trips across meshes and processes, retention, damage, failed saves."""

import dataclasses
import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoint, configfile
from jaxlm import config as cfg
from jaxlm.mesh import open_mesh
from jaxlm.models import llama
from jaxlm.optim import make_optimizer
from jaxlm.state import State, abstract_state, create_state, model_structure

# After a failure Orbax leaves behind reads and writes whose event loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FACTS = {"tokenizer_sha256": "a" * 64, "next_item": 8}


def make_config(mesh: dict[str, int], optimizer: str = "adamw", **model) -> cfg.Config:
    """A tiny llama; adafactor trains its blocks only, so that the rest is `fixed`."""
    sizes = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=48)
    return cfg.Config(
        steps=10,
        model=llama.Config(**{**sizes, "family": "llama", "vocab_size": 100, **model}),
        mesh=cfg.Mesh(**mesh),
        batch=cfg.Batch(sequences=8, sequence_length=16),
        optimizer=cfg.Optimizer(
            name=optimizer,
            learning_rate=1e-3,
            train=("groups.*",) if optimizer == "adafactor" else ("*",),
        ),
        data=cfg.Data(path="data"),
    )


def target(config: cfg.Config, count: int = 8) -> State:
    """The abstract state of a config on the first `count` devices."""
    return on_devices(abstract_state, config, count)


def on_devices(make, config: cfg.Config, count: int) -> State:
    """abstract_state or create_state of a config on the first `count` devices."""
    mesh, layout = open_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        dims = model_structure(config.model, layout).dims
        return make(config, layout, make_optimizer(config.optimizer, 10, dims), mesh)


def fill(abstract: State, step: int, nan: bool = True) -> State:
    """A state of random bits that depend on the step and the leaf alone, with `nan` also of NaNs
    and infinities."""
    leaves, treedef = jax.tree.flatten(abstract)

    def one(index: int, leaf) -> jax.Array:
        bits = np.random.default_rng([step, index]).bytes(leaf.size * leaf.dtype.itemsize)
        value = np.frombuffer(bits, leaf.dtype).reshape(leaf.shape)
        if not nan and jnp.issubdtype(leaf.dtype, jnp.inexact):
            value = np.where(np.isfinite(value.astype(np.float32)), value, 1).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)

    state = jax.tree.unflatten(treedef, [one(i, leaf) for i, leaf in enumerate(leaves)])
    counter = jax.device_put(np.int32(step), abstract.step.sharding)
    return State(counter, state.params, state.fixed, state.opt)


def finite(step: int) -> State:
    """A small state without NaN and infinity."""
    return fill(small(), step, nan=False)


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def small(count: int = 8) -> State:
    """The abstract state of a few arrays of many types, half of them split over the devices."""
    mesh, _ = open_mesh(make_config({"data": count}), jax.devices()[:count])
    split = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    array = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    params = {f"groups.0.{i}.q": array((8, 4 + i), jnp.float32, split) for i in range(3)}
    dtypes = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8, jnp.uint32)
    fixed = {np.dtype(dtype).name: array((3, 5), dtype, whole) for dtype in dtypes}
    count_ = array((), jnp.int32, whole)
    return State(count_, params, fixed, ({"mu": params, "count": count_}, (), None))


def write(directory: Path, *states: State, data=FACTS, config=None, **keep) -> None:
    """Save states under their step numbers, one after another."""
    manager = checkpoint.open_manager(directory, cfg.Checkpoint(**{"keep": 100, **keep}))
    config = configfile.to_dict(config or make_config({"data": 8}))
    for state in states:
        checkpoint.save(manager, int(state.step), state, data, config)
    checkpoint.finish(manager)


def error_of(function, *args) -> str:
    """The text of the UserError that a call raises: one line."""
    with pytest.raises(cfg.UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_any_mesh_to_any_mesh(tmp_path, optimizer):
    meshes = [({"data": 8}, 8), ({"fsdp": 8}, 8), ({"tensor": 4}, 4), ({}, 1)]
    meshes += [({"data": 2, "fsdp": 2, "tensor": 2}, 8)]
    targets = [target(make_config(mesh, optimizer), count) for mesh, count in meshes]
    first = fill(targets[0], 1)
    assert bool(first.fixed) == (optimizer == "adafactor")
    state = first
    for step, abstract in enumerate(targets[1:], 1):
        write(tmp_path, State(jnp.int32(step), state.params, state.fixed, state.opt))
        state = checkpoint.restore_state(tmp_path, step, abstract)
        assert int(state.step) == step
        assert_same((state.params, state.fixed, state.opt), (first.params, first.fixed, first.opt))
        shardings = jax.tree.map(lambda x: x.sharding, (state, abstract))
        assert shardings[0] == shardings[1]


def test_types_and_names(tmp_path):
    state = fill(small(), 5)
    write(tmp_path, state)
    assert_same(checkpoint.restore_state(tmp_path, 5, small(4)), state)
    metadata = json.loads((tmp_path / "5" / "opt" / "_METADATA").read_text())
    names = [entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()]
    assert sorted(names) == ["0.count", *(f"0.mu.groups.0.{i}.q" for i in range(3))]


def test_read_only_manager(tmp_path):
    write(tmp_path, fill(small(), 5))
    with pytest.raises(cfg.UserError, match="no checkpoint there"):
        checkpoint.read_config(tmp_path / "none")
    manager = checkpoint.open_manager(tmp_path, cfg.Checkpoint(), read_only=True)
    assert_same(checkpoint.restore_state(manager, 5, small()), fill(small(), 5))
    checkpoint.open_manager(tmp_path / "none", cfg.Checkpoint(), read_only=True)
    assert not (tmp_path / "none").exists()


def test_saved_state_may_be_donated(tmp_path):
    """Background writes read the state of their step, although later steps reuse its buffers."""
    mesh, _ = open_mesh(make_config({"data": 8}))
    value = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    specs = {"rows": jax.P("data"), "columns": jax.P(None, "data"), "whole": jax.P()}
    params = {n: jax.device_put(value, jax.NamedSharding(mesh, s)) for n, s in specs.items()}
    state = State(jax.device_put(np.int32(0), params["whole"].sharding), params, {}, dict(params))
    state = jax.tree.map(lambda x: x.copy(), state)  # the step donates each buffer once
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    step = step.lower(state).compile()
    manager = checkpoint.open_manager(tmp_path, cfg.Checkpoint(keep=100))
    busy = []
    for number in range(1, 19):
        state = step(state)
        if number % 3 == 1:
            checkpoint.save(manager, number, state, FACTS, {})
        elif number % 3 == 2:
            jax.block_until_ready(state)
            busy.append(manager.is_saving_in_progress())
    checkpoint.finish(manager)
    assert any(busy)  # else this test shows nothing
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    for number in range(1, 19, 3):
        saved = checkpoint.restore_state(tmp_path, number, abstract)
        for array in (*saved.params.values(), *saved.opt.values()):
            assert np.array_equal(array, value + number)
    after = step(step(saved))  # restored buffers may be donated too
    assert int(after.step) == 18 and np.array_equal(after.params["rows"], value + 18)


def test_json_is_copied(tmp_path):
    manager = checkpoint.open_manager(tmp_path, cfg.Checkpoint())
    data = {"next_item": 8, "nested": {"a": [1, 2]}}
    checkpoint.save(manager, 1, fill(small(), 1), data, {"name": "x"})
    data["next_item"] = 9
    data["nested"]["a"].append(3)
    checkpoint.finish(manager)
    assert checkpoint.read_data(tmp_path, 1) == {"next_item": 8, "nested": {"a": [1, 2]}}
    assert checkpoint.read_config(tmp_path) == {"name": "x"}


def test_retention(tmp_path):
    kept = {3: [2, 3], 4: [3, 4], 5: [4, 5], 6: [4, 5, 6], 7: [4, 6, 7], 8: [4, 7, 8], 9: [4, 8, 9]}
    for step in range(1, 10):  # a new manager each time, as after a crash
        write(tmp_path, finite(step), keep=2, keep_every=4)
        assert checkpoint.steps(tmp_path) == kept.get(step, list(range(1, step + 1)))
    write(tmp_path, *(finite(step) for step in (10, 11, 13)), keep=2, keep_every=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 11, 13]
    assert checkpoint.latest(tmp_path) == 13


def test_the_newest_without_nan_is_kept(tmp_path):
    bad = lambda step: dataclasses.replace(
        finite(step), params={n: x * jnp.nan for n, x in finite(step).params.items()}
    )
    write(tmp_path, finite(1), finite(2), bad(3), bad(4), bad(5), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    assert [checkpoint.is_finite(tmp_path, step) for step in (2, 4, 5)] == [True, False, False]
    write(tmp_path, bad(6), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    infinite = finite(7)
    infinite.opt[0]["mu"]["groups.0.1.q"] = infinite.params["groups.0.1.q"] / 0
    write(tmp_path, infinite, finite(8), keep=1)
    assert checkpoint.steps(tmp_path) == [8]


def test_never_overwrites(tmp_path):
    write(tmp_path, fill(small(), 5))
    assert "5 is there already" in error_of(write, tmp_path, fill(small(), 5))
    assert_same(checkpoint.restore_state(tmp_path, 5, small()), fill(small(), 5))


def test_leftovers_are_not_checkpoints(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None and checkpoint.latest(tmp_path) is None
    write(tmp_path, fill(small(), 5))
    leftover = tmp_path / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", leftover)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "7x").mkdir()
    assert checkpoint.latest(tmp_path) == 5
    checkpoint.open_manager(tmp_path, cfg.Checkpoint(), read_only=True)
    assert leftover.exists()
    write(tmp_path, fill(small(), 6))  # the same step as the leftover
    assert checkpoint.steps(tmp_path) == [5, 6] and not leftover.exists()
    assert_same(checkpoint.restore_state(tmp_path, 6, small()), fill(small(), 6))


def test_the_newest_is_read_where_a_run_removes_it_meanwhile(tmp_path):
    assert checkpoint.read_newest(tmp_path / "none", lambda step: step) is None
    write(tmp_path, fill(small(), 5))

    def read(step: int):
        if step == 5:  # what a run with checkpoint.keep=1 does
            write(tmp_path, fill(small(), 6))
            shutil.rmtree(tmp_path / "5")
        return checkpoint.restore_state(tmp_path, step, small())

    found = checkpoint.read_newest(tmp_path, read)
    assert found is not None and found[0] == 6
    assert_same(found[1], fill(small(), 6))
    shutil.rmtree(tmp_path / "6/params")
    text = error_of(checkpoint.read_newest, tmp_path, read)  # damaged, not removed
    assert (
        f"{tmp_path}/6: damaged: params/" in text and "is missing; no older step is sound" in text
    )


DAMAGES = {
    "deleted": lambda content, other: None,
    "emptied": lambda content, other: b"",
    "cut": lambda content, other: content[: len(content) // 2],
    "longer": lambda content, other: content + b"\0",
    "one bit": lambda content, other: flipped(content),
    "of another step": lambda content, other: other,
}


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :] or b"x"


def test_no_damaged_file_is_read(tmp_path, caplog):
    """Each file of a checkpoint, damaged in each way: named, and the step before is used."""
    run, good = tmp_path / "checkpoints", tmp_path / "good"
    states = {step: fill(small(), step) for step in (4, 5)}
    write(run, *states.values())
    shutil.copytree(run, good)
    read = lambda step: (
        checkpoint.read_data(run, step),
        checkpoint.restore_state(run, step, small()),
    )
    files = [path for path in (good / "5").rglob("*") if path.is_file()]
    unread = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax's, beside the items
    files = [path for path in files if path.name not in unread]
    others = sorted((good / "4").rglob("*"))
    for path in files:
        name, content = path.relative_to(good), path.read_bytes()
        alike = [o for o in others if o.is_file() and o.suffix == path.suffix]
        other = next((o for o in alike if o.read_bytes() != content), path).read_bytes()
        for how, damage in DAMAGES.items():
            data = damage(content, other)
            if data == content:
                continue
            broken = run / name
            broken.write_bytes(data) if data is not None else broken.unlink()
            caplog.clear()
            step, (facts, state) = checkpoint.read_newest(run, read)
            assert step == 4 and facts == FACTS, (name, how)
            assert_same(state, states[4])
            said = str(name).removeprefix("5/")
            assert said in caplog.text and "step 4 is used" in caplog.text, (name, how)
            broken.write_bytes(content)
    step, (_, state) = checkpoint.read_newest(run, read)
    assert step == 5
    assert_same(state, states[5])


def test_a_damaged_step_is_put_aside_where_an_older_one_is_sound(tmp_path, caplog):
    write(tmp_path, fill(small(), 3), fill(small(), 4), fill(small(), 5))
    (tmp_path / "99999").mkdir()
    for item in ("params", "opt"):  # whole, and sound, of another step
        shutil.rmtree(tmp_path / "5" / item)
        shutil.copytree(tmp_path / "4" / item, tmp_path / "5" / item)
    read = lambda step: checkpoint.restore_state(tmp_path, step, small())
    step, state = checkpoint.read_newest(tmp_path, read, put_aside=True)
    assert step == 4 and checkpoint.steps(tmp_path) == [3, 4]
    assert_same(state, fill(small(), 4))
    assert "99999: damaged: manifest.json is missing; it is now 99999.damaged" in caplog.text
    assert (tmp_path / "5.damaged" / "params").is_dir()
    shutil.rmtree(tmp_path / "4" / "opt")
    (tmp_path / "3").rename(tmp_path / "5")
    for _ in range(2):  # never a new run instead
        text = error_of(lambda: checkpoint.read_newest(tmp_path, read, put_aside=True))
        assert f"{tmp_path}/5: damaged: manifest.json is of step 3: something was renamed" in text
        assert f"to begin anew, move {tmp_path} away" in text
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_checkpoints_of_before_there_were_manifests(tmp_path):
    write(tmp_path, fill(small(), 5))
    (tmp_path / "5" / "manifest.json").unlink()
    read = lambda step: checkpoint.restore_state(tmp_path, step, small())
    assert "manifest.json is missing" in error_of(checkpoint.read_newest, tmp_path, read)
    path = tmp_path / "5" / "config" / "metadata"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    assert checkpoint.read_newest(tmp_path, read)[0] == 5


def test_items_are_restorable_alone(tmp_path):
    state, abstract = fill(small(), 5), small()
    write(tmp_path, state)
    for item in ("opt", "data"):
        shutil.rmtree(tmp_path / "5" / item)
    os.remove(tmp_path / "5" / "_CHECKPOINT_METADATA")
    params, fixed = checkpoint.restore_params(tmp_path, 5, abstract.params, abstract.fixed)
    assert_same((params, fixed), (state.params, state.fixed))
    text = error_of(checkpoint.restore_state, tmp_path, 5, abstract)
    assert f"{tmp_path}/5: opt cannot be read" in text and "no older step" in text


def test_other_model_or_optimizer(tmp_path):
    config = make_config({"fsdp": 8})
    write(tmp_path, fill(target(config), 5), config=config)
    restore = lambda config: error_of(checkpoint.restore_state, tmp_path, 5, target(config))
    text = restore(make_config({"fsdp": 8}, mlp_dim=64))
    assert f"{tmp_path}/5: params does not fit this config: groups." in text
    assert "float32[2, 32, 48] there, float32[2, 32, 64] here" in text
    text = restore(make_config({"fsdp": 8}, tie_embeddings=True))
    assert "absent here" in text and "absent there" not in text
    text = restore(make_config({"fsdp": 8}, "muon"))
    assert "opt does not fit" in text and "saved with optimizer.name=adamw" in text
    assert "params does not fit" in restore(make_config({"fsdp": 8}, "adafactor"))  # trains fewer
    abstract = target(config)
    text = error_of(checkpoint.restore_params, tmp_path, 5, abstract.params, abstract.params)
    assert "fixed does not fit" in text and "and " in text


def test_missing_newer_and_renamed(tmp_path):
    abstract = small()
    write(tmp_path, fill(abstract, 5), fill(abstract, 6))
    assert "there are steps 5, 6" in error_of(checkpoint.restore_state, tmp_path, 7, abstract)
    assert "train first" in error_of(checkpoint.read_config, tmp_path / "none", 7)
    (tmp_path / "6").rename(tmp_path / "8")
    assert "it is of step 6" in error_of(checkpoint.restore_state, tmp_path, 8, abstract)
    path = tmp_path / "5" / "config" / "metadata"
    about = json.loads(path.read_text())
    assert about["format"] == 2 and about["jaxlm"] and about["config"]["steps"] == 10
    path.write_text(json.dumps({**about, "format": 3, "jaxlm": "9.0"}))
    text = error_of(checkpoint.restore_params, tmp_path, 5, abstract.params, abstract.fixed)
    assert "written by jaxlm 9.0 in checkpoint format 3" in text and "update it" in text
    path.write_text(json.dumps({**about, "format": "new"}))
    assert "config cannot be read" in error_of(checkpoint.read_config, tmp_path, 5)


def test_failed_save_is_reported_and_the_next_one_is_made(tmp_path):
    write(tmp_path, finite(1), finite(2))
    manager = checkpoint.open_manager(tmp_path, cfg.Checkpoint(keep=2))
    save = lambda step: checkpoint.save(manager, step, finite(step), FACTS, {})
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for step, limit in ((3, 1500), (4, 0)):  # bytes of a file: arrays fail, everything fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(step)
            text = error_of(save, step + 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert f"{tmp_path}/{step}: the checkpoint was not saved: File too large" in text
        assert checkpoint.steps(tmp_path) == [1, 2] == manager.all_steps()
        checkpoint.finish(manager)  # told once
    save(5)
    checkpoint.finish(manager)
    assert checkpoint.steps(tmp_path) == [2, 5]
    assert_same(checkpoint.restore_state(tmp_path, 5, small()), finite(5))


def test_failed_removal_is_not_a_failed_save(tmp_path, monkeypatch):
    write(tmp_path, finite(1), finite(2))
    manager = checkpoint.open_manager(tmp_path, cfg.Checkpoint(keep=2))
    checkpoint.save(manager, 3, finite(3), FACTS, {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: os.rmdir(path))  # it is not empty
        text = error_of(checkpoint.finish, manager)
    assert f"{tmp_path}: older checkpoints cannot be removed: Directory not empty" in text
    assert checkpoint.steps(tmp_path) == [1, 2, 3] == manager.all_steps()
    checkpoint.save(manager, 4, finite(4), FACTS, {})
    checkpoint.finish(manager)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    text = error_of(checkpoint.open_manager, tmp_path / "file", cfg.Checkpoint())
    assert "cannot keep checkpoints there: File exists" in text
    manager = checkpoint.open_manager(tmp_path / "run", cfg.Checkpoint())
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("x")
    text = error_of(checkpoint.save, manager, 1, fill(small(), 1), {}, {})
    assert f"{tmp_path}/run/1: the checkpoint was not saved: " in text


def test_refuse_other_run(tmp_path):
    config = make_config({"data": 8})
    refuse = lambda config, facts=FACTS: checkpoint.refuse_other_run(tmp_path, config, facts)
    assert refuse(config) == []
    write(tmp_path / "checkpoints", fill(small(), 5), config=config)
    assert refuse(make_config({"fsdp": 4, "tensor": 2})) == []
    text = error_of(refuse, make_config({}, "muon", embed_dim=64, tie_embeddings=True))
    assert f"run.dir={tmp_path} holds a run of another model: model.embed_dim=32 there, 64" in text
    assert "model.tie_embeddings=false there, true here; optimizer.name=adamw there, muon" in text
    assert text.endswith("; choose another run.dir")
    text = error_of(refuse, config, {"tokenizer_sha256": "b" * 64})
    assert "tokenizer=aaaaaaaaaaaa there, bbbbbbbbbbbb here" in text
    assert refuse(make_config({}, init_std=0.5)) == [("model.init_std", 0.02, 0.5)]
    imported = tmp_path / "imported"
    write(imported / "checkpoints", fill(small(), 0), data={}, config=config)
    text = error_of(checkpoint.refuse_other_run, imported, config, FACTS)
    assert f"checkpoint.start_from={imported}" in text


def test_orbax_is_silent(tmp_path, capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        write(tmp_path, fill(small(), 1), fill(small(), 2), keep=1)
        checkpoint.restore_state(tmp_path, 2, small())
        manager = checkpoint.open_manager(tmp_path, cfg.Checkpoint(), read_only=True)
        checkpoint.finish(manager)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if "orbax" in record.pathname]


# Two processes, each running `worker`.

MESHES = [{"data": 2, "fsdp": 2}, {"fsdp": 4}, {"tensor": 4}]


def worker(process: str, port: str, source: str, result: str) -> None:
    """Over two processes: restore what one wrote onto three meshes, save it, and a new state."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert jax.process_count() == 2 and len(jax.devices()) == 4
    assert checkpoint.latest(source) == 1
    manager = checkpoint.open_manager(result, cfg.Checkpoint(keep=3))
    for step, mesh in enumerate(MESHES, 1):
        config = make_config(mesh)
        state = checkpoint.restore_state(source, 1, target(config, 4))
        data, saved = checkpoint.read_data(source, 1), checkpoint.read_config(source)
        checkpoint.save(manager, step, state, data, saved)
    initial = on_devices(create_state, make_config(MESHES[0]), 4)
    checkpoint.save(manager, 4, initial, data, saved)
    checkpoint.finish(manager)
    again = checkpoint.restore_state(manager, 3, target(make_config(MESHES[0]), 4))
    for x, y in zip(*map(jax.tree.leaves, (again.params, state.params)), strict=True):
        assert x.shape == y.shape
    if process == "0":  # one process may read these alone
        checkpoint.refuse_other_run(Path(source).parent, config, FACTS)


def test_two_processes(tmp_path):
    source, result = tmp_path / "checkpoints", tmp_path / "result"
    state = fill(target(make_config({"fsdp": 8})), 1)
    write(source, state)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    code = "import sys, test_checkpoint as t; t.worker(*sys.argv[1:])"
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(port), str(source), str(result)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    output = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    assert checkpoint.steps(result) == [2, 3, 4]
    for step in (2, 3):
        for mesh, count in (({"fsdp": 4}, 4), ({"data": 4}, 4), ({}, 1)):
            restored = checkpoint.restore_state(result, step, target(make_config(mesh), count))
            expected = (state.params, state.fixed, state.opt)
            assert_same((restored.params, restored.fixed, restored.opt), expected)
    assert checkpoint.read_data(result, 3) == FACTS
    here = on_devices(create_state, make_config({}), 1)
    restored = checkpoint.restore_state(result, 4, target(make_config({}), 1))
    assert_same(restored.params, here.params)
