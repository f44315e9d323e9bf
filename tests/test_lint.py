"""Warnings about layouts that work and are likely mistakes; each stays away where all is well."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from jaxlm import config as cfg
from jaxlm import lint
from jaxlm.mesh import open_mesh
from jaxlm.sharding import make_layout
from jaxlm.state import model_structure

LARGE = [
    "model.embed_dim=1024",
    "model.mlp_dim=8192",
    "model.vocab_size=1000",
]  # 64 MiB, by two layers


def warnings(kind: str, hosts: int, *overrides: str, model: str = "llama") -> list[str]:
    """Warnings on devices of a kind, in the order of the mesh, spread evenly over hosts."""
    config = tiny.config(model, *overrides)
    sizes = {axis: getattr(config.mesh, axis) for axis in cfg.AXES}
    count = int(np.prod(list(sizes.values())))
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    made = [
        SimpleNamespace(
            platform=platform, device_kind=kind, process_index=i * hosts // count,
            slice_index=i * hosts // count, coords=(i % 2, i // 2 % 2, i // 4),
        )
        for i in range(count)
    ]  # fmt: skip
    grid = np.array(made, object).reshape(list(sizes.values()))
    mesh = SimpleNamespace(devices=grid, shape=sizes, size=count)
    real, _ = open_mesh(tiny.config("llama"), jax.devices()[:1])
    layout = make_layout(config, sizes, config.attention)
    with jax.set_mesh(real):
        one = make_layout(config, dict.fromkeys(cfg.AXES, 1), config.attention)
        structure = model_structure(config.model, one)
    return list(lint.warnings(config, mesh, layout, structure))


def test_large_copies_are_named_with_what_splits_them():
    small = ["batch.sequences=65536", "mesh.fsdp=2", "mesh.tensor=4"]
    assert warnings("NVIDIA H100", 1, *small, *LARGE) == []
    (one,) = warnings("NVIDIA H100", 1, *small, *LARGE, "storage.embed=[]")
    assert one == (
        "groups.0.0.down, groups.0.0.gate, groups.0.0.up (up to 64 MiB of float32) rest in 2 "
        "copies each, because mesh.fsdp=2 splits none of their dimensions; "
        "storage.embed=[fsdp] does"
    )
    fixed = warnings("NVIDIA H100", 1, *small, *LARGE, "storage.embed=[fsdp]")
    assert fixed == []


@pytest.mark.parametrize("kind, name", [("NVIDIA H100", "hosts"), ("TPU v5", "slices")])
def test_tensor_groups_stay_within_fast_links(kind, name):
    many = "batch.sequences=1048576"
    assert warnings(kind, 2, many, "mesh.data=2", "mesh.tensor=4") == []
    (one,) = warnings(kind, 4, many, "mesh.data=2", "mesh.tensor=4")
    assert one.startswith(f"mesh.tensor=4: a tensor group spans {name}")
    assert "use mesh.tensor=2 or less" in one


def test_tokens_that_pay_for_the_gathers():
    """v5p: 459e12 / 1.8e11 = 2550 tokens a chip for each axis of the torus; H100: 989 / 0.45."""
    tokens = lambda n: f"batch.sequences={n // 32}"
    mesh = "mesh.fsdp=2"
    (one,) = warnings("TPU v5", 1, tokens(2 * 2528), mesh)
    assert "2528 tokens a chip" in one and "gathers from 2550" in one
    assert warnings("TPU v5", 1, tokens(2 * 2560), mesh) == []
    assert warnings("TPU v5", 1, tokens(8 * 864), "mesh.fsdp=8") == []  # three axes: 850
    assert len(warnings("TPU v5", 1, tokens(8 * 832), "mesh.fsdp=8")) == 1
    assert len(warnings("TPU v5", 1, tokens(8 * 2560), mesh, "batch.microbatches=8")) == 1
    once = ["batch.microbatches=8", "gather_at=step"]
    assert warnings("TPU v5", 1, tokens(2 * 2560), mesh, *once) == []
    assert len(warnings("NVIDIA H100", 1, tokens(2 * 2176), mesh)) == 1
    assert warnings("NVIDIA H100", 1, tokens(2 * 2208), mesh) == []
    assert warnings("cpu", 1, tokens(64), mesh) == []
    assert warnings("TPU v5", 1, tokens(64), "mesh.data=2") == []  # nothing is gathered


def test_tokens_that_pay_for_the_network():
    """v5p: 459e12 / 6.2e9 = 74032 tokens for each slice, however many chips it has."""
    mesh = ["mesh.data=4", "mesh.dcn={data: 2}"]
    assert warnings("TPU v5", 2, f"batch.sequences={2 * 74048 // 32}", *mesh) == []
    (one,) = warnings("TPU v5", 2, f"batch.sequences={2 * 73984 // 32}", *mesh)
    assert (
        one.startswith("mesh.dcn={'data': 2}: 73984 tokens a step for each slice")
        and "74032" in one
    )


def test_the_check_prints_them(capsys):
    from jaxlm import cli

    many = ["devices.simulate=0", "mesh.fsdp=8", "storage.embed=[]", *LARGE]
    assert cli.main(["config", "check", str(tiny.CONFIGS / "llama.yaml"), *many]) == 0
    out = capsys.readouterr().out
    assert (
        "fits on 8 x cpu" in out
        and "warning: groups.0.0.down, groups.0.0.gate, groups.0.0.up (" in out
    )
