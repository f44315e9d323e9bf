"""The step against closed formulas: loss, weights, microbatches, clipping, frozen weights."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxlm.data import load, open_split
from jaxlm.loss import token_losses
from jaxlm.models.decoder import logits
from jaxlm.program import (
    loss_and_grads,
    make_eval_step,
    make_program,
    make_train_step,
    trace_train_step,
)
from jaxlm.sharding import batch_shardings
from jaxlm.state import create_state

MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def open_run(config, num_devices):
    program = make_program(config, jax.devices()[:num_devices])
    mesh, layout, structure, optimizer, _, _ = program
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optimizer, mesh)
        shardings = batch_shardings(config, layout, mesh)
        split = open_split(config.data.path, "train")
        batch = next(load.batches(split, config.batch, 0, shardings))
    return mesh, layout, structure, optimizer, state, batch


@pytest.fixture(scope="module")
def alone(data):
    """A run of a family on one device."""
    return functools.cache(lambda family: tiny.run(tiny.config(family, f"data.path={data}"), 1))


@pytest.fixture(scope="module")
def summed(data):
    """(count, family, overrides) -> what a change of the first batch sums to: loss, gradients..."""

    @functools.cache
    def program(count, family, *overrides):
        config = tiny.config(family, f"data.path={data}", *overrides)
        mesh, layout, structure, _, state, batch = open_run(config, count)
        step = jax.jit(lambda s, b: loss_and_grads(config, structure, s, b, layout))

        def sums(change):
            with jax.set_mesh(mesh):
                return jax.device_get(step(state, change(batch)))

        return sums

    return program


@pytest.fixture(scope="module")
def clipped(data):
    """(config, make a state, batch, step, mesh) of a train step on eight devices that clips."""
    clip = ["optimizer.clip_norm=0.01", "loss.z_loss=0.5"]
    config = tiny.config("llama", f"data.path={data}", *clip, *MESH)
    mesh, layout, structure, optimizer, _, batch = open_run(config, 8)
    step = make_train_step(config, structure, layout, optimizer, {})
    return config, lambda: create_state(config, layout, optimizer, mesh), batch, step, mesh


def uneven(batch):
    """The batch with weights that differ from row to row and token to token."""
    weights = np.random.default_rng(0).random(batch["weights"].shape).astype(np.float32)
    weights[:3] = 0
    return batch | {"weights": jax.device_put(weights, batch["weights"].sharding)}


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("mesh", [[], MESH])
def test_loss_is_cross_entropy_in_float64(data, mesh, chunks):
    config = tiny.config("llama", f"data.path={data}", f"loss.chunks={chunks}", *mesh)
    config_mesh, layout, structure, _, state, batch = open_run(config, 8 if mesh else 1)

    def losses(params, batch):
        model = structure.merge(params)
        hidden, _, _ = model(batch["tokens"], batch["positions"], batch["segments"], layout)
        head = model.head_weight(layout)
        return (*token_losses(hidden, head, batch["targets"], config.model, layout, chunks),
                logits(hidden, head, config.model))  # fmt: skip

    with jax.set_mesh(config_mesh):
        nll, z, scores = jax.jit(losses)(state.params, batch)
    scores = np.asarray(scores, np.float64)[..., : config.model.vocab_size]
    with jax.enable_x64(True):
        expected = optax.softmax_cross_entropy_with_integer_labels(
            jnp.asarray(scores), jnp.asarray(np.asarray(batch["targets"]))
        )
    log_z = np.log(np.exp(scores).sum(-1))
    np.testing.assert_allclose(nll, expected, rtol=2e-6)
    np.testing.assert_allclose(z, log_z**2, rtol=2e-6)


@pytest.mark.parametrize("family", ["llama", tiny.nightly("gpt2")])
def test_microbatches_are_weighted_by_tokens(summed, family):
    loss, weight, grads, aux = summed(1, family, "loss.z_loss=0.5")(uneven)
    parts = ["batch.microbatches=4", "loss.z_loss=0.5", *MESH[:1]]
    loss_4, weight_4, grads_4, aux_4 = summed(2, family, *parts)(uneven)
    np.testing.assert_allclose([loss_4, weight_4], [loss, weight], rtol=1e-6)
    np.testing.assert_allclose(aux_4["z_loss"], aux["z_loss"], rtol=1e-6)
    for name, grad in grads.items():
        floor = 1e-4 * np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        error = np.abs(grads_4[name] - grad).max() / max(np.abs(grad).max(), floor)
        assert error < 1e-5, name


def test_gradients_are_of_the_sum_and_clipped_to_the_norm(summed, clipped):
    loss, weight, grads, aux = summed(1, "llama", "loss.z_loss=0.5")(lambda batch: batch)
    config, make_state, batch, step, mesh = clipped
    with jax.set_mesh(mesh):
        after, metrics = step(make_state(), batch)
    norm = np.sqrt(sum(np.sum((np.float64(g) / weight) ** 2) for g in grads.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(loss / weight, rel=1e-6)
    assert float(metrics["z_loss"]) == pytest.approx(aux["z_loss"] / weight, rel=1e-6)
    assert norm > 0.01  # so that it was clipped: Adam's first moment shows by how much
    moments = after.opt[0].mu
    norm = np.sqrt(sum(np.sum(np.float64(m) ** 2) for m in jax.device_get(moments).values()))
    assert norm == pytest.approx((1 - config.optimizer.b1) * 0.01, rel=1e-4)
    assert after.params["embed"].shape == grads["embed"].shape


def test_gradients_of_the_z_loss_are_those_of_log_z_squared(data, summed):
    found = {w: summed(1, "llama", f"loss.z_loss={w}")(uneven)[2] for w in ("0", "0.5")}
    config = tiny.config("llama", f"data.path={data}")
    mesh, layout, structure, _, state, batch = open_run(config, 1)

    def penalty(params, batch):
        model = structure.merge(params)
        hidden, _, _ = model(batch["tokens"], batch["positions"], batch["segments"], layout)
        scores = logits(hidden, model.head_weight(layout), config.model)
        return jnp.sum(batch["weights"] * jax.nn.logsumexp(scores, axis=-1) ** 2)

    with jax.set_mesh(mesh):
        expected = jax.device_get(jax.jit(jax.grad(penalty))(state.params, uneven(batch)))
    for name, grad in expected.items():
        error = np.abs(found["0.5"][name] - found["0"][name] - 0.5 * grad).max()
        assert error < 1e-5 * np.abs(found["0.5"][name]).max(), name


BFLOAT16 = {
    "layer": ["loss.chunks=8"],
    "step": ["gather_at=step", "batch.microbatches=8", "loss.chunks=8"],
    "sharded": ["batch.microbatches=2", *MESH],
}


# A layer's lines are its family's own. Those of the step are not: it adds its microbatches in
# test_parts_of_a_batch_are_added_in_float32.
@pytest.mark.parametrize(
    "family, case",
    [("llama", "sharded"), ("gpt2", "layer")]
    + [
        tiny.nightly("llama", "layer"),
        tiny.nightly("llama", "step"),
        tiny.nightly("gpt2", "step"),
        tiny.nightly("gpt2", "sharded"),
    ],
)
def test_sums_in_bfloat16_compute_are_in_float32(family, case, zipf_gradients):
    """Gradients of 8192 tokens, a sixth of them one word: as near as the products allow."""
    expected = zipf_gradients(family, "float32", "attention.backend=xla")
    for name, grad in zipf_gradients(family, "bfloat16", *BFLOAT16[case]).items():
        error = np.linalg.norm(grad - expected[name]) / np.linalg.norm(expected[name])
        assert error < 0.012, (name, error)


PARTS = {
    "microbatches": (["batch.microbatches=8", "gather_at=step", "loss.chunks=1"], 1e-6),
    "chunks": (["loss.chunks=8"], 2e-3),  # the head is bfloat16: sum and parts are rounded once
}


@pytest.mark.parametrize("by", PARTS)
def test_parts_of_a_batch_are_added_in_float32(data, by):
    """Gradients are linear in the weights of tokens: those of eight parts add up to the whole's."""
    options = ["precision.compute=bfloat16", "loss.z_loss=0", "model.tie_embeddings=false"]
    overrides, limit = PARTS[by]
    config = tiny.config(
        "llama", f"data.path={data}", "batch.sequences=16", *options, *overrides
    )  # fmt: skip
    mesh, layout, structure, _, state, batch = open_run(config, 1)
    row, column = np.indices(batch["weights"].shape)
    part = row % 8 if by == "microbatches" else column // (config.batch.sequence_length // 8)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda s, b: loss_and_grads(config, structure, s, b, layout))
        gradients = lambda w: jax.device_get(
            step(state, batch | {"weights": batch["weights"] * w})
        )[2]
        whole = gradients(np.float32(1))
        parts = [gradients(np.float32(part == i)) for i in range(8)]
    for name in whole if by == "microbatches" else ["head"]:
        total = sum(np.float64(each[name]) for each in parts)
        error = np.linalg.norm(whole[name] - total) / np.linalg.norm(total)
        assert error < limit, (name, error)


