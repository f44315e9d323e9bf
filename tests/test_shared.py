"""One trace for many candidates of a search says what the trace of each one says."""

import random
from pathlib import Path

import pytest

from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import estimate, search
from jaxlm.plan.shared import Estimator

CONFIGS = Path(__file__).parent / "configs"
CASES = [
    ("llama", "v5e:2x4", []), ("mixtral", "h100:1x8", []),
    ("llama", "cpu:8", ["batch.sequence_length=16384"]),
    pytest.param("mixtral", "v5e:2x4", ["model.dispatch=capacity"], marks=pytest.mark.nightly),
    pytest.param("gpt2", "h100:1x8", [], marks=pytest.mark.nightly),
    pytest.param("qwen3_moe", "v5e:2x4", [], marks=pytest.mark.nightly),
]  # fmt: skip


def traffic(cost) -> dict:
    return {(row.kind, row.axes): row.bytes for row in cost.traffic}


@pytest.mark.parametrize("name, target, overrides", CASES)
def test_shared_traces_say_what_own_traces_do(name, target, overrides):
    config = configfile.load(
        CONFIGS / f"{name}.yaml", ["data.path=absent", "batch.sequences=64", *overrides]
    )
    hardware = parse_target(target)
    every = sorted(search.legal(config, hardware), key=lambda pair: search.overrides(*pair))
    chosen = random.Random(0).sample(every, 2)
    estimator = Estimator(config, hardware)
    for (one, sizes), found in zip(chosen, estimator(chosen), strict=True):
        own = estimate.of_config(one, hardware)
        where = search.overrides(one, sizes)
        assert found.cost.total_flops == pytest.approx(own.cost.total_flops, rel=1e-6), where
        assert found.cost.peak == pytest.approx(own.cost.peak, rel=0.01), where
        assert found.cost.hbm_bytes == pytest.approx(own.cost.hbm_bytes, rel=0.01), where
        assert found.time.seconds == pytest.approx(own.time.seconds, rel=0.01), where
        least = 1e-3 * sum(row.bytes for row in own.cost.traffic)
        assert traffic(found.cost) == pytest.approx(traffic(own.cost), rel=1e-3, abs=least), where


def test_a_trace_stands_for_meshes_and_batches_of_other_sizes():
    config = configfile.load(CONFIGS / "llama.yaml", ["data.path=absent", "batch.sequences=64"])
    target = parse_target("v5e:4x4")
    estimator = Estimator(config, target)
    every = list(search.legal(config, target))
    same = [
        pair for pair in every
        if pair[0].remat == search.REMAT[0] and pair[0].loss.chunks == 2
        and pair[1]["stage"] == 1 and pair[0].batch.microbatches > 1
    ]  # fmt: skip
    estimator(same)
    assert len(same) > 20 and len(estimator.steps) < 8
