"""Random kills, stops and restarts of islands and mergers: no round stalls, no hand is needed.

    python benchmarks/faults.py --events 100 --out /tmp/faults

Islands of a tiny model and two mergers (one at work, one that waits) meet in a directory. Every few
seconds one process, chosen at random, is killed and started again after a while, stopped and
continued, or replaced while it is stopped. Afterwards:
- the rounds go on with all islands, without a hand;
- replaying the store from its older snapshot gives the newer one, bit for bit;
- no island has two contributions in one merge, or one contribution in two;
- no block of the data is claimed twice, and no process ended with a traceback.
Exit 0 if all of it holds. With `--undisturbed N`, as many runs of as many merges follow in which
nothing happens, with other seeds: the held-out loss of the merged model is to be within two of
their standard deviations of their mean.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

import argparse
import dataclasses
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxlm.outer import about as facts
from jaxlm.outer import ledger as books
from jaxlm.outer import merging, records, snapshots
from jaxlm.outer.presence import Process
from jaxlm.outer.records import Identity
from jaxlm.outer.store import open_store

CONFIG = """
name: faults
steps: 1000000
model: {family: llama, num_layers: 1, embed_dim: 16, num_heads: 2, num_kv_heads: 1, head_dim: 8,
        mlp_dim: 32, vocab_size: 300, tie_embeddings: true}
batch: {sequences: 2, sequence_length: 32}
precision: {compute: float32}
optimizer: {name: adamw, learning_rate: 1.0e-3, warmup_steps: 10}
data: {path: DATA, prefetch: 1}
checkpoint: {every: 40, keep: 2}
eval: {every: 0, batches: 64}
sample: {every: 0}
log: {every: 20}
outer: {every: 20, rule: RULE, momentum: 0.5, start_step: 20, store: STORE, grace: 4, quorum: 2,
        wire: [int8], fragments: 2}
"""


@dataclasses.dataclass
class Job:
    """A process that is started again when it was killed."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen | None = None
    start_at: float = 0.0  # monotonic; when to start it again
    continue_at: float = 0.0  # when to continue it; 0: it is not stopped
    replaced: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)


def jobs_of(out: Path, islands: int) -> list[Job]:
    """Islands a, b, ... and two mergers."""
    jaxlm = [sys.executable, "-m", "jaxlm"]
    made = []
    for name in "abcdefgh"[:islands]:
        words = ["train", out / "config.yaml", f"run.dir={out / name}", f"outer.island={name}"]
        made.append(Job(name, [*jaxlm, *map(str, words)], out / f"{name}.log"))
    for name in ("merger0", "merger1"):
        command = [*jaxlm, "outer", "serve", str(out / "store")]
        made.append(Job(name, command, out / f"{name}.log"))
    return made


def disturb(job: Job, chance: random.Random) -> str:
    """Do one thing to a process that runs."""
    assert job.process is not None
    now, kind = time.monotonic(), chance.choice(["kill", "kill", "stop", "stop", "replace"])
    if kind == "kill":
        job.process.kill()
        job.process.wait()
        job.process, job.start_at = None, now + chance.uniform(0, 5)
    else:
        job.process.send_signal(signal.SIGSTOP)
        job.continue_at = now + chance.uniform(1, 12)
    if kind == "replace":  # it wakes when the other has its place
        job.replaced.append(job.process)
        job.continue_at = now + chance.uniform(20, 40)
        job.start()
    return kind


def tend(jobs: list[Job]) -> list[str]:
    """Start and continue what is due; gives what ended by itself and should not have."""
    now, ended = time.monotonic(), []
    for job in jobs:
        if job.continue_at and now >= job.continue_at:
            for process in [*job.replaced, job.process]:
                if process is not None and process.poll() is None:
                    process.send_signal(signal.SIGCONT)
            job.continue_at = 0.0
        if job.process is None and now >= job.start_at:
            job.start()
        elif job.process is not None and job.process.poll() is not None and not job.continue_at:
            if all(process.poll() is not None for process in job.replaced):  # else that one trains
                ended.append(f"{job.name} ended by itself with {job.process.returncode}")
            job.start()
    return ended


def merges_of(store) -> int:
    return max([-1, *records.numbers(store, "merges")]) + 1


def wait_for(reached, jobs: list[Job], seconds: float, what: str) -> list[str]:
    """Tend the jobs until something is reached; SystemExit after so long."""
    until, ended = time.monotonic() + seconds, []
    while not reached():
        ended += tend(jobs)
        if time.monotonic() > until:
            raise SystemExit(f"STALLED: {what} took more than {seconds:.0f} s")
        time.sleep(0.2)
    return ended


def check(out: Path) -> list[str]:
    """What is wrong with the store and the logs."""
    wrong = []
    store = open_store(str(out / "store"))
    _, about, identity = facts.read(store, Identity("check", ""))
    process = Process(store, identity, 1.0)
    ledgers = []
    for i, (name, body) in enumerate(list(snapshots.newest(store, identity))[:2]):
        (out / f"replay{i}").mkdir(exist_ok=True)
        ledgers.append(snapshots.load_from(process, about, out / f"replay{i}", name, body))
    newer, older = ledgers
    while older.position.number < newer.position.number and merging.follow(older):
        pass
    if older.position != newer.position:
        wrong.append(f"the replay ends at {older.position}, not at {newer.position}")
    for place, array in enumerate(about.arrays):
        for kind in books.KINDS:
            one, other = (books.read_array(each, kind, place) for each in ledgers)
            if one.tobytes() != other.tobytes():
                wrong.append(f"the replay of {kind} of {array.name} has other bits")
            if not np.isfinite(one).all():
                wrong.append(f"{kind} of {array.name} is not finite")
    seen: dict[tuple, int] = {}
    for number in records.numbers(store, "merges"):
        body = records.read_record(store, identity, records.numbered("merges", number))
        for each in body["islands"]:
            key = (each["island"], each["number"])
            if key in seen:
                wrong.append(f"contribution {key} is in merges {seen[key]} and {number}")
            seen[key] = number
    for log in out.glob("*.log"):
        if "Traceback" in log.read_text():
            wrong.append(f"{log} has a traceback")
    return wrong