def test_logits_are_not_rounded_to_the_compute_type():
    rng, config = np.random.default_rng(0), tiny.config("llama").model
    hidden = jnp.asarray(rng.normal(size=(4, 32)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(384, 32)), jnp.bfloat16)
    scores = jax.jit(lambda h, w: logits(h, w, config))(hidden, head)
    expected = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    np.testing.assert_allclose(scores[:, :300], expected[:, :300], rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda h: jnp.sum(logits(h, head, config)[:, :300]))(hidden)
    exact = np.asarray(head, np.float64)[:300].sum(0)
    np.testing.assert_allclose(np.float64(gradient), np.tile(exact, (4, 1)), rtol=2**-8)


@pytest.fixture(scope="module")
def zipf_gradients(data):
    """(family, compute type, overrides) -> gradients of tokens that follow Zipf's law, float64."""
    chance = 1 / np.arange(1, 301)
    words = np.random.default_rng(0).choice(300, (16, 513), p=chance / chance.sum())
    rows = np.ones((16, 512), np.int32)
    batch = {"tokens": words[:, :-1], "targets": words[:, 1:], "segments": rows}
    batch |= {"weights": rows.astype(np.float32), "positions": rows * np.arange(512)}

    @functools.cache
    def gradients(family, compute, *overrides):
        longer = ["model.max_positions=512"] if family == "gpt2" else []
        config = tiny.config(
            family, f"data.path={data}", f"precision.compute={compute}", "model.init_std=0.1",
            "batch.sequences=16", "batch.sequence_length=512", "attention.backend=chunked",
            "attention.chunk=64", "loss.z_loss=0", *longer, *overrides,
        )  # fmt: skip
        count = 8 if config.mesh.tensor > 1 else 1
        mesh, layout, structure, optimizer, _, _ = make_program(config, jax.devices()[:count])
        with jax.set_mesh(mesh):
            state = create_state(config, layout, optimizer, mesh)
            placed = {
                name: jax.device_put(
                    batch[name].astype(np.float32 if name == "weights" else int), s
                )
                for name, s in batch_shardings(config, layout, mesh).items()
            }
            step = jax.jit(lambda s, b: loss_and_grads(config, structure, s, b, layout))
            grads = jax.device_get(step(state, placed)[2])
        # GPT-2's key bias has none but rounding.
        return {
            name: np.asarray(g if name != "groups.0.0.qkv_bias" else g[:, ::2], np.float64)
            for name, g in grads.items()
        }

    return gradients


