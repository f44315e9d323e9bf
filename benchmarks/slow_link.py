"""Wall clock over a slow link: islands in a store, each behind some Mbit/s, against one island.

    python benchmarks/slow_link.py --mbit 10 --steps 200

Every island's store is slowed down: an operation takes `--latency` seconds, and its bytes pass at
`--mbit` Mbit/s, up and down apart. The merger is beside the store. For each setting of `outer:` two
islands train the same number of steps; printed are seconds, the time that islands waited, bytes,
and the loss of the merged model. Data parallel over this link would send the gradients each step:
2 x 4 bytes a parameter up and down; the last column says how long that alone takes.
"""

import argparse
import dataclasses
import json
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
eval: {every: 0}
sample: {every: 0}
outer: {every: 20, rule: diloco, learning_rate: 0.7, momentum: 0.5, start_step: 40, grace: 30,
        quorum: 2, store: STORE}
"""
SETTINGS = {
    "float32": [],
    "int8": ["outer.wire=[int8]"],
    "int4": ["outer.wire=[int4]"],
    "int4, 4 fragments, in the background": [
        "outer.wire=[int4]", "outer.fragments=4", "outer.overlap=3", "outer.mix=0.5",
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


def island(mbit: float, latency: float, arguments: list[str]) -> int:
    """`jaxlm train` with a slow store."""
    from jaxlm import cli
    from jaxlm.outer import apart

    open_fast = apart.open_store
    apart.open_store = lambda *a: slowed(open_fast(*a), mbit, latency)
    return cli.main(["train", *arguments])


def start(out: Path, *words: object) -> subprocess.Popen:
    with out.open("ab") as log:
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log)


def measure(out: Path, name: str, overrides: list[str], args) -> dict:
    """Two islands to the end."""
    folder = out / "".join(c if c.isalnum() else "-" for c in name)
    folder.mkdir()
    text = CONFIG.replace("STEPS", str(args.steps)).replace("DATA", str(out / "data"))
    (folder / "config.yaml").write_text(text.replace("STORE", str(folder / "store")))
    merger = start(folder / "m.log", "-m", "jaxlm", "outer", "serve", folder / "store")
    link = [__file__, "--island", "--mbit", args.mbit, "--latency", args.latency]
    runs = [
        start(folder / f"{n}.log", *link, folder / "config.yaml", f"run.dir={folder / n}",
              f"outer.island={n}", *overrides)
        for n in "ab"
    ]  # fmt: skip
    codes = [run.wait() for run in runs]
    merger.kill()
    merger.wait()
    if any(codes):
        raise SystemExit(f"{name}: an island ended with {codes}; see {folder}")
    rows = [json.loads(x) for x in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "outer/waited" in row]
    last, first = steps[-1], next(row for row in steps if row["step"] >= 40)
    parted = [row for row in steps if row["step"] > first["step"]]
    seconds = sum(row["step_seconds"] * 10 for row in parted if row["step"] % 10 == 0)
    evaluation = [row["eval/loss"] for row in rows if "eval/loss" in row]
    sent, received = last["outer/bytes_sent"] / 1e6, last["outer/bytes_received"] / 1e6
    return {
        "setting": name, "seconds": round(seconds, 1), "waited": round(last["outer/waited"], 1),
        "sent_mb": round(sent, 2), "received_mb": round(received, 2),
        "loss": round(evaluation[-1], 4) if evaluation else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--latency", type=float, default=0.05, help="of an operation, seconds")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--island", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.island:
        return island(args.mbit, args.latency, rest)
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
