"""The search: which candidates there are, how they are ranked, what is written and remembered."""

import dataclasses
import math
import time
from pathlib import Path

import pytest

from jaxlm import config as cfg
from jaxlm import configfile
from jaxlm.hardware.target import parse_target
from jaxlm.plan import estimate, roofline, search
from jaxlm.plan.compiled import CompileError
from jaxlm.plan.cost import Cost
from jaxlm.validate import validate

ROOT = Path(__file__).parent
LLAMA = ROOT.parent / "configs" / "llama3-8b.yaml"
TINY = ROOT / "configs" / "llama.yaml"
BYTES = {"full": 1.0, "names": 2.0, "dots": 8.0, "none": 14.0}  # saved, by policy
WORK = {"full": 4.0, "names": 3.7, "dots": 3.1, "none": 3.0}  # passes


def made_up(config, sizes) -> estimate.Estimate:
    """A model whose best is known: tensor costs time, fsdp saves memory, remat trades them."""
    held = 16 * 8e9 / (sizes["fsdp"] * sizes["tensor"] * sizes["stage"])
    rows = config.batch.sequences / config.batch.microbatches / math.prod(sizes.values())
    saved = 3e8 * rows * BYTES[config.remat.policy] * sizes["tensor"]
    seconds = WORK[config.remat.policy] * (1 + 0.1 * (sizes["tensor"] - 1))
    seconds *= 1 + sizes["stage"] / config.batch.microbatches - 1 / config.batch.microbatches
    cost = Cost({"parameters": held, "saved/block input": saved}, {}, 0.0, (), 0.0, 0.0)
    return estimate.Estimate(cost, roofline.Time(seconds, {"matmuls": seconds}, "matmuls"))


def estimator(configs) -> list[estimate.Estimate]:
    return [made_up(*pair) for pair in configs]


def load(*overrides: str) -> cfg.Config:
    return configfile.load(LLAMA, ["data.path=absent", *overrides])


@pytest.fixture(scope="module")
def found() -> search.Search:
    target = parse_target("v6e:16x16")
    start = time.monotonic()
    result = search.analytic_search(load(), target, estimator)
    assert time.monotonic() - start < 10  # without the traces, a second
    return result


def test_every_candidate_is_legal_and_they_are_many(found):
    assert found.space > 5000 > found.looked == len(found.ranked) > 400
    assert len(list(search.legal(load(), parse_target("v6e:16x16")))) == found.space
    seen = {
        (*c.sizes.values(), c.config.remat, c.config.batch, c.config.loss) for c in found.ranked
    }
    assert len(seen) == found.looked
    for one in found.ranked[::50]:
        assert math.prod(one.sizes.values()) == 256
        validate(one.config, 256)
        assert one.sizes == {axis: getattr(one.config.mesh, axis) for axis in cfg.AXES}


def test_what_fits_comes_first_by_time_and_the_rest_by_memory(found):
    limit = 0.95 * 32e9
    assert all(c.fits == (c.peak <= limit) for c in found.ranked)
    fits = [c for c in found.ranked if c.fits]
    rest = [c for c in found.ranked if not c.fits]
    assert fits and rest and found.ranked == fits + rest
    assert [c.seconds for c in fits] == sorted(c.seconds for c in fits)
    assert [c.peak for c in rest] == sorted(c.peak for c in rest)
    best = found.ranked[0]  # nothing is recomputed, and no axis costs time
    assert best.config.remat.policy == "none" and best.sizes["tensor"] == 1
    assert best.sizes["stage"] == 1


def test_less_memory_leaves_fewer_candidates():
    target = parse_target("v6e:4x4")
    small = search.analytic_search(load("plan.memory=0.3"), target, estimator)
    large = search.analytic_search(load(), target, estimator)
    assert sum(c.fits for c in small.ranked) < sum(c.fits for c in large.ranked)
    config = load("plan.memory=0.1")
    hopeless = search.analytic_search(config, parse_target("v5e:1x1"), estimator)
    with pytest.raises(cfg.UserError, match=r"plan.memory=0.1 of 16.0 GB; the least is one device"):
        search.refuse_hopeless(config, parse_target("v5e:1x1"), hopeless)
    config = load("batch.sequences=3")
    with pytest.raises(cfg.UserError, match="batch.sequences=3; use fewer devices"):
        nothing = search.analytic_search(config, parse_target("cpu:7"), estimator)
        search.refuse_hopeless(config, parse_target("cpu:7"), nothing)


