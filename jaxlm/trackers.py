"""TensorBoard and Weights & Biases: metrics sent to programs that draw them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm import config as cfg
from jaxlm import extras

logger = logging.getLogger("jaxlm")
Sink = Callable[[dict[str, Any]], None]  # of records with a "step"


def open_tensorboard(run_dir: Path, start: int, stack: contextlib.ExitStack) -> Sink:
    """Events in <run>/tensorboard; those after step `start`, of an earlier start, are hidden.

    They stay in their files, and an event tells TensorBoard's readers to drop them.
    """
    tensorboard = extras.load("tensorboardX", "tensorboard", "log.tensorboard=true")
    # The suffix: tensorboardX names files by the second, and would replace one of the same second.
    writer = tensorboard.SummaryWriter(
        str(run_dir / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}"
    )
    stack.callback(writer.close)

    def write(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, record["step"])

    return write


def open_wandb(config: cfg.Config, run_dir: Path, start: int, stack: contextlib.ExitStack) -> Sink:
    """One W&B run for a run directory: a later start resumes it, by the id in <run>/wandb.json.

    What W&B's own variables and settings files say comes before what is said here. W&B cannot take
    back a step (its rewind is a preview on some servers; WANDB_RESUME_FROM asks for it), so steps
    that it holds are not sent again. It knows them itself when it is online; wandb.json has the
    last one of a start that ended in order.
    """
    wandb = extras.load("wandb", "wandb", "log.wandb=true")
    path = run_dir / "wandb.json"
    kept = _read(path)
    given = wandb.setup().settings
    options = {
        "project": given.project or "jaxlm",
        "name": given.run_name or config.name,
        "dir": os.environ.get("WANDB_DIR") or str(run_dir),
    }
    moved = given.resume_from or given.fork_from  # neither goes with `resume`
    if not moved:
        options |= {"id": given.run_id or kept.get("id"), "resume": given.resume or "allow"}
    try:
        run = wandb.init(config=dataclasses.asdict(config), **options)
    except Exception as error:  # no key, no such entity, no network, another user's project, ...
        raise cfg.UserError(
            f"log.wandb=true: W&B cannot start a run: {type(error).__name__}: {error}; "
            "log in with `wandb login`, or keep the records on disk with WANDB_MODE=offline"
        ) from error
    resumed = not moved and kept.get("id") == run.id
    held = max(run.step - 1, kept.get("step", 0) if resumed else 0)
    if held > start:
        logger.info("W&B holds this run's steps up to %d; it is sent those after", held)
    last = [held]
    _write(path, run.id, held)

    def close() -> None:
        run.finish()
        _write(path, run.id, last[0])

    def write(record: dict[str, Any]) -> None:
        if record["step"] > held:
            run.log(dict(record), step=record["step"])
            last[0] = record["step"]

    stack.callback(close)
    return write


def _read(path: Path) -> dict[str, Any]:
    """The id and last step of a W&B run; nothing where there is none, or no such file."""
    try:
        found = json.loads(path.read_text())
        return {"id": str(found["id"]), "step": int(found["step"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cfg.UserError(
            f"{path}: the id of this run's W&B run cannot be read ({error}); remove the file to "
            "start another one"
        ) from error


def _write(path: Path, run_id: str, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps({"id": run_id, "step": step}) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise cfg.UserError(f"{path}: cannot be written: {error.strerror}") from error
