"""The compiled train step holds the collectives that its layout calls for, and no others.

CPU's compiler has no reduce-scatter: there an all-reduce stands for each.
"""

import dataclasses
import importlib.util
from collections import Counter

import numpy as np
import pytest
import recorded
from recorded import LAYOUTS

from jaxlm import config as cfg
from jaxlm import xla
from jaxlm.hardware.target import AbsentDevice, parse_target
from jaxlm.xla.collectives import replica_groups

WEIGHTS, NORMS, TABLES = 7, 3, 2  # of a layer: q k v o gate up down; norms with the final one


def expected(sizes: dict[str, int], microbatches: int, gather_at: str, kind: str) -> Counter:
    """Arrays communicated, by (kind, axes, loops around), from the layout alone."""
    cpu = kind == "cpu"
    data, fsdp, tensor = (sizes[axis] > 1 for axis in ("data", "fsdp", "tensor"))
    outside = int(microbatches > 1)  # of the loop over layers, inside that over microbatches
    layer, scatter = outside + 1, "all-reduce" if cpu else "reduce-scatter"
    want = Counter()
    if fsdp and gather_at == "layer":
        want["all-gather", ("fsdp",), layer] += 2 * WEIGHTS  # forward, and recomputed backward
        # They do not change from one microbatch to the next, and CPU's compiler sees it.
        want["all-gather", ("fsdp",), 0 if cpu else outside] += TABLES
        want[scatter, ("fsdp",), layer] += WEIGHTS  # gradients
        want[scatter, ("fsdp",), outside] += TABLES
    if fsdp and gather_at == "step":
        want["all-gather", ("fsdp",), 0] += WEIGHTS + TABLES
    # What does not shard a weight at rest is summed once a step, outside every loop.
    late = ("data",) * data + ("fsdp",) * (fsdp and gather_at == "step")
    if late:
        want["all-reduce", late, 0] += WEIGHTS + TABLES
    everywhere = ("data",) * data + ("fsdp",) * fsdp + ("tensor",) * tensor
    if everywhere:
        want["all-reduce", everywhere, 0] += NORMS  # replicated; each device saw some tokens
    if tensor:
        # Into attention and MLP: forward, recomputed; out of them: the gradients' way back.
        want["all-gather", ("tensor",), layer] += 2 + 2 + 2
        # Out: forward 2, recomputed 1 (the second norm's input); back in: into attention and MLP.
        want[scatter, ("tensor",), layer] += 2 + 1 + 2
        want["all-gather", ("tensor",), outside] += 2  # into the head; out of the embedding, back
        want[scatter, ("tensor",), outside] += 1  # out of the embedding
        # Each chunk of the loss: maximum, sum, target; recomputed: maximum, sum; hidden's gradient.
        want["all-reduce", ("tensor",), outside + 1] += 3 + 2 + 1
    return want


def expected_bytes(config: cfg.Config, sizes: dict[str, int], kind: str) -> Counter:
    """Bytes of results in a step, by (kind, axes): weights and activations times their trips."""
    cpu, m, b = kind == "cpu", config.model, config.batch
    data, fsdp, tensor = (sizes[axis] for axis in ("data", "fsdp", "tensor"))
    width, wide = (
        np.dtype(x).itemsize for x in (config.precision.compute, config.precision.reduce)
    )
    heads = 2 * (m.num_heads + m.num_kv_heads) * m.head_dim
    layers = m.num_layers * m.embed_dim * (heads + 3 * m.mlp_dim) // tensor
    tables = TABLES * m.embed_dim * cfg.padded_vocab(m) // tensor
    norms = (NORMS - 1) * m.num_layers + 1
    tokens = b.sequences * b.sequence_length // (data * fsdp)  # of a device, in all microbatches
    scatter, part = ("all-reduce", 1) if cpu else ("reduce-scatter", tensor)
    want = Counter()
    if fsdp > 1 and config.gather_at == "layer":
        times = b.microbatches
        want["all-gather", ("fsdp",)] += width * (
            2 * times * layers + (1 if cpu else times) * tables
        )
        kept = layers + tables if cpu else (layers + tables) // fsdp
        want[scatter, ("fsdp",)] += wide * times * kept
    if fsdp > 1 and config.gather_at == "step":
        want["all-gather", ("fsdp",)] += width * (layers + tables)
    late = ("data",) * (data > 1) + ("fsdp",) * (fsdp > 1 and config.gather_at == "step")
    if late:
        held = 1 if config.gather_at == "step" else fsdp
        want["all-reduce", late] += wide * (layers + tables) // held
    everywhere = tuple(axis for axis in ("data", "fsdp", "tensor") if sizes[axis] > 1)
    if everywhere:
        want["all-reduce", everywhere] += wide * norms * m.embed_dim
    if tensor > 1:
        hidden = width * tokens * m.embed_dim
        want["all-gather", ("tensor",)] += (6 * m.num_layers + 2) * hidden
        want[scatter, ("tensor",)] += (5 * m.num_layers + 1) * hidden // part
        want["all-reduce", ("tensor",)] += hidden + 5 * 4 * tokens  # the loss
    return want


