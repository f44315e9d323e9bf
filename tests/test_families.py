"""A family is one file: found because it is there, with its checks, layers, names and cache."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import latent
import local_global
import numpy as np
import pytest
import test_generate
import tiny

import jaxlm
from jaxlm import models
from jaxlm.config import FAMILIES, SHARED
from jaxlm.interop.name_map import first_layers, tensors
from jaxlm.mesh import open_mesh
from jaxlm.models.layers import RMSNorm
from jaxlm.program import make_program, trace_train_step
from jaxlm.state import model_structure


def test_every_file_is_a_family_or_shared():
    files = {file.stem for file in Path(models.__path__[0]).glob("*.py")}
    assert files == {*FAMILIES, *SHARED}
    for name in FAMILIES:
        models.family_module(name)


def test_a_new_file_is_a_family(tmp_path):
    """Its keys, checks and layers are known to the commands; no other file is touched."""
    shutil.copytree(Path(jaxlm.__file__).parent, tmp_path / "jaxlm")
    shutil.copy(local_global.__file__, tmp_path / "jaxlm" / "models")

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "jaxlm", "config", *arguments], cwd=tmp_path, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
        )  # fmt: skip

    config = [tiny.CONFIGS / "llama.yaml", "model.family=local_global", "model.dense_layers=2"]
    done = command("check", *config)
    assert done.returncode == 2 and "model.num_layers=2 leaves no pattern" in done.stderr
    done = command("explain", "model.dense_layers")
    assert "family local_global only" in done.stdout and "default 0" in done.stdout, done.stderr


BROKEN = {
    "import nothing_there": "the model family cannot be imported: ModuleNotFoundError: No module",
    "x = (": "the model family cannot be imported: SyntaxError",
    "Config = check = groups = 1": "a model family has Norm, encode_positions, MODEL_TYPES",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_one_line(text, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    line = tiny.message(models.family_module, "broken")
    sys.modules.pop("jaxlm.models.broken", None)
    assert line.startswith("jaxlm/models/broken.py: ") and BROKEN[text] in line


def test_layers_are_numbered_through_every_group_and_pattern(monkeypatch):
    """One dense layer, two whole patterns of 2 + 1, and a rest of one."""
    local_global.register(monkeypatch)
    config = local_global.config(
        tiny.config("llama", "model.sliding_window=5"), num_layers=8, locals_per_global=2,
        dense_layers=1,
    )  # fmt: skip
    groups = local_global.groups(config.model)
    assert [(len(pattern), repeats) for pattern, repeats in groups] == [(1, 1), (3, 2), (1, 1)]
    assert first_layers(groups) == [[(0, 1)], [(1, 3), (2, 3), (3, 3)], [(7, 1)]]
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        shapes = model_structure(config.model, layout).shapes
    places = {t.name: (t.ours, t.place) for t in tensors(config.model, shapes)}
    name = "model.layers.{}.mlp.gate_proj.weight"
    expected = ["0.0", "1.0", "1.1", "1.2", "1.0", "1.1", "1.2", "2.0"]
    for layer, (block, repeat) in enumerate(zip(expected, [0, 0, 0, 0, 1, 1, 1, 0], strict=True)):
        assert places[name.format(layer)] == (f"groups.{block}.gate", (repeat,))
    assert name.format(8) not in places and len(places) == 8 * 9 + 2


@pytest.mark.parametrize("count, axes", [(1, []), (4, ["mesh.fsdp=2", "mesh.tensor=2"])])
def test_a_block_says_what_it_keeps_for_generation(count, axes, monkeypatch):
    """Latent attention keeps one narrow vector of a token: scores are those without a cache."""
    latent.register(monkeypatch)
    base = tiny.config("llama", *axes)
    config = dataclasses.replace(
        base, model=latent.Config(**vars(base.model) | dict(family=latent.NAME))
    )
    mesh, layout = open_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in structure.shapes.items()}
    params = test_generate.put_weights(arrays, structure, layout, mesh)
    rows_BS = rng.integers(0, 300, (8, 24), np.int32)
    with jax.set_mesh(mesh):
        model = structure.merge(params)
        (kept,) = test_generate.generate.make_cache(config.model, 8, 20, layout)[0][0]
        expected = np.asarray(test_generate.full_forward(layout)(model, rows_BS))
    assert kept.shape == (2, 8, 20, 6)
    lengths = [3, 9, 1, 16, 2, 12, 8, 5]
    parts = (config, structure, layout, mesh, params)
    found = test_generate.cached_scores(parts, rows_BS, lengths)
    for row, length in enumerate(lengths):
        one = expected[row, length - 1 : length + 8, :300]
        np.testing.assert_allclose(found[row, :, :300], one, rtol=1e-5, atol=1e-5)


def test_a_norm_with_an_offset_keeps_small_scales():
    """x / rms(x) * (1 + w): w as it is in the file; as 1 + w in float32 this one would be lost."""
    config = tiny.config("llama")
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        norm = RMSNorm(config.model, layout, offset=1.0)
        x_BSD = jax.random.normal(jax.random.key(0), (2, 3, config.model.embed_dim))
        first = norm(x_BSD, layout)
        norm.scale.set_value(jnp.full(config.model.embed_dim, 0.5))
        np.testing.assert_allclose(norm(x_BSD, layout), 1.5 * first, rtol=1e-6)
    rms = np.sqrt(np.mean(np.square(x_BSD), -1, keepdims=True) + config.model.norm_epsilon)
    np.testing.assert_allclose(first, x_BSD / rms, rtol=1e-5)
    assert np.float32(1) + np.float32(1e-9) == 1


@pytest.mark.parametrize("layers, barriers", [(1, True), (2, False)])
def test_what_is_recomputed_waits_for_the_backward_pass(layers, barriers):
    """A loop keeps it there by itself, but XLA dissolves a loop that runs once."""
    config = tiny.config("llama", f"model.num_layers={layers}")
    program = make_program(config, jax.devices()[:1])
    text = trace_train_step(config, program).lower().as_text()
    chunks = config.loss.chunks  # the head's loop has more than one
    assert chunks > 1 and ("optimization_barrier" in text) == barriers
