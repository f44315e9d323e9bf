"""The command line: arguments in, one function called, one line for a user's mistake."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from jaxlm import __version__
from jaxlm.config import UserError, expand_home

OVERRIDES = "key.sub=value: overrides of the config, e.g. mesh.fsdp=8 optimizer.learning_rate=1e-3"

# Arguments, of any command, that name files or directories.
PATHS = (
    "config", "target", "source", "out", "path", "inputs", "validation", "tokenizer", "html",
    "write", "calibrate", "store", "key",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for a user's mistake, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escapes for what a terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        parser = make_parser()
    except KeyboardInterrupt:  # loading modules takes a while
        print("\njaxlm: interrupted before anything was done", file=sys.stderr)
        return 130
    args, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes positional arguments in one run only; overrides may stand anywhere
        if not hasattr(args, "overrides") or any(r.startswith("-") or "=" not in r for r in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    # What others print is their result, and may be read by a program.
    stream = sys.stdout if args.run in (_train, _check) else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.handleError = lambda record: _unlogged(handler, record)
    logging.basicConfig(format="%(message)s", level=logging.ERROR, handlers=[handler])
    logging.getLogger("jaxlm").setLevel(logging.WARNING)
    try:
        _expand_paths(args)
        return args.run(args) or 0
    except UserError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"jaxlm: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        _after_out_of_memory(args)
        return 2
    except KeyboardInterrupt:
        print(f"\njaxlm: interrupted; {args.interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that read our output has ended
        _drop(sys.stdout)
        return 1


def _unlogged(handler: logging.StreamHandler, record: logging.LogRecord) -> None:
    """A line that could not be logged: a run goes on without the reader of its lines."""
    if isinstance(sys.exc_info()[1], BrokenPipeError):
        _drop(handler.stream)
    else:
        logging.Handler.handleError(handler, record)


def _drop(stream) -> None:
    """Drop what is written from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _expand_paths(args: argparse.Namespace) -> None:
    """Replace ~ in paths, which shells leave in --out=~/x; a file that has this name stays."""
    for name in PATHS:
        value = getattr(args, name, None)
        texts = [value] if isinstance(value, str) else value or []
        paths = [text if os.path.lexists(text) else expand_home(text, name) for text in texts]
        if paths:
            setattr(args, name, paths[0] if isinstance(value, str) else paths)


def make_parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the arguments."""
    from jaxlm.data import command
    from jaxlm.outer import command as outer_command
    from jaxlm.plan import command as plan_command
    from jaxlm.privacy import command as privacy_command

    parser = argparse.ArgumentParser(
        prog="jaxlm", description="Train language models on any mesh that a config names."
    )
    parser.add_argument("--version", action="version", version=f"jaxlm {__version__}")
    parser.set_defaults(interrupted="the same command starts from the beginning")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    plan_command.add_parser(commands)
    _add_eval(commands)
    _add_generate(commands)
    command.add_parser(commands)
    privacy_command.add_parser(commands)
    _add_import(commands)
    _add_export(commands)
    _add_config(commands)
    _add_verify(commands)
    outer_command.add_parser(commands)
    return parser


def _command(
    commands, name: str, run, help_: str, description: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help_, description=description or help_[0].upper() + help_[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_train(commands) -> None:
    parser = _command(
        commands, "train", _train, "train, or go on with, the run that a config describes",
        "Train the run that a config describes. The same command again goes on where it stopped. "
        "`jaxlm config explain` lists every key with its default and unit.",
    )  # fmt: skip
    parser.set_defaults(
        interrupted="the same command goes on from the last checkpoint, or from the beginning"
        " where there is none yet"
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _add_eval(commands) -> None:
    parser = _command(commands, "eval", _eval, "held-out loss of a checkpoint")
    parser.add_argument("target", metavar="RUN", help="run directory, or the YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--step", type=int, help="checkpoint to read, steps; None: the newest")
    parser.add_argument("--split", default="validation", help="split of the dataset at data.path")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", _generate, "continue prompts with a trained model")
    parser.add_argument("target", metavar="RUN", help="run directory, or the YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="text to continue; repeatable (one batch)")
    add("--step", type=int, help="checkpoint to read, steps; None: the newest")
    add("--tokens", type=int, default=128, help="tokens to generate for each prompt")
    add("--temperature", type=float, default=0.8, help="0: greedy")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="smallest set of tokens with this probability")
    add("--seed", type=int, default=0, help="seed of the samples")
    add("--json", action="store_true", help="print one JSON object a prompt")


def _add_import(commands) -> None:
    parser = _command(
        commands, "import", _import, "make a run directory from Hugging Face weights",
        "Read config.json and *.safetensors into a run directory, ready for eval, generate, "
        "export, and checkpoint.start_from of another run.",
    )  # fmt: skip
    parser.add_argument("source", metavar="HF_DIR", help="directory with config.json")
    parser.add_argument("out", metavar="RUN", help="run directory to make")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _add_export(commands) -> None:
    parser = _command(commands, "export", _export, "write a checkpoint as a Hugging Face directory")
    parser.add_argument("target", metavar="RUN", help="run directory, or the YAML file of a run")
    parser.add_argument("out", metavar="HF_DIR", help="directory to make")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--step", type=int, help="checkpoint to read, steps; None: the newest")
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=types, help="type of the weights")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file, gigabytes")


def _add_config(commands) -> None:
    parser = commands.add_parser("config", help="show, check and explain configs")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, run, help_ in (
        ("show", _show, "the resolved config, with the source of every value"),
        ("check", _check, "whether the config would run on the devices that it names"),
    ):
        action = _command(actions, name, run, help_)
        action.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
        action.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    action.add_argument("--target", help="absent devices, as v5p:4x4x4 or h100:4x8")
    action = _command(actions, "explain", _explain, "meaning, legal values, effect of a key")
    action.add_argument("key", metavar="KEY", nargs="?", default="", help="key or section")


def _add_verify(commands) -> None:
    parser = _command(
        commands, "verify-layout", _verify, "prove that meshes train the same model",
        "Shrink the config (widths, layers, vocabulary; never its structure), run it on simulated "
        "devices under each mesh and on one device, and compare initial parameters, loss, every "
        "gradient and three updates. Exit code 1 if any differs.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="MESH|KEY=VALUE",
        help="meshes, as fsdp=2,tensor=4 (none: the config's own), and overrides of the config",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def _start(args, target: str):
    """The config, with its devices started: nothing before this touches a device."""
    import jax

    from jaxlm import devices, run

    config = run.load_config(target, args.overrides)
    talk = args.run in (_train, _check)  # others print their result
    logging.getLogger("jaxlm").setLevel(logging.INFO if talk else logging.WARNING)
    devices.start(config.devices)
    if jax.process_index():
        logging.getLogger("jaxlm").setLevel(logging.WARNING)
    return config


def _train(args) -> None:
    config = _start(args, args.config)
    from jaxlm import train

    train.train(_with_mesh(config))


def _with_mesh(config):
    """The config with `mesh: auto` chosen for the devices that are there."""
    if not config.mesh.auto:
        return config
    import jax

    from jaxlm.plan import search

    return search.settle_run(config, jax.devices())


def _after_out_of_memory(args) -> None:
    """Say what would fit: the planner's confirmed edits, by a process of its own."""
    from jaxlm.plan import command

    if args.run is not _train:
        print("jaxlm: a larger mesh takes less memory a device", file=sys.stderr)
    else:
        command.advise(args.config, args.overrides)


