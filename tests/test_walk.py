"""The trace of a step, read: against recorded and compiled programs, and closed formulas.

recorded/costs.json: what was counted in programs compiled on 2026-11-28 (jax 0.12.0, XLA for CPU
and for CUDA 12; on 2026-11-29 libtpu 0.0.52) of rows of benchmarks/memory.py: FLOPs, results of
collectives in a step, peak.
"""

import collections
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from jaxlm import attention, configfile
from jaxlm.attention.compiled import kernel_flops
from jaxlm.hardware.target import parse_target
from jaxlm.plan import estimate, traced
from jaxlm.plan.cost import part_of
from jaxlm.xla import count_flops, find_collectives, parse, walk

HERE = Path(__file__).parent
LAYOUTS = HERE.parent / "configs" / "layouts"
RECORDED = json.loads((HERE / "recorded" / "costs.json").read_text())
# Islands have two kinds of programs, for which test_plan_islands.py stands.
NAMES = sorted({path.stem for path in LAYOUTS.glob("*.yaml")} - {"islands"})
ROWS = [(target, name) for target in ("cpu:8", "h100:1x8") for name in NAMES]


def assert_traffic(found, expected: dict[str, float]) -> None:
    """Bytes of each kind over the same axes within 5 %; of what is a part in 500 of all, any."""
    got = {f"{row.kind} {' '.join(row.axes)}": row.bytes for row in found}
    least = sum(expected.values()) / 500
    for name in got | expected:
        assert got.get(name, 0) == pytest.approx(expected.get(name, 0), rel=0.05, abs=least), name


@pytest.mark.parametrize("target, layout", ROWS)
def test_a_layout_costs_what_its_compiled_program_does(target, layout):
    expected = RECORDED[target][layout]
    found = estimate.of_config(configfile.load(LAYOUTS / f"{layout}.yaml"), parse_target(target))
    assert found.cost.total_flops == pytest.approx(expected["flops"], rel=1e-6)
    assert_traffic(found.cost.traffic, expected["traffic"])
    assert found.cost.peak == pytest.approx(expected["peak"], rel=0.15)
    assert not found.cost.notes and all(size >= 0 for size in found.cost.memory.values())


WIDER = [
    ("cpu:8", "wider fsdp"), ("cpu:8", "wider fsdp, remat dots"),
    ("cpu:8", "wider pipeline, remat none"), ("cpu:8", "wider fsdp, head whole"),
    ("h100:1x8", "wider fsdp"), ("h100:1x8", "wider fsdp, remat none"),
    ("h100:1x8", "wider fsdp, 4 microbatches"),
    ("v5e:2x4", "wider tensor, gemma, remat dots"),  # gathers run late: 1.21 if as traced
]  # fmt: skip


@pytest.mark.parametrize("target, name", WIDER)
def test_memory_of_a_larger_model_in_bfloat16(target, name):
    row = RECORDED[target][name]
    config = configfile.load(LAYOUTS / f"{row['layout']}.yaml", row["overrides"])
    found = estimate.of_config(config, parse_target(target)).cost
    assert found.peak == pytest.approx(row["peak"], rel=0.1)
    assert found.total_flops == pytest.approx(row["flops"], rel=1e-6)


# A step that nothing here was written for.


def step_of_its_own(state, batch):
    """A convolution of neighbours as a layer, a hinge loss, an optimizer of three moments."""

    def layer(x, w):
        mixed = 0.5 * (x + jnp.roll(x, 1, axis=1))
        return x + jnp.sin(mixed @ reshard(w, P(None, None))), None

    def loss(weights):
        y, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), batch, weights)
        return jnp.sum(jnp.maximum(0.0, 1.0 - y * jnp.sign(batch)))

    weights, *moments = state
    value, grads = jax.value_and_grad(loss)(weights)
    first, second, third = moments
    first = 0.9 * first + 0.1 * grads
    second = 0.99 * second + 0.01 * grads**2
    third = 0.999 * third + 0.001 * grads**3
    scale = jnp.sqrt(second) + jnp.cbrt(jnp.abs(third)) + 1e-8
    return (weights - 0.01 * first / scale, first, second, third), value


