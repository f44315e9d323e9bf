"""verify-layout passes what is right on every mesh, and catches planted mistakes."""

import functools
import json

import jax
import jax.numpy as jnp
import local_global
import pytest
import tiny

from jaxlm import cli, configfile, optim, program, sharding, shrink, verify
from jaxlm.attention import ring
from jaxlm.config import AXES
from jaxlm.models import experts, layers
from jaxlm.pipeline import stages

CONFIGS = tiny.CONFIGS.parent.parent / "configs"


@functools.cache
def reference(*key):
    """measure() of a tiny config on one device, once per config and precision."""
    config = tiny.config(*key)
    return functools.cache(lambda double: verify.measure(config, double))


def check(mesh: str, *key: str) -> verify.Result:
    """A tiny config (family, overrides) on a mesh against one device."""
    config = verify.replace_mesh(tiny.config(*key), verify.parse_mesh(mesh))
    return verify.verify_mesh(config, reference(*key))


def at_start(config):
    """Loss, metrics and gradients in float64, whose verdict counts."""
    return verify.measure(config, True, start_only=True)


@functools.cache
def start_of(*key):
    """at_start of a tiny config on one device."""
    return at_start(tiny.config(*key))


def first_mistake(expected, config) -> str:
    """The first of what `at_start` finds that differs; in float32 something would differ too."""
    ranked = list(verify.errors(expected, at_start(config)))
    first, found = verify._first(ranked, "float64"), verify._first(ranked, "float32")
    assert (first is None) == (found is None)
    return f"{first[0]} of {first[1]}" if first else ""


@pytest.fixture
def start_only(monkeypatch):
    """No optimizer runs: for what shows in the first batch, in a third of the time."""
    true = verify.measure
    first = lambda config, double, _=True: true(config, double, True)
    monkeypatch.setattr(verify, "measure", first)


# Mistakes, each as a change of one function of jaxlm.


def misplaced_scale(monkeypatch):
    """Devices along tensor but the first shift the scaled features by one."""
    true = layers._scale

    def scale(x, weight):
        y = true(x, weight)
        spec, ways = jax.typeof(y).sharding.spec, jax.sharding.get_abstract_mesh().shape["tensor"]
        if ways == 1:
            return y
        turn = lambda y: jnp.where(jax.lax.axis_index("tensor") == 0, y, jnp.roll(y, 1, -1))
        return jax.shard_map(turn, in_specs=spec, out_specs=spec)(y)

    monkeypatch.setattr(layers, "_scale", scale)


def dropped_sum(monkeypatch):
    """Of a product summed over tensor, the first device's part alone is kept."""
    true = sharding.Layout.dot

    def dot(self, equation, x, w, out=None):
        if out is not None:
            first = lambda x: x * (jax.lax.axis_index("tensor") == 0)
            spec = jax.typeof(x).sharding.spec
            if "tensor" in spec:
                x = jax.shard_map(first, in_specs=spec, out_specs=spec)(x)
        return true(self, equation, x, w, out)

    monkeypatch.setattr(sharding.Layout, "dot", dot)


def scaled_gradients(name: str, factor: float):
    """The gradients of some weights, times a factor, on more than one device."""

    def plant(monkeypatch):
        true = program.reduce_gradients

        def reduce_gradients(grads, structure, layout):
            wrong = factor if layout.size("batch") > 1 else 1.0
            done = true(grads, structure, layout)
            return {n: g * (wrong if n.endswith(name) else 1.0) for n, g in done.items()}

        monkeypatch.setattr(program, "reduce_gradients", reduce_gradients)

    return plant


def wrong_norm(monkeypatch):
    """The global norm counts replicated weights once per copy."""
    true = optim.global_norm

    def global_norm(grads):
        return true(grads) * jax.sharding.get_abstract_mesh().size

    monkeypatch.setattr(optim, "global_norm", global_norm)


