# ruff: noqa: E501 - lines of HLO
"""HLO accounting: exact FLOPs and bytes of programs with known answers, and a test per fact."""

from typing import NamedTuple

import pytest
import recorded
from known_programs import K, L, N

from jaxlm import xla
from jaxlm.attention.compiled import kernel_flops, shown_blocks
from jaxlm.config import AXES
from jaxlm.hardware.target import parse_target
from jaxlm.plan.compiled import count_traffic, unknown_trips
from jaxlm.plan.cost import part_of
from jaxlm.xla import hlo
from jaxlm.xla.estimates import reification_seconds

DEVICES = 8
ALONG = dict.fromkeys(AXES, 1) | {"fsdp": DEVICES}


def known(name: str, target: str) -> xla.Module:
    """A known program as it was compiled for a target."""
    return recorded.module(f"known {name}, {target}")


class Counted(NamedTuple):
    """What is counted of FLOPs."""

    parts: dict[str, float]
    kernels: float
    notes: list[str]


def count(module: xla.Module) -> Counted:
    return Counted(*xla.count_flops(xla.walk(module), part_of, kernel_flops))


def flops(module: xla.Module) -> float:
    counted = count(module)
    assert not counted.notes
    return sum(counted.parts.values())


PRODUCT = 2 * N**3
FLOPS = {
    "dense": 2 * PRODUCT,
    "scan": L * PRODUCT,
    "nested": K * L * PRODUCT,
    "grad": 3 * L * PRODUCT,
    "remat": 4 * L * PRODUCT,
    "fsdp": L * PRODUCT / DEVICES,
    "tensor": 2 * L * PRODUCT / DEVICES,
    "experts": PRODUCT / DEVICES**2,
}


@pytest.mark.parametrize("target", recorded.TARGETS)
@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_exact(target, name):
    found = flops(known(name, target))
    if name == "remat" and found == 3 * L * PRODUCT:  # tanh' needs tanh alone: it may be kept
        return
    assert found == FLOPS[name]