def test_a_batch_in_which_nothing_counts_leaves_no_nan(clipped):
    _, make_state, batch, step, mesh = clipped
    batch = batch | {"weights": jnp.zeros_like(batch["weights"])}
    with jax.set_mesh(mesh):
        state, metrics = step(make_state(), batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["weight"] == 0
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(jax.device_get(state)))


@pytest.mark.oldest
def test_the_state_is_donated(clipped):
    _, make_state, batch, step, mesh = clipped
    with jax.set_mesh(mesh):
        step(state := make_state(), batch)
    assert all(array.is_deleted() for array in jax.tree.leaves(state))


def test_evaluation_holds_no_more_than_a_microbatch(data):
    """Activations of the eval step, in temporary bytes of the compiled program."""
    bytes_ = {}
    for count in (1, 8):
        long = ["batch.sequences=32", "batch.sequence_length=128", f"batch.microbatches={count}"]
        config = tiny.config("llama", f"data.path={data}", *long)
        mesh, layout, structure, _, state, batch = open_run(config, 1)
        with jax.set_mesh(mesh):
            step = make_eval_step(config, structure, layout, {})
            compiled = step.lower(state.params, state.fixed, batch).compile()
        bytes_[count] = compiled.memory_analysis().temp_size_in_bytes
    assert bytes_[8] < bytes_[1] / 4


