"""Runs on several meshes: the same initial bits and samples, the same losses to rounding.

Every layout, one step at a time, is in test_every_layout.py.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from jaxlm.config import AXES, UserError
from jaxlm.mesh import _hybrid_grid, open_mesh

LAYOUTS = {
    "one device": (1, []),
    "tensor, kv heads replicated": (4, ["mesh.tensor=4"]),
    "data x fsdp x tensor": (8, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
    "dcn": (8, ["mesh.data=4", "mesh.fsdp=2", "mesh.dcn={data: 2}"]),
    "microbatches": (2, ["mesh.data=2", "batch.microbatches=4"]),
    "batch on fewer axes": (
        8,
        ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "rules.batch=[fsdp]"],
    ),
    "gathered once a step": (
        4,
        ["mesh.data=2", "mesh.fsdp=2", "gather_at=step", "batch.microbatches=2"],
    ),
}


@pytest.fixture(scope="module")
def references(data):
    kept = {}

    def reference(family, optimizer):
        if (family, optimizer) not in kept:
            config = tiny.config(family, f"data.path={data}", f"optimizer.name={optimizer}")
            kept[family, optimizer] = tiny.run(config, 1)
        return kept[family, optimizer]

    return reference


# Each day with one family: gpt2 is on every axis in test_every_layout.py, Muon in test_optim.py.
BOTH = "data x fsdp x tensor"
MUON = [("gpt2", "muon", BOTH), *(tiny.nightly("gpt2", "muon", n) for n in LAYOUTS if n != BOTH)]


FEW = ("microbatches", "gathered once a step")  # each day in test_{every_layout,context}.py
LLAMA = [("llama", "adamw", name) for name in list(LAYOUTS)[1:] if name not in FEW]
LLAMA += [tiny.nightly("llama", "adamw", name) for name in FEW]


@pytest.mark.parametrize("family, optimizer, layout", LLAMA + MUON)
def test_every_layout_is_the_same_run(layout, family, optimizer, data, references):
    count, mesh = LAYOUTS[layout]
    config = tiny.config(family, f"data.path={data}", f"optimizer.name={optimizer}", *mesh)
    losses, initial, batch, _ = tiny.run(config, count)
    expected, expected_initial, expected_batch, _ = references(family, optimizer)
    for name, value in expected_initial.items():
        np.testing.assert_array_equal(initial[name], value, err_msg=name)
    for name, value in expected_batch.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("granule", ["simulated", "process_index", "slice_index"])
def test_a_dcn_factor_runs_across_granules(granule):
    """data=4 over two slices or processes of four devices: its outer half is the granule."""
    facts = dict(platform="cpu", device_kind="cpu", process_index=0, slice_index=0)
    devices = [SimpleNamespace(**facts | {"id": i, granule: i // 4}) for i in range(8)]
    if granule == "slice_index":  # a slice of two hosts: not processes, but slices stay together
        devices = devices[::2] + devices[1::2]
        for device in devices:
            device.process_index = device.id // 2
    size = lambda sizes: [sizes.get(axis, 1) for axis in AXES]
    grid = _hybrid_grid(size({"data": 4, "fsdp": 2}), size({"data": 2}), devices)
    found = np.vectorize(lambda device: device.id // 4)(grid).squeeze()
    np.testing.assert_array_equal(found, [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert len({device.id for device in grid.flat}) == 8
    inner = _hybrid_grid(size({"data": 2, "fsdp": 4}), size({"fsdp": 2}), devices)
    found = np.vectorize(lambda device: device.id // 4)(inner).squeeze()
    np.testing.assert_array_equal(found, [[0, 0, 1, 1], [0, 0, 1, 1]])
    if granule != "simulated":
        with pytest.raises(UserError, match="mesh.dcn: data=4 is 4, and the devices are in 2 "):
            _hybrid_grid(size({"data": 4, "fsdp": 2}), size({"data": 4}), devices)


def test_the_shape_of_an_array_on_one_device():
    """As jax has it, for weights at rest, activations in use and what axes do not divide."""
    config = tiny.config("llama", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2")
    mesh, layout = open_mesh(config, jax.devices())
    for spec, shape in (
        (layout.stored("layers embed mlp"), (2, 32, 64)),
        (layout.stored("vocab embed"), (384, 32)),
        (layout.spec("batch residual_seq _"), (8, 32, 32)),
    ):
        assert layout.local_shape(spec, shape) == NamedSharding(mesh, spec).shard_shape(shape)
    assert layout.local_shape("batch residual_seq _", (8, 32, 32)) == (2, 16, 32)
    assert layout.local_shape("batch seq", (5, 32)) == (2, 32)  # the largest
