"""Formulas against compiled programs."""

from pathlib import Path

import jax
import pytest

from jaxlm import configfile
from jaxlm.plan import analytic, hlo
from jaxlm.plan.account import count_flops
from jaxlm.plan.compiled import trace_train_step
from jaxlm.plan.target import parse_target
from jaxlm.train import make_program

FSDP = Path(__file__).parent.parent / "configs" / "layouts" / "fsdp.yaml"


@pytest.mark.parametrize("chunks", [1, 2])
def test_flops_of_each_part_are_those_of_the_program(chunks):
    config = configfile.load(FSDP, [f"loss.chunks={chunks}", "remat.policy=none"])
    program = make_program(config, jax.devices())
    text = trace_train_step(config, program).lower().compile().as_text()
    counted = count_flops(list(hlo.walk(hlo.parse(text))))[0]
    target = parse_target("cpu:8")
    formulas = analytic.analyze(config, program.layout, program.structure, target).flops
    assert formulas == pytest.approx(counted, rel=1e-6)
