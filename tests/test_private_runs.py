"""Private runs: rows drawn, noise, what is spent, and that a row cannot be found in the model."""

import contextlib
import dataclasses
import json
import math
import shutil
import stat

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dp_accounting.pld import privacy_loss_distribution as losses_of
from scipy import stats

from jaxlm import data, verify
from jaxlm.data import load
from jaxlm.mesh import open_mesh
from jaxlm.privacy import accounting, ledger, sampling
from jaxlm.privacy.noise import add_noise
from jaxlm.program import make_eval_step, make_program
from jaxlm.sharding import batch_shardings
from jaxlm.state import create_state
from jaxlm.train import train

PRIVATE = ["privacy.clip_norm=0.5", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5"]
SECRET = bytes(range(32))

# What is spent.

REFERENCES = [  # noise multiplier, steps, rate, delta; epsilon by dp-accounting, PLD and RDP
    (3.0, 512, 0.1, 1e-6, 3.7697, 4.0510),
    (1.0, 10_000, 0.01, 1e-5, 6.1877, 6.7128),
    (1.1, 14_062, 256 / 60_000, 1e-5, 2.3817, 2.5966),
    (0.8, 1_000, 0.005, 1e-6, 2.0041, 2.6265),
]


@pytest.mark.parametrize("noise, steps, rate, delta, by_losses, by_renyi", REFERENCES)
def test_epsilon_is_that_of_published_accountants(noise, steps, rate, delta, by_losses, by_renyi):
    found = accounting.make_accountant(noise, rate, delta, cut=0.0)(steps)
    assert found == pytest.approx(by_losses, abs=1e-3)
    assert found < by_renyi  # an upper bound by another method
    assert accounting.make_accountant(noise, rate, delta, cut=0.0)(steps // 2) < found


def test_renyi_accounting_is_above():
    """By dp-accounting's other accountant, as it is today."""
    noise, steps, rate, delta, _, by_renyi = REFERENCES[0]
    sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    found = dp_accounting.rdp.RdpAccountant().compose(sampled, steps).get_epsilon(delta)
    assert found == pytest.approx(by_renyi, abs=1e-3)


def test_cuts_are_paid_for():
    """epsilon is where delta, with what cuts add, is the given one (docs/privacy.md)."""
    noise, steps, rate, delta, cut = 1.0, 100, 0.02, 1e-5, 1e-8
    found = accounting.make_accountant(noise, rate, delta, cut)(steps)
    composed = losses_of.from_gaussian_mechanism(noise, sampling_prob=rate).self_compose(steps)
    total = composed.get_delta_for_epsilon(found) + (1 + math.exp(found)) * steps * cut
    assert total == pytest.approx(delta, rel=1e-3)
    assert found > accounting.make_accountant(noise, rate, delta, 0.0)(steps) + 0.01
    assert accounting.make_accountant(noise, rate, delta, 1e-6)(steps) == math.inf


def test_the_last_step_that_a_budget_pays_for():
    spent = lambda steps: steps**0.5
    for budget in (0.5, 3.0, 3.1, 7.0, 100.0):
        found = accounting.affordable_steps(spent, budget, 50)
        assert spent(found) <= budget and (found == 50 or spent(found + 1) > budget)


# Rows.


@pytest.mark.parametrize("places, rows", [(64, 200), (256, 100_000), (4096, 10**9)])
def test_a_batch_next_to_never_overflows(places, rows):
    expected, cut = sampling.expected_rows(places, 1e-6), sampling.cut_chance(1e-6)
    assert stats.binom.sf(places, rows, expected / rows) <= cut * (1 + 1e-6)
    assert stats.poisson.sf(places, 1.01 * expected) > cut  # and no more rows would do
    assert expected > 0.25 * places


def test_every_row_is_drawn_independently():
    """Chi-square of how often each row is drawn, of pairs of neighbours, and of sample sizes."""
    rows, rate, steps = 50, 0.1, 4000
    hits = np.zeros((steps, rows), bool)
    for step in range(steps):
        hits[step, sampling.draw_rows(SECRET, step, rows, rate, rows)] = True
    count = lambda x, p: np.sum((x.sum(0) - steps * p) ** 2) / (steps * p * (1 - p))
    assert 1e-3 < stats.chi2.sf(count(hits, rate), rows) < 1 - 1e-3
    pairs = hits[:, 1:] & hits[:, :-1]
    assert 1e-4 < stats.chi2.sf(count(pairs, rate**2), rows - 1) < 1 - 1e-4
    later = hits[1:] & hits[:-1]
    assert 1e-4 < stats.chi2.sf(np.sum((later.sum(0) - steps * 0.01) ** 2) / 39.6, rows) < 1 - 1e-4
    sizes = np.bincount(hits.sum(1), minlength=12)
    sizes = [*sizes[:11], sizes[11:].sum()]
    chances = stats.binom.pmf(range(11), rows, rate)
    expected = steps * np.array([*chances, 1 - chances.sum()])
    assert stats.chisquare(sizes, expected).pvalue > 1e-3


def test_a_sample_is_a_function_of_secret_and_step():
    draw = lambda secret, step: sampling.draw_rows(secret, step, 10**7, 1e-5, 400).tolist()
    assert draw(SECRET, 3) == draw(SECRET, 3) and len(draw(SECRET, 3)) > 50
    assert draw(SECRET, 3) != draw(SECRET, 4) != draw(bytes(32), 4)
    keys = {sampling.noise_key(s, step).tobytes() for s in (SECRET, bytes(32)) for step in range(9)}
    assert len(keys) == 18


def test_what_is_too_much_is_left_out_at_random():
    """Of twice as many rows as places, each is kept with chance one half."""
    kept = np.zeros(40)
    for step in range(2000):
        found = sampling.draw_rows(SECRET, step, 40, 1 - 1e-12, 20)
        assert len(found) == 20 and (np.diff(found) > 0).all()
        kept[found] += 1
    # The counts add up to a constant: 39 of 40 degrees of freedom.
    assert 1e-4 < stats.chi2.sf(np.sum((kept - 1000) ** 2) / 500 * 39 / 40, 39) < 1 - 1e-4


def test_batches_hold_the_sampled_rows_and_padding(data):
    """On a mesh, from any step; what is left of a batch is padding of weight 0."""
    config = tiny.config("llama", f"data.path={data}", *PRIVATE)
    mesh, layout = open_mesh(verify.replace_mesh(config, {"fsdp": 4}), jax.devices()[:4])
    split, batch = data_split(config), config.batch
    packed = load.pack(split, batch.sequence_length, 0)
    found = load.private_batches(
        split, batch, 0, batch_shardings(config, layout, mesh), 5, secret=SECRET, rate=0.02
    )
    for step, made in zip((5, 6), found, strict=False):
        rows = sampling.draw_rows(SECRET, step, packed.num_items, 0.02, batch.sequences)
        assert 0 < len(rows) < batch.sequences
        for place, row in enumerate(rows):
            item = load.item(packed, int(row))
            for name in made.keys() - {"noise"}:
                np.testing.assert_array_equal(np.asarray(made[name])[place], item[name])
        assert not np.asarray(made["weights"])[len(rows) :].any()
        assert not np.asarray(made["segments"])[len(rows) :].any()
        np.testing.assert_array_equal(made["noise"], sampling.noise_key(SECRET, step))


def data_split(config):
    return data.open_split(config.data.path, "train")


# Noise.


def test_the_variance_of_the_noise():
    """Chi-square of its squares, and that it is normal, over arrays of two shapes."""
    config = tiny.config("llama", *PRIVATE)
    privacy = dataclasses.replace(config.privacy, clip_norm=0.5, noise_multiplier=1.7)
    mesh, _ = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        grads = {"a": jnp.full((300, 200), 5.0), "b": jnp.zeros(60_000)}
        words = jnp.asarray(sampling.noise_key(SECRET, 7))
        noisy = jax.device_get(add_noise(privacy, grads, words))
    a, b = ((noisy[n] - np.asarray(grads[n])).ravel().astype(np.float64) / 0.85 for n in "ab")
    for x in (a, b):
        assert 1e-3 < stats.chi2.sf(np.sum(x**2), x.size) < 1 - 1e-3
        assert stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02  # each array has its own


# Whole runs.


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """A dataset of some 400 rows of 32 bytes."""
    from jaxlm.data.prepare import prepare

    out = tmp_path_factory.mktemp("rows")
    (out / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["mesh", "axis", "shard", "token"], 60)
        (out / "texts" / f"{i}.txt").write_text(" ".join(words))
    prepare(out / "tokens", [out / "texts"], "bytes", validation_fraction=0.1, report=lambda _: 0)
    return out / "tokens"


def run_config(path, run_dir, *overrides):
    small = ["model.num_layers=1", "steps=4", "batch.sequences=64", "checkpoint.every=2"]
    small += ["mesh.fsdp=2", "eval.every=0", "eval.batches=1", "optimizer.warmup_steps=0"]
    places = [f"data.path={path}", f"run.dir={run_dir}"]
    return tiny.config("llama", *small, *PRIVATE, *places, *overrides)


@pytest.fixture(scope="module")
def whole_run(many_rows, tmp_path_factory):
    """A run of 4 steps; the devices that are there are more than its mesh has."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    with two_devices():
        train(run_config(many_rows, run_dir))
    return run_dir


@contextlib.contextmanager
def two_devices():
    """As on a machine that has two."""
    found = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: found)
        yield


def test_metrics_tell_epsilon_and_nothing_of_the_rows(whole_run, many_rows):
    records = [r for r in tiny.records(whole_run) if "epsilon" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    config = run_config(many_rows, whole_run)
    terms = ledger.make_terms(config, data_split(config))
    assert [r["epsilon"] for r in records] == [terms.epsilon(n) for n in (1, 2, 3, 4)]
    known = {"step", "epsilon", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}
    assert set().union(*records) == known | {"step_seconds"}
    mode = (whole_run / ledger.FILE).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert "secret" not in (whole_run / "config.yaml").read_text()


def test_a_resumed_run_ends_in_the_same_bits(whole_run, many_rows, tmp_path):
    """It draws the same rows and noise: both come from the secret that the run's directory has."""
    shutil.copytree(whole_run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    config = run_config(many_rows, tmp_path / "again")
    with two_devices():
        train(config)
    first, second = (parameters(config, d) for d in (whole_run, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def parameters(config, run_dir):
    from jaxlm import run

    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run_dir)))
    with two_devices(), run.open_model(config, 4) as model:
        return {name: np.asarray(x) for name, x in model.params.items()}


def test_other_terms_are_refused(whole_run, many_rows, tmp_path):
    split = data_split(run_config(many_rows, whole_run))
    opened = lambda *more, where=whole_run: ledger.open_ledger(
        run_config(many_rows, where, *more), split
    )
    assert "privacy.noise_multiplier=2.0 here, 1.0 there" in tiny.message(
        opened, "privacy.noise_multiplier=2"
    )
    assert "holds a private run, and steps without privacy" in tiny.message(
        opened, "privacy.clip_norm=0", "privacy.noise_multiplier=0"
    )
    assert "is not below one over the rows" in tiny.message(opened, "privacy.delta=0.01")
    assert "rows on average" in tiny.message(opened, "batch.sequences=8")
    assert "use a smaller batch.sequences or more data" in tiny.message(
        opened, "batch.sequences=1024"
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "4").symlink_to(whole_run / "checkpoints" / "4")
    assert "or the file with its secret is lost" in tiny.message(opened, where=tmp_path)


def test_a_step_is_not_made_otherwise_with_the_same_noise(whole_run, many_rows, tmp_path):
    split, rate = data_split(run_config(many_rows, whole_run)), "optimizer.learning_rate=0.5"
    for name in ("killed", "done"):
        shutil.copytree(whole_run, tmp_path / name)
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "done" / "checkpoints" / "2")
    opened = lambda name, *more: ledger.open_ledger(
        run_config(many_rows, tmp_path / name, *more), split
    )
    for more in (rate, "steps=8", "optimizer.b2=0.5"):
        text = tiny.message(opened, "killed", more)
        key, _, value = more.partition("=")
        assert text.startswith(f"{key}={value} here, ") and "the same noise" in text
    record = (tmp_path / "killed" / ledger.FILE).read_bytes()
    opened("killed", "log.every=2", "mesh.fsdp=1")
    assert (tmp_path / "killed" / ledger.FILE).read_bytes() == record
    secret = opened("done", rate, "steps=8")[1].secret
    assert secret == opened("done", rate, "steps=8")[1].secret
    assert secret.hex() == json.loads(record)["secret"]
    assert "steps=12 here, 8 in run.dir" in tiny.message(opened, "done", rate, "steps=12")
    mode = (tmp_path / "done" / ledger.FILE).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_a_budget_sets_the_last_step(whole_run, many_rows, tmp_path, caplog):
    spent = [r["epsilon"] for r in tiny.records(whole_run) if "epsilon" in r]
    split = data_split(run_config(many_rows, whole_run))
    caplog.set_level("INFO", "jaxlm")
    config = run_config(many_rows, tmp_path, f"privacy.epsilon={(spent[1] + spent[2]) / 2}")
    config, _ = ledger.open_ledger(config, split)
    assert config.steps == 2
    assert "is spent after step 2 of 4: the run ends there" in caplog.text
    small = run_config(many_rows, tmp_path, f"privacy.epsilon={spent[0] / 2}")
    assert "does not pay for one step" in tiny.message(ledger.open_ledger, small, split)


@pytest.mark.nightly
def test_a_budget_ends_the_run(whole_run, many_rows, tmp_path):
    """With a checkpoint at the last step that it pays for."""
    spent = [r["epsilon"] for r in tiny.records(whole_run) if "epsilon" in r]
    budget = (spent[1] + spent[2]) / 2
    with two_devices():
        train(run_config(many_rows, tmp_path / "run", f"privacy.epsilon={budget}"))
    records = [r for r in tiny.records(tmp_path / "run") if "epsilon" in r]
    assert [r["step"] for r in records] == [1, 2] and records[-1]["epsilon"] <= budget
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


# A row that should not be in the model.

PLACES, ROWS, LENGTH = 64, 256, 16


def canary_loss(*overrides):
    """(loss of an odd row in the data, losses of such rows that are not, loss of usual rows)."""
    config = tiny.config(
        "llama", f"batch.sequences={PLACES}", f"batch.sequence_length={LENGTH}", "steps=200",
        "model.num_layers=1",
        "optimizer.learning_rate=0.01", "optimizer.warmup_steps=0", "optimizer.schedule=constant",
        "optimizer.weight_decay=0", "loss.chunks=1", "loss.z_loss=0", "remat.policy=none",
        *overrides,
    )  # fmt: skip
    mesh, layout, structure, optimizer, step, options = make_program(config, jax.devices()[:1])
    rng = np.random.default_rng(0)
    odd = rng.integers(100, 300, (PLACES, LENGTH + 1))
    usual = (rng.integers(0, 8, (ROWS, 1)) + np.arange(LENGTH + 1)) % 8 + 1
    rows = np.concatenate([odd[:1], usual[1:]])
    rate = sampling.expected_rows(PLACES, 1e-5) / ROWS
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optimizer, mesh)
        shardings = batch_shardings(config, layout, mesh)
        put = lambda rows: {n: jax.device_put(x, shardings[n]) for n, x in make(rows).items()}
        for number in range(config.steps):
            batch = put(rows[sampling.draw_rows(SECRET, number, ROWS, rate, PLACES)])
            if config.privacy.clip_norm:
                batch["noise"] = jnp.asarray(sampling.noise_key(SECRET, number))
            state, _ = step(state, batch)
        evaluate = make_eval_step(config, structure, layout, options)
        loss = lambda rows: np.ravel(evaluate(state.params, {}, put(rows))[0]) / LENGTH
        losses = loss(odd)
        return losses[0], losses[1:], loss(usual[:PLACES]).mean()


