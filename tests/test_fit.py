"""Edits that make a config fit are confirmed by a compile, and cost what they say."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from jaxlm import cli, configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import compiled, estimate, fit
from jaxlm.plan.compiled import CompileError
from jaxlm.validate import validate

TINY = Path(__file__).parent / "configs" / "llama.yaml"
TARGET = parse_target("cpu:8")


def load(*overrides: str):
    return configfile.load(TINY, ["mesh.data=8", "remat.policy=none", *overrides])


def figures(config) -> tuple[float, float]:
    """(peak, seconds) of a made-up machine."""
    peak = 8 / config.mesh.fsdp + (2 if config.remat.policy == "full" else 8)
    peak += 4 / config.batch.microbatches
    return peak, (1.3 if config.remat.policy == "full" else 1.0) + config.batch.microbatches / 10


def guess(configs) -> list[tuple[float, float]]:
    return [figures(config) for config in configs]


def measure(config) -> dict:
    peak, seconds = figures(config)
    return {"peak_bytes": peak, "step_seconds": seconds, "refused": None}


@pytest.fixture
def limit(monkeypatch):
    def set_to(amount):
        monkeypatch.setattr(estimate, "memory_limit", lambda _: amount / 0.95)

    return set_to


def test_every_edit_is_legal_and_changes_something():
    config = load("batch.sequences=32")
    found = fit.candidates(config, TARGET)
    assert len(found) > 10
    for edit, edited in found:
        validate(edited, 8)
        assert edited != config
        again = configfile.load(TINY, ["mesh.data=8", "remat.policy=none", "batch.sequences=32",
                                       *fit.overrides(edit)])  # fmt: skip
        assert dataclasses.replace(again, mesh=edited.mesh) == edited
        assert {a: n for a, n in vars(again.mesh).items() if n != 1} == {
            a: n for a, n in vars(edited.mesh).items() if n != 1
        }


def test_confirmed_edits_fit_and_the_cheapest_is_first(limit):
    limit(16.5)
    edits = fit.propose(load(), TARGET, measure, guess)
    assert len(edits) == 3
    assert all(edit.peak_bytes <= 16.5 for edit in edits)
    assert [e.step_seconds for e in edits] == sorted(e.step_seconds for e in edits)
    cheapest = edits[0]  # fsdp costs nothing here
    assert cheapest.overrides == ("mesh.data=4", "mesh.fsdp=2") and cheapest.price == 0
    assert "16.0 B" in fit.describe(cheapest) or "16 B" in fit.describe(cheapest)


def test_two_edits_where_one_is_not_enough(limit):
    limit(11)
    edits = fit.propose(load(), TARGET, measure, guess)
    assert edits and all(edit.peak_bytes <= 11 for edit in edits)
    assert all(len(edit.overrides) > 3 for edit in edits)


def test_what_does_not_compile_or_fit_is_not_proposed(limit):
    limit(16.5)
    tried = []

    def stubborn(config):
        tried.append(config)
        if len(tried) > 1 and config.mesh.fsdp > 1:
            raise CompileError("crashed")
        return measure(config) | {"peak_bytes": 20.0 if config.remat.policy == "full" else 99.0}

    assert fit.propose(load(), TARGET, stubborn, guess) == []
    assert len(tried) == 1 + fit.TRIED


def test_what_fits_is_made_smaller(limit):
    limit(1e9)
    edits = fit.propose(load(), TARGET, measure, guess)
    assert edits and all(edit.peak_bytes < figures(load())[0] for edit in edits)


def test_what_the_compiler_refuses_does_not_fit_whatever_its_peak(limit):
    """Neither as it is, nor as an edit: it leaves less than the device has."""
    limit(1e9)
    refused = lambda config: measure(config) | {"refused": {"needed_bytes": 1}}
    assert fit.propose(load(), TARGET, refused, guess) == []
    first = lambda config: (measure if config.mesh.fsdp > 1 else refused)(config)
    edits = fit.propose(load(), TARGET, first, guess)
    assert edits and all("mesh.fsdp=2" in edit.overrides for edit in edits)


def test_what_is_printed_has_its_brackets_and_can_be_pasted(monkeypatch, capsys):
    buffer = {"bytes": 8.0, "kind": "saved", "name": "f.1", "shape": "f32[2]", "source": "a[/b]:1"}
    result = {"refused": None, "largest": [buffer], "cost": None}
    names = {"remat.policy": "names", "remat.names": ("attention",), "remat.offload": ()}
    edits = [fit.Edit(fit.overrides(names), 1e9, 1.1, 1.0)]
    monkeypatch.setattr(compiled, "measure", lambda *_: result)
    monkeypatch.setattr(fit, "propose", lambda *_: edits)
    assert cli.main(["plan", str(TINY), "target=cpu:8", "mesh.data=8", "--fit"]) == 0
    out = capsys.readouterr().out
    assert "f32[2]" in out and "a[/b]:1" in out
    line = next(line for line in out.splitlines() if line.startswith("remat"))
    pasted = shlex.split(line.split(":")[0])
    again = configfile.load(TINY, pasted).remat
    assert (again.policy, again.names, again.offload) == ("names", ("attention",), ())