BYTES = {  # of results in a run, by kind: every weight gathered, every sum, every hop
    "fsdp": ("all-gather", 4 * L * N * N),
    "tensor": ("all-reduce", 4 * L * N * N),
    "ring": ("collective-permute", 4 * L * N * N // DEVICES),
    "experts": ("all-to-all", 2 * 4 * N * N // DEVICES),
}


@pytest.mark.parametrize("target", recorded.TARGETS)
@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_collectives_are_exact(target, name):
    kind, want = BYTES[name]
    found = xla.find_collectives(known(name, target))
    assert {one.kind for one in found} == {kind}
    assert sum(one.bytes * one.times for one in found) == want


@pytest.mark.parametrize("target", recorded.TARGETS)
def test_wire_bytes_by_the_ring_model(target):
    for name, factor in (("fsdp", 7 / 8), ("tensor", 2 * 7 / 8), ("ring", 1), ("experts", 7 / 8)):
        found = xla.find_collectives(known(name, target))
        (row,) = count_traffic(found, ALONG, parse_target(target), {})
        assert row.axes == ("fsdp",) and row.size == DEVICES
        assert row.wire == pytest.approx(factor * BYTES[name][1])
        assert row.network == {"cpu:8": "memory"}.get(target, "links")


def program(body: str) -> hlo.Module:
    """A module of snippets; `%sum` adds two numbers."""
    return hlo.parse(f"HloModule m, is_scheduled=true, num_partitions=8\n\n{body}\n")


WHILE = """%cond (s: (s32[], s32[], f32[8])) -> pred[] {
  %s = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=DIRECTION
}

%body (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %t = (s32[], s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %m = s32[] get-tuple-element(%t), index=1
  %x = f32[8] get-tuple-element(%t), index=2
  %two = s32[] constant(2)
  %k = s32[] add(%j, %two)
  %r = f32[8] all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%sum
  ROOT %o = (s32[], s32[], f32[8]) tuple(%k, %m, %r)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %first = s32[] constant(3)
  %limit = s32[] constant(11)
  %copy = s32[] copy(%limit)
  %init = (s32[], s32[], f32[8]) tuple(%first, %copy, %a)
  %w = (s32[], s32[], f32[8]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=2
}"""


@pytest.mark.parametrize("direction, trips", [("LT", 4), ("LE", 5)])
def test_trips_from_start_step_and_limit(direction, trips):
    """3, 5, 7, 9 below 11; the limit comes through a tuple and a copy."""
    (one,) = xla.find_collectives(program(WHILE.replace("DIRECTION", direction)))
    assert (one.loops, one.times) == (1, trips)


def test_trips_that_the_compiler_knows():
    text = WHILE.replace(
        ", body=%body", ', body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    (one,) = xla.find_collectives(program(text))
    assert one.times == 9


def test_unknown_trips_are_said():
    module = program(WHILE.replace("%limit = s32[] constant(11)", "%limit = s32[] partition-id()"))
    (note,) = unknown_trips(list(xla.walk(module)))
    assert "unknown trips" in note


ASYNC = """ENTRY %main (a: f32[8], b: f32[4,4]) -> f32[64] {
  %a = f32[8] parameter(0)
  %b = f32[4,4] parameter(1)
  %s = (f32[8], f32[64]) all-gather-start(%a), channel_id=1, replica_groups=[1,8]<=[8]
  %between = f32[4,4] WORK(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %d = f32[64] all-gather-done(%s)
}"""


@pytest.mark.parametrize("work, blocking", [("dot", False), ("bitcast", True)])
def test_an_asynchronous_collective_blocks_unless_work_runs_meanwhile(work, blocking):
    (one,) = xla.find_collectives(program(ASYNC.replace("WORK", work)))
    assert (one.kind, one.bytes, one.blocking) == ("all-gather", 256, blocking)


KERNEL = """ENTRY %main (m: s8[1,8,4], q: bf16[2,4,1024,64], k: bf16[2,2,1024,64]) -> bf16[2,4,1024,64] {
  %m = s8[1,8,4] parameter(0)
  %q = bf16[2,4,1024,64] parameter(1)
  %k = bf16[2,2,1024,64] parameter(2)
  ROOT %NAME = RESULT custom-call(%m, %m, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/transpose(jvp())/projections/attention/NAME/pallas_call"}
}"""
OUT = "bf16[2,4,1024,64]"


@pytest.mark.parametrize(
    "name, result, matmuls",
    [
        ("splash_mha_fwd_residuals", f"({OUT}, f32[2,4,1024,128])", 2),
        ("splash_mha_dkv_no_residuals", f"({OUT}, {OUT}, {OUT})", 5),
        ("splash_mha_dkv_no_residuals", f"({OUT}, {OUT})", 4),
        ("splash_mha_dq_no_residuals", OUT, 3),
    ],
)
def test_flops_of_attention_kernels(name, result, matmuls):
    """8 x 4 blocks, of which a causal mask shows 1 1 2 2 3 3 4 4."""
    text = KERNEL.replace("NAME", name).replace("RESULT", result)
    parts, kernels, notes = count(program(text))
    assert not notes and set(parts) == {"attention/backward"}
    assert kernels == matmuls * 2 * (2 * 4 * 1024 * 1024) * 64 * 20 / 32


def test_each_kernel_has_its_own_window():
    """Of 8 x 4 blocks a window of 128 shows the one on the diagonal, and the one before."""
    name, out = "splash_mha_fwd_residuals", f"({OUT}, f32[2,4,1024,128])"
    text = KERNEL.replace("NAME", name).replace("RESULT", out)
    text = text.replace("attention/", "attention/window_128/")
    parts, kernels, _ = count(program(text))
    first = lambda row: max(0, row * 128 - 127) // 256
    blocks = sum(row * 128 // 256 - first(row) + 1 for row in range(8))
    assert kernels == 2 * 2 * (2 * 4 * 1024 * 1024) * 64 * blocks / 32 and set(parts)


def test_a_window_hides_blocks_on_both_sides():
    """Of 8 x 8 blocks of 128, rows of a window of 128 see themselves and the one before."""
    assert shown_blocks(8, 8, 1024, 128) == (1 + 7 * 2) / 64
    assert shown_blocks(8, 8, 1024, 0) == 36 / 64


def test_other_kernels_are_named():
    text = KERNEL.replace("NAME", "gather_rows").replace("RESULT", OUT)
    _, kernels, notes = count(program(text))
    assert kernels == 0 and notes == ["FLOPs of kernel gather_rows are not known"]


def test_gemms_of_cublas():
    text = """ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32] parameter(0)
  %b = bf16[32,16] parameter(1)
  ROOT %g = (bf16[64,16], s8[1024]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}"""
    assert flops(program(text)) == 2 * 64 * 32 * 16


@pytest.mark.parametrize(
    "attributes, window, count",
    [("size=4 pad=0_0", (8, 4), 5 * 4), ("size=3 pad=1_1", (8, 3), 8 + 2 * 7),
     ("size=3 pad=2_2 rhs_dilate=2", (8, 3), 8 + 2 * 6),
     ("size=8 pad=7_7 rhs_reversal=1", (8, 8), 64), ("size=3 pad=1_1 lhs_dilate=2", (5, 3), 5 + 2 * 4)],
)  # fmt: skip
def test_windows_count_the_places_that_meet_an_element(attributes, window, count):
    length, size = window
    spread = 2 if "lhs_dilate=2" in attributes else 1
    gap = 2 if "rhs_dilate=2" in attributes else 1
    pad = int(attributes.split("pad=")[1][0])
    out = (length - 1) * spread + 1 + 2 * pad - (size - 1) * gap
    text = f"""ENTRY %main (a: f32[2,{length},3], k: f32[{size},3,7]) -> f32[2,{out},7] {{
  %a = f32[2,{length},3] parameter(0)
  %k = f32[{size},3,7] parameter(1)
  ROOT %c = f32[2,{out},7] convolution(%a, %k), window={{{attributes}}}, dim_labels=b0f_0io->b0f
}}"""
    assert flops(program(text)) == 2 * 2 * 3 * 7 * count


def test_costs_of_gpu_models_that_are_to_be_trusted():
    cost = lambda *rows: hlo.Instruction(
        "f", "fusion", (), (0,), (), "", ', backend_config={"reification_cost":['
        + ",".join(f'{{"exec_time_us":{time},"name":"{name}"}}' for name, time in rows) + "]}", False,
    )  # fmt: skip
    seconds = reification_seconds
    assert seconds(cost(("", 9), ("sol", 4))) == pytest.approx(4e-6)
    assert seconds(cost(("sol", 4), ("indexing-cost-model", 7))) == pytest.approx(7e-6)
    assert seconds(cost(("", 9), ("experimental-gemm-cost-model", 3))) == 0


def test_padding_and_memory_spaces_of_shapes():
    (one,) = hlo.parse_shapes("bf16[5,3,100]{2,1,0:T(8,128)(2,1)S(1)}")
    assert (one.bytes, one.padded_bytes, one.space) == (3000, 5 * 8 * 128 * 2, 1)
    (turned,) = hlo.parse_shapes("f32[100,5]{0,1:T(8,128)}")
    assert turned.padded_bytes == 8 * 128 * 4
    pair = hlo.parse_shapes("((f32[8]{0}, s32[]), /*index=1*/pred[4]{0:S(5)})")
    assert [shape.dtype for shape in pair] == ["f32", "s32", "pred"] and pair[2].space == hlo.HOST


def test_host_traffic_is_counted_apart():
    text = """ENTRY %main (a: f32[64,8], h: f32[64,8]) -> f32[64,8] {
  %a = f32[1,8] parameter(0)
  %h = f32[64,8]{1,0:S(5)} parameter(1)
  %z = s32[] constant(0)
  %s = (f32[64,8]{1,0:S(5)}, f32[1,8], s32[], s32[], f32[64,8]{1,0:S(5)}, u32[]) dynamic-update-slice-start(%h, %a, %z, %z)
  ROOT %d = f32[64,8]{1,0:S(5)} dynamic-update-slice-done(%s)
}"""
    module = program(text)
    assert xla.count_bytes(module, xla.walk(module)) == (32, 32)


IN_PLACE = """%fused (p0: f32[64,8], p1: f32[8,8], p2: s32[]) -> f32[64,8] {
  %p0 = f32[64,8] parameter(0)
  %p1 = f32[8,8] parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8] dynamic-slice(%p1, %p2, %zero), dynamic_slice_sizes={1,8}
  ROOT %u = f32[64,8] dynamic-update-slice(%p0, %row, %p2, %zero)
}

ENTRY %main (a: f32[64,8], b: f32[8,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8] parameter(0)
  %b = f32[8,8] parameter(1)
  %i = s32[] parameter(2)
  FUSION
}"""


@pytest.mark.parametrize(
    "fusion",
    [
        "ROOT %f = f32[64,8] fusion(%a, %b, %i), kind=kLoop, calls=%fused",
        """%s = ((f32[64,8], f32[8,8], s32[]), f32[64,8], u32[]) fusion-start(%a, %b, %i), kind=kLoop, calls=%fused
  ROOT %f = f32[64,8] fusion-done(%s)""",
    ],
)
def test_an_update_in_place_moves_the_slice_alone(fusion):
    """Also where XLA:GPU starts it early."""
    module = program(IN_PLACE.replace("FUSION", fusion))
    visits = list(xla.walk(module))
    assert xla.count_bytes(module, visits) == (32 + 32 + 4, 0)
    chip = xla.Chip("gpu", clock=0, flops=1e15, bandwidth=3e12)
    # Without a cost of its own: bytes over the bandwidth.
    assert xla.compute_seconds(module, visits, chip) == pytest.approx(68 / 3e12)


def test_parts_and_passes():
    for name, want in {
        "jit(s)/jvp()/while/body/projections/bsd,dhc->bshc/dot_general": "projections/forward",
        "jit(s)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/dot": "mlp/recompute",
        "jit(s)/transpose(jvp(head))/checkpoint/transpose(jvp(d))/dot_general": "head/backward",
        "jit(s)/jvp()/projections/attention/shard_map/pallas_call": "attention/forward",
        "jit(s)/add": "other/forward",
    }.items():
        assert part_of(name) == want


def test_places_in_python():
    text = """HloModule m, num_partitions=1

FileNames
1 "train.py"
2 "llama.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=68}
2 {file_name_id=2 function_name_id=1 line=94}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %n = f32[8] negate(%a), metadata={op_name="x" stack_frame_id=2}
  ROOT %m = f32[8] negate(%n), metadata={op_name="x" source_file="old.py" source_line=7}
}
"""
    module = hlo.parse(text)
    new, old = module.entry.by_name["n"], module.entry.by_name["m"]
    assert module.source(new) == (("llama.py", 94), ("train.py", 68))
    assert module.source(old) == (("old.py", 7),)
