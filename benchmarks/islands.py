"""Held-out loss of islands beside data parallelism, at equal tokens; one line of JSON a run.

    python benchmarks/islands.py run FILE.jsonl CONFIG [VARIANT ...] [KEY=VALUE ...]
    python benchmarks/islands.py table FILE.jsonl

Runs each variant with seeds 0, 1 and 2 where FILE.jsonl has no line of it yet, so that it can be
stopped and started again. Islands are 4 simulated devices. "one island" is a run of a quarter of
the batch: what an island has without the others. Those of "jobs" variants are processes that meet
in a directory; the first one trains the first steps alone, on its quarter of the batch, and all
make a few steps more, so that tokens are equal.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

K = 4
START = "outer.start_step=200"
ISLANDS = ["devices.simulate=4", "mesh.data=1", f"mesh.replica={K}", "outer.every=20"]
NESTEROV = [*ISLANDS, "outer.learning_rate=0.7", "outer.momentum=0.9"]
VARIANTS = {
    "data parallel": ["devices.simulate=4", "mesh.data=4"],
    "one island": ["devices.simulate=1", "mesh.data=1"],
    "average": [*ISLANDS, START, "outer.rule=average"],
    "average, no warm start": [*ISLANDS, "outer.rule=average"],
    "DiLoCo": [*NESTEROV, START],
    "DiLoCo, no warm start": NESTEROV,
    "DiLoCo 0.9/0.5": [*ISLANDS, START, "outer.learning_rate=0.9", "outer.momentum=0.5"],
    "average, int4": [*ISLANDS, START, "outer.rule=average", "outer.wire=int4"],
    "average, int2": [*ISLANDS, START, "outer.rule=average", "outer.wire=[int2,float32]"],
    "average, int2, no feedback": [
        *ISLANDS, START, "outer.rule=average", "outer.wire=[int2,float32]",
    ],
    "average, topk": [*ISLANDS, START, "outer.rule=average", "outer.wire=[topk,float32]"],
    "average, fragments": [
        *ISLANDS, START, "outer.rule=average", "outer.fragments=4", "outer.overlap=2",
        "outer.mix=0.5",
    ],
}  # fmt: skip
# One local step without momentum is asynchronous gradient descent.
JOBS = {
    "jobs: delayed": ["outer.every=20", "outer.momentum=0.5"],
    "jobs: asynchronous, one step": ["outer.every=1", "outer.momentum=0"],
}
DELAYED = ["mesh.data=1", "outer.rule=delayed", "outer.learning_rate=1", "outer.adapt=false", START]
# Runs jaxlm with errors of lossy formats forgotten: what feedback is worth.
FORGETFUL = """
import sys
from jaxlm import cli
from jaxlm.outer import wire
kept = wire.send
def send(x, error, name):
    payload, error = kept(x, None, name)
    return payload, None if error is None else 0 * error
wire.send = send
sys.exit(cli.main(sys.argv[1:]))
"""


def loss_of(config: str, variant: str, seed: int, overrides: list[str]) -> float:
    """Train a variant with one seed; the last held-out loss."""
    words = [config, *overrides, f"seed={seed}", "sample.every=0", "checkpoint.every=0"]
    with tempfile.TemporaryDirectory() as scratch:
        if variant in JOBS:
            return loss_of_jobs(Path(scratch), words, JOBS[variant])
        if variant == "one island":
            words.append(f"batch.sequences={setting(words, 'sequences') // K}")
        start = ["-c", FORGETFUL] if variant.endswith("no feedback") else ["-m", "jaxlm"]
        command = [sys.executable, *start, "train", *words, *VARIANTS[variant]]
        subprocess.run([*command, f"run.dir={scratch}/run"], check=True, stdout=subprocess.DEVNULL)
        return last_loss(Path(scratch, "run"))


def loss_of_jobs(scratch: Path, words: list[str], own: list[str]) -> float:
    """Train K jobs with a merger; the held-out loss of the merged model, from who ended last."""
    steps, first = setting(words, "steps"), setting([*words, START, "outer.every=1"], "start_step")
    words = [*words, *DELAYED, *own, f"outer.store={scratch}/store"]
    # The first `first` steps are one job's alone: K steps + (1 - K) first in all.
    words += [f"batch.sequences={setting(words, 'sequences') // K}"]
    words += [f"steps={steps + (K - 1) * first // K}"]
    jaxlm = [sys.executable, "-m", "jaxlm"]
    merger = subprocess.Popen([*jaxlm, "outer", "serve", f"{scratch}/store"])
    try:
        jobs = [
            subprocess.Popen(
                [*jaxlm, "train", *words, f"outer.island=i{k}", f"run.dir={scratch}/i{k}"],
                stdout=subprocess.DEVNULL,
            )
            for k in range(K)
        ]
        if any([job.wait() for job in jobs]):
            raise SystemExit(f"an island failed: {' '.join(words)}")
    finally:
        merger.kill()
        merger.wait()
    runs = [scratch / f"i{k}" for k in range(K)]
    return last_loss(max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime))


def setting(words: list[str], key: str) -> int:
    """A whole number of the config, by the last part of its key."""
    shown = subprocess.run(
        [sys.executable, "-m", "jaxlm", "config", "show", *words],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    line = next(x for x in shown.splitlines() if x.strip().startswith(f"{key}:"))
    return int(line.split("#")[0].split(":")[1])


def last_loss(run_dir: Path) -> float:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [r["eval/loss"] for r in records if "eval/loss" in r][-1]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(file: Path, config: str, words: list[str]) -> None:
    overrides = [word for word in words if "=" in word]
    chosen = [word for word in words if "=" not in word] or [*VARIANTS, *JOBS]
    for seed in (0, 1, 2):
        for variant in chosen:
            key = {"config": Path(config).stem, "variant": variant, "seed": seed,
                   "overrides": overrides}  # fmt: skip
            if any(key.items() <= line.items() for line in read(file)):
                continue
            line = key | {"loss": loss_of(config, variant, seed, overrides)}
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def table(file: Path) -> None:
    """Mean over seeds, and how far from data parallelism."""
    groups: dict[tuple, dict[str, list[float]]] = {}
    for line in read(file):
        case = groups.setdefault((line["config"], *line["overrides"]), {})
        case.setdefault(line["variant"], []).append(line["loss"])
    for case, variants in groups.items():
        print(*case)
        base = statistics.mean(variants.get("data parallel", [float("nan")]))
        for name, losses in variants.items():
            mean = statistics.mean(losses)
            spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
            print(f"  {name:32} {mean:.4f} +- {spread:.4f}  {mean / base - 1:+.1%}  {len(losses)}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
    if len(sys.argv) > 3 and sys.argv[1] == "run":
        run(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    elif len(sys.argv) == 3 and sys.argv[1] == "table":
        table(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
