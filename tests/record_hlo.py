"""Record compiled programs as test data: python tests/record_hlo.py [--all] [NAME ...]

Compiles what is missing, what jaxlm traces differently now, and with --all everything; the other
records stay. Needs the compilers of TPU and GPU (pip install '.[plan-tpu,plan-gpu]'). Each program
is written as it is done: run the command again to resume.
"""

import argparse
import contextlib
import datetime
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimized machine code: the same HLO (tests/conftest.py).
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402  (it reads the environment)
import recorded  # noqa: E402
from buffer_assignment import read_places  # noqa: E402

from jaxlm.hardware.target import parse_target  # noqa: E402
from jaxlm.plan import cache, overflow  # noqa: E402
from jaxlm.plan.compiled import GPU_OPTIONS, SURFACED  # noqa: E402

# The text names files the same wherever the repository is.
jax.config.update(
    "jax_hlo_source_file_canonicalization_regex", r"^.*(?=/(jaxlm|tests|site-packages)/)"
)


def compile_one(source: recorded.Source) -> tuple[dict[str, str], dict]:
    """(files, what the manifest says) of a program."""
    target = parse_target(source.target)
    lowered = recorded.trace(source, recorded.devices(target)).lower()
    options = GPU_OPTIONS if target.platform == "gpu" else None
    files, refusal = {}, None
    with tempfile.TemporaryFile() as words:
        try:
            with errors_into(words):
                compiled = lowered.compile(options)
            memory, files["hlo"] = compiled.memory_analysis(), compiled.as_text()
            if target.platform == "cpu":
                files["places"] = list_places(compiled)
        except jax.errors.JaxRuntimeError as error:
            refusal, memory, files["hlo"] = overflow.explain(lowered, error)
        words.seek(0)
        said = words.read().decode()
    numbers = {name: getattr(memory, name) for name in overflow.Memory._fields}
    return files, {
        "memory": numbers, "refusal": refusal.message if refusal else "",
        "warnings": [line for line in said.splitlines() if SURFACED in line],
    }  # fmt: skip


@contextlib.contextmanager
def errors_into(file):
    """Standard error of this process, the compilers' too, goes into a file."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def list_places(compiled) -> str:
    """Where XLA's buffer assignment lays the temporaries, one in a line."""
    (module,) = compiled.runtime_executable().hlo_modules()
    assignment = compiled.memory_analysis().serialized_buffer_assignment_proto
    places = read_places(assignment, module.as_serialized_hlo_module_proto())
    return "".join(f"{json.dumps(place)}\n" for place in places)


def is_kept(name: str) -> bool:
    """Whether there is a record of what jaxlm traces now."""
    if name not in recorded.read_manifest() or not recorded.path(name, "hlo").exists():
        return False
    traced = recorded.describe_trace(recorded.SOURCES[name])
    return recorded.read_text(name, "trace").splitlines() == traced


def record_one(name: str, folder: Path) -> None:
    """Compile a program and write its files and its row of the manifest."""
    start, source = time.monotonic(), recorded.SOURCES[name]
    files, numbers = compile_one(source)
    files["trace"] = "".join(f"{line}\n" for line in recorded.describe_trace(source))
    for suffix, content in files.items():
        data = lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME)
        recorded.path(name, suffix, folder).write_bytes(data)
    row = {"source": source._asdict(), "date": f"{datetime.date.today()}", **numbers}
    rows = recorded.read_manifest(folder) | {name: row | {"versions": cache.versions()}}
    ordered = {one: rows[one] for one in recorded.SOURCES if one in rows}
    (folder / "manifest.new").write_text(json.dumps(ordered, indent=1) + "\n")
    os.replace(folder / "manifest.new", folder / "manifest.json")
    size = len(files["hlo"]) >> 10
    print(f"{name}: {time.monotonic() - start:.0f} s, {size} KiB", flush=True)


def drop_others() -> None:
    """Remove the files of programs that are not recorded any more."""
    names = [recorded.path(n, s) for n in recorded.SOURCES for s in ("hlo", "trace", "places")]
    for file in set(recorded.FOLDER.glob("*.xz")) - set(names):
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Record compiled programs as test data.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="also what is recorded already")
    parser.add_argument("--folder", type=Path, help="compile for one target, into this folder")
    args = parser.parse_args()
    names = args.names or list(recorded.SOURCES)
    if args.folder:  # in this process: compilers of several targets do not share one
        for name in names:
            record_one(name, args.folder)
        return
    recorded.FOLDER.mkdir(parents=True, exist_ok=True)
    drop_others()
    due = [name for name in names if args.all or not is_kept(name)]
    kind = lambda name: re.sub(r"^cpu:\d+", "cpu", recorded.SOURCES[name].target)
    for target in dict.fromkeys(map(kind, due)):
        own = [name for name in due if kind(name) == target]
        print(f"{target}: {len(own)} programs", flush=True)
        command = [sys.executable, __file__, "--folder", str(recorded.FOLDER), *own]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
