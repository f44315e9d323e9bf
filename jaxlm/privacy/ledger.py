"""The private side of a run: its secret, how its rows are drawn, and what each step costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm import checkpoint, configfile
from jaxlm import config as cfg
from jaxlm.data import Split, pack
from jaxlm.privacy import accounting, sampling

logger = logging.getLogger("jaxlm")
FILE = "secret.json"
FORMAT = 2
MARKS = 32  # numbers of steps in a run for which epsilon is computed


@dataclasses.dataclass(frozen=True)
class Terms:
    """How rows are drawn from a dataset, and what that spends."""

    num_rows: int
    expected: float  # rows a step
    rate: float  # chance that a row takes part in a step
    epsilon: Callable[[int], float]  # after a number of steps


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Terms and secret of a run."""

    terms: Terms
    secret: bytes
    steps: int  # of the run

    def epsilon(self, step: int) -> float:
        """Spent after a step, or up to a 32nd of the run later: an upper bound, cheap to have."""
        stride = -(-self.steps // MARKS)
        return self.terms.epsilon(min(-(-step // stride) * stride, self.steps))


def make_terms(config: cfg.Config, training: Split) -> Terms:
    """UserError where the dataset is too small for the batch, or delta too large for it."""
    privacy, places = config.privacy, config.batch.sequences
    num_rows = pack.count_items(training, config.batch.sequence_length)
    if privacy.delta >= 1 / num_rows:
        raise cfg.UserError(
            f"privacy.delta={privacy.delta:g} is not below one over the rows of "
            f"data.path={config.data.path}, {num_rows}: rows could be published whole; use "
            f"privacy.delta={0.1 / num_rows:.0e} or less"
        )
    expected = sampling.expected_rows(places, privacy.delta)
    if expected < 1:
        raise cfg.UserError(
            f"batch.sequences={places}: a sample that next to never is larger has {expected:.2g} "
            "rows on average; use batch.sequences=64 or more"
        )
    if 2 * expected > num_rows:
        raise cfg.UserError(
            f"batch.sequences={places}: a step draws {expected:.0f} rows on average, and "
            f"data.path={config.data.path} has {num_rows}; use a smaller batch.sequences or more "
            "data"
        )
    rate = expected / num_rows
    epsilon = accounting.make_accountant(
        privacy.noise_multiplier, rate, privacy.delta, sampling.cut_chance(privacy.delta)
    )
    return Terms(num_rows, expected, rate, epsilon)


def open_ledger(config: cfg.Config, training: Split) -> tuple[cfg.Config, Ledger | None]:
    """The ledger of a run (None without privacy), and its config with the steps it can afford.

    All processes must call it. UserError where the run directory is of other terms, or of a run
    without privacy.
    """
    run_dir = cfg.run_dir(config)
    if not config.privacy.clip_norm:
        if (run_dir / FILE).exists():
            raise cfg.UserError(
                f"privacy.clip_norm=0.0: run.dir={run_dir} holds a private run, and steps without "
                "privacy would undo what it promises; choose another run.dir, with "
                f"checkpoint.start_from={run_dir}"
            )
        return config, None
    terms = make_terms(config, training)
    steps, budget = config.steps, config.privacy.epsilon
    if budget:
        steps = accounting.affordable_steps(terms.epsilon, budget, config.steps)
    if not steps:
        raise cfg.UserError(
            f"privacy.epsilon={budget:g} does not pay for one step, which costs "
            f"{terms.epsilon(1):.3g}; use a larger privacy.noise_multiplier or privacy.epsilon"
        )
    if steps < config.steps:
        logger.info(
            "privacy.epsilon=%g is spent after step %d of %d: the run ends there", budget, steps,
            config.steps,
        )  # fmt: skip
        config = dataclasses.replace(config, steps=steps)
    logger.info(
        "privacy: epsilon %.3f at delta %g after step %d, of %s", terms.epsilon(steps),
        config.privacy.delta, steps, accounting.UNIT.format(config.batch.sequence_length),
    )  # fmt: skip
    first = jax.process_index() == 0
    secret = _shared(_open_secret(config, terms, training, run_dir) if first else None)
    return config, Ledger(terms, secret, steps)


def _open_secret(config: cfg.Config, terms: Terms, training: Split, run_dir: Path) -> bytes:
    """The secret of a run directory: the one it has, or a new one, written there.

    A step that is made again must be the same step: its noise is. So a run whose last step has been
    made may go on with other settings, and one that was stopped before may not.
    """
    facts = _facts(config, terms, training)
    try:
        kept = json.loads((run_dir / FILE).read_text())
    except FileNotFoundError:
        kept = None
    except (OSError, ValueError) as error:
        raise cfg.UserError(f"{run_dir / FILE}: cannot be read: {error}") from error
    if kept is None and checkpoint.latest(run_dir / "checkpoints") is not None:
        raise cfg.UserError(
            f"run.dir={run_dir} has checkpoints and no {FILE}: they are of a run without privacy, "
            "or the file with its secret is lost; choose another run.dir"
        )
    if kept is None:
        secret = secrets.token_bytes(sampling.SECRET_BYTES)
        _write(run_dir, facts | {"config": configfile.to_dict(config), "secret": secret.hex()})
        return secret
    differ = [
        f"{name}={fact} here, {kept.get(name)} there"
        for name, fact in facts.items()
        if fact != kept.get(name)
    ]
    if differ:
        raise cfg.UserError(
            f"run.dir={run_dir} holds a private run on other terms: {'; '.join(differ)}; what it "
            "spent could not be told; use its terms, or another run.dir"
        )
    changed = configfile.differences(kept["config"], config, "numbers")
    if changed:
        newest, last = checkpoint.latest(run_dir / "checkpoints"), kept["config"]["steps"]
        if newest != last:
            key, before, now = changed[0]
            raise cfg.UserError(
                f"{key}={now} here, {before} in run.dir={run_dir}, a private run that has no "
                f"checkpoint of its last step, {last}: steps that were made after its newest "
                "checkpoint would be made otherwise with the same noise, and the difference tells "
                "what the noise hides; end the run as it began, or choose another run.dir"
            )
        _write(run_dir, kept | {"config": configfile.to_dict(config)}, again=True)
    return bytes.fromhex(kept["secret"])


def _facts(config: cfg.Config, terms: Terms, training: Split) -> dict[str, Any]:
    """What the accountant's answer rests on, beside the number of steps."""
    p = config.privacy
    facts = {"clip_norm": p.clip_norm, "noise_multiplier": p.noise_multiplier, "delta": p.delta}
    return (
        {"format": FORMAT}
        | {f"privacy.{name}": value for name, value in facts.items()}
        | {"batch.sequences": config.batch.sequences, "rows": terms.num_rows}
        | {"data.path's fingerprint": training.fingerprint}
    )


def _write(run_dir: Path, record: dict[str, Any], again: bool = False) -> None:
    """Write the record for its owner's eyes alone. `again`: there is one, which it replaces."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if again else os.O_EXCL)
        path = run_dir / (f"{FILE}.new" if again else FILE)
        with open(os.open(path, flags, 0o600), "w") as file:
            json.dump(record, file, indent=1)
        if again:
            os.replace(path, run_dir / FILE)
    except OSError as error:
        raise cfg.UserError(
            f"run.dir={run_dir}: cannot write there: {error.strerror}; choose another run.dir"
        ) from error


def _shared(secret: bytes | None) -> bytes:
    """Process 0's secret, on every process."""
    if jax.process_count() == 1:
        assert secret is not None
        return secret
    mine = np.frombuffer(secret or bytes(sampling.SECRET_BYTES), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()
