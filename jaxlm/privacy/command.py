"""`jaxlm privacy CONFIG`: what a private run would spend, before it runs."""

from __future__ import annotations

import json
from typing import Any

from jaxlm import config as cfg

SHOWN = (0.1, 0.25, 0.5)  # of the run, beside its end


def add_parser(commands: Any) -> None:
    """Add `privacy`; it sets `run`, a function of the arguments."""
    text = "what a private run spends: epsilon, and what it protects"
    parser = commands.add_parser(
        "privacy", help=text, description=text[0].upper() + text[1:] + ". Nothing is trained; the "
        "dataset at data.path is only counted.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `jaxlm train`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(args) -> None:
    from jaxlm import devices, run  # not above: the parser of every command comes here

    config = run.load_config(args.config, args.overrides)
    devices.start(config.devices)
    report = make_report(config)
    print(json.dumps(report) if args.json else describe(report))


def make_report(config: cfg.Config) -> dict[str, Any]:
    """What a run spends. UserError for a config without privacy or with terms that cannot be."""
    from jaxlm import data, run
    from jaxlm.privacy.accounting import UNIT, affordable_steps
    from jaxlm.privacy.ledger import make_terms
    from jaxlm.validate import validate

    validate(config)
    p = config.privacy
    if not p.clip_norm:
        raise cfg.UserError(
            "privacy.clip_norm=0.0: this config trains without privacy; use privacy.clip_norm=1.0 "
            "privacy.noise_multiplier=1.0"
        )
    run.prepare_data(config)
    terms = make_terms(config, data.open_split(config.data.path, "train"))
    steps = config.steps
    if p.epsilon:
        steps = affordable_steps(terms.epsilon, p.epsilon, config.steps)
    return {
        "unit": UNIT.format(config.batch.sequence_length),
        "rows": terms.num_rows,
        "rows_a_step": terms.expected,
        "rate": terms.rate,
        "places": config.batch.sequences,
        "clip_norm": p.clip_norm,
        "noise_multiplier": p.noise_multiplier,
        "delta": p.delta,
        "steps": config.steps,
        "budget": p.epsilon,
        "last_step": steps,
        "epsilon": _marks(terms, steps),
    }


def _marks(terms, steps: int) -> dict[int, float]:
    """Epsilon at some steps of the run, the last among them."""
    marks = {max(1, round(part * steps)) for part in SHOWN} | {steps}
    return {step: terms.epsilon(step) for step in sorted(marks) if step}


def describe(report: dict[str, Any]) -> str:
    """The report as lines."""
    r = report
    lines = [
        f"protects {r['unit']}",
        f"rows {r['rows']:,}; a step draws each with chance {r['rate']:.3g}: on average "
        f"{r['rows_a_step']:.1f}, into a batch of {r['places']} places",
        f"gradients of rows clipped to {r['clip_norm']:g}, noise of {r['noise_multiplier']:g} "
        f"times that; delta {r['delta']:g}",
        *(f"epsilon {epsilon:.3f} after step {step}" for step, epsilon in r["epsilon"].items()),
    ]
    if r["last_step"] < r["steps"]:
        lines.append(
            f"privacy.epsilon={r['budget']:g} is spent after step {r['last_step']} of "
            f"{r['steps']}: the run ends there"
        )
    return "\n".join(lines)
