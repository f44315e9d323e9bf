"""A split sequence: ring, gathered and all-to-all attention are dense attention, at equal work.

Shapes: B batch, S queries, T keys, H query heads, K kv heads, G queries per kv head, C head_dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import forward_and_gradients, open_layout

from jaxlm import attention
from jaxlm.attention import xla
from jaxlm.sharding import sequence_order
from jaxlm.xla import find_collectives, parse

VARIANTS = ("ring", "all_gather", "all_to_all")
LENGTH, WIDTH = 64, 8
DIMS = ("batch seq heads _", "batch seq kv_heads _", "batch seq kv_heads _", "batch seq heads _")


def make_arrays(shape, kv_heads: int, segments: bool, dtype=np.float32):
    """q, k, v, the output's cotangent, and segments or None, in their natural order."""
    batch, length, heads, width = shape
    rng = np.random.default_rng(0)
    array = lambda count: rng.normal(size=(batch, length, count, width)).astype(dtype)
    arrays = array(heads), array(kv_heads), array(kv_heads), array(heads)
    ids = np.cumsum(rng.random((batch, length)) < 0.06, axis=1).astype(np.int32)
    return *arrays, ids if segments else None


def dense(arrays, softcap: float, window: int) -> list[np.ndarray]:
    """Output, dq, dk, dv of softmax(q k / sqrt(C)) v, written out in numpy float64."""
    q_BSHC, k_BTKC, v_BTKC, grad_BSHC = (np.asarray(x, np.float64) for x in arrays[:4])
    batch, length, heads, width = q_BSHC.shape
    kv_heads = k_BTKC.shape[2]
    group = lambda x: x.reshape(batch, length, kv_heads, heads // kv_heads, width)
    q_BSKGC, grad_BSKGC = group(q_BSHC), group(grad_BSHC)
    s_BKGST = np.einsum("bskgc,btkc->bkgst", q_BSKGC, k_BTKC) * width**-0.5
    slope_BKGST = 1 - np.tanh(s_BKGST / softcap) ** 2 if softcap else 1.0
    s_BKGST = softcap * np.tanh(s_BKGST / softcap) if softcap else s_BKGST
    back_ST = np.arange(length)[:, None] - np.arange(length)[None, :]
    mask_BST = ((back_ST >= 0) & (back_ST < (window or length)))[None]
    if arrays[4] is not None:
        mask_BST = mask_BST & (arrays[4][:, :, None] == arrays[4][:, None, :])
    s_BKGST = np.where(mask_BST[:, None, None], s_BKGST, -np.inf)
    p_BKGST = np.exp(s_BKGST - s_BKGST.max(-1, keepdims=True))
    p_BKGST /= p_BKGST.sum(-1, keepdims=True)
    out_BSKGC = np.einsum("bkgst,btkc->bskgc", p_BKGST, v_BTKC)
    dp_BKGST = np.einsum("bskgc,btkc->bkgst", grad_BSKGC, v_BTKC)
    ds_BKGST = p_BKGST * (dp_BKGST - (p_BKGST * dp_BKGST).sum(-1, keepdims=True)) * slope_BKGST
    ds_BKGST *= width**-0.5
    return [
        out_BSKGC.reshape(q_BSHC.shape),
        np.einsum("bkgst,btkc->bskgc", ds_BKGST, k_BTKC).reshape(q_BSHC.shape),
        np.einsum("bkgst,bskgc->btkc", ds_BKGST, q_BSKGC),
        np.einsum("bkgst,bskgc->btkc", p_BKGST, grad_BSKGC),
    ]


def attend(*arguments):
    return attention.attend(*arguments)[0]


def open_split(variant: str, heads: int, kv_heads: int, *axes: str, chunk: int = 5):
    """(mesh, layout); chunk 5 divides no piece, so that some queries are padding."""
    options = f"attention.context={variant}", "attention.backend=xla"
    return open_layout(heads, kv_heads, WIDTH, *options, *axes, chunk=chunk)


def split_result(variant, arrays, softcap, window, *axes) -> list[np.ndarray]:
    """Output, dq, dk, dv on a mesh, back in their natural order."""
    mesh, layout = open_split(variant, arrays[0].shape[2], arrays[1].shape[2], *axes)
    order = sequence_order(layout, arrays[0].shape[1])
    with jax.set_mesh(mesh):
        put = lambda x, dims: jax.device_put(x[:, order], NamedSharding(mesh, layout.spec(dims)))
        inputs = [put(x, dims) for x, dims in zip(arrays[:4], DIMS, strict=True)]
        inputs.append(None if arrays[4] is None else put(arrays[4], "batch seq"))
        found = forward_and_gradients(attend, inputs, layout, softcap, window)
    return [x[:, np.argsort(order)] for x in found]


CASES = {  # heads, kv heads, segments, soft cap, window, mesh
    "causal": (4, 4, False, 0.0, 0, ["mesh.context=2"]),
    "segments, soft cap": (4, 2, True, 2.0, 0, ["mesh.context=4"]),
    "window within a piece": (8, 8, False, 0.0, 3, ["mesh.context=8"]),
    "kv heads fewer than tensor": (8, 2, True, 0.0, 9, ["mesh.context=2", "mesh.tensor=4"]),
    "data, window over pieces": (4, 1, True, 3.0, 37, ["mesh.context=4", "mesh.data=2"]),
    "over two axes": (4, 2, True, 0.0, 0, [
        "mesh.context=2", "mesh.fsdp=2", "rules.seq=[fsdp,context]", "rules.batch=[]",
        "rules.residual_seq=[fsdp,context]",
    ]),
}  # fmt: skip


# Of gathered keys and all-to-alls each day the cases that go another way than the ring's pieces.
OTHERS = ("segments, soft cap", "kv heads fewer than tensor", "over two axes")
DENSE = [(case, "ring") for case in CASES]
DENSE += [
    (case, variant) if case in OTHERS else tiny.nightly(case, variant)
    for case in CASES for variant in VARIANTS if variant != "ring"
]  # fmt: skip


@pytest.mark.parametrize("case, variant", DENSE)
def test_a_split_sequence_is_dense_attention(case, variant):
    heads, kv_heads, segments, softcap, window, axes = CASES[case]
    arrays = make_arrays((2, LENGTH, heads, WIDTH), kv_heads, segments)
    found = split_result(variant, arrays, softcap, window, *axes)
    for one, other in zip(found, dense(arrays, softcap, window), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
    if variant == "ring":  # and xla's own gradients, on one device
        mesh, layout = open_split(variant, heads, kv_heads)
        with jax.set_mesh(mesh):
            inputs = [None if x is None else jnp.asarray(x) for x in arrays]
            whole = forward_and_gradients(xla.attend, inputs, layout, softcap, window)
        for one, other in zip(found, whole, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float64_nothing_is_rounded_to_float32(variant):
    arrays = make_arrays((2, LENGTH, 4, WIDTH), 2, True, np.float64)
    with jax.enable_x64(True):
        found = split_result(variant, arrays, 2.0, 21, "mesh.context=2", "mesh.tensor=2")
    for one, other in zip(found, dense(arrays, 2.0, 21), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12 * np.abs(other).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_may_be_mapped_over(variant):
    """Under vmap over a leading dimension on `stage`, as the pipeline runs it, with gradients."""
    axes = "mesh.context=2", "mesh.stage=2", "mesh.tensor=2"
    mesh, layout = open_split(variant, 4, 2, *axes)
    layout = layout.without("stage")
    arrays = make_arrays((4, 32, 4, WIDTH), 2, True)
    order = sequence_order(layout, 32)

    def run(q, k, v, grad, ids):
        each = lambda q, k, v: jax.vmap(lambda *x: attend(*x, layout, 0.0, 7))(q, k, v, ids)
        out, pull = jax.vjp(each, q, k, v)
        return out, *pull(grad)

    with jax.set_mesh(mesh):
        put = lambda x, dims: jax.device_put(
            x[:, order].reshape(2, 2, *x.shape[1:]),
            NamedSharding(mesh, P("stage", *layout.spec(dims))),
        )
        found = jax.jit(run)(*map(put, arrays, (*DIMS, "batch seq")))
    assert (
        found[0].sharding.spec
        == found[3].sharding.spec
        == P("stage", None, "context", "tensor", None)
    )
    for one, other in zip(found, dense(arrays, 0.0, 7), strict=True):
        one = np.asarray(one).reshape(other.shape)[:, np.argsort(order)]
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


# Work, memory, communication.


def shapes(mesh, layout, batch: int, length: int, heads: int, kv_heads: int, segments: bool):
    """q, k, v, segments of a program to look at."""
    arrays = [
        jax.ShapeDtypeStruct(
            (batch, length, count, WIDTH), jnp.float32, sharding=NamedSharding(mesh, layout.spec(d))
        )
        for count, d in zip((heads, kv_heads, kv_heads), DIMS, strict=False)
    ]
    rows = NamedSharding(mesh, layout.spec("batch seq"))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    return *arrays, ids if segments else None


def program(layout, backward: bool):
    """Attention, or its gradients."""
    forward = lambda q, k, v, ids: attend(q, k, v, ids, layout, 0.0, 0)
    loss = lambda q, k, v, ids: jnp.sum(forward(q, k, v, ids) ** 2)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if backward else forward)


def score_flops(jaxpr) -> int:
    """Multiply-adds of all products on one device, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes[i] for i in contracted)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * score_flops(inner)
    return total


@pytest.mark.parametrize("variant", ["ring", "all_gather"])
def test_the_work_of_a_device_shrinks_with_their_number(variant):
    """2n+1 of the (2n)^2 pairs of pieces: 1.25, 1.125, 1.0625 times the causal half, over n."""
    for n in (2, 4, 8):
        mesh, layout = open_split(variant, 2, 2, f"mesh.context={n}", chunk=4)
        with jax.set_mesh(mesh):
            inputs = shapes(mesh, layout, 1, LENGTH, 2, 2, True)
            found = score_flops(program(layout, False).trace(*inputs).jaxpr)
        assert found * (2 * n) ** 2 == (2 * n + 1) * 2 * 2 * LENGTH**2 * WIDTH


@pytest.mark.parametrize("n", [2, 4, 8])
def test_zigzag_gives_every_device_the_same_part_of_the_mask(n):
    _, layout = open_split("ring", 2, 2, f"mesh.context={n}")
    order = sequence_order(layout, 256)
    assert sorted(order) == list(range(256))
    seen = lambda order: (order + 1).reshape(n, -1).sum(1)  # keys that a device's queries see
    assert np.ptp(seen(order)) < 0.05 * seen(order).min()
    assert np.ptp(seen(np.arange(256))) > seen(np.arange(256)).min()  # in the natural order
    pieces = order.reshape(n, 2, -1)
    assert [(int(low[0]), int(high[0])) for low, high in pieces] == [
        (i * 128 // n, (2 * n - 1 - i) * 128 // n) for i in range(n)
    ]


def test_whole_sequences_keep_their_order():
    natural = np.arange(64)
    for variant, axes in (("ring", []), ("all_to_all", ["mesh.context=2"])):
        _, layout = open_split(variant, 2, 2, *axes)
        assert np.array_equal(sequence_order(layout, 64), natural)


def test_memory_does_not_grow_with_the_ring():
    """At 256 tokens a device, forward and backward, in layers that are scanned and recomputed."""
    found = []
    for n in (2, 4, 8):
        mesh, layout = open_split("ring", 2, 2, f"mesh.context={n}", chunk=32)

        def loss(q, k, v, ids, layout=layout):
            layer = jax.checkpoint(lambda x, k: (attend(x, k, v, ids, layout, 0.0, 0), None))
            return jnp.sum(jax.lax.scan(layer, q, jnp.stack([k, k]))[0])

        with jax.set_mesh(mesh):
            inputs = shapes(mesh, layout, 1, 256 * n, 2, 2, True)
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes)
    assert found[2] < 1.02 * found[1], found
    assert found[1] < 1.25 * found[0], (
        found
    )  # of two there is no loop, which holds what it passes on


@functools.cache
def moved(variant: str, n: int, backward: bool) -> dict[str, tuple[int, int]]:
    """kind -> (arrays, bytes of results) that a device receives, loops as often as they run."""
    mesh, layout = open_split(variant, 8, 8, f"mesh.context={n}", chunk=16)
    with jax.set_mesh(mesh):
        inputs = shapes(mesh, layout, 1, LENGTH, 8, 8, False)
        text = program(layout, backward).lower(*inputs).compile().as_text()
    found = {}
    for one in find_collectives(parse(text)):
        count, size = found.get(one.kind, (0, 0))
        found[one.kind] = count + one.times * len(one.shapes), size + one.times * one.bytes
    return found


@pytest.mark.parametrize("n", [tiny.nightly(2), 4, tiny.nightly(8)])
def test_bytes_of_the_ring(n):
    """k, v make n-1 hops forward; backward they make them again, and dk, dv n."""
    part = 4 * LENGTH // n * 8 * WIDTH
    hops = 2 * (n - 1)
    assert moved("ring", n, False) == {"collective-permute": (hops, hops * part)}
    hops += 2 * (n - 1) + 2 * n - 2  # without remat XLA makes the first of both passes one
    found = moved("ring", n, True)["collective-permute"]
    assert found == (hops, hops * part)


def test_bytes_of_gathered_keys():
    n, whole = 4, 4 * LENGTH * 8 * WIDTH
    assert moved("all_gather", n, False) == {"all-gather": (2, 2 * whole)}
    found = moved("all_gather", n, True)
    assert found["all-gather"][1] in (2 * whole, 4 * whole)  # twice, or the first are kept
    assert found["all-to-all"][1] == 2 * whole


def test_bytes_of_whole_sequences():
    """One all-to-all for q, k, v and the output, each way."""
    n, part = 4, 4 * LENGTH // 4 * 8 * WIDTH
    assert moved("all_to_all", n, False)["all-to-all"][1] == 4 * part
    assert set(moved("all_to_all", n, False)) == {"all-to-all"}
    assert moved("all_to_all", n, True)["all-to-all"][1] == 8 * part


# Whole models.

RUNS = {  # family, devices, mesh, what differs from the plain run on one device too
    "fsdp, microbatches": (
        "llama", 4, ["mesh.context=2", "mesh.fsdp=2", "batch.microbatches=2"], [],
    ),
    "tensor, a window, kept by name": (
        "llama", 8, ["mesh.context=2", "mesh.tensor=4", "remat.policy=names",
                     "remat.names=[attention]"],
        ["model.sliding_window=7"],
    ),
    "expert, gathered, no segments": (
        "gpt2", 8, ["mesh.context=4", "mesh.expert=2", "attention.context=all_gather"],
        ["data.segments=false", "model.attention_softcap=5"],
    ),
    "data, all to all, gathered once a step": (
        "gpt2", 4, ["mesh.context=2", "mesh.data=2", "attention.context=all_to_all",
                    "gather_at=step", "batch.microbatches=2"],
        ["model.sliding_window=7"],
    ),
    "kept by name": (
        "gpt2", 2, ["mesh.context=2", "remat.policy=names", "remat.names=[attention]"],
        ["model.sliding_window=7"],
    ),
}  # fmt: skip


@functools.cache
def reference(data, family: str, *overrides: str):
    return tiny.run(tiny.config(family, f"data.path={data}", *overrides), 1)


# Rings of llama and gpt2, with fsdp, tensor and microbatches, are in test_every_layout.py too;
# a window in the all-to-all that stays, and outputs kept by name in the next test.
DOUBLE = ("fsdp, microbatches", "tensor, a window, kept by name", "kept by name")


@pytest.mark.parametrize("case", [tiny.nightly(c) if c in DOUBLE else c for c in RUNS])
def test_a_split_sequence_is_the_same_run(case, data):
    family, count, mesh, both = RUNS[case]
    losses, initial, batch, _ = tiny.run(
        tiny.config(family, f"data.path={data}", *both, *mesh), count
    )
    expected, expected_initial, expected_batch, _ = reference(data, family, *both)
    for found, wanted in ((initial, expected_initial), (batch, expected_batch)):
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < expected[0]


def test_kept_outputs_spare_the_second_forward_pass():
    """With remat.names=[attention] the backward pass does not go round for the output again."""
    mesh, layout = open_split("ring", 2, 2, "mesh.context=2")
    policy = jax.checkpoint_policies.save_only_these_names("attention")

    def loss(q, k, v, ids, policy):
        layer = jax.checkpoint(lambda q: attend(2 * q, k, v, ids, layout, 0.0, 0), policy=policy)
        return jnp.sum(layer(q) ** 2)

    def products(policy):
        with jax.set_mesh(mesh):
            inputs = shapes(mesh, layout, 1, LENGTH, 2, 2, True)
            grad = jax.jit(jax.grad(functools.partial(loss, policy=policy)))
            return score_flops(grad.trace(*inputs).jaxpr)

    assert products(policy) < products(None)