def make(rows) -> dict[str, np.ndarray]:
    """A batch of these rows of tokens, and padding."""
    batch = {n: np.zeros((PLACES, LENGTH), np.int32) for n in ("tokens", "targets", "positions")}
    batch |= {"segments": np.zeros((PLACES, LENGTH), np.int32)}
    batch |= {"weights": np.zeros((PLACES, LENGTH), np.float32)}
    count = len(rows)
    batch["tokens"][:count], batch["targets"][:count] = rows[:, :-1], rows[:, 1:]
    batch["positions"][:count] = np.arange(LENGTH)
    batch["weights"][:count] = batch["segments"][:count] = 1
    return batch


def test_a_memorised_row_is_found_without_privacy_and_not_with_it():
    """By the loss of an odd row that was trained on, against odd rows that were not."""
    distance = lambda own, others: (own - others.mean()) / others.std()
    own, others, usual = canary_loss()
    assert distance(own, others) < -5 and usual < 0.1
    own, others, usual = canary_loss(
        "privacy.clip_norm=1", "privacy.noise_multiplier=1", "privacy.delta=1e-5"
    )
    assert abs(distance(own, others)) < 2.5 and usual < 0.3  # it learns what many rows share


def test_the_record_is_json(whole_run):
    record = json.loads((whole_run / ledger.FILE).read_text())
    assert len(bytes.fromhex(record["secret"])) == sampling.SECRET_BYTES