def wrong_start(monkeypatch):
    """The seed of initial values depends on the mesh."""
    true = layers.normal

    def normal(key, std):
        return true(jax.random.fold_in(key, jax.sharding.get_abstract_mesh().size), std)

    monkeypatch.setattr("jaxlm.models.decoder.normal", normal)


def wrong_ring(monkeypatch):
    """Keys and values go round the ring the other way than the queries believe."""

    def shift(rule, blocks):
        ring = [((i + 1) % rule.devices, i) for i in range(rule.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, rule.axes, ring), blocks)

    monkeypatch.setattr(ring, "_shift", shift)


def ring_gradient_twice(monkeypatch):
    """The backward pass of the ring counts the gradient of the values twice."""
    true = ring._local_backward

    def backward(*arrays):
        dq, dk, dv = true(*arrays)
        return dq, dk, 2 * dv

    monkeypatch.setattr(ring, "_local_backward", backward)


def wrong_stage(monkeypatch):
    """Stages hand their activations to the stage before, not to the one after."""
    true = stages.Stages.shift
    wrong = lambda self, x, by: true(self, x, -1 if by == 1 else by)
    monkeypatch.setattr(stages.Stages, "shift", wrong)


def wrong_stage_backward(monkeypatch):
    """Stages hand their cotangents to the stage after, not to the one before."""
    true = stages.Stages.shift
    wrong = lambda self, x, by: true(self, x, 1 if by == -1 else by)
    monkeypatch.setattr(stages.Stages, "shift", wrong)


def stay_at_home(monkeypatch):
    """Tokens do not travel to their experts."""
    monkeypatch.setattr(experts, "_all_to_all", lambda x, *_: x)


STAGES = ["llama", "batch.microbatches=2", "model.num_layers=4"]
MISTAKES = {  # mistake, mesh, config, the first thing that must differ
    "a norm's scale misplaced": (misplaced_scale, "fsdp=2,tensor=2", ["llama"], "loss"),
    "a sum over devices dropped": (dropped_sum, "fsdp=2,tensor=2", ["llama"], "loss"),
    "a gradient counted twice": (
        scaled_gradients("down", 2), "data=2", ["llama"], "gradient of groups.0.0.down",
    ),
    "a gradient not summed": (
        scaled_gradients("scale", 0.5), "data=2", ["llama"], "gradient of final_norm.scale",
    ),
    "a norm of gradients counted twice": (
        wrong_norm, "data=2", ["llama"], "gradient norm of all gradients",
    ),
    "a wrong ring": (wrong_ring, "context=4", ["llama"], "loss"),
    "a ring's gradient counted twice": (
        ring_gradient_twice, "context=4", ["llama"], "gradient of ",
    ),
    "a wrong stage": (wrong_stage, "stage=4", STAGES, "loss"),
    "a wrong stage, backward": (wrong_stage_backward, "stage=4", STAGES, "gradient of "),
    "tokens at home": (stay_at_home, "expert=4", ["mixtral"], "loss"),
}  # fmt: skip


def test_other_initial_values_are_caught(monkeypatch):
    """Bits are compared, so that float32 decides."""
    reference("llama")(False)  # without the mistake
    wrong_start(monkeypatch)
    result = check("data=2", "llama")
    assert not result.equal and result.precision == "float32"
    assert result.first.startswith("initial of embed") and result.first.endswith("float32")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_differs_at_the_start(name, monkeypatch):
    plant, mesh, config, first = MISTAKES[name]
    expected = start_of(*config)  # without the mistake
    plant(monkeypatch)
    on_mesh = verify.replace_mesh(tiny.config(*config), verify.parse_mesh(mesh))
    assert first_mistake(expected, on_mesh).startswith(first)


