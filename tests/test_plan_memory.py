"""The peak of memory by the trace of a step: exact where it can be, else near the compilers'."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import recorded

from jaxlm import configfile, optim
from jaxlm.hardware.target import parse_target
from jaxlm.mesh import open_mesh
from jaxlm.plan import estimate
from jaxlm.plan.facts import padding
from jaxlm.state import abstract_state, model_structure

CONFIGS = Path(__file__).parent.parent / "configs"
LAYOUTS = CONFIGS / "layouts"


def load(name: str, *overrides: str):
    return configfile.load(LAYOUTS / f"{name}.yaml", overrides)


def memory(config, target: str) -> dict[str, float]:
    """Class -> bytes at the peak."""
    return estimate.of_config(config, parse_target(target)).cost.memory


def local_bytes(arrays) -> int:
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(size(x) for x in jax.tree.leaves(arrays))


STATES = [
    ("data", ["optimizer.name=adamw"]), ("fsdp", ["optimizer.name=lion"]),
    ("tensor", ["optimizer.name=muon"]), ("everything", ["optimizer.name=adafactor"]),
    ("expert", ["optimizer.name=adamw"]), ("fsdp", ['optimizer.train=["groups.*"]']),
]  # fmt: skip


@pytest.mark.parametrize("layout, overrides", STATES)
def test_the_state_and_the_batch_are_exact(layout, overrides):
    config = load(layout, *overrides, "model.embed_dim=256")
    mesh, place = open_mesh(config, parse_target("cpu:8").absent_devices())
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, place)
        rule = optim.make_optimizer(config.optimizer, config.steps, structure.dims)
        state = abstract_state(config, place, rule, mesh)
    sizes = memory(config, "cpu:8")
    assert sizes["parameters"] == local_bytes((state.params, state.fixed))
    assert sizes["optimizer"] == local_bytes((state.opt, state.step))
    shape = config.batch.sequences * config.batch.sequence_length
    assert sizes["batch"] == 5 * 4 * shape / (place.size("batch") * place.size("seq"))


# (local shape, bytes of an element): elements that libtpu keeps for each (libtpu 0.0.52, the entry
# parameters of configs/layouts compiled for v5e:2x4).
TILED = [
    ((4, 128, 4, 32), 4, 1), ((4, 16, 2, 32), 4, 4), ((4, 4, 32, 16), 4, 4), ((8192, 16), 4, 1),
    ((4, 64, 2), 4, 2), ((4, 128, 352), 4, 1), ((2, 128), 4, 1), ((128,), 4, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape, width, factor", TILED)
def test_arrays_lie_in_tiles_on_tpu(shape, width, factor):
    assert padding(shape, width) == factor
    many = padding(tuple(np.array([n, 2 * n]) if n == shape[0] else n for n in shape), width)
    assert np.ravel(many)[0] == factor


# arguments of the compiled train step, as libtpu 0.0.52 counts them for v5e:2x4
ARGUMENTS = {
    "context": 3673088, "data": 21450752, "everything": 3372032, "expert": 5144576,
    "fsdp": 3657728, "hsdp": 7294976, "multislice": 7294976, "pipeline": 3656704,
    "tensor": 3968000, "zero2": 3657728,
}  # fmt: skip


@pytest.mark.parametrize("layout", ARGUMENTS)
def test_state_and_batch_on_tpu_are_padded_as_libtpu_pads_them(layout):
    sizes = memory(load(layout), "v5e:2x4")
    state = sizes["parameters"] + sizes["optimizer"] + sizes["batch"]
    assert state == pytest.approx(ARGUMENTS[layout], rel=0.001)


def test_constants_are_made_in_their_loop_on_tpu_alone():
    """A mask of a chunk of logits, which autodiff makes before the loop over chunks."""
    more = ["model.vocab_size=65000", "batch.sequence_length=1024", "remat.policy=full"]
    sizes = {target: memory(load("fsdp", *more), target) for target in ("v5e:2x4", "h100:1x8")}
    tokens = 16 * 1024 / 8 / 8  # of a chunk on one device
    masks = sizes["h100:1x8"]["workspace"] - sizes["v5e:2x4"]["workspace"]
    assert masks > 2 * 4 * tokens * 65024


REMAT = {  # policy -> bytes of a token in a layer: 2 bytes each of D, (H + 2 K) C + D, F, ...
    ("full", ""): {"block input": 2 * 128},
    ("dots", ""): {
        "block input": 2 * 128, "projections": 2 * (128 + 64 + 64 + 128), "mlp": 2 * 2 * 352,
    },
    ("names", "mlp,query"): {"block input": 2 * 128, "query": 2 * 128, "mlp": 2 * 2 * 352},
}  # fmt: skip


@pytest.mark.parametrize("policy", REMAT)
def test_activations_that_remat_keeps_are_exact(policy):
    kind, names = policy
    rows, tokens, layers = 16, 128, 4  # rows enough that the peak is where all are kept
    config = load(
        "fsdp", "precision.compute=bfloat16", f"remat.policy={kind}", f"remat.names=[{names}]",
        f"batch.sequences={8 * rows}",
    )  # fmt: skip
    want = {f"saved/{name}": size * rows * tokens * layers for name, size in REMAT[policy].items()}
    saved = {k: v for k, v in memory(config, "h100:1x8").items() if k.startswith("saved/")}
    head = {"saved/head", "saved/other"}  # what the backward of the loss reads
    assert {name: size for name, size in saved.items() if name not in head} == want


def test_what_is_offloaded_is_not_on_the_device():
    keep = ["remat.policy=names", "remat.names=[mlp]", "precision.compute=bfloat16"]
    with_mlp = memory(load("fsdp", *keep), "v5e:2x4")
    without = memory(load("fsdp", *keep, "remat.offload=[mlp]"), "v5e:2x4")
    assert "saved/mlp" in with_mlp and "saved/mlp" not in without


# Programs whose peaks were recorded (recorded.py); costs.json of test_walk.py holds others.
# Of a step as small as these libtpu keeps all temporaries in on-chip memory: nothing to compare.
@pytest.mark.parametrize("name", [name for name in recorded.PEAKS if "TPU" not in name])
def test_the_peak_is_near_the_compilers(name):
    """On CPU a program's arguments and temporaries; XLA's own peak leaves out the latter there."""
    target, _ = recorded.PEAKS[name]
    found = recorded.record(f"layout {name}").memory
    peak = found.peak_memory_in_bytes
    if target == "cpu:8":
        assert found.alias_size_in_bytes > 0.9 * found.output_size_in_bytes
        peak = found.argument_size_in_bytes + found.temp_size_in_bytes
    config = recorded.SOURCES[f"layout {name}"].config
    assert sum(memory(config, target).values()) == pytest.approx(peak, rel=0.15)


# Peaks of rows of benchmarks/memory.py compiled for v5e:2x4 by libtpu 0.0.52 (2026-11-29).
ON_V5E = {
    "wider fsdp": 551858176, "wider fsdp, remat none": 2161733632,
    "wider fsdp, 4 microbatches": 735815168, "wider data": 2313831936,
}  # fmt: skip


@pytest.mark.parametrize("name", ON_V5E)
def test_the_peak_is_near_that_of_libtpu(name):
    row = json.loads((Path(__file__).parent / "recorded" / "costs.json").read_text())["cpu:8"][name]
    sizes = memory(load(row["layout"], *row["overrides"]), "v5e:2x4")
    assert sum(sizes.values()) == pytest.approx(ON_V5E[name], rel=0.15)


# Peaks of benchmarks/README.md, which take minutes to compile.
LARGE = {
    "8B fsdp": ("llama3-8b", "v6e:4x4", 20.5e9, [
        "mesh.fsdp=16", "batch.sequences=64", "batch.microbatches=2",
    ]),
    "70B fsdp x tensor": ("llama3-70b", "v5p:8x8x8", 12.2e9, [
        "mesh.fsdp=128", "mesh.tensor=4", "batch.sequences=512", "batch.microbatches=2",
    ]),
    "8B context": ("llama3-8b", "h100:1x8", 32.5e9, [
        "mesh.fsdp=1", "mesh.context=8", "batch.sequences=4", "batch.sequence_length=131072",
        "batch.microbatches=4", "loss.chunks=16",
    ]),
    "Mixtral-8x7B": ("mixtral-8x7b", "v5p:4x4x8", 56.6e9, ["mesh.fsdp=16", "mesh.expert=8"]),
    "8B on GPUs": ("llama3-8b", "h100:1x8", 25.2 * 2**30, ["batch.sequences=16"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_peaks_of_large_models(name):
    config, target, peak, overrides = LARGE[name]
    found = memory(configfile.load(CONFIGS / f"{config}.yaml", overrides), target)
    assert sum(found.values()) == pytest.approx(peak, rel=0.15)


def test_more_of_what_saves_memory_saves_memory():
    peak = lambda *more: sum(memory(load("fsdp", *recorded.WIDER, *more), "h100:1x8").values())
    policies = [peak(f"remat.policy={policy}") for policy in ("none", "dots", "full")]
    assert policies == sorted(policies, reverse=True) and len(set(policies)) == 3
    assert peak("batch.microbatches=2") < peak()
    assert peak("loss.chunks=16") < peak("loss.chunks=2")