def measured_bytes(rows: list[dict]) -> Counter:
    """Bytes of results in a step, by (kind, axes)."""
    found = Counter()
    for row in rows:
        found[row["kind"], tuple(row["axes"])] += row["step_bytes"]
    return found


def check_bytes(found: Counter, want: Counter) -> None:
    """Within 10 %, and a thousandth of all bytes for scalars that no formula counts."""
    slack = sum(want.values()) / 1000
    for key in want | found:
        assert abs(found[key] - want[key]) <= 0.1 * want[key] + slack, (key, found, want)


def count(found: list[xla.Collective], axes: dict[str, int]) -> Counter:
    """Arrays communicated, by (kind, axes, loops around), without scalars."""
    counted = Counter()
    for one in found:
        arrays = len(one.shapes) - one.scalars
        counted[one.kind, xla.mesh_axes(one.groups, axes), one.loops] += arrays
    return +counted


def collectives(name: str):
    """(config, sizes of the axes, collectives) of a recorded train step."""
    axes = dict(recorded.program(name).layout.axes)
    return recorded.SOURCES[name].config, axes, xla.find_collectives(recorded.module(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_of_a_layout(name):
    config, axes, found = collectives(name)
    want = expected(axes, config.batch.microbatches, config.gather_at, "cpu")
    assert count(found, axes) == want
    rows = measured_bytes(xla.summarize(found, axes))
    check_bytes(rows, expected_bytes(config, axes, "cpu"))
    assert sum(one.scalars for one in found) <= 5  # loss, weight, z-loss; the gradient's norm


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_gradients_cross_the_data_axis_once(microbatches):
    """However many microbatches there are: the slow network is used once a step."""
    _, axes, found = collectives(f"data, {microbatches} microbatches of 16")
    assert count(found, axes) == {
        ("all-reduce", ("data",), 0): WEIGHTS + TABLES + NORMS,
    }


BACKENDS = {
    "fsdp=8 on TPU": "splash",
    "fsdp=4 x tensor=2 on TPU": "splash",
    "fsdp=8 on GPU": "xla",
    "fsdp=4 x tensor=2 on GPU": "xla",
    "2 hosts, 2 microbatches on GPU": "xla",
    "2 hosts, bfloat16 sums on GPU": "xla",
}


@pytest.mark.parametrize("name", BACKENDS)
def test_collectives_on_devices_that_are_not_here(name):
    got, config = recorded.report(name), recorded.SOURCES[name].config
    assert not recorded.record(name).warnings  # of an "involuntary full rematerialization"
    axes = dict(recorded.program(name).layout.axes)
    assert (got["devices"], got["attention"]) == (8, BACKENDS[name])
    assert got["state_and_batch_bytes"] < got["peak_bytes"] < 2e9
    gpu, found = "GPU" in name, Counter()
    for row in got["collectives"]:
        key = row["kind"], row["axes"], row["loops"]
        found[key] += row["arrays"] - row["scalars"]
        if key[:2] == ("all-reduce", ("data",)):  # all gradients but the norms'
            width = np.dtype(config.precision.reduce).itemsize
            assert row["bytes"] == width * large_weights(config.model) / config.mesh.fsdp
    kind = "gpu" if gpu else "tpu"
    want = expected(axes, config.batch.microbatches, config.gather_at, kind)
    assert joined(found, gpu) == joined(want, gpu)
    check_bytes(measured_bytes(got["collectives"]), expected_bytes(config, axes, kind))


def joined(counts: Counter, gpu: bool) -> Counter:
    """GPU's combiner concatenates all-reduces as it likes: there one or many count the same."""
    return Counter({k: 1 if gpu and k[0] == "all-reduce" else n for k, n in counts.items() if n})


def large_weights(m: cfg.Model) -> int:
    """Parameters of a Llama without its norms."""
    heads = 2 * (m.num_heads + m.num_kv_heads) * m.head_dim
    layer = m.embed_dim * (heads + 3 * m.mlp_dim)
    return m.num_layers * layer + TABLES * m.embed_dim * cfg.padded_vocab(m)


def test_bytes_of_a_ring_on_tpu():
    """Keys and values n-1 hops in each of three passes, less one that two share; gradients n."""
    rows = recorded.report("a ring on TPU")["collectives"]
    m = recorded.SOURCES["a ring on TPU"].config.model
    hop = 2 * (16 // 2) * (512 // 4) * m.num_kv_heads * m.head_dim  # elements of k and v
    want = m.num_layers * hop * (2 * (3 * 3 - 1) + 4 * 4)  # bfloat16, and float32 sums
    assert measured_bytes(rows)["collective-permute", ("context",)] == pytest.approx(want, rel=0.1)
    once = [row for row in rows if row["axes"] == ("data",) and row["bytes"] > 1000]
    assert [row["loops"] for row in once] == [0]
    assert once[0]["bytes"] == pytest.approx(4 * large_weights(m) / 4, rel=0.01)


def test_bytes_of_a_pipeline_on_tpu():
    """A hop each way in every tick but the last; gradients cross data once a step."""
    rows = recorded.report("a pipeline on TPU")["collectives"]
    m = recorded.SOURCES["a pipeline on TPU"].config.model
    hop, ticks = 2 * (16 // 4 // 4) * 512 * m.embed_dim, 4 + 2 - 1
    assert measured_bytes(rows)["collective-permute", ("stage",)] == hop * (2 * ticks - 1)
    once = [row for row in rows if row["axes"] == ("data",) and row["bytes"] > 1000]
    assert [row["loops"] for row in once] == [0]
    assert once[0]["bytes"] == pytest.approx(4 * large_weights(m) / 2, rel=0.01)


needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="jax-cuda12-plugin is not installed",
)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cfg.UserError, match="libtpu is missing: pip install libtpu$"):
        parse_target("v5e:2x4").devices()
    with pytest.raises(
        cfg.UserError, match="missing: pip install jax-cuda12-plugin jax-cuda12-pjrt$"
    ):
        parse_target("h100:1x8").devices()


@pytest.mark.parametrize(
    "target, says",
    {
        "v5e": "v5e has slices 1x1, 2x2, 2x4",
        "v5p:4x4x5": "or any cube of 4s, as 8x8x16",
        "h100:2x2x2": "use hosts x GPUs, as h100:1x8",
        "2*h100:1x8": "is not known; use a TPU slice",
        "tpu:8": "several as 2\\*v5p:4x4x4",
        "v5e:2xx4": "is not known",
        "": "target= is not known",
    }.items(),
)
def test_unknown_targets_are_one_line(target, says):
    with pytest.raises(cfg.UserError, match=says):
        parse_target(target)


@needs_tpu
@needs_cuda
@pytest.mark.parametrize(
    "name",
    ["v5e:2x4", "v6e:16x16", "v5p:4x4x8", "2*v5p:2x2x2", "v4:2x2x4", "tpu7x:2x2x2", "h100:2x8"],
)
def test_absent_devices_are_those_of_the_compiler(name):
    """Number, kind, place and order, so that both make the same mesh."""
    target, keys = parse_target(name), [field.name for field in dataclasses.fields(AbsentDevice)]
    real = [AbsentDevice(*(getattr(device, key, 0) for key in keys)) for device in target.devices()]
    real = [dataclasses.replace(device, coords=tuple(device.coords)) for device in real]
    assert real == target.absent_devices()


GROUPS = {
    "replica_groups={{0,1},{2,3}}": ((0, 1), (2, 3)),
    "replica_groups={}": (),
    "replica_groups=[2,2]<=[4]": ((0, 1), (2, 3)),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "replica_groups=mesh['a'=2,'b'=2] {'a'}": ((0, 2), (1, 3)),
    "replica_groups=mesh['a'=2,'b'=2] {'a','b'}": ((0, 1, 2, 3),),
    "replica_groups=mesh['a'=8] {'a':(2)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}": ((0, 1), (2, 3)),
    "source_target_pairs={{0,1},{1,0}}": ((0, 1), (1, 0)),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_in_every_syntax(text):
    assert replica_groups(f"%x), channel_id=1, {text}, dimensions={{0}}") == GROUPS[text]


HLO = """HloModule m, num_partitions=4

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %part = f32[2] slice(%x), slice={[0:2]}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%part), channel_id=1, replica_groups=[1,4]<=[4]
  %d = f32[8]{0} all-gather-done(%s)
  %f = f32[2]{0} fusion(%d), kind=kLoop, calls=%all-reduce-scatter.1
  ROOT %r = (s32[], f32[8]) tuple(%next, %d)
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8] parameter(0)
  %r = f32[8]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = f32[2] slice(%r), slice={[0:2]}
}

ENTRY %main (a: f32[8]) -> (bf16[4], f32[]) {
  %a = f32[8]{0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %c = f32[] parameter(2)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]) tuple(%zero, %a)
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %q = (bf16[4]{0}, f32[]) all-reduce(%b, %c), channel_id=3, replica_groups=[2,2]<=[4]
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %s = f32[] add(%p, %q)
}
"""


def test_halves_fusions_and_loops():
    everyone = ((0, 1, 2, 3),)
    assert xla.find_collectives(xla.parse(HLO)) == [
        xla.Collective("all-gather", ("f32[8]",), 32, everyone, 1, 5),
        xla.Collective("reduce-scatter", ("f32[8]",), 8, everyone, 1, 5),
        xla.Collective("all-reduce", ("bf16[4]", "f32[]"), 12, ((0, 1), (2, 3)), 0, 1),
    ]