def test_tensor_stays_near_and_slices_are_far():
    for sizes, dcn in search.meshes(load(), parse_target("h100:4x8")):
        assert sizes["tensor"] <= 8 and not dcn
    found = list(search.meshes(load(), parse_target("2*v5p:2x2x2")))
    assert found
    for sizes, dcn in found:
        assert math.prod(dcn.values()) == 2 and not dcn.keys() - {"data", "stage", "fsdp"}
        assert all(sizes[axis] % factor == 0 for axis, factor in dcn.items())
    assert {axis for _, dcn in found for axis in dcn} == {"data", "stage", "fsdp"}


def test_axes_follow_the_model():
    assert search._axes(load()) == ("stage", "data", "fsdp", "tensor")
    assert "context" in search._axes(load("batch.sequence_length=131072"))
    mixtral = configfile.load(ROOT / "configs" / "mixtral.yaml")
    assert "expert" in search._axes(mixtral)


def candidate(seconds: float, peak: float, fsdp: int, fits: bool = True) -> search.Candidate:
    sizes = dict.fromkeys(cfg.AXES, 1) | {"fsdp": fsdp}
    guess = estimate.Estimate(
        Cost({"workspace": peak}, {}, 0.0, (), 0.0, 0.0), roofline.Time(seconds, {}, "matmuls")
    )
    return search.Candidate(search.settle(load(), sizes, {}), sizes, guess, fits)


def test_a_compile_that_fails_is_marked_and_the_search_goes_on():
    ranked = [candidate(1.0 + n, 10.0 - n, 2**n) for n in range(6)]
    said, asked = [], []

    def measure(config):
        asked.append(config.mesh.fsdp)
        if config.mesh.fsdp == 1:
            raise CompileError("target=v5e: the compiler crashed (signal 11)")
        peak = {2: 99.0}.get(config.mesh.fsdp, 5.0)  # the second does not fit after all
        known = {"peak_bytes": peak, "limit": "x", "refused": None}
        return known | {"step_seconds": 20.0 - config.mesh.fsdp}

    found = search.compile_best(search.Search(6, 0, ranked), 2, 50.0, measure, said.append)
    assert asked == [1, 2, 4, 8]  # until two fit
    assert [c.sizes["fsdp"] for c in found.ranked] == [8, 4, 2, 1, 16, 32]
    assert [c.fits for c in found.ranked] == [True, True, False, False, True, True]
    assert "signal 11" in found.ranked[3].failure and len(said) == 4 and "signal 11" in said[0]
    assert search.chosen(found) is found.ranked[0]


def test_a_search_of_which_nothing_fits_once_compiled_is_one_line():
    ranked = [candidate(1.0, 10.0, 1), candidate(2.0, 20.0, 2, fits=False)]
    refused = {"refused": {"needed_bytes": 9e9}, "peak_bytes": 9e9, "step_seconds": 1.0}
    measure = lambda config: refused | {"limit": "x"}
    found = search.compile_best(search.Search(2, 0, ranked), 3, 50.0, measure, lambda _: None)
    with pytest.raises(cfg.UserError, match="1 did by traces.*9.0 GB, does not fit; use"):
        search.chosen(found)


def test_what_the_compiler_refuses_does_not_fit_and_the_search_goes_on():
    ranked, said = [candidate(1.0 + n, 10.0 - n, 2**n) for n in range(3)], []

    def measure(config):
        refused = {"needed_bytes": 5.0} if config.mesh.fsdp == 1 else None
        return {"step_seconds": 2.0, "peak_bytes": 5.0, "limit": "x", "refused": refused}

    found = search.compile_best(search.Search(3, 0, ranked), 1, 50.0, measure, said.append)
    assert [(c.sizes["fsdp"], c.fits) for c in found.ranked] == [(2, True), (1, False), (4, True)]
    assert "does not fit" in said[0] and search.chosen(found).sizes["fsdp"] == 2


