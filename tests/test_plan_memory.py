"""The analytic peak of memory: exact where it can be, within a tenth of the compilers elsewhere."""

import functools
import math
import time
from pathlib import Path

import jax
import pytest
import recorded

from jaxlm import configfile, optim
from jaxlm.hardware.target import parse_target
from jaxlm.mesh import open_mesh
from jaxlm.plan import memory as analytic
from jaxlm.state import abstract_state, model_structure

LAYOUTS = Path(__file__).parent.parent / "configs" / "layouts"


def setting(config, target: str):
    """(mesh, layout, structure, target) of a config."""
    hardware = parse_target(target)
    mesh, layout = open_mesh(config, hardware.absent_devices())
    with jax.set_mesh(mesh):
        return mesh, layout, model_structure(config.model, layout), hardware


def estimate(config, target: str) -> dict[str, float]:
    return analytic.memory(config, *setting(config, target)[1:])


def load(name: str, *overrides: str):
    return configfile.load(LAYOUTS / f"{name}.yaml", overrides)


def local_bytes(arrays) -> int:
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(size(x) for x in jax.tree.leaves(arrays) if x.ndim)


def check_state(config):
    """Parameters and optimizer to the byte; returns (sizes, layout)."""
    mesh, place, structure, hardware = setting(config, "cpu:8")
    rule = optim.make_optimizer(config.optimizer, config.steps, structure.dims)
    with jax.set_mesh(mesh):
        state = abstract_state(config, place, rule, mesh)
    sizes = analytic.memory(config, place, structure, hardware)
    assert sizes["parameters"] == local_bytes((state.params, state.fixed))
    assert sizes["optimizer"] == local_bytes(state.opt)
    return sizes, place


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "adafactor"])
@pytest.mark.parametrize("layout", ["data", "fsdp", "tensor", "everything", "expert"])
def test_state_is_exact(layout, optimizer):
    config = load(layout, f"optimizer.name={optimizer}", "model.embed_dim=256")
    sizes, place = check_state(config)
    shape = config.batch.sequences * config.batch.sequence_length
    assert sizes["batch"] == 5 * 4 * shape / (place.size("batch") * place.size("seq"))


def test_state_of_what_is_frozen():
    sizes, _ = check_state(load("fsdp", 'optimizer.train=["groups.*"]'))
    assert sizes["optimizer"] < 2 * sizes["parameters"]


REMAT = {  # policy -> bytes of a token in a layer: 2 bytes each of D, (H + 2 K) C + D, F, ...
    ("full", ""): {"block input": 2 * 128},
    ("dots", ""): {
        "block input": 2 * 128, "query": 2 * 128, "key": 2 * 64, "value": 2 * 64,
        "projections": 2 * 128, "mlp": 2 * 2 * 352,
    },
    ("names", "mlp,query"): {"block input": 2 * 128, "query": 2 * 128, "mlp": 2 * 2 * 352},
}  # fmt: skip


@pytest.mark.parametrize("policy", REMAT)
def test_saved_activations_are_exact(policy):
    kind, names = policy
    config = load(
        "fsdp", "precision.compute=bfloat16", f"remat.policy={kind}", f"remat.names=[{names}]"
    )
    _, *place = setting(config, "cpu:8")
    tokens, layers = 2 * 128, 4
    want = {f"saved/{name}": size * tokens * layers for name, size in REMAT[policy].items()}
    for name, sizes in analytic.phases(config, *place).items():
        saved = {key: size for key, size in sizes.items() if key.startswith("saved/")}
        assert saved == (want if name in ("forward", "losses", "head", "backward") else {}), name


def test_what_is_offloaded_is_not_on_the_device():
    keep = ["remat.policy=names", "remat.names=[mlp]", "precision.compute=bfloat16"]
    with_mlp = estimate(load("fsdp", *keep), "v5e:2x4")
    without = estimate(load("fsdp", *keep, "remat.offload=[mlp]"), "v5e:2x4")
    assert "saved/mlp" in with_mlp and "saved/mlp" not in without


@pytest.mark.parametrize("target", ["cpu:8", "h100:1x8", "v5e:2x4"])
def test_gradients_hold_what_the_layers_stack_and_the_head_sums(target):
    config = load("hsdp", "remat.policy=full")
    _, *place = setting(config, target)
    table, heads, mlp = 8192 * 128, 4 * 128 * 32 * (4 + 2 + 2 + 4), 4 * 3 * 128 * 352
    layers, norms = heads + mlp, 128 * 9
    lanes = 4 if target == "v5e:2x4" else 1  # heads of 32, and fsdp=4 of 128: a quarter of a tile
    found = analytic.phases(config, *place)
    constants = table if target == "cpu:8" else 0
    # fsdp=4 splits all but the norms; one of those is no layer's.
    stacked = (lanes * heads + mlp) / 4 + norms - 128
    assert found["backward"]["gradients"] == 4 * (table + stacked + constants)
    assert found["update"]["gradients"] == 4 * (table / 4 + layers / 4 + norms + constants)


