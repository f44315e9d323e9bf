"""Held-out loss where a quarter of the islands is hostile: each defence against each attack.

    python benchmarks/attacks.py FILE.jsonl CONFIG [K ...] [KEY=VALUE ...]

K (default 4 and 8) is the number of islands, of which a quarter sends what ATTACKS says in place of
what it learnt. One line of JSON a run; what FILE.jsonl has is not run again. 400 steps, of which
100 together, and a merge every 10.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ATTACKS = ("none", "sign flip", "ten times", "nan", "noise", "stale copy")
DEFENCES = ("none", "clip", "median", "trimmed", "cosine")
SETTINGS = [
    "steps=400", "outer.start_step=100", "outer.every=10", "outer.rule=average", "mesh.data=1",
    "sample.every=0", "checkpoint.every=0", "eval.every=0",
]  # fmt: skip


def hostile(attack: str, count: int) -> None:
    """The first `count` islands of this process's run attack, from now on."""
    import jax
    import jax.numpy as jnp

    from jaxlm.outer import exchange, together
    from jaxlm.outer.fleet import ISLAND

    made = exchange.make_programs

    def make_programs(fleet):
        programs, kept = made(fleet), {}
        islands = exchange._specs(fleet, fleet.names, True)
        whole = exchange._specs(fleet, fleet.names, False)

        def tamper(thetas, before, stale, step):
            mine = jax.lax.axis_index(ISLAND) < count
            sent, learnt = {}, {}
            for i, n in enumerate(fleet.names):
                learnt[n] = before[n] - thetas[n]
                key = jax.random.fold_in(jax.random.key(i), step)
                noise = jax.random.normal(key, learnt[n].shape) * jnp.std(learnt[n])
                bad = {
                    "none": learnt[n], "sign flip": -learnt[n], "ten times": -10 * learnt[n],
                    "nan": jnp.nan * learnt[n], "noise": 10 * noise, "stale copy": stale[n],
                }[attack]  # fmt: skip
                sent[n] = jnp.where(mine, before[n] - bad, thetas[n])
            return sent, learnt

        tampered = exchange._everywhere(
            tamper, fleet, (islands, whole, islands, exchange.P()), (islands, islands)
        )

        def attacked(thetas, before, memory, fragment, tokens):
            stale = kept.get("first") or jax.tree.map(jnp.zeros_like, thetas)
            sent, learnt = tampered(thetas, before, stale, len(kept))
            kept.setdefault("first", learnt)  # a copy of its first contribution, again and again
            kept[len(kept)] = None
            return programs.exchange(sent, before, memory, fragment, tokens)

        return programs._replace(exchange=attacked)

    together.make_programs = make_programs


def loss_of(config: str, islands: int, attack: str, defend: str, overrides: list[str]) -> float:
    """The last held-out loss of a run, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        own = [f"devices.simulate={islands}", f"mesh.replica={islands}", f"outer.defend={defend}"]
        own += [*SETTINGS, *overrides, f"run.dir={scratch}/run"]
        command = [sys.executable, __file__, "--one", attack, str(islands // 4), config, *own]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records = map(json.loads, Path(scratch, "run", "metrics.jsonl").read_text().splitlines())
        last = [r["eval/loss"] for r in records if "eval/loss" in r][-1]
        return float("nan") if last is None else last


def main(file: Path, config: str, words: list[str]) -> None:
    overrides = [word for word in words if "=" in word]
    counts = [int(word) for word in words if "=" not in word] or [4, 8]
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for islands in counts:
        for defend in DEFENCES:
            for attack in ATTACKS:
                key = {"islands": islands, "attack": attack, "defend": defend}
                if any(key.items() <= line.items() for line in done):
                    continue
                line = key | {"loss": loss_of(config, islands, attack, defend, overrides)}
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        from jaxlm import cli

        hostile(sys.argv[2], int(sys.argv[3]))
        sys.exit(cli.main(["train", *sys.argv[4:]]))
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
