"""Wall clock over a slow link: islands in a store, each behind some Mbit/s, against one island.

    python benchmarks/slow_link.py --mbit 10 --steps 200

Every island's store is slowed down: an operation takes `--latency` seconds, and its bytes pass at
`--mbit` Mbit/s, up and down apart. The merger is beside the store. For each setting of `outer:` two
islands, each on a half of the cores, train the same number of steps. Printed are the seconds of the
steps after the first merge, how many of them the devices of island a were idle between two steps,
the compute utilisation (the rest, as a share), its bytes, and the loss of the merged model. Beside
them stand two runs without islands.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CONFIG = """
name: slow
steps: STEPS
model: {family: llama, num_layers: 4, embed_dim: 128, num_heads: 4, num_kv_heads: 2, head_dim: 32,
        mlp_dim: 352, vocab_size: 300, tie_embeddings: true}
batch: {sequences: 8, sequence_length: 128}
optimizer: {name: adamw, learning_rate: 2.0e-3, warmup_steps: 20}
data: {path: DATA}
checkpoint: {every: 0}
eval: {every: 0, batches: 32}
sample: {every: 0}
log: {every: 10}
outer: {every: 40, rule: diloco, learning_rate: 0.7, momentum: 0.5, start_step: 40, grace: 30,
        quorum: 2, store: STORE}
"""
FIRST = 80  # islands have parted at step 40 and met once
SETTINGS = {
    "no islands": None,
    "float32": [],
    "int8": ["outer.wire=[int8]"],
    "int4": ["outer.wire=[int4]"],
    "int4, 2 fragments, in the background": [
        "outer.wire=[int4]", "outer.fragments=2", "outer.overlap=15", "outer.mix=0.5",
    ],
}  # fmt: skip


def slowed(store, mbit: float, latency: float):
    """A store whose operations take as long as over such a link; the two directions are apart."""
    ways = {"up": threading.Lock(), "down": threading.Lock()}

    def wait(way: str, size: int) -> None:
        time.sleep(latency)
        with ways[way]:
            time.sleep(8e-6 * size / mbit)

    def up(operation):
        def send(name, data):
            wait("up", len(data))
            return operation(name, data)

        return send

    def down(operation):
        def receive(name):
            data = operation(name)
            wait("down", len(data))
            return data

        return receive

    def listed(folder):
        time.sleep(latency)
        return store.list(folder)

    return dataclasses.replace(
        store, read=down(store.read), create=up(store.create), write=up(store.write), list=listed
    )


def island(half: int, mbit: float, latency: float, arguments: list[str]) -> int:
    """`jaxlm train` with a slow store, on the first or the second half of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[half::2] or cores)  # before jax counts them
    # With one thread XLA would run nothing else until the loop waits: what is coded in the
    # background needs a second one.
    os.environ |= dict.fromkeys(("NPROC", "PJRT_NPROC"), str(max(2, len(cores) // 2)))
    import jax

    from jaxlm import cli
    from jaxlm.outer import adopt, apart

    open_fast, after, idle = apart.open_store, adopt.after_step, [0.0]

    def timed(isle, arrays):
        jax.block_until_ready(arrays)
        begin = time.monotonic()
        found = after(isle, arrays)
        idle[0] += (time.monotonic() - begin) * (isle.step > FIRST)
        return found

    apart.open_store = lambda *a: slowed(open_fast(*a), mbit, latency)
    adopt.after_step = timed
    code = cli.main(["train", *arguments])
    print(json.dumps({"idle": idle[0]}), flush=True)
    return code


def start(out: Path, *words: object) -> subprocess.Popen:
    with out.open("ab") as log:
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log)


def measure(out: Path, name: str, overrides: list[str] | None, args) -> dict:
    """Two islands to the end; where overrides are None, two runs that do not meet."""
    folder = out / "".join(c if c.isalnum() else "-" for c in name)
    folder.mkdir()
    text = CONFIG.replace("STEPS", str(args.steps)).replace("DATA", str(out / "data"))
    text = text.replace("STORE", str(folder / "store"))
    if overrides is None:
        text = text[: text.index("outer:")]
    (folder / "config.yaml").write_text(text)
    merger = start(folder / "m.log", "-m", "jaxlm", "outer", "serve", folder / "store")
    link = ["--mbit", args.mbit, "--latency", args.latency]
    runs = [
        start(folder / f"{n}.log", __file__, "--island", half, *link, folder / "config.yaml",
              f"run.dir={folder / n}",
              *([] if overrides is None else [f"outer.island={n}", *overrides]))
        for half, n in enumerate("ab")
    ]  # fmt: skip
    codes = [run.wait() for run in runs]
    merger.kill()
    merger.wait()
    if any(codes):
        raise SystemExit(f"{name}: an island ended with {codes}; see {folder}")
    rows = [json.loads(x) for x in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_seconds" in row]
    last = steps[-1]
    seconds = sum(10 * row["step_seconds"] for row in steps if row["step"] > FIRST)
    idle = json.loads((folder / "a.log").read_text().splitlines()[-1])["idle"]
    loss = next(row["eval/loss"] for row in reversed(rows) if "eval/loss" in row)
    return {
        "setting": name, "seconds": round(seconds, 1), "idle": round(idle, 1),
        "utilisation": round(1 - idle / seconds, 3),
        "sent_mb": round(last.get("outer/bytes_sent", 0.0) / 1e6, 2),
        "received_mb": round(last.get("outer/bytes_received", 0.0) / 1e6, 2),
        "loss": round(loss, 4),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--latency", type=float, default=0.05, help="of an operation, seconds")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--island", type=int, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.island is not None:
        return island(args.island, args.mbit, args.latency, rest)
    out = Path(tempfile.mkdtemp(prefix="jaxlm-slow-"))
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    prepare = ["data", "prepare", "--out", out / "data", "--tokenizer", "bytes", "--split-within",
               "--validation-fraction", "0.1", *pages]  # fmt: skip
    subprocess.run([sys.executable, "-m", "jaxlm", *map(str, prepare)], check=True)
    for name, overrides in SETTINGS.items():
        print(json.dumps(measure(out, name, overrides, args)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