def found(config, target: str) -> dict[str, dict[str, float]]:
    return analytic.phases(config, *setting(config, target)[1:])


def test_scores_are_held_whole_or_a_chunk_at_a_time():
    whole = found(load("fsdp", "attention.backend=xla"), "h100:1x8")
    part = found(load("fsdp", "attention.backend=chunked", "attention.chunk=32"), "h100:1x8")
    scores = 4 * 2 * 4 * 128 * 128  # float32 of two rows and four heads
    assert whole["head"]["workspace"] == part["head"]["workspace"]
    assert whole["backward"]["workspace"] - part["backward"]["workspace"] == 2 * scores * (
        1 - 1 / 4
    )
    kept = "saved/residuals"  # the softmax and its cast; of chunks only the logs of the sums
    assert whole["backward"][kept] - part["backward"][kept] == 4 * (2 * scores - 4 * 2 * 128 * 4)


def test_a_pipeline_keeps_the_inputs_of_its_slots():
    stream, slots, layers = 4 * 128 * 128, 2 * (2 - 1) + 1, 2  # of one row; of a stage
    sizes = found(load("pipeline", "remat.policy=full"), "h100:1x8")["backward"]
    assert sizes["saved/block input"] == stream * (slots + 1.5 * layers)  # habits.py: zeros_twice


def test_weights_of_a_step_are_there_in_every_phase():
    config = load("zero2", "remat.policy=full", "precision.compute=bfloat16")
    weights = 8192 * 128 + 4 * (128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 352) + 128 * 9
    sizes = found(config, "h100:1x8")["update"]
    assert sizes["workspace"] == 2 * weights
    at_rest = (weights - 128 * 9) / 8 + 128 * 9
    assert sizes["gradients"] == 4 * (weights + at_rest)  # sums of microbatches, and reduced


def test_sums_over_devices_are_not_in_place_on_cpu():
    layers = 4 * (128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 352) + 128 * 8
    sizes = found(load("data"), "cpu:8")
    assert sizes["reduction"]["gradients"] == 2 * 4 * (8192 * 128 + layers + 128)
    assert "reduction" not in found(load("data"), "h100:1x8")


ON_CPU = [name for name, (target, _) in recorded.PEAKS.items() if target == "cpu:8"]
ELSEWHERE = [name for name in recorded.PEAKS if name not in ON_CPU]


@pytest.mark.parametrize("name", ON_CPU)
def test_peak_on_cpu(name):
    """A program's arguments and temporaries; XLA's own peak leaves out the latter on CPU."""
    found = recorded.record(f"layout {name}").memory
    assert found.alias_size_in_bytes > 0.9 * found.output_size_in_bytes
    peak = found.argument_size_in_bytes + found.temp_size_in_bytes
    config = recorded.SOURCES[f"layout {name}"].config
    assert sum(estimate(config, "cpu:8").values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_peak_on_devices_that_are_not_here(name):
    source, found = recorded.SOURCES[f"layout {name}"], recorded.record(f"layout {name}").memory
    got = sum(estimate(source.config, source.target).values())
    assert got == pytest.approx(found.peak_memory_in_bytes, rel=0.1)


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
    "405B": ("llama3-405b", "h100:64x8", 22.2e9, [
        "mesh.stage=2", "mesh.fsdp=32", "mesh.tensor=8", "batch.sequences=2048",
        "batch.microbatches=64",
    ]),
    "8B on GPUs": ("llama3-8b", "h100:1x8", 25.2 * 2**30, ["batch.sequences=16"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_peaks_of_large_models(name):
    config, target, peak, overrides = LARGE[name]
    found = configfile.load(LAYOUTS.parent / f"{config}.yaml", overrides)
    assert sum(estimate(found, target).values()) == pytest.approx(peak, rel=0.1)


def test_more_of_what_saves_memory_saves_memory():
    peak = lambda *more: sum(estimate(load("fsdp", *recorded.WIDER, *more), "h100:1x8").values())
    policies = [peak(f"remat.policy={policy}") for policy in ("none", "dots", "full")]
    assert policies == sorted(policies, reverse=True) and len(set(policies)) == 3
    assert peak("batch.microbatches=2") < peak()
    assert peak("loss.chunks=16") <= peak("loss.chunks=2") < peak("loss.chunks=1")


def test_a_call_takes_milliseconds():
    config = load("everything")
    _, *place = setting(config, "v5e:2x4")
    call = functools.partial(analytic.memory, config, *place)
    call()
    start = time.process_time()
    for _ in range(50):
        call()
    assert (time.process_time() - start) / 50 < 0.005