def test_a_step_that_the_planner_has_never_seen():
    sizes = {"replica": 1, "stage": 1, "data": 1, "fsdp": 8, "context": 1, "expert": 1, "tensor": 1}
    devices = np.array(jax.devices()).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    array = lambda *shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    weights = array(6, 256, 256, spec=P(None, "fsdp", None))
    with jax.set_mesh(mesh):
        trace = jax.jit(step_of_its_own, donate_argnums=0).trace(
            (weights,) * 4, array(64, 128, 256, spec=P("fsdp", None, None))
        )
    target = parse_target("cpu:8")
    found = traced.analyze(traced.read_step(trace, target), sizes, target, {})
    compiled = trace.lower().compile()
    module, memory = parse(compiled.as_text()), compiled.memory_analysis()
    flops = count_flops(walk(module), part_of, kernel_flops)[0]
    assert found.total_flops == pytest.approx(sum(flops.values()), rel=1e-6)
    assert found.total_flops == 4 * (2 * 8 * 128 * 256 * 256 * 6)  # forward twice, and backward
    expected = collections.Counter()
    for one in find_collectives(module):
        expected[f"{one.kind} fsdp"] += one.bytes * one.times
    assert_traffic(found.traffic, expected)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert found.peak == pytest.approx(peak, rel=0.15)


# Facts of XLA for CPU, each on the smallest program that shows it.


def branches(weights, x):
    """Five chains that need not wait for one another, and are large before they are summed."""
    large = lambda w: jnp.cumsum(jnp.cumsum(x[:, :1] * w[:1], 0), 0)
    return weights, sum(jnp.sum(jnp.cumsum(large(w), 0)) for w in weights)


def used_twice(weights, x):
    """One value, of elementwise work, for two operations of which one waits for the other."""
    y = jnp.tanh(x)
    first = jnp.max(jnp.cumsum(jnp.sin(y), 0))
    return weights, jnp.max(jnp.cumsum(jnp.cos(y) + first, 0))


@pytest.mark.parametrize(
    "step, without", [(branches, {"order": "traced"}), (used_twice, {"once": False})]
)
def test_what_xla_for_cpu_keeps_in_memory(step, without):
    axes = ("replica", "stage", "data", "fsdp", "context", "expert", "tensor")
    sizes = dict.fromkeys(axes, 1)
    devices = np.array(jax.devices()[:1]).reshape((1,) * len(axes))
    mesh = Mesh(devices, axes, axis_types=(AxisType.Explicit,) * len(axes))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P()))
        for shape in ((5, 256, 512), (4096, 256))
    ]
    with jax.set_mesh(mesh):
        trace = jax.jit(step).trace(*shapes)
    target = parse_target("cpu:1")
    read = traced.read_step(trace, target)
    other = dataclasses.replace(read, facts=dataclasses.replace(read.facts, **without))
    memory = trace.lower().compile().memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    found = lambda read: traced.analyze(read, sizes, target, {}).peak
    assert found(read) == pytest.approx(peak, rel=0.15) and found(other) < 0.8 * peak


# Kernels declare what they cost.


def test_kernels_declare_their_flops():
    shapes = [((2, 4, 2048, 128), 2)] * 3
    whole = 4.0 * 2 * 4 * 2048 * 2048 * 128  # two products of all scores
    declared = lambda name, scope="": attention.kernel_flops(name, scope, shapes)
    # Blocks of 512 queries and 1024 keys: of 4 x 2 the causal mask hides two, a window two more.
    assert declared("splash_mha_fwd_residuals", "window_0/x") == whole * 6 / 8
    assert declared("splash_mha_dkv_no_residuals", "window_0") == 2.5 * whole * 6 / 8
    assert declared("splash_mha_fwd_residuals", "window_512") < whole * 6 / 8
    shapes = [((2, 2048, 4, 128), 2)] * 3
    assert declared("dot_product_attention_fwd_wrapper") == whole / 2
    assert declared("dot_product_attention_bwd_wrapper") == 2.5 * whole / 2
    assert declared("somebody_elses_kernel") is None