def test_rounding_is_told_from_a_mistake(monkeypatch, start_only):
    """A difference that float32 alone has is no mistake, and is reported as such."""
    true = program.reduce_gradients

    def coarse(grads, structure, layout):
        done = true(grads, structure, layout)
        if layout.size("batch") == 1 or layout.compute == "float64":
            return done
        return {name: g * (1 + 2e-5) for name, g in done.items()}

    reference("llama")(False)
    monkeypatch.setattr(program, "reduce_gradients", coarse)
    result = check("data=2", "llama")
    assert result.equal and result.precision == "float64"
    assert 1e-5 < result.errors["gradient"] < 3e-5


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.rglob("*.yaml")))
def test_every_config_shrinks_and_keeps_its_structure(name):
    full = configfile.load(next(CONFIGS.rglob(name)))
    sizes = verify.own_mesh(full)
    small = verify.replace_mesh(verify.shrink(full, [sizes]), sizes)
    verify.validate(small, verify.math.prod(sizes.values()))
    weights = small.model.embed_dim * (small.model.vocab_size + small.model.mlp_dim)
    assert weights * small.model.num_layers < 1e6
    assert small.batch.sequences * small.batch.sequence_length <= 1 << 14
    kept = ("num_heads", "num_kv_heads", "tie_embeddings", "qk_norm", "family")
    for field in kept:
        assert getattr(small.model, field) == getattr(full.model, field)
    for field in ("remat", "rules", "storage", "gather_at"):
        assert getattr(small, field) == getattr(full, field)


