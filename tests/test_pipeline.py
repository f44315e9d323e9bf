"""The pipeline computes what one device does, in the ticks, memory and messages of its schedule."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import local_global
import numpy as np
import pytest
import tiny

from jaxlm import config as cfg
from jaxlm import generate, pipeline
from jaxlm.data import load, open_split
from jaxlm.models import llama, mixtral
from jaxlm.plan import compiled as compiler
from jaxlm.program import loss_and_grads, make_eval_step, make_program
from jaxlm.sharding import batch_shardings, partitions, sequence_order
from jaxlm.state import create_state
from jaxlm.xla import find_collectives, matmul_flops, mesh_axes, parse, walk

LAYOUTS = {  # those of test_every_layout.py apart
    "stage=4, M not a multiple": (4, 6, ["mesh.stage=4"]),
    "fewer microbatches than stages": (4, 2, ["mesh.stage=4"]),
    "repeats, more than stages": (2, 4, ["mesh.stage=2", "pipeline.repeats=4"]),
    "stage=4, repeats, data": (8, 4, ["mesh.stage=4", "mesh.data=2", "pipeline.repeats=2"]),
    "repeats, gathered once a step": (
        4, 4, ["mesh.stage=2", "mesh.fsdp=2", "pipeline.repeats=2", "gather_at=step"],
    ),
    "repeats": (2, 4, ["mesh.stage=2", "pipeline.repeats=2"]),
    "gathered once a step": (4, 4, ["mesh.stage=2", "mesh.fsdp=2", "gather_at=step"]),
}  # fmt: skip
FAMILIES = {"llama": [], "gpt2": ["model.tie_embeddings=true"]}


def open_run(config, num_devices):
    program = make_program(config, jax.devices()[:num_devices])
    with jax.set_mesh(program.mesh):
        state = create_state(config, program.layout, program.optimizer, program.mesh)
        split = open_split(config.data.path, "train")
        shardings = batch_shardings(config, program.layout, program.mesh)
        order = sequence_order(program.layout, config.batch.sequence_length)
        found = load.batches(split, config.batch, 0, shardings, order=order)
        batches = [uneven(batch, i, order) for i, batch in zip(range(10), found, strict=False)]
    return program, state, batches


def uneven(batch, seed, order):
    """Weights that differ from token to token; multiples of 1/64, so that any order sums alike."""
    parts = np.random.default_rng(seed).integers(0, 64, batch["weights"].shape)
    weights = (parts[:, order] / 64).astype(np.float32)
    return batch | {"weights": jax.device_put(weights, batch["weights"].sharding)}


def measure(config, num_devices):
    """(initial parameters, loss_and_grads of the first batch) on the host."""
    program, state, batches = open_run(config, num_devices)
    with jax.set_mesh(program.mesh):
        sums = jax.jit(lambda s, b: loss_and_grads(config, program.structure, s, b, program.layout))
        return jax.device_get((state.params, sums(state, batches[0])))


@pytest.fixture(scope="module")
def references(data):
    """One device; the number of microbatches does not matter."""
    return functools.cache(lambda family: measure(configure(data, family, *ROWS), 1))


ROWS = ["batch.sequences=24"]  # that every number of microbatches and every mesh divides


def configure(data, family, *overrides):
    """Eight layers, z-loss, and an embedding that is not the head for llama."""
    return tiny.config(
        family, f"data.path={data}", "model.num_layers=8", "model.tie_embeddings=false",
        "loss.z_loss=0.01", *FAMILIES[family], *overrides,
    )  # fmt: skip


def assert_same(found, expected):
    """Loss, weight, every gradient and aux of loss_and_grads, to 1e-5."""
    (loss, weight, grads, aux), (loss_1, weight_1, grads_1, aux_1) = found, expected
    np.testing.assert_allclose([loss, weight], [loss_1, weight_1], rtol=1e-5)
    assert grads.keys() == grads_1.keys() and aux.keys() == aux_1.keys()
    for name, value in aux.items():
        np.testing.assert_allclose(value, aux_1[name], rtol=1e-5, atol=1e-7, err_msg=name)
    floor = 1e-4 * np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads_1.values()))
    for name, grad in grads_1.items():
        error = np.abs(grads[name] - grad).max() / max(np.abs(grad).max(), floor)
        assert error < 1e-5, (name, error)


# gpt2 is on stages in test_every_layout.py; repeats know no family, and what a number of stages,
# repeats and microbatches means is the schedule's, which is tested by itself.
FEW = ("fewer microbatches than stages", "repeats, gathered once a step")
CASES = [("llama", name) if name in FEW else tiny.nightly("llama", name) for name in LAYOUTS]
CASES += [tiny.nightly("gpt2", "repeats")]


@pytest.mark.parametrize("family, name", CASES)
def test_a_pipeline_is_the_same_run(family, name, data, references):
    devices, microbatches, overrides = LAYOUTS[name]
    config = configure(data, family, *ROWS, f"batch.microbatches={microbatches}", *overrides)
    found, expected = measure(config, devices), references(family)
    for array, value in expected[0].items():
        np.testing.assert_array_equal(found[0][array], value, err_msg=array)
    assert_same(found[1], expected[1])


class Block(llama.Block):
    """A block with a loss, a metric, an update, and another map of the mesh inside."""

    def __call__(self, x_BSD, table, segments_BS, layout, cache=None):
        spec = layout.spec("batch residual_seq _")
        double = jax.shard_map(lambda x: jnp.tanh(x) + x, in_specs=spec, out_specs=spec)
        x_BSD, cache, _ = super().__call__(double(x_BSD), table, segments_BS, layout, cache)
        y_BSD = x_BSD.astype(jnp.float32)
        square = jnp.mean(y_BSD**2)
        return x_BSD, cache, {
            "x/size_loss": 0.1 * square, "size": square,
            "update/count": jnp.sum(y_BSD**2, axis=(0, 1)),
            "peak/large": jnp.sum(y_BSD > 0, axis=(0, 1)).astype(jnp.float32),
        }  # fmt: skip


def weighted(config, structure, state, batch, layout):
    """What loss_and_grads means for blocks with aux, written plainly.

    Means of microbatches count by their tokens, without padding, and counts are added up.
    """
    from jaxlm.loss import batch_losses, read_aux, split_batch, sum_losses

    count = lambda part: jnp.sum(part["segments"] > 0)

    def one(params, part):
        nll_BS, z_BS, aux = batch_losses(config, structure.merge(params), part, layout)
        sums = sum_losses(config, nll_BS, z_BS, part["weights"])
        weight = jnp.sum(batch["weights"]) * count(part) / count(batch)
        added = ("update/count", "peak/large")
        aux = {n: v if n.endswith(added) else v * weight for n, v in aux.items()}
        losses = [jnp.sum(v) for n, v in aux.items() if n.endswith("x/size_loss")]
        return sums["loss"] + sums["z_loss"] + sum(losses), sums | read_aux(aux, 1.0)[1]

    parts = split_batch(batch, config.batch.microbatches)
    grads, aux = None, None
    for m in range(config.batch.microbatches):
        new, more = jax.grad(one, has_aux=True)(state.params, {n: x[m] for n, x in parts.items()})
        grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
        aux = more if aux is None else jax.tree.map(jnp.add, aux, more)
    peaks = {n: aux.pop(n) for n in list(aux) if n.startswith("peak/")}
    large_LX = jnp.concatenate([peaks[n] for n in peaks])
    aux["large"] = jnp.mean(jnp.max(large_LX, 1) / jnp.mean(large_LX, 1)) * aux["weight"]
    return aux.pop("loss"), aux.pop("weight"), grads, aux


@pytest.mark.parametrize(
    "stages, repeats, count", [(2, 1, 5), (4, 1, 2), (4, 1, 6), (3, 3, 6), (4, 2, 8), (2, 4, 4)]
)
def test_every_chunk_meets_every_microbatch_once_and_in_order(stages, repeats, count):
    s = pipeline.Schedule(stages, repeats, count)
    forward, backward = {}, {}
    for tick in range(s.ticks + s.warmup):
        for stage in range(stages):
            for done, item in (
                (forward, s.forward(tick, stage)),
                (backward, s.backward(tick, stage)),
            ):
                key = (int(item.microbatch), int(item.repeat) * stages + stage)
                assert not item.valid or key not in done
                if item.valid:
                    done[key] = tick, int(item.slot)
    everything = {(m, c) for m in range(count) for c in range(stages * repeats)}
    assert forward.keys() == backward.keys() == everything
    assert max(tick for tick, _ in forward.values()) == s.ticks - 1
    assert min(tick for tick, _ in backward.values()) == s.warmup
    for (m, c), (tick, slot) in forward.items():
        after, saved = backward[m, c]
        assert saved == slot == tick % s.slots and 0 <= after - tick < s.slots
        if c:  # what is handed on is used in the next tick
            assert tick == forward[m, c - 1][0] + 1 and after == backward[m, c - 1][0] - 1


def compiled_step(data, devices, *overrides):
    config = configure(data, "llama", *overrides)
    program = make_program(config, jax.devices()[:devices])
    compiled = compiler.trace_train_step(config, program).lower().compile()
    return config, program.layout, compiled


def dot_flops(text: str, keep) -> float:
    """FLOPs of the dots on one device whose sizes `keep` accepts, times the loops around them."""
    total = 0.0
    for visit in walk(parse(text)):
        dot = visit.instruction
        if dot.opcode == "dot":
            operands = visit.computation.operands(dot)
            sizes = [n for one in (*operands, dot) for n in one.shapes[0].dims]
            assert visit.known
            total += keep(sizes) * visit.times * matmul_flops(dot, visit.computation)
    return total


@pytest.mark.parametrize(
    "stages, repeats, count", [(2, 2, 4), tiny.nightly(4, 1, 8), tiny.nightly(2, 1, 4)]
)
def test_stages_work_all_but_the_bubble(stages, repeats, count, data):
    """FLOPs of the layers of a stage, over those of its share of all layers and microbatches."""
    config, _, compiled = compiled_step(
        data, stages, f"mesh.stage={stages}", f"pipeline.repeats={repeats}",
        f"batch.microbatches={count}", "remat.policy=full",
    )  # fmt: skip
    m, length = config.model, config.batch.sequence_length
    vocab = cfg.padded_vocab(m)
    head = {vocab, vocab // stages}  # no other dimension has these sizes
    executed = dot_flops(compiled.as_text(), lambda sizes: not head & set(sizes))
    down, heads = m.embed_dim * m.mlp_dim, m.head_dim * m.num_heads
    weights = m.embed_dim * m.head_dim * 2 * (m.num_heads + m.num_kv_heads) + 3 * down
    forward = 2 * (weights + 2 * length * heads)  # a token, a layer
    # Forward in its tick, twice more in that of the backward, and two products for each; the second
    # time the last product's result is not needed.
    layer = 5 * forward - 2 * down
    tokens = config.batch.sequences * length
    useful = layer * tokens * m.num_layers / stages
    s = pipeline.Schedule(stages, repeats, count)
    assert executed / useful == pytest.approx(s.ticks / (count * repeats), rel=0.02)
    assert 1 - s.bubble == pytest.approx(count * repeats / s.ticks)


def test_memory_and_messages_do_not_grow_with_microbatches(data):
    """A permute each way and tick; gradients over data once a step."""
    found, peaks = [], []
    for count in (8, 16):
        _, layout, compiled = compiled_step(
            data, 8, "mesh.stage=4", "mesh.data=2", f"batch.microbatches={count}",
            f"batch.sequences={4 * count}", "batch.sequence_length=64", "model.num_layers=4",
        )  # fmt: skip
        peaks.append(compiled.memory_analysis().temp_size_in_bytes)
        rows = find_collectives(parse(compiled.as_text()))
        axes = dict(layout.axes)
        place = lambda one: (one.kind, mesh_axes(one.groups, axes), one.loops)  # noqa: B023
        found.append(sorted((*place(one), one.shapes) for one in rows))
        permutes = [one for one in rows if one.kind == "collective-permute"]
        # Forward only: 1; both: 2; backward only: 1.
        assert sum(len(one.shapes) for one in permutes) == 4
        assert {place(one)[1:] for one in permutes} == {(("stage",), 1)}
        for one in rows:
            assert one.kind not in ("all-gather", "all-to-all"), one
            if "data" in place(one)[1] and len(one.shapes) > one.scalars:
                assert one.loops == 0, one
    assert found[0] == found[1] and peaks[1] == pytest.approx(peaks[0], rel=0.05)


def evaluate_and_generate(data, *mesh):
    """Losses and weights of rows, and tokens."""
    config = local_and_global(
        data, "batch.microbatches=2", *mesh, num_layers=9, locals_per_global=1
    )
    program, state, batches = open_run(config, 8 if mesh else 1)
    with jax.set_mesh(program.mesh):
        step = make_eval_step(config, program.structure, program.layout, {})
        rows = jax.device_get(step(state.params, state.fixed, batches[0]))
        return *rows, generate.generate_tokens(
            config, program.structure, program.layout, program.mesh, state.params,
            [[1, 2, 3], [7]], tokens=8, temperature=1.0,
        )  # fmt: skip


@pytest.mark.parametrize(
    "mesh", [["mesh.data=2", "mesh.context=2"], tiny.nightly(["mesh.fsdp=2", "mesh.tensor=2"])]
)
def test_evaluation_and_generation_on_stages(mesh, data, monkeypatch):
    """A pattern four times, in two chunks of two stages, and a rest; with a split sequence too."""
    local_global.register(monkeypatch)
    losses, weights, tokens = evaluate_and_generate(data)
    found = evaluate_and_generate(data, "mesh.stage=2", "pipeline.repeats=2", *mesh)
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    np.testing.assert_array_equal(found[1], weights)
    assert found[2] == tokens


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["mesh.stage=3"],
            "model.num_layers=8 is not divisible by mesh.stage=3; nearest: .*6 or 9",
        ),
        (["pipeline.repeats=2"], "pipeline.repeats=2 has no effect with mesh.stage=1"),
        (["mesh.stage=2", "pipeline.repeats=3"], "not divisible by 6 .mesh.stage=2 x pipeline.rep"),
        (
            ["mesh.stage=4", "pipeline.repeats=2", "batch.microbatches=2"],
            "batch.microbatches=2 is not divisible by mesh.stage=4; nearest: .*=4",
        ),
        (["mesh.stage=2", "rules.layers=[]"], "rules.layers=.. with mesh.stage=2"),
    ],
)
def test_mistakes_are_named(overrides, message, data):
    from jaxlm.validate import validate

    config = configure(data, "llama", *overrides)
    with pytest.raises(cfg.UserError, match=message):
        validate(config, max(config.mesh.stage, 1))


def local_and_global(data, *overrides, num_layers=26, locals_per_global=5, **keys):
    """A pattern with a window, whole patterns on stages and what is left on none."""
    base = configure(data, "llama", "model.sliding_window=10", *overrides)
    keys |= dict(num_layers=num_layers, locals_per_global=locals_per_global)
    return local_global.config(base, **keys)


@pytest.mark.parametrize(
    "layers, balance, mesh",
    [
        tiny.nightly((1, 2), "bias", []), tiny.nightly((1, 2, 1), "bias", []),
        tiny.nightly((4, 1), "loss", ["pipeline.repeats=2"]),
    ],
)  # fmt: skip
def test_experts_on_no_stage(layers, balance, mesh, data, monkeypatch):
    """Losses, metrics and updates of layers before the stages; some after are in the next test."""
    monkeypatch.setattr(mixtral, "groups", lambda _: [((mixtral.Block,), n) for n in layers])
    options = [f"model.num_layers={sum(layers)}", "model.router_z_loss=0.01", "batch.sequences=16"]
    options += [f"model.balance={balance}", "batch.microbatches=4"]
    mesh = ["mesh.stage=2", "mesh.expert=2", *mesh]
    found = [
        measure(tiny.config("mixtral", f"data.path={data}", *options, *more), devices)
        for more, devices in ((mesh, 4), ([], 1))
    ]
    for name, value in found[1][0].items():
        np.testing.assert_array_equal(found[0][0][name], value, err_msg=name)
    assert_same(found[0][1], found[1][1])
    counts = [name for name in found[0][1][3] if name.startswith("update/")]
    assert len(counts) == (len(layers) if balance == "bias" else 0)


@pytest.mark.parametrize("before, repeats", [(1, 2), tiny.nightly(0, 2), tiny.nightly(0, 1)])
def test_a_pattern_and_a_rest_on_stages(before, repeats, data, monkeypatch):
    """Gradients, aux in the order of layers, and where weights rest.

    Against a sum over microbatches, each weighted; on a mesh that splits the sequence too.
    """
    local_global.register(monkeypatch)
    monkeypatch.setattr(local_global, "Local", Block)
    monkeypatch.setattr(local_global, "Global", type("Both", (local_global.Global, Block), {}))
    found = []
    mesh = ["mesh.stage=2", "mesh.fsdp=2", "mesh.tensor=2", f"pipeline.repeats={repeats}"]
    for overrides, devices, step in (([], 1, weighted), (mesh, 8, loss_and_grads)):
        config = local_and_global(
            data, "batch.microbatches=2", *overrides, num_layers=9 + before,
            locals_per_global=1, dense_layers=before,
        )  # fmt: skip
        program, state, batches = open_run(config, devices)
        with jax.set_mesh(program.mesh):
            run = lambda s, b: step(config, program.structure, s, b, program.layout)  # noqa: B023
            found.append(jax.device_get(jax.jit(run)(state, batches[0])))
    homes = [1] * before + [0, 1]  # the dimension of a stacked weight that stages split
    for group, home in enumerate(homes):
        weight = state.params[f"groups.{group}.0.up"]
        axes = partitions(jax.typeof(weight).sharding.spec)
        assert [i for i, axis in enumerate(axes) if "stage" in str(axis)] == [home]
    assert_same(found[1], found[0])
    counts = {n: a.shape[0] for n, a in found[1][3].items() if n.startswith("update/")}
    assert sorted(counts.values()) == [1] * before + [1, 4, 4]  # two blocks of each repeat


def test_layers_on_no_stage_split_rows_over_stages(data, monkeypatch):
    """And so work as much for each layer as those on stages: 2 rows of 8 on 2 x 2 devices."""
    local_global.register(monkeypatch)
    true, seen = local_global.Local.__call__, set()

    def call(self, x_BSD, *rest):
        seen.add((jax.typeof(x_BSD).sharding.shard_shape(x_BSD.shape)[0], x_BSD.shape[0]))
        return true(self, x_BSD, *rest)

    monkeypatch.setattr(local_global.Local, "__call__", call)
    config = local_and_global(data, "mesh.stage=2", "mesh.data=2", num_layers=14)
    compiler.trace_train_step(config, make_program(config, jax.devices()[:4]))
    assert seen == {(4, 8), (2, 8)}  # inside vmap over stages, and outside


@pytest.mark.parametrize(
    "layers, overrides, message, works",
    [
        (
            26, ["mesh.stage=3"],
            "num_layers=26 has 4 repeats of the 6 layers .* not divisible by mesh.stage=3; "
            "nearest: model.num_layers=20 or 38, or mesh.stage=2 or 4",
            [(20, ["mesh.stage=3"]), (38, ["mesh.stage=3"]), (26, ["mesh.stage=4"])],
        ),
        (
            34, ["mesh.stage=5", "batch.sequences=12"],
            "batch.sequences=12 is not divisible by .*mesh.stage=5.*; nearest: batch.sequences=10 "
            "or 15",
            [(34, ["mesh.stage=5", "batch.sequences=15"])],
        ),
        (48, ["mesh.stage=4", "pipeline.repeats=4"], "8 repeats .* 16 .*; nearest: .*=96,", []),
    ],
)  # fmt: skip
def test_patterns_that_stages_do_not_divide_are_named(
    layers, overrides, message, works, data, monkeypatch
):
    from jaxlm.validate import layout_problems

    local_global.register(monkeypatch)
    more = ["model.embed_dim=240", "batch.microbatches=1", "batch.sequences=24"]

    def problems(layers, overrides):
        config = local_and_global(data, *more, *overrides, num_layers=layers)
        sizes = dict.fromkeys(cfg.AXES, 1) | {"stage": config.mesh.stage}
        return [p for p in layout_problems(config, sizes) if "vocab_size" not in p]

    first = problems(layers, overrides)[0]
    assert re.search(message, first), first
    for fix in works:
        assert not problems(*fix)


def test_the_bubble_is_told(data):
    config = configure(data, "llama", "mesh.stage=4", "batch.microbatches=8")
    text = pipeline.describe(config, 4)
    assert "4 stages" in text and "8 microbatches" in text and "bubble 27.3%" in text
    few = dataclasses.replace(config, batch=dataclasses.replace(config.batch, microbatches=2))
    assert "more batch.microbatches" in pipeline.describe(few, 4)


def test_layers_on_no_stage_are_told(data, monkeypatch):
    local_global.register(monkeypatch)
    text = pipeline.describe(local_and_global(data), 4)
    assert "4 stages x 1 chunks of 6 layers, 2 layers on no stage" in text
