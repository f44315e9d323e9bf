"""Calibration: what finished runs measured, against what was predicted for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import config as cfg
from jaxlm.hardware.target import Target, parse_target
from jaxlm.plan import estimate, roofline
from jaxlm.plan.cost import Cost

MEASURED = "measured/step_seconds"


def calibrate(runs: Sequence[tuple[str, cfg.Config]]) -> dict[str, Any]:
    """Fit efficiencies of each kind of hardware to runs, and keep them for later plans."""
    pairs: dict[str, list[tuple[Cost, float]]] = {}
    targets: dict[str, list[Target]] = {}
    rows = []
    for path, config in runs:
        record = read_measurement(Path(path))
        target = parse_target(record["plan/target"])
        cost = estimate.of_config(config, target).cost
        name = target.kind.name
        targets.setdefault(name, []).append(target)
        pairs.setdefault(name, []).append((cost, record[MEASURED]))
        rows.append({"run": path, "target": target.text} | {
            key: record[key] for key in sorted(record) if key.startswith(("plan/", "measured/"))
        })  # fmt: skip
    fitted, store = {}, estimate.efficiencies_path(runs[0][1])
    for name, measured in pairs.items():
        found = roofline.fit_efficiencies(measured, targets[name])
        try:
            roofline.save(store, name, found)
        except OSError as error:
            raise cfg.UserError(
                f"{store}: cannot be written: {error.strerror}; choose another plan.cache"
            ) from error
        fitted[name] = {k: {"value": e.value, "origin": e.origin} for k, e in found.items()}
    return {"runs": rows, "efficiencies": fitted, "path": str(store)}


def read_measurement(run_dir: Path) -> dict[str, Any]:
    """The record that `train` wrote at the end of a run."""
    path = run_dir / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise cfg.UserError(f"--calibrate {run_dir}: {path} cannot be read") from error
    found = [record for record in records if record.get(MEASURED) and record.get("plan/target")]
    if not found:
        raise cfg.UserError(
            f"--calibrate {run_dir}: its metrics.jsonl has no {MEASURED}; train writes it at the "
            "end of a run of a few log.every steps"
        )
    return found[-1]


def describe(found: dict[str, Any]) -> list[str]:
    """What was fitted, in lines."""
    lines = [
        f"{row['run']} ({row['target']}): predicted {row['plan/step_seconds']:.4g} s, "
        f"measured {row[MEASURED]:.4g} s"
        for row in found["runs"]
    ]
    for kind, known in found["efficiencies"].items():
        lines += [f"{kind}: {k} {e['value']:.4g}: {e['origin']}" for k, e in known.items()]
    return [*lines, f"kept in {found['path']}; later plans use and name them"]