def _eval(args) -> None:
    config = _start(args, args.target)
    import json

    from jaxlm import evaluate

    result = evaluate.evaluate_run(config, args.step, args.split)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            "  ".join(
                f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
            )
        )


def _generate(args) -> None:
    config = _start(args, args.target)
    import json

    from jaxlm import generate, run

    prompts = args.prompt or [""]
    with run.open_model(config, args.step) as model:
        texts = generate.generate_text(
            model.config, model.structure, model.layout, model.mesh, model.params | model.fixed,
            run.find_tokenizer(config), prompts, tokens=args.tokens,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        )  # fmt: skip
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text}) if args.json else prompt + text)


def _import(args) -> None:
    from jaxlm.interop import hugging_face

    hugging_face.import_run(args.source, args.out, args.overrides)
    print(f"{args.out} has the weights of {args.source} as step 0")


def _export(args) -> None:
    config = _start(args, args.target)
    from jaxlm.interop import hugging_face

    hugging_face.export_run(config, args.out, args.step, args.dtype, args.shard_gb)
    print(f"{args.out} has the weights of {args.target} in {args.dtype}")


def _show(args) -> None:
    from jaxlm import configfile, explain, run, validate

    path = run.config_path(args.config)
    config, sources = configfile.load_with_sources(path, args.overrides)
    validate.validate(config)
    print(explain.show(config, sources), end="")


def _check(args) -> None:
    import jax

    from jaxlm import lint, pipeline
    from jaxlm.hardware.target import parse_target
    from jaxlm.mesh import open_mesh
    from jaxlm.state import model_structure

    found = parse_target(args.target).devices() if args.target else None
    config = _start(args, args.config)
    mesh, layout = open_mesh(config if found else _with_mesh(config), found)
    print(f"{args.config}: fits on {mesh.size} x {mesh.devices.flat[0].device_kind}")
    if layout.size("layers") > 1:
        print(pipeline.describe(config, layout.size("layers")))
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
    for line in lint.warnings(config, mesh, layout, structure):
        print(f"warning: {line}")


def _verify(args) -> int:
    import math

    from jaxlm import devices, run, verify
    from jaxlm.config import Devices

    texts = [text for text in args.overrides if verify.is_mesh(text)]
    overrides = [text for text in args.overrides if not verify.is_mesh(text)]
    config = run.load_config(args.config, overrides)
    meshes = verify.chosen_meshes(config, texts)
    devices.start(Devices(simulate=max(math.prod(sizes.values()) for sizes in meshes)))
    return 0 if verify.run(config, meshes, args.json) else 1


def _explain(args) -> None:
    from jaxlm import explain

    print(explain.explain(args.key), end="")