def test_fixed_weights_do_not_change_and_have_no_moments(data, alone):
    overrides = [f"data.path={data}", "optimizer.train=[groups.*.q, final_norm.*]", *MESH]
    losses, initial, _, state = tiny.run(tiny.config("llama", *overrides), 8, steps=5)
    assert set(initial) == {"groups.0.0.attention.q", "final_norm.scale"}
    assert "embed" in state.fixed and "embed" not in state.opt[0].mu
    np.testing.assert_array_equal(state.fixed["embed"], alone("llama")[1]["embed"])
    assert np.isfinite(losses).all()
    for name, value in initial.items():
        assert not np.array_equal(state.params[name], value)


OPTIONS = {
    "remat none": ["remat.policy=none"],
    "remat dots": ["remat.policy=dots"],
    "remat names": ["remat.policy=names", "remat.names=[query, key, value, attention, mlp]"],
    "chunked attention": ["attention.backend=chunked", "attention.chunk=8"],
    "chunks of the head": ["loss.chunks=8"],
}


# Remat none and dots are drawn in test_every_layout.py; the others are here at once.
TOGETHER = ["remat names", "chunked attention", "chunks of the head"]


@pytest.mark.parametrize(
    "options", [TOGETHER, *(tiny.nightly([option]) for option in OPTIONS)], ids=", ".join
)
def test_options_that_change_no_numbers(data, alone, options):
    own = [override for option in options for override in OPTIONS[option]]
    losses = tiny.run(tiny.config("llama", f"data.path={data}", *own, *MESH), 8, steps=5)[0]
    np.testing.assert_allclose(losses, alone("llama")[0][:5], rtol=1e-5)


def products(*overrides: str, family: str = "llama") -> int:
    """Matrix products in the train step, before the compiler sees it."""
    config = tiny.config(family, *overrides)
    traced = trace_train_step(config, make_program(config, jax.devices()[:1]))
    return traced.lower().as_text().count("stablehlo.dot_general")


@pytest.mark.oldest
def test_remat_recomputes_what_it_does_not_keep():
    none, dots, full = (products(f"remat.policy={name}") for name in ("none", "dots", "full"))
    # All of a layer but `down`, on whose result no gradient depends: q, k, v, o, gate, up, two of
    # attention, and the scales of two norms. dots: those of the last four, which map over a batch.
    assert (full, dots) == (none + 10, none + 4)
    keep = lambda names: products("remat.policy=names", f"remat.names=[{names}]")
    assert keep("attention") == full - 1
    assert keep("mlp") == full - 2
    assert keep("query,key,value") == full - 3
    assert keep("query,key,value,attention,mlp") == full - 6