def test_at_most_twice_as_many_are_compiled():
    asked = []

    def measure(config):
        asked.append(config)
        raise CompileError("no")

    ranked = [candidate(1.0 + n, 1.0, 2**n) for n in range(9)]
    found = search.compile_best(search.Search(9, 0, ranked), 2, 50.0, measure, lambda _: None)
    assert len(asked) == 4 and search.chosen(found) is ranked[4]


def test_the_front_holds_what_no_other_beats():
    rows = [candidate(s, p, 2**n) for n, (s, p) in enumerate([(3, 1), (1, 9), (2, 5), (4, 4)])]
    rows.append(candidate(0.5, 0.5, 64, fits=False))
    assert [c.sizes["fsdp"] for c in search.pareto(rows)] == [2, 4, 1]


def test_the_written_config_is_the_best_one(found, tmp_path):
    target, best = parse_target("v6e:16x16"), found.ranked[0]
    out = tmp_path / "best.yaml"
    out.write_text(search.config_text(LLAMA, str(out), best, target))
    again = configfile.load(out)
    for section in ("mesh", "remat", "batch", "loss", "model", "optimizer"):
        assert getattr(again, section) == getattr(best.config, section)
    assert out.read_text().startswith("# Found by jaxlm plan --search for v6e:16x16: ")
    assert (
        configfile.load(LLAMA, search.overrides(best.config, best.sizes)[:-3]).model
        == best.config.model
    )
    named = best._replace(config=dataclasses.replace(best.config, remat=search.REMAT[2]))
    there = configfile.load(LLAMA, search.overrides(named.config, named.sizes))
    assert there.remat == search.REMAT[2]


def test_auto_and_axes_replace_each_other(tmp_path):
    path = tmp_path / "auto.yaml"
    path.write_text(f"include: {LLAMA}\nmesh: auto\n")
    config = configfile.load(path)
    assert config.mesh == cfg.Mesh(auto=True)
    assert configfile.load(path, ["mesh.tensor=2"]).mesh == cfg.Mesh(tensor=2)
    assert configfile.load(LLAMA, ["mesh.tensor=2", "mesh=auto"]).mesh == cfg.Mesh(auto=True)
    again = tmp_path / "again.yaml"
    again.write_text(configfile.dump(config))
    assert configfile.load(again) == config
    validate(config)
    with pytest.raises(cfg.UserError, match="mesh=auto is for train and plan"):
        validate(config, 8)
    path.write_text(f"include: {LLAMA}\nmesh: {{auto: true, fsdp: 8}}\n")
    with pytest.raises(cfg.UserError, match="mesh.auto=true with mesh.fsdp: auto chooses"):
        validate(configfile.load(path))


