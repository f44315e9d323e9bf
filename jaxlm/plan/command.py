"""`jaxlm plan`: arguments in, a plan, a search, a list of edits or a calibration out."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import config as cfg

DESCRIPTION = (
    "What a run takes on hardware that need not be here: memory, FLOPs, communication, time and "
    "cost. The train step is compiled for the target by its real compiler, in a process of its "
    "own; --analytic reads its trace instead, in seconds. target=... is short for plan.target=..."
)


def add_parser(commands) -> None:
    """The arguments of `jaxlm plan`."""
    parser = commands.add_parser(
        "plan", help="what a run takes, how fast it is and which mesh is best, before renting",
        description=DESCRIPTION,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory", nargs="?")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="target=v6e:16x16 and overrides of the config, e.g. mesh.fsdp=8",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--analytic",
        action="store_true",
        help="nothing is compiled: the step is traced, and the trace read",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--html", metavar="FILE", help="write a page with charts")
    add("--search", action="store_true", help="find the fastest mesh, remat and microbatches")
    add("--write", metavar="FILE", help="with --search: write the config of the best")
    add("--fit", action="store_true", help="the largest buffers, and edits that make it fit")
    add("--calibrate", metavar="RUN", nargs="+", help="fit efficiencies to these finished runs")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where the plan does not fit in memory."""
    if not args.json:  # nothing but the object on standard output
        logging.getLogger("jaxlm").setLevel(logging.WARNING)
    if args.calibrate:
        return _calibrate(args)
    if not args.config:
        raise cfg.UserError("jaxlm plan needs a CONFIG, as in jaxlm plan configs/llama3-8b.yaml")
    if args.write and not args.search:
        raise cfg.UserError(f"--write {args.write} needs --search, which finds what to write")
    from jaxlm import run as runs

    config = runs.load_config(args.config, [_override(text) for text in args.overrides])
    target = _target(config)
    if (args.search or args.fit) and config.outer.every and not config.outer.store:
        raise cfg.UserError(
            f"--{'search' if args.search else 'fit'} with outer.every={config.outer.every}: it "
            "looks at one train step; plan an island alone, with outer.every=0 mesh.replica=1 and "
            "the part of the target that it has"
        )
    if args.search:
        return _search(args, config, target)
    if config.mesh.auto:
        config = _auto(config, target)
    return _fit(args, config, target) if args.fit else _plan(args, config, target)


def _override(text: str) -> str:
    return f"plan.{text}" if text.startswith("target=") else text


def _target(config: cfg.Config):
    """The target; only `local` may touch devices."""
    import jax

    from jaxlm import devices
    from jaxlm.plan import estimate

    if config.plan.target == "local":
        devices.start(config.devices)
    else:  # a process of its own compiles
        devices.leave_out_absent()
        jax.config.update("jax_platforms", "cpu")
    return estimate.find_target(config)


def _auto(config: cfg.Config, target) -> cfg.Config:
    from jaxlm.plan import search

    config, why = search.choose_mesh(config, target)
    _say(why)
    return config


def _say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def _console():
    from rich.console import Console

    return Console(highlight=False, width=None if os.isatty(1) else 132)


def _plan(args, config: cfg.Config, target) -> int:
    from jaxlm.plan import page, plan, report

    made = plan.make_plan(config, target, args.analytic)
    found = plan.to_dict(made)
    if args.json:
        print(json.dumps(found))
    else:
        report.show(_console(), found)
    if args.html:  # last: a path that cannot be written loses nothing
        _write(args.html, page.page(found))
    return 0 if made.fits else 1


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise cfg.UserError(f"{path}: cannot be written: {error.strerror}") from error


def _search(args, config: cfg.Config, target) -> int:
    from jaxlm import run as runs
    from jaxlm.plan import plan, report, search

    measure = None if args.analytic else lambda one: plan.measure_seconds(one, target)
    found = search.run(config, target, measure, _say)
    best = search.chosen(found)
    if args.json:
        print(json.dumps(search.to_dict(found)))
    else:
        report.show_search(_console(), found)
        print(f"\nbest: {search.describe(best)}")
        print(f"as overrides: {shlex.join(search.overrides(best.config, best.sizes))}")
    if args.write:
        _write(
            args.write, search.config_text(runs.config_path(args.config), args.write, best, target)
        )
        _say(f"written: {args.write}")
    return 0


def _fit(args, config: cfg.Config, target) -> int:
    from jaxlm.plan import compiled, fit, plan, report, shared
    from jaxlm.validate import resolve_mesh

    result = compiled.measure(config, target)
    estimator = shared.Estimator(config, target)

    def guess(configs: list[cfg.Config]) -> list[tuple[float, float]]:
        found = estimator([(one, resolve_mesh(one.mesh, target.size)) for one in configs])
        return [(one.cost.peak, one.time.seconds) for one in found]

    edits = fit.propose(config, target, lambda one: plan.measure_seconds(one, target), guess)
    if args.json:
        found = {key: result[key] for key in ("refused", "largest")}
        print(json.dumps(found | {"edits": [fit.to_dict(edit) for edit in edits]}))
        return 0 if edits else 1
    console = _console()
    for line in plan.refusal_lines(result):
        console.print(line, markup=False, soft_wrap=True)
    if result["largest"]:
        report.show_table(console, report.largest(result["largest"]))
    for edit in edits:
        console.print(fit.describe(edit), markup=False, soft_wrap=True)
    return 0 if edits else 1


def advise(config: str, overrides: Sequence[str]) -> None:
    """After `train` ran out of memory: `--fit` for its devices, in a process of its own.

    The devices' memory is full, and the planner needs none of it.
    """
    import jax

    from jaxlm import metrics

    if jax.process_index() == 0:
        with metrics.only_informs("edits that fit are not looked for"):
            _advise(["plan", config, "--fit", *overrides])


def _advise(arguments: list[str]) -> None:
    import jax

    from jaxlm.hardware.target import local_target

    try:
        arguments.append(f"target={local_target(jax.devices()).text}")
    except cfg.UserError as error:
        _say(f"jaxlm: {error}; more batch.microbatches or remat.policy=full take less")
        return
    command = f"jaxlm {shlex.join(arguments)}"
    _say(f"jaxlm: looking for edits that fit: {command}")
    done = subprocess.run([sys.executable, "-m", "jaxlm", *arguments], stdout=sys.stderr)
    if done.returncode:
        _say("jaxlm: more batch.microbatches, remat.policy=full or more devices take less memory")


def _calibrate(args) -> int:
    from jaxlm import devices
    from jaxlm import run as runs
    from jaxlm.plan import calibrate

    devices.leave_out_absent()
    for text in [args.config, *args.overrides]:
        if text:
            raise cfg.UserError(f"--calibrate takes run directories alone, not {text}")
    configs = [(path, runs.load_config(path)) for path in args.calibrate]
    found: dict[str, Any] = calibrate.calibrate(configs)
    if args.json:
        print(json.dumps(found))
        return 0
    for line in calibrate.describe(found):
        print(line)
    return 0
