"""What islands send, in compiled merges and in plans: against closed formulas, on CPU, TPU, GPU."""

import jax
import numpy as np
import pytest
import tiny

from jaxlm import configfile
from jaxlm.cli import main
from jaxlm.hardware.target import parse_target
from jaxlm.outer import wire
from jaxlm.plan import compiled, outer_step, plan
from jaxlm.program import make_program

QUICKSTART = tiny.CONFIGS.parent.parent / "configs" / "quickstart.yaml"
K, EVERY = 8, 100


def islands(*overrides):
    own = ["mesh.data=1", f"mesh.replica={K}", f"outer.every={EVERY}", "outer.start_step=50"]
    return configfile.load(QUICKSTART, [*own, *overrides])


def sent(config, target) -> float:
    """Bytes that a device sends in a merge, in the text of the compiled programs."""
    program = make_program(config, jax.devices()[:K])
    costs = compiled.read_merges(config, program, target)
    assert {row.axes for cost in costs for row in cost.traffic} == {("replica",)}
    return sum(row.wire for cost in costs for row in cost.traffic)


def formula(config, up: str, down: str) -> float:
    """(K - 1)/K of all bytes of both ways; each array has zeros up to whole groups of an island."""
    program = make_program(config, jax.devices()[:K])
    group, total = K * max(wire.group(up), wire.group(down)), 0.0
    for shape in program.structure.shapes.values():
        size = -(-int(np.prod(shape)) // group) * group
        total += wire.num_bytes(size, up) + wire.num_bytes(size, down)
    return total * (K - 1) / K


@pytest.mark.parametrize(
    "wires, least",
    [
        (["float32"], 49.9),
        (["int4", "bfloat16"], 150),
        (["int4"], 350),
        tiny.nightly(["int2"], 650),
    ],
)
def test_a_merge_sends_what_its_formats_say(wires, least):
    """Beside an all-reduce of bfloat16 gradients in each of the 100 steps between two merges."""
    config = islands(f"outer.wire=[{','.join(wires)}]", "outer.rule=average")
    bytes_ = sent(config, parse_target("cpu:8"))
    assert bytes_ == pytest.approx(formula(config, wires[0], wires[-1]), rel=1e-3)
    shapes = make_program(config, jax.devices()[:K]).structure.shapes
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    assert EVERY * 2 * (K - 1) / K * 2 * parameters / bytes_ >= least


def test_a_fragment_takes_its_part_of_the_wire():
    whole, part = (
        sent(islands("outer.rule=average", f"outer.fragments={n}"), parse_target("cpu:8"))
        for n in (1, 4)
    )
    assert part / whole == pytest.approx(1 / 4, rel=0.01)


@pytest.mark.parametrize("target", ["h100:4x2", "4*v5e:2x2", "cpu:8"])
def test_a_plan_of_islands_crosses_them_in_merges_alone(target):
    own = ["mesh.data=1", "mesh.replica=4", "mesh.fsdp=-1", "outer.every=20", "outer.start_step=50"]
    own += ["mesh.dcn={replica: 4}"] if "cpu" not in target else []
    config = configfile.load(QUICKSTART, own)
    found = plan.to_dict(plan.make_plan(config, parse_target(target), analytic=True))
    assert "replica" not in found["mesh"] and found["target"]["text"] == {
        "h100:4x2": "h100:1x2", "4*v5e:2x2": "v5e:2x2", "cpu:8": "cpu:2",
    }[target]  # fmt: skip
    assert not any("replica" in row["axes"] for row in found["collectives"])
    outer = found["outer"]
    assert all("replica" in row["axes"] for row in outer["collectives"])
    network = "memory" if target == "cpu:8" else "network"
    assert set(outer["networks"]) == {network} and outer["networks"][network]["bytes"] > 0
    assert outer["islands"] == 4 and found["run"]["tokens"] == 500 * 16 * 128
    # Merged parameters and the momentum of a quarter of them, in float32, over the devices.
    parameters = found["parameters"] * 4 / (parse_target(target).size / 4)
    kept = found["memory"]["classes"]["outer"]
    assert kept == pytest.approx(parameters * 1.25, rel=0.01)


def test_traced_merges_send_what_compiled_ones_do():
    config = islands("outer.wire=[int4,bfloat16]")
    traced = outer_step.of_traces(config, parse_target("cpu:8"))
    bytes_ = sum(row.wire for cost in traced for row in cost.traffic)
    assert bytes_ == pytest.approx(sent(config, parse_target("cpu:8")), rel=0.01)


def test_targets_that_islands_do_not_share_are_named(capsys):
    for count, target in ((3, "h100:4x8"), (3, "2*v5p:4x4x4"), (16, "cpu:8")):
        text = tiny.message(outer_step.island_target, parse_target(target), count)
        assert f"mesh.replica={count} does not cut target={target}" in text
    assert outer_step.island_target(parse_target("4*v5p:4x4x4"), 2).text == "2*v5p:4x4x4"
    assert outer_step.island_target(parse_target("h100:2x8"), 4).text == "h100:1x4"
    assert outer_step.island_target(parse_target("2*v5p:4x4x4"), 4).text == "v5p:2x4x4"
    own = ["mesh.data=1", "mesh.replica=2", "mesh.fsdp=-1", "outer.every=20"]
    for way in ("--search", "--fit"):
        assert main(["plan", str(QUICKSTART), "target=h100:1x8", way, *own]) == 2
        assert f"{way} with outer.every=20" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["4*v5e:2x2"])
def test_slices_need_an_axis_that_runs_across_them(name):
    config = configfile.load(QUICKSTART, ["mesh.data=1", "mesh.fsdp=16"])
    text = tiny.message(make_program, config, parse_target(name).absent_devices())
    assert "mesh.dcn is empty, and the devices are in 4 slices" in text