def test_a_chosen_mesh_is_remembered(tmp_path, monkeypatch):
    keys = ["mesh=auto", f"plan.cache={tmp_path}/cache", f"run.dir={tmp_path}/run"]
    config, target = configfile.load(TINY, keys), parse_target("cpu:8")
    monkeypatch.setattr(search, "Estimator", lambda *_: estimator)
    monkeypatch.setattr(estimate, "memory_limit", lambda _: 1e12)
    first, why = search.choose_mesh(config, target)
    assert math.prod(getattr(first.mesh, axis) for axis in cfg.AXES) == 8
    assert not first.mesh.auto and first.remat == config.remat and first.batch == config.batch
    assert "mesh: auto chose, of" in why and "plan.cache" not in why
    monkeypatch.setattr(search, "Estimator", lambda *_: pytest.fail("asked again"))
    second, why = search.choose_mesh(config, target)
    assert second == first and why.endswith("from plan.cache")
    # A run keeps its mesh, whatever would be chosen now.
    run = search.settle(first, dict.fromkeys(cfg.AXES, 1) | {"data": 8}, {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(configfile.dump(run))
    kept = search.settle_run(config, parse_target("cpu:8").absent_devices())
    assert kept.mesh == run.mesh
    with pytest.raises(pytest.fail.Exception, match="asked again"):  # other devices: anew
        search.settle_run(config, parse_target("cpu:4").absent_devices())


@pytest.mark.parametrize(
    "planted",
    [
        b"\x80\x04.", b"[]", b"{}", b'{"settings": 1, "why": "x"}',
        b'{"settings": {"mesh": {"fsdp": 3}, "remat": {"policy": "none", "names": [], '
        b'"offload": []}, "microbatches": 1, "chunks": 1}, "why": "x"}',
        b'{"settings": {"mesh": {"fsdp": "8"}, "remat": {"policy": "none", "names": [], '
        b'"offload": []}, "microbatches": 1, "chunks": 1}, "why": "x"}',
    ],
)  # fmt: skip
def test_a_strange_memory_of_a_mesh_is_not_used(tmp_path, monkeypatch, planted):
    config = configfile.load(TINY, ["mesh=auto", f"plan.cache={tmp_path}"])
    target = parse_target("cpu:8")
    monkeypatch.setattr(search, "Estimator", lambda *_: estimator)
    monkeypatch.setattr(estimate, "memory_limit", lambda _: 1e12)
    first, _ = search.choose_mesh(config, target)
    [path] = tmp_path.glob("mesh-*.json")
    path.write_bytes(planted)
    again, why = search.choose_mesh(config, target)
    assert again == first and "plan.cache" not in why


def test_traces_that_fail_leave_the_mesh_to_the_user(tmp_path, monkeypatch):
    def fault(*_):
        raise KeyError("a new optimizer")

    monkeypatch.setattr(search, "Estimator", fault)
    keys = ["mesh=auto", f"plan.cache={tmp_path}/cache", f"run.dir={tmp_path}/run"]
    message = "mesh=auto: no mesh can be chosen: KeyError: 'a new optimizer'; give its axes"
    with pytest.raises(cfg.UserError, match=message):
        search.settle_run(configfile.load(TINY, keys), parse_target("cpu:8").absent_devices())


def test_auto_changes_other_settings_only_where_it_must(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "Estimator", lambda *_: estimator)
    target, cache = parse_target("v6e:16x16"), f"plan.cache={tmp_path}"
    config = load("mesh=auto", "remat.policy=dots", cache)
    assert search.choose_mesh(config, target)[0].remat == config.remat
    tight = load("mesh=auto", "remat.policy=none", "plan.memory=0.2", cache)
    assert search.choose_mesh(tight, target)[0].batch.microbatches > 1


def helpful(configs) -> list[estimate.Estimate]:
    """Every doubling of stages is better, up to 16."""
    guesses = []
    for guess, (_, sizes) in zip(estimator(configs), configs, strict=True):
        seconds = 1 + abs(math.log2(sizes["stage"]) - 4)
        guesses.append(guess._replace(time=roofline.Time(seconds, {}, "matmuls")))
    return guesses


def test_kinds_of_meshes_are_looked_at_outwards_from_the_simplest():
    """Of stages, those beside the best two; where more of them help, all on the way."""
    config, target = load(), parse_target("v6e:16x16")
    stages = lambda found: sorted({one.sizes["stage"] for one in found.ranked})

    assert stages(search.analytic_search(config, target, estimator)) == [1, 2, 4]
    assert stages(search.analytic_search(config, target, helpful)) == [1, 2, 4, 8, 16, 32]
    best = search.analytic_search(config, target, helpful).ranked[0]
    assert best.sizes["stage"] == 16


def test_a_search_starts_at_the_simplest_kind_of_all_that_single_steps_join():
    assert search._simplest([(1, 1), (1, 4), (2, 4), (2, 8)]) == {(1, 1)}
    assert search._simplest([(1, 1), (1, 2), (2, 4), (8, 4)]) == {(1, 1), (2, 4)}


def test_the_way_outwards_leads_over_kinds_that_are_not_legal():
    """16 layers on 24 devices: 3 and 6 stages divide the devices, but not the layers."""
    config = load("model.num_layers=16", "batch.sequences=1536")
    best = search.analytic_search(config, parse_target("h100:3x8"), helpful).ranked[0]
    assert best.sizes["stage"] == 8