PATTERNS = {  # layers, keys, mesh: layers of the small config, and its groups as (blocks, repeats)
    "whole and a rest": (14, {}, {"data": 2}, 14, [(6, 2), (2, 1)]),
    "many and a rest": (62, {}, {"data": 2}, 14, [(6, 2), (2, 1)]),
    "many": (48, {}, {"data": 2}, 12, [(6, 2)]),
    "one": (6, {}, {"data": 2}, 6, [(6, 1)]),
    "on stages": (48, {}, {"stage": 4}, 24, [(6, 4)]),
    "a rest beside stages": (26, {}, {"stage": 2}, 14, [(6, 2), (2, 1)]),
    "most layers on stages": (50, {"dense_layers": 14}, {"stage": 2}, 38, [(1, 14), (6, 4)]),
    "after dense layers": (27, {"dense_layers": 3}, {"data": 2}, 15, [(1, 3), (6, 2)]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_kind_of_block_is_kept(name, monkeypatch):
    """The fewest layers with all patterns whole, repeated where they were, in the same order."""
    layers, keys, mesh, fewest, groups = PATTERNS[name]
    local_global.register(monkeypatch)
    base = tiny.config("llama", "batch.sequence_length=1024", "model.sliding_window=512")
    full = local_global.config(base, num_layers=layers, **keys)
    small = shrink.shrink(full, [mesh])
    kinds = lambda model: {block for pattern, _ in local_global.groups(model) for block in pattern}
    assert kinds(small.model) == kinds(full.model) == {local_global.Local, local_global.Global}
    assert small.model.num_layers == fewest
    assert [(len(pattern), r) for pattern, r in local_global.groups(small.model)] == groups
    assert 1 < small.model.sliding_window < small.batch.sequence_length


def test_what_depends_on_a_size_still_happens():
    """Windows, soft caps, stretched wavelengths, full experts and Adafactor's means."""
    keys = ["model.attention_softcap=50", "model.logit_softcap=30", "model.rope_scaling=llama3"]
    small = lambda *key: shrink.shrink(tiny.config(*key), [{"data": 2}])
    model = small("llama", *keys, "optimizer.name=adafactor").model
    assert model.attention_softcap == model.logit_softcap == 1
    assert min(model.embed_dim, model.mlp_dim) >= optim.MIN_FACTORED
    length = 2 * jnp.pi / jnp.array(layers.rotary_frequencies(model.head_dim, model.rope_theta))
    assert (length < model.rope_original_length / model.rope_high_freq_factor).any()
    assert (length > model.rope_original_length / model.rope_low_freq_factor).any()
    window = lambda size, *more: small("llama", f"model.sliding_window={size}", *more)
    assert window(1024, "batch.sequence_length=4096").model.sliding_window == 10
    wide = window(4096, "batch.sequence_length=4096")  # it hides nothing
    assert wide.model.sliding_window == wide.batch.sequence_length
    assert window(0).model.sliding_window == 0
    full = small("mixtral", "model.dispatch=capacity", "model.capacity_factor=4.0")
    assert full.model.capacity_factor == 1  # the even share: whatever is uneven is dropped


def test_a_mistake_in_the_last_block_of_a_pattern_is_caught(monkeypatch):
    """Not the first block, which alone was compared where a pattern was cut."""
    local_global.register(monkeypatch)
    base = tiny.config("llama", "batch.sequence_length=1024", "model.sliding_window=512")
    full = local_global.config(base, num_layers=8, locals_per_global=1)
    small = shrink.shrink(full, [{"data": 2}])
    assert small.model.num_layers == 4
    one, on_mesh = (verify.replace_mesh(small, sizes) for sizes in ({}, {"data": 2}))
    expected = at_start(one)
    assert not first_mistake(expected, on_mesh)
    true = local_global.Global.__call__

    def wrong(self, x_BSD, *rest):
        factor = 1.01 if jax.sharding.get_abstract_mesh().size > 1 else 1.0
        return true(self, x_BSD * factor, *rest)

    monkeypatch.setattr(local_global.Global, "__call__", wrong)
    assert first_mistake(expected, on_mesh) == "loss of loss"


def test_another_number_of_microbatches_is_tried(monkeypatch, start_only):
    """A mistake that the config's own number does not show."""
    true = program.split_batch

    def wrong(batch, count):
        parts, many = true(batch, count), jax.sharding.get_abstract_mesh().size > 1
        return parts | ({"targets": parts["tokens"]} if many else {})

    monkeypatch.setattr(program, "split_batch", wrong)
    (result,) = verify.verify_layout(tiny.config("llama"), [{"data": 2}])
    assert result.microbatches == (1, 2) and not result.equal
    assert result.first.startswith("loss of loss in 2 microbatches")


@pytest.mark.nightly  # each day in test_moe.py: microbatches change nothing but the balance loss
def test_experts_without_a_balance_loss_are_the_same_in_all_microbatches(start_only):
    config = tiny.config("mixtral", "model.balance=none", "model.router_z_loss=0.1")
    on_mesh = verify.replace_mesh(config, {"data": 2})
    changed = verify.replace_microbatches(on_mesh, 2)
    result = verify.verify_mesh(changed, lambda double: verify.measure(config, double))
    assert result.equal, result.first
    assert {"metric", "gradient"} <= result.errors.keys()


def test_numbers_of_microbatches_that_are_tried():
    """What the mesh allows, and nothing where the number is known to change losses."""
    other = lambda *key: verify.other_microbatches(tiny.config(*key))
    assert other("llama") == 2 and other("llama", "batch.microbatches=2") == 1
    interleaved = ["model.num_layers=4", "mesh.stage=2", "pipeline.repeats=2"]
    assert other("llama", "batch.microbatches=2", *interleaved) == 4
    assert other("llama", "batch.sequences=1") == 0  # nothing to split
    assert other("mixtral") == 0 and other("mixtral", "model.balance=none") == 2


def test_the_gradients_are_one_program(monkeypatch):
    """For both optimizers, whose states differ; it takes the longest to compile."""
    true, traced = verify.loss_and_grads, []
    monkeypatch.setattr(verify, "loss_and_grads", lambda *args: traced.append(args) or true(*args))
    verify.measure(tiny.config("llama"), False)
    assert len(traced) == 1


def test_the_optimizer_of_the_config_is_compared(monkeypatch):
    true = optim._orthogonalize_group

    def wrong(x, *axes):
        return true(x, *axes) * jax.sharding.get_abstract_mesh().size

    config = tiny.config("llama", "optimizer.name=muon")
    reference = verify.measure(config, False)
    monkeypatch.setattr(optim, "_orthogonalize_group", wrong)
    on_mesh = verify.replace_mesh(config, {"fsdp": 2})
    found = verify.measure(on_mesh, False)
    worst: dict = {}
    for what, _, error in verify.errors(reference, found):
        worst[what] = max(error, worst.get(what, 0.0))
    assert worst["SGD update"] < 1e-5 and worst["Muon update"] > 0.5


def test_a_large_mesh_still_divides_the_small_config():
    full, sizes = configfile.load(CONFIGS / "llama3-405b.yaml"), {"stage": 2, "fsdp": 32}
    small = verify.replace_mesh(verify.shrink(full, [sizes]), sizes)
    verify.validate(small, 64)


def test_documents_are_packed_as_in_training():
    config = tiny.config("llama")
    layout = sharding.make_layout(config, dict.fromkeys(AXES, 1), config.attention)
    batch = verify.make_batch(config, layout, 0)
    segments, positions = batch["segments"], batch["positions"]
    for row in range(len(segments)):
        for segment in set(segments[row]) - {0}:
            place = positions[row][segments[row] == segment]
            assert place.tolist() == list(range(len(place)))
    assert (batch["weights"][segments == 0] == 0).all() and (segments == 0).any()
    whole = verify.make_batch(tiny.config("llama", "data.segments=false"), layout, 0)
    assert (whole["positions"] == range(config.batch.sequence_length)).all()


@pytest.mark.parametrize(
    "text, message",
    [
        ("fsdp", "'fsdp' is not axis=size"),
        ("fsdp=2,tensr=4", "'tensr=4' is not axis=size"),
        ("fsdp=0", "'fsdp=0' is not axis=size"),
        ("fsdp=2,fsdp=2", "axis fsdp is given twice"),
    ],
)
def test_mistakes_in_a_mesh_are_one_line(text, message):
    with pytest.raises(verify.cfg.UserError, match=message):
        verify.parse_mesh(text)


def test_a_mesh_too_large_to_simulate_is_refused():
    with pytest.raises(verify.cfg.UserError, match="a mesh of 100000 devices is too large"):
        verify.chosen_meshes(tiny.config("llama"), ["fsdp=100000"])


def test_a_mesh_that_cannot_work_is_refused_before_it_runs():
    config = configfile.load(CONFIGS / "quickstart.yaml")
    with pytest.raises(verify.cfg.UserError, match="model.num_heads=.* is not divisible by mesh.t"):
        verify.shrink(config, [{"tensor": 3}])


def test_the_command(capsys, monkeypatch):
    """A table and the exit code; its JSON, of a real run, is in test_audit.py."""
    errors, first = {"initial": 0.0, "gradient": 1.0}, "gradient of up by 1 in float64"
    wrong = verify.Result("data=2", 2, (1,), False, "float64", errors, {}, first)
    monkeypatch.setattr(verify, "verify_layout", lambda *_: [wrong])
    monkeypatch.setattr("jaxlm.devices.start", lambda devices: None)  # they are started
    assert cli.main(["verify-layout", str(tiny.CONFIGS / "llama.yaml"), "data=2", "steps=5"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out and f"data=2: {first}" in out


def test_an_error_that_is_not_a_number_is_null_in_json(capsys, monkeypatch):
    found = verify.Result(
        "data=2", 2, (1,), False, "float64", {"loss": float("nan"), "gradient": 0.5}, {}, "loss"
    )
    monkeypatch.setattr(verify, "verify_layout", lambda *_: [found])
    assert not verify.run(tiny.config("llama"), [{"data": 2}], as_json=True)
    strict = functools.partial(json.loads, parse_constant=pytest.fail)
    (row,) = strict(capsys.readouterr().out)
    assert row["errors"] == {"loss": None, "gradient": 0.5} and not row["equal"]
