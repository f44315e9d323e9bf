"""Formulas against compiled programs."""

from pathlib import Path

import jax
import pytest
import tiny

from jaxlm import configfile
from jaxlm.attention.compiled import kernel_flops
from jaxlm.hardware.target import parse_target
from jaxlm.models import llama
from jaxlm.plan import analytic
from jaxlm.plan.cost import part_of
from jaxlm.program import make_program, trace_train_step
from jaxlm.xla import count_flops, parse, walk

FSDP = Path(__file__).parent.parent / "configs" / "layouts" / "fsdp.yaml"


@pytest.mark.parametrize("chunks", [1, 2])
def test_flops_of_each_part_are_those_of_the_program(chunks):
    config = configfile.load(FSDP, [f"loss.chunks={chunks}", "remat.policy=none"])
    program = make_program(config, jax.devices())
    text = trace_train_step(config, program).lower().compile().as_text()
    counted = count_flops(walk(parse(text)), part_of, kernel_flops)[0]
    target = parse_target("cpu:8")
    formulas = analytic.analyze(config, program.layout, program.structure, target).flops
    assert formulas == pytest.approx(counted, rel=1e-6)


class Local(llama.Block):
    """A block that sees 8 tokens, among others that see what model.sliding_window says."""

    @staticmethod
    def window(config):
        return 8


@pytest.mark.parametrize("window", [0, 20])
def test_attention_of_a_pattern_of_blocks_is_that_of_the_program(window, monkeypatch):
    monkeypatch.setattr(llama, "groups", lambda c: [((Local, llama.Block), c.num_layers // 2)])
    config = tiny.config(
        "llama", "attention.backend=chunked", "attention.chunk=4", "batch.sequence_length=64",
        f"model.sliding_window={window}",
    )  # fmt: skip
    program = make_program(config, jax.devices()[:1])
    text = trace_train_step(config, program).lower().compile().as_text()
    counted = count_flops(walk(parse(text)), part_of, kernel_flops)[0]
    target = parse_target("cpu:1")
    formulas = analytic.analyze(config, program.layout, program.structure, target).flops
    for when in ("forward", "recompute", "backward"):
        assert formulas[f"attention/{when}"] == counted[f"attention/{when}"]