@pytest.mark.oldest
def test_dots_keeps_no_biases():
    """GPT-2's five biases are products with ones, recomputed under either policy."""
    biases = "model.biases={}".format
    saved = lambda policy, bias: products(f"remat.policy={policy}", biases(bias), family="gpt2")
    extra = lambda policy: saved(policy, "true") - saved(policy, "false")
    assert extra("dots") == extra("full") > extra("none")


@pytest.mark.oldest
def test_offloaded_activations_wait_on_the_host():
    kept = ["remat.policy=names", "remat.names=[mlp,query]"]
    for offload in ([], ["remat.offload=[mlp]"]):
        config = tiny.config("llama", *kept, *offload)
        traced = trace_train_step(config, make_program(config, jax.devices()[:1]))
        # Gate and up of two layers, [batch, sequence, mlp] each; the query stays.
        on_host = set(re.findall(r"f32<host>\[[\d,]+\]", str(traced.jaxpr)))
        assert ("f32<host>[2,8,32,64]" in on_host) == bool(offload)
        assert not any(shape.endswith("4,8]") for shape in on_host)


@pytest.mark.parametrize("chunks", [1, 8])
def test_full_logits_are_never_held(chunks):
    """The largest array over the vocabulary is that of one chunk, in the compiled step too."""
    batch = ["batch.sequences=4", "batch.sequence_length=64"]
    config = tiny.config("llama", "model.vocab_size=1024", f"loss.chunks={chunks}", *batch)
    program = make_program(config, jax.devices()[:1])
    text = trace_train_step(config, program).lower().compile().as_text()
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"\[([\d,]+)\]", text)]
    tokens = [math.prod(s) // 1024 for s in shapes if 1024 in s and config.model.embed_dim not in s]
    assert max(tokens) == 4 * 64 // chunks


@pytest.mark.nightly  # each day GPT-2 in test_every_layout.py; Llama's are those of Qwen3 and Gemma
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_qk_norm_and_soft_caps_on_every_axis(data, family):
    options = ["model.qk_norm=true", "model.attention_softcap=20"]
    options += ["model.logit_softcap=5", "model.tie_embeddings=false"]
    config = tiny.config(family, f"data.path={data}", *options)
    expected = tiny.run(config, 1, steps=5)[0]
    losses = tiny.run(tiny.config(family, f"data.path={data}", *options, *MESH), 8, steps=5)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    config = tiny.config(family, f"data.path={data}")
    mesh, layout, structure, _, state, batch = open_run(config, 1)
    with jax.set_mesh(mesh):
        step = make_eval_step(config, structure, layout, {})
        sums, weights = jax.device_get(step(state.params, state.fixed, batch))
    assert abs(sums.sum() / weights.sum() - expected[0]) > 1e-5


# In float32 between devices the gradients themselves are compared above.
@pytest.mark.parametrize("reduce", [tiny.nightly("float32"), "bfloat16"])
def test_bfloat16_compute_is_near_float32(data, alone, reduce):
    options = ["precision.compute=bfloat16", f"precision.reduce={reduce}", *MESH]
    losses = tiny.run(tiny.config("llama", f"data.path={data}", *options), 8)[0]
    np.testing.assert_allclose(losses, alone("llama")[0], rtol=0.02)
    assert losses != alone("llama")[0]


# All are on every mesh in test_optim.py.
@pytest.mark.parametrize("optimizer", [tiny.nightly("adafactor"), tiny.nightly("lion")])
def test_the_other_optimizers_are_the_same_run_too(data, optimizer):
    options = [f"data.path={data}", f"optimizer.name={optimizer}", "optimizer.learning_rate=1e-3"]
    expected = tiny.run(tiny.config("gpt2", *options), 1)[0]
    losses = tiny.run(tiny.config("gpt2", *options, *MESH), 8)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0]
