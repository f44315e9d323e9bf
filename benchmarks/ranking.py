"""Whether traces rank layouts like compiled programs do: Spearman's correlation of step times.

    python benchmarks/ranking.py [MODEL/TARGET ...] [--results FILE] [--count N] [--no-compile]

Of every legal candidate a seeded sample is compiled, and the best few of the search; both sides
take the efficiencies of roofline.py's table, never calibrated ones. What was compiled is appended
to FILE, so that a second call goes on: remove it when the train step or jaxlm.xla change. Needs the
extras plan-tpu and plan-gpu.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm import config as cfg
from jaxlm import configfile
from jaxlm.hardware.target import Target, parse_target
from jaxlm.plan import compiled, roofline, search
from jaxlm.plan.cost import Cost, from_json
from jaxlm.plan.shared import Estimator

CONFIGS = Path(__file__).parent.parent / "configs"
SEED = 0
BEST = 4  # as many as --search compiles by default
SHAPE = [
    "model.embed_dim=1024", "model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=128",
    "model.vocab_size=32000", "batch.sequences=64", "batch.sequence_length=2048", "loss.chunks=4",
]  # fmt: skip
MODELS = {  # name -> config, overrides
    "dense": ("llama3-8b", [*SHAPE, "model.num_layers=8", "model.mlp_dim=2816"]),
    "experts": ("mixtral-8x7b", [
        *SHAPE, "model.num_layers=4", "model.expert_mlp_dim=1408",
    ]),
}  # fmt: skip
TARGETS = ("v5e:2x4", "h100:1x8")


class Pair(NamedTuple):
    """A candidate by its trace and by its compiled program."""

    text: str
    guess: roofline.Time
    found: roofline.Time
    guess_cost: Cost
    found_cost: Cost
    chosen: bool  # whether --search would compile it

    @property
    def ratio(self) -> float:
        return self.guess.seconds / self.found.seconds


def choose(
    config: cfg.Config, target: Target, estimator: Estimator, count: int, kept: set[str]
) -> tuple[list[search.Candidate], set[str]]:
    """What was compiled before, the best of the search, and a sample that does not depend on it;
    and the names of the best."""
    every = {" ".join(search.overrides(*pair)): pair for pair in search.legal(config, target)}
    sample = random.Random(SEED).sample(sorted(every), min(count, len(every)))
    found = search.analytic_search(config, target, estimator).ranked
    best = [name(one) for one in search.distinct(found) if one.fits][:BEST]
    chosen = [each for each in every if each in {*kept, *best, *sample}]
    guesses = estimator([every[each] for each in chosen])
    candidates = [
        search.Candidate(*every[each], guess, True)
        for each, guess in zip(chosen, guesses, strict=True)
    ]
    return candidates, set(best)


def name(candidate: search.Candidate) -> str:
    """The choices of a candidate in a line."""
    return " ".join(search.overrides(candidate.config, candidate.sizes))


def load(path: Path) -> dict[tuple[str, str], dict]:
    """(model/target, candidate) -> what was compiled before."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {(row["case"], row["candidate"]): row for row in rows}


def measure(
    case: str, chosen: list[search.Candidate], target: Target, path: Path, compiles: bool
) -> Iterator[tuple[search.Candidate, Cost]]:
    """The Cost of each compiled program; those that the compiler refuses are left out, and said."""
    kept = load(path)
    for one in chosen:
        row = kept.get((case, name(one)))
        if row is None and not compiles:
            continue
        if row is None:
            row = {"case": case, "candidate": name(one)}
            try:
                row["cost"] = compiled.measure(one.config, target)["cost"]
            except compiled.CompileError as error:
                row["failure"] = str(error)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if "failure" in row:
            print(f"{case} {name(one)}: {row['failure']}", flush=True)
        else:
            yield one, from_json(row["cost"])


def compare(case: str, path: Path, count: int, compiles: bool) -> list[Pair]:
    """Both estimates of every candidate of a model and target."""
    model, place = case.split("/")
    target = parse_target(place)
    source, overrides = MODELS[model]
    config = configfile.load(CONFIGS / f"{source}.yaml", overrides)
    known, pairs = roofline.EFFICIENCIES[target.platform], []
    kept = {candidate for where, candidate in load(path) if where == case}
    chosen, best = choose(config, target, Estimator(config, target), count, kept)
    for one, found in measure(case, chosen, target, path, compiles):
        guess = one.guess.cost
        times = [roofline.estimate(cost, target, known) for cost in (guess, found)]
        pairs.append(Pair(name(one), *times, guess, found, name(one) in best))
    return sorted(pairs, key=lambda pair: pair.found.seconds)


def spearman(left: list[float], right: list[float]) -> float:
    """The correlation of two lists' ranks; equal values share the mean of theirs."""
    ranks = [
        np.array([sum(v < x for v in values) + (values.count(x) - 1) / 2 for x in values])
        for values in (left, right)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


def show(case: str, pairs: list[Pair]) -> None:
    """The table of a case, and a line of what it shows."""
    print(f"\n## {case}\n| candidate | compiled, ms | traced, ms | ratio | parts of both, ms |")
    print("|---|---|---|---|---|")
    for pair in pairs:
        parts = ", ".join(
            f"{part} {1e3 * pair.found.parts.get(part, 0):.1f}/"
            f"{1e3 * pair.guess.parts.get(part, 0):.1f}"
            for part in roofline.PARTS
            if part in pair.found.parts or part in pair.guess.parts
        )
        print(
            f"| {pair.text} | {1e3 * pair.found.seconds:.1f} | {1e3 * pair.guess.seconds:.1f} "
            f"| {pair.ratio:.2f} | {parts} |"
        )
    if len(pairs) < 3:
        print(f"{case}: {len(pairs)} compiled candidates are too few to rank")
        return
    guesses, found = [p.guess.seconds for p in pairs], [p.found.seconds for p in pairs]
    slower = lambda pair: f"{pair.found.seconds / min(found) - 1:.1%}"
    first = min(pairs, key=lambda pair: pair.guess.seconds)
    searched = [pair for pair in pairs if pair.chosen]
    print(f"{case}: Spearman {spearman(guesses, found):.3f} over {len(pairs)} candidates")
    print(f"slower than the best compiled: the first by traces by {slower(first)}")
    if searched:  # not so with --no-compile after the search changed
        choice = min(searched, key=lambda pair: pair.found.seconds)
        print(f"the choice of --search, of {len(searched)} compiled, by {slower(choice)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank layouts by traces and by compilers.")
    cases = [f"{model}/{target}" for model in MODELS for target in TARGETS]
    parser.add_argument("cases", nargs="*", metavar="MODEL/TARGET", default=cases)
    parser.add_argument("--results", type=Path, default=Path("ranking.jsonl"))
    parser.add_argument("--count", type=int, default=20, help="size of the sample")
    parser.add_argument("--no-compile", action="store_true", help="only what FILE has")
    args = parser.parse_args()
    for case in args.cases:
        show(case, compare(case, args.results, args.count, not args.no_compile))


if __name__ == "__main__":
    main()
