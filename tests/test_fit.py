"""Edits that make a config fit: legal, confirmed by a compiler, the fastest first."""

from pathlib import Path

import pytest
import split_programs

from jaxlm import config as cfg
from jaxlm import configfile
from jaxlm.plan import fit
from jaxlm.plan.target import parse_target
from jaxlm.validate import validate

CONFIG = Path(__file__).parent / "configs" / "llama.yaml"
TARGET = parse_target("h100:1x8")


def load(*overrides: str) -> cfg.Config:
    return configfile.load(CONFIG, ["mesh.data=8", "remat.policy=none", *overrides])


def test_single_changes_are_legal_and_can_be_written():
    config = load()
    changes = fit.legal(config, 8, fit.single_changes(config, 8))
    texts = {" ".join(f"{k}={fit._text(v)}" for k, v in change) for change in changes}
    assert "mesh.data=1 mesh.fsdp=8" in texts
    assert "remat.policy=full remat.names=[] remat.offload=[]" in texts
    assert not any("mesh.expert" in text for text in texts)  # a dense model
    for change in changes:
        edit = fit.Edit(change, fit.apply(config, change), 0, 0, 0)
        validate(edit.config, 8)
        again = configfile.load(CONFIG, ["mesh.data=8", "remat.policy=none", *edit.overrides])
        assert again == edit.config


def fake(fits: dict[str, tuple[float, float]], crash: str = ""):
    """A measuring function that looks at one key=value of the mesh or remat, and what it saw."""
    seen = []

    def measure(config: cfg.Config) -> dict:
        seen.append(config)
        if crash and crash == config.remat.policy:
            raise cfg.UserError("the compiler crashed (signal 11)")
        peak, seconds = 100.0, 1.0
        if config.remat.policy == "full":
            peak, seconds = peak - fits["remat"][0], seconds + fits["remat"][1]
        if config.mesh.fsdp > 1:
            peak, seconds = peak - fits["fsdp"][0], seconds + fits["fsdp"][1]
        return {"peak_bytes": peak, "step_seconds": seconds}

    return measure, seen


def test_only_what_the_compiler_confirmed_is_proposed():
    measure, seen = fake({"remat": (50, 0.3), "fsdp": (60, 0.1)})
    optimist = lambda config: (1.0, 1.0)  # guesses that everything fits
    edits = fit.propose(load(), TARGET, measure, optimist, limit=55, tries=40)
    assert edits and all(edit.peak_bytes <= 55 for edit in edits)
    assert [edit.seconds for edit in edits] == sorted(edit.seconds for edit in edits)
    assert all(len(edit.change) <= 3 for edit in edits)
    assert edits[0].slower == pytest.approx(edits[0].seconds / 1.0)
    assert len(seen) <= 41
    assert "% of step time" in fit.describe(edits[0])


def test_a_guess_comes_before_the_compiler():
    measure, seen = fake({"remat": (50, 0.3), "fsdp": (60, 0.1)})
    knows = lambda config: (40.0, 1.1) if config.mesh.fsdp == 8 else (100.0, 1.0)
    edits = fit.propose(load(), TARGET, measure, knows, limit=55, count=1, tries=1)
    assert [edit.overrides for edit in edits] == [("mesh.data=1", "mesh.fsdp=8")]
    assert len(seen) == 2  # the config, and the edit


def test_edits_are_put_together_where_none_is_enough():
    measure, _ = fake({"remat": (30, 0.3), "fsdp": (40, 0.1)})
    guess = lambda config: (100 - 30 * (config.remat.policy == "full"), 1.0)
    edits = fit.propose(load(), TARGET, measure, guess, limit=35, count=1, tries=200)
    assert len(edits) == 1
    assert edits[0].config.remat.policy == "full" and edits[0].config.mesh.fsdp > 1


def test_a_crash_of_the_compiler_is_not_the_end():
    measure, _ = fake({"remat": (90, 0.0), "fsdp": (60, 0.1)}, crash="full")
    edits = fit.propose(load(), TARGET, measure, limit=50, tries=40)
    assert edits and all(edit.config.remat.policy != "full" for edit in edits)


def test_a_device_of_unknown_memory_is_one_line():
    with pytest.raises(cfg.UserError, match="target=cpu:8: how much memory"):
        fit.propose(load(), parse_target("cpu:8"), lambda config: {})


def test_confirmed_by_a_real_compiler():
    """On CPU, without a guess: what remat saves is seen in the compiled program."""
    config = load("model.num_layers=8", "batch.sequence_length=128", "batch.sequences=16")

    def measure(one: cfg.Config) -> dict:
        return {"peak_bytes": split_programs.split(one, "cpu:8").peak, "step_seconds": 1.0}

    found = split_programs.split(config, "cpu:8")
    lines, peak = fit.explain_memory(found, 4), found.peak
    assert len(lines) == 4 and any("jaxlm/" in line and ".py:" in line for line in lines)
    edits = fit.propose(config, TARGET, measure, limit=0.8 * peak, count=1, tries=2)
    assert edits and edits[0].peak_bytes < 0.8 * peak
    assert edits[0].config.remat.policy == "full"
