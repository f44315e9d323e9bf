"""Islands of unlike speed: seconds until a loss is reached, in rounds and asynchronously.

    python benchmarks/speeds.py --rounds 12 --seed 0

Four islands meet in a directory; three make a step in `--pace` seconds, one takes four times as
long. Steps are slept to their length, so that other load on the machine does not count as long as
it leaves time for the work itself (`busy` says what part of a fast step it takes). First come
rounds that wait for all; the loss of the merged model after the last one is the target. Then
`outer.rule=delayed`, without and with adapted numbers of local steps: printed are the seconds until
its merged model has reached the target, and its loss when as many tokens were trained on.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY, START = 10, 40
SPEEDS = {"a": 1, "b": 1, "c": 1, "d": 4}  # island -> its step, in units of --pace
CONFIG = """
name: speeds
steps: 100000
model: {family: llama, num_layers: 2, embed_dim: 64, num_heads: 4, num_kv_heads: 2, head_dim: 16,
        mlp_dim: 176, vocab_size: 300, tie_embeddings: true}
batch: {sequences: 4, sequence_length: 64}
optimizer: {name: adamw, learning_rate: 2.0e-3, warmup_steps: 20, schedule: constant}
data: {path: DATA}
checkpoint: {every: 0}
eval: {every: 10, batches: 16}
sample: {every: 0}
log: {every: 10}
"""
ROUNDS = ["outer.rule=diloco", "outer.quorum=4", "outer.grace=600"]
DELAYED = ["outer.rule=delayed", "outer.grace=10"]
SETTINGS = {
    "rounds": ROUNDS,
    "delayed": [*DELAYED, "outer.adapt=false"],
    "delayed, adapted": [*DELAYED, "outer.adapt=true"],
}


def island(pace: float, arguments: list[str]) -> int:
    """`jaxlm train` whose steps take at least `pace` seconds."""
    import jax

    from jaxlm import cli
    from jaxlm.outer import apart

    meet = apart.meet

    def paced(config, program):
        step = program.train_step
        work: list[float] = []

        def slept(state, batch):
            begin = time.monotonic()
            state, values = step(state, batch)
            jax.block_until_ready(values)
            work.append(time.monotonic() - begin)
            if len(work) % 20 == 0:
                print(f"busy {sum(work[-20:]) / 20 / pace:.2f}", flush=True)
            time.sleep(max(0.0, begin + pace - time.monotonic()))
            return state, values

        return meet(config, program._replace(train_step=slept))

    apart.meet = paced
    return cli.main(["train", *arguments])


def start(out: Path, *words: object) -> subprocess.Popen:
    with out.open("ab") as log:
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log)


def evaluations(folder: Path) -> list[float]:
    """The held-out losses so far, of the fastest island's evaluations of the merged model."""
    file = folder / "a" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [x["eval/loss"] for x in map(json.loads, lines) if "eval/loss" in x]


def measure(out: Path, name: str, target: float | None, args) -> dict:
    """Train until the target is reached and the tokens are spent; of rounds, so many."""
    folder = out / "".join(c if c.isalnum() else "-" for c in name)
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.replace("DATA", str(out / "data")))
    words = [f"outer.store={folder / 'store'}", f"outer.every={EVERY}", f"seed={args.seed}"]
    words += [f"outer.start_step={START}", "outer.learning_rate=0.7", "outer.momentum=0.5"]
    jobs = [start(folder / "m.log", "-m", "jaxlm", "outer", "serve", folder / "store")]
    train = lambda n: start(
        folder / f"{n}.log", __file__, "--island", "--pace", args.pace * SPEEDS[n],
        folder / "config.yaml", f"run.dir={folder / n}", f"outer.island={n}", *words,
        *SETTINGS[name],
    )  # fmt: skip
    jobs.append(train("a"))  # a fast one trains the first steps
    while not list((folder / "store" / "leases" / "founder").glob("*.json")):
        time.sleep(0.2)
    jobs += [train(n) for n in "bcd"]
    merges, begin, found, seen = folder / "store" / "merges", 0.0, {"setting": name}, 0
    steps: dict[str, int] = {}  # merge -> local steps in it; the store forgets old ones
    spent = args.rounds * EVERY * len(SPEEDS)  # steps of all islands
    try:
        while "loss" not in found:
            time.sleep(0.2)
            if any(job.poll() is not None for job in jobs):
                raise SystemExit(f"{name}: a process ended by itself; see {folder}")
            for file in merges.glob("*.json"):
                with contextlib.suppress(FileNotFoundError):  # removed as old
                    body = json.loads(file.read_text())["body"]
                    steps[file.name] = sum(each["steps"] for each in body["islands"])
            begin = begin or (time.monotonic() if steps else 0.0)
            losses = evaluations(folder)
            if len(losses) == seen:
                continue
            seen, seconds = len(losses), time.monotonic() - begin
            done = sum(steps.values())
            reached = target is None or losses[-1] <= target
            if reached and target is not None:
                found.setdefault("seconds", round(seconds, 1))
            if done >= spent:
                found.setdefault("loss_at_equal_tokens", round(losses[-1], 4))
            if done >= spent and (reached or done >= 3 * spent):
                found["loss"] = losses[-1]
                found.setdefault("seconds", round(seconds, 1) if reached else None)
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    busy = [float(x.split()[1]) for x in (folder / "a.log").read_text().splitlines()
            if x.startswith("busy ")]  # fmt: skip
    return found | {"merges": len(steps), "busy": max(busy[2:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pace", type=float, default=0.5, help="seconds of a fast step")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--island", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.island:
        return island(args.pace, rest)
    out = Path(tempfile.mkdtemp(prefix="jaxlm-speeds-"))
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    prepare = ["data", "prepare", "--out", out / "data", "--tokenizer", "bytes", "--split-within",
               "--validation-fraction", "0.1", *pages]  # fmt: skip
    subprocess.run([sys.executable, "-m", "jaxlm", *map(str, prepare)], check=True)
    target = None
    for name in SETTINGS:
        found = measure(out, name, target, args)
        target = found["loss"] if target is None else target
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