def begin(out: Path, data: Path, args, seed: int) -> list[Job]:
    """Start islands and mergers in a directory of their own."""
    out.mkdir(parents=True)
    text = CONFIG.replace("DATA", str(data)).replace("STORE", str(out / "store"))
    (out / "config.yaml").write_text(text.replace("RULE", args.rule) + f"seed: {seed}\n")
    jobs = jobs_of(out, args.islands)
    for job in jobs:
        job.start()
    return jobs


def end(jobs: list[Job]) -> None:
    """Kill what runs."""
    for job in jobs:
        for process in [*job.replaced, job.process]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


def loss_of(out: Path) -> float:
    """The held-out loss of the merged model in the newest checkpoint of island a."""
    command = [sys.executable, "-m", "jaxlm", "eval", out / "a", "--json"]
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["loss"]


def undisturbed(out: Path, data: Path, args, seed: int, merges: int) -> float:
    """The loss of a run of so many merges in which nothing happens."""
    jobs = begin(out / "run", data, args, seed)
    store = open_store(str(out / "run" / "store"))
    try:
        wait_for(lambda: merges_of(store) >= merges, jobs, 3600.0, f"{merges} merges")
    finally:
        end(jobs)
    return loss_of(out / "run")


def disturbed(out: Path, data: Path, args) -> dict:
    """A run with events, and what is found in it afterwards."""
    begun, counts, ended = time.monotonic(), {}, []
    chance, jobs = random.Random(args.seed), begin(out / "run", data, args, args.seed)
    store = open_store(str(out / "run" / "store"))
    try:
        ended += wait_for(lambda: merges_of(store) >= 2, jobs, args.limit, "the first merges")
        longest, last, number = 0.0, time.monotonic(), merges_of(store)
        while (event := sum(counts.values())) < args.events:
            until = time.monotonic() + chance.expovariate(1 / args.pause)
            while time.monotonic() < until:
                ended += tend(jobs)
                time.sleep(0.2)
                if merges_of(store) > number:
                    longest = max(longest, time.monotonic() - last)
                    last, number = time.monotonic(), merges_of(store)
                elif time.monotonic() - last > args.limit:
                    raise SystemExit(f"STALLED: no merge for {args.limit:.0f} s")
            able = [j for j in jobs if j.process and not j.continue_at and j.process.poll() is None]
            if not able:
                continue
            job = chance.choice(able)
            kind = disturb(job, chance)
            counts[kind] = counts.get(kind, 0) + 1
            print(f"{event}: {kind} {job.name} at merge {number}", flush=True)
        # Without a hand: all islands are in a merge together again.
        target = merges_of(store) + 2
        islands = {job.name for job in jobs if len(job.name) == 1}
        seen: set[str] = set()

        def together() -> bool:
            for each in range(target, merges_of(store)):
                _, _, identity = facts.read(store, Identity("check", ""))
                body = records.read_record(store, identity, records.numbered("merges", each))
                seen.update(entry["island"] for entry in body["islands"])
            return seen >= islands

        ended += wait_for(together, jobs, args.limit, "a round of all islands")
        ended += wait_for(
            lambda: len(records.numbers(store, "snapshots")) > 1, jobs, args.limit, "two snapshots"
        )
    finally:
        end(jobs)
    codes = [p.returncode for job in jobs if len(job.name) == 1 for p in job.replaced]
    return {
        "events": counts, "merges": merges_of(store), "longest_gap_seconds": round(longest, 1),
        "seconds": round(time.monotonic() - begun), "ended_by_themselves": ended,
        "replaced_ended_with": codes, "store_objects": len(store.list("")),
        "wrong": check(out / "run"), "loss": loss_of(out / "run"),
    }  # fmt: skip


def main() -> int:
    """Run the events and the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--islands", type=int, default=3)
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between events")
    parser.add_argument("--limit", type=float, default=600.0, help="longest wait for a merge, s")
    parser.add_argument("--rule", default="diloco", choices=["diloco", "delayed"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=int, default=0, help="runs to compare the loss with")
    parser.add_argument("--out", default="", help="directory to make; empty: a temporary one")
    args = parser.parse_args()
    out = Path(args.out or tempfile.mkdtemp(prefix="jaxlm-faults-"))
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    prepare = ["data", "prepare", "--out", out / "data", "--tokenizer", "bytes", "--split-within",
               "--validation-fraction", "0.1", *pages]  # fmt: skip
    subprocess.run([sys.executable, "-m", "jaxlm", *map(str, prepare)], check=True)
    found = disturbed(out / "disturbed", out / "data", args)
    print(json.dumps(found, indent=1), flush=True)
    losses = []
    for seed in range(1, args.undisturbed + 1):
        folder = out / f"undisturbed{seed}"
        losses.append(undisturbed(folder, out / "data", args, args.seed + seed, found["merges"]))
        print(f"undisturbed, seed {args.seed + seed}: loss {losses[-1]:.4f}", flush=True)
    if len(losses) < 2:
        return int(bool(found["wrong"]))
    away = abs(found["loss"] - statistics.mean(losses)) / statistics.stdev(losses)
    print(f"the disturbed run's loss is {away:.2f} standard deviations away")
    return int(bool(found["wrong"]) or away > 2)


if __name__ == "__main__":
    raise SystemExit(main())
