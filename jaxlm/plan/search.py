"""The search for a layout: meshes x remat policies x microbatches x chunks of the loss.

Traces rank hundreds; the compiler decides between the best few.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config as cfg
from jaxlm import configfile
from jaxlm.divisibility import layout_problems
from jaxlm.hardware.target import Target, local_target
from jaxlm.models import family_module
from jaxlm.nearest import factorisations
from jaxlm.plan import cache, estimate
from jaxlm.plan.compiled import CompileError
from jaxlm.plan.estimate import Estimate
from jaxlm.plan.plan import remat_text
from jaxlm.plan.shared import FREE, Estimator
from jaxlm.plan.units import duration, size
from jaxlm.validate import validate
from jaxlm.yaml_values import yaml_text

logger = logging.getLogger("jaxlm")
# With full remat: the meshes of which every other setting is tried, at most so many of the fastest,
MESHES = 40
# none slower than the best by more than another policy can make up for (guesses; a step that waits
# for gathers of weights has three of them with full remat and two without).
FULL_REMAT = 3 / 2
# Of so many of the best, and of those that are faster and do not fit, other chunks of the loss.
CHUNKED = 5
LONG = 16384  # tokens of a sequence from which splitting it is considered
TENSOR = 64  # devices at most over tensor: beyond, its sums outweigh what it saves
REMAT = (
    cfg.Remat(policy="full"),
    cfg.Remat(policy="names", names=("attention",)),  # the costliest to compute again
    cfg.Remat(policy="names", names=("query", "key", "value", "attention")),
    cfg.Remat(policy="dots"),
    cfg.Remat(policy="none"),
)


class Candidate(NamedTuple):
    """A config with every choice made, and what it is estimated to take."""

    config: cfg.Config
    sizes: dict[str, int]
    guess: Estimate
    fits: bool
    compiled: dict[str, Any] | None = None  # "peak_bytes", "step_seconds" of its program
    failure: str = ""  # why it could not be compiled

    @property
    def seconds(self) -> float:
        """Of a step, by the best that is known."""
        return self.compiled["step_seconds"] if self.compiled else self.guess.time.seconds

    @property
    def limit(self) -> str:
        """What limits the step."""
        return self.compiled["limit"] if self.compiled else self.guess.time.limit

    @property
    def peak(self) -> float:
        """Bytes, by the best that is known."""
        return self.compiled["peak_bytes"] if self.compiled else self.guess.cost.peak


class Search(NamedTuple):
    """All that a search looked at."""

    looked: int  # candidates that were estimated
    space: int  # candidates that are legal
    ranked: list[Candidate]  # the compiled ones first, then those that fit, by seconds


def meshes(config: cfg.Config, target: Target) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """(sizes, dcn) of every mesh of the target that makes sense for the model."""
    axes, chips = _axes(config), target.size // target.slices
    near = target.shape[-1] if target.platform == "gpu" else chips
    for shape in factorisations(target.size, len(axes)):
        sizes = dict.fromkeys(cfg.AXES, 1) | dict(zip(axes, shape, strict=True))
        # Sums over tensor, and exchanges of the sequence, run in every layer: near each other.
        if sizes["tensor"] > min(near, TENSOR) or sizes["context"] * sizes["tensor"] > chips:
            continue
        if target.platform == "tpu" and target.slices > 1:
            for axis in ("data", "stage", "fsdp"):
                if sizes[axis] % target.slices == 0:
                    yield sizes, {axis: target.slices}
        else:
            yield sizes, {}


def _axes(config: cfg.Config) -> tuple[str, ...]:
    """The mesh axes that can help this model."""
    groups = family_module(config.model.family).groups(config.model)
    axes = ["stage"] * (len(groups) == 1) + ["data", "fsdp"]
    axes += ["context"] * (config.batch.sequence_length >= LONG)
    axes += ["expert"] * ("num_experts" in vars(config.model))
    return (*axes, "tensor")


def settle(config: cfg.Config, sizes: dict[str, int], dcn: dict[str, int]) -> cfg.Config:
    """The config on this mesh."""
    return dataclasses.replace(config, mesh=dataclasses.replace(cfg.Mesh(), dcn=dcn, **sizes))


def microbatches(config: cfg.Config, sizes: dict[str, int]) -> list[int]:
    """Numbers of microbatches: the config's own, and powers of two down to a row a device."""
    rules = cfg.RULES | config.rules
    ways = math.prod(sizes[axis] for axis in rules["batch"])
    most = config.batch.sequences // ways
    counts = {2**n for n in range(11) if 2**n <= most} | {config.batch.microbatches}
    least = sizes["stage"]  # fewer leave stages idle
    return sorted(n for n in counts if n >= least and config.batch.sequences % (n * ways) == 0)


def with_settings(config: cfg.Config, count: int, remat: cfg.Remat, chunks: int) -> cfg.Config:
    """The config with these microbatches, remat policy and chunks of the loss."""
    return dataclasses.replace(
        _with_chunks(config, chunks), remat=remat,
        batch=dataclasses.replace(config.batch, microbatches=count),
    )  # fmt: skip


def _with_chunks(config: cfg.Config, chunks: int) -> cfg.Config:
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, chunks=chunks))


def chunk_counts(config: cfg.Config) -> list[int]:
    """Chunks of the loss: the config's own, and a quarter and four times as many."""
    own = config.loss.chunks
    return [n for n in dict.fromkeys([own, own // 4, own * 4]) if n]


def analytic_search(
    config: cfg.Config,
    target: Target,
    estimator: Callable[[list[tuple[cfg.Config, dict[str, int]]]], list[Estimate]],
    mesh_only: bool = False,
) -> Search:
    """Every legal mesh x microbatches with full remat; of the best meshes, all other settings.

    Meshes of one kind share traces, and a kind takes seconds: from the simplest the search goes on
    to the kinds beside the best two that are near each other. With `mesh_only` all but the mesh
    stays as the config has it.
    """
    limit = estimate.memory_limit(target) * config.plan.memory or math.inf
    found: dict[tuple, Candidate] = {}

    def look(wanted: Iterable[tuple[cfg.Config, dict[str, int]]]) -> list[Candidate]:
        """Those that are legal and new."""
        new = {_key(one, sizes): (one, sizes) for one, sizes in wanted}
        legal = {
            key: pair for key, pair in new.items()
            if key not in found and not any(layout_problems(*pair))
        }  # fmt: skip
        guesses = estimator(list(legal.values()))
        made = [
            Candidate(*pair, guess, guess.cost.peak <= limit)
            for pair, guess in zip(legal.values(), guesses, strict=True)
        ]
        found.update(zip(legal, made, strict=True))
        return made

    every = [(settle(config, sizes, dcn), sizes) for sizes, dcn in meshes(config, target)]
    counts = lambda sizes: microbatches(config, sizes)
    kinds: dict[tuple[int, ...], list[tuple[cfg.Config, dict[str, int]]]] = {}
    for settled, sizes in every:
        if mesh_only:
            wanted = [(settled, sizes)]
        else:  # a single microbatch is another trace: at first only where there are no more
            base, few = (REMAT[0], config.loss.chunks), counts(sizes)
            few = [n for n in few if n > 1] or few
            wanted = [(with_settings(settled, n, *base), sizes) for n in few]
        if wanted := [pair for pair in wanted if not any(layout_problems(*pair))]:
            kinds.setdefault(_kind(sizes), []).extend(wanted)
    seen: dict[tuple[int, ...], tuple] = {}  # kind -> the order of its best candidate
    nearest = _simplest(kinds)
    while nearest:
        for kind in sorted(nearest):
            seen[kind] = min(map(_order, look(kinds[kind])))
        best = sorted(seen, key=seen.__getitem__)[:2]
        best = [kind for kind in best if _near(seen[kind], seen[best[0]])]
        nearest = {near for kind in best for near in _beside(kind, kinds)} - seen.keys()
    if mesh_only:
        return Search(len(found), len(found), sorted(found.values(), key=_order))

    def ranked(key: Callable[[Candidate], Any]) -> list[Candidate]:
        """The best of each key, in order."""
        best: dict[Any, Candidate] = {}
        for one in sorted(found.values(), key=_order):
            best.setdefault(key(one), one)
        return list(best.values())

    each = ranked(lambda one: _mesh_key(one.config, one.sizes))
    meshes_of = collections.defaultdict(list)
    for one in each[:MESHES]:
        meshes_of[_kind(one.sizes)].append(one)
    policies = list(dict.fromkeys((*REMAT, config.remat)))
    for near in meshes_of.values():
        best = min(found.values(), key=_order)
        look(
            (with_settings(one.config, n, remat, config.loss.chunks), one.sizes)
            for one in near if one.fits and one.seconds < FULL_REMAT * best.seconds
            for n in counts(one.sizes) for remat in policies
        )  # fmt: skip
        policies = [one.config.remat for one in ranked(lambda one: one.config.remat)[:2]]
    both = ranked(lambda one: (_mesh_key(one.config, one.sizes), one.config.remat))
    faster = [one for one in both if not one.fits and one.seconds < both[0].seconds]
    for chunks in chunk_counts(config):
        look(
            (_with_chunks(one.config, chunks), one.sizes)
            for one in both[:CHUNKED] + faster[:CHUNKED]
        )
    space = sum(1 for _ in legal(config, target))
    return Search(len(found), space, sorted(found.values(), key=_order))


def legal(config: cfg.Config, target: Target) -> Iterator[tuple[cfg.Config, dict[str, int]]]:
    """Every candidate that a search may look at: (config, sizes of its mesh)."""
    for sizes, dcn in meshes(config, target):
        settled = settle(config, sizes, dcn)
        for n, chunks in itertools.product(microbatches(config, sizes), chunk_counts(config)):
            if any(layout_problems(with_settings(settled, n, config.remat, chunks), sizes)):
                continue
            for remat in dict.fromkeys((*REMAT, config.remat)):
                yield with_settings(settled, n, remat, chunks), sizes


def _kind(sizes: dict[str, int]) -> tuple[int, ...]:
    """What meshes have in common that share traces."""
    return tuple(n for axis, n in sizes.items() if axis not in FREE)


def _near(order: tuple[bool, float, float], best: tuple[bool, float, float]) -> bool:
    """Whether it is worse by at most a quarter (a guess), by the first number of `_order`."""
    return order[0] == best[0] and order[1] <= 1.25 * best[1]


def _beside(kind: tuple[int, ...], kinds: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """The kinds that differ from one in a single axis, by the next number up or down."""
    found = set()
    for i in range(len(kind)):
        line = sorted(one for one in kinds if one[:i] + one[i + 1 :] == kind[:i] + kind[i + 1 :])
        place = line.index(kind)
        found |= {*line[max(0, place - 1) : place + 2]}
    return found - {kind}


def _simplest(kinds: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """The first kind of all that steps along one axis join; more than one where none joins all."""
    left, found = set(kinds), set()
    while left:
        reached = [min(left)]
        found.add(reached[0])
        for kind in reached:  # grows
            reached += _beside(kind, left) - set(reached)
        left -= set(reached)
    return found


def _mesh_key(config: cfg.Config, sizes: dict[str, int]) -> tuple:
    return (*sizes.values(), *config.mesh.dcn.items())


def _key(config: cfg.Config, sizes: dict[str, int]) -> tuple:
    return (
        *_mesh_key(config, sizes), config.batch.microbatches, config.remat, config.loss.chunks,
    )  # fmt: skip


def _order(candidate: Candidate) -> tuple[bool, float, float]:
    """What fits by time; what does not by memory."""
    if not candidate.fits:
        return True, candidate.peak, candidate.seconds
    return False, candidate.seconds, candidate.peak


def compile_best(
    search: Search,
    count: int,
    limit: float,
    measure: Callable[[cfg.Config], dict],
    say: Callable[[str], None],
) -> Search:
    """Compile the best until `count` of them fit; one that fails or does not fit is marked.

    At most twice as many are tried: beyond, traces are wrong about this model.
    """
    tried, asked, fit = [], distinct(search.ranked)[: 2 * count], 0
    for candidate in asked:
        if fit == count or not candidate.fits:
            break
        try:
            result = measure(candidate.config)
            fits = not result["refused"] and result["peak_bytes"] <= limit
            fit += fits
            tried.append(candidate._replace(compiled=result, fits=fits))
        except CompileError as error:
            tried.append(candidate._replace(failure=str(error), fits=False))
        say(f"compiled {len(tried)}: {describe(tried[-1])}")
    done = sorted(tried, key=lambda c: (not c.fits, bool(c.failure), c.seconds))
    rest = [one for one in search.ranked if not any(one is each for each in asked[: len(tried)])]
    return search._replace(ranked=done + rest)


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The first of each mesh and remat policy: the others differ by little."""
    found: dict[tuple, Candidate] = {}
    for one in candidates:
        found.setdefault((*one.sizes.values(), one.config.remat), one)
    return list(found.values())


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and memory, the fastest first.

    By traces, which all candidates have; without those that the compiler refused.
    """
    front, least = [], math.inf
    usable = [one for one in candidates if one.fits and not one.failure]
    for one in sorted(usable, key=lambda c: (c.guess.time.seconds, c.guess.cost.peak)):
        if one.guess.cost.peak < least:
            front.append(one)
            least = one.guess.cost.peak
    return front


def mesh_text(sizes: dict[str, int], dcn: dict[str, int]) -> str:
    """fsdp=64 tensor=4 (dcn data=2)."""
    text = " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one device"
    far = " ".join(f"{axis}={n}" for axis, n in dcn.items())
    return f"{text} (dcn {far})" if far else text


def describe(candidate: Candidate) -> str:
    """A candidate in a line."""
    config = candidate.config
    text = (
        f"{mesh_text(candidate.sizes, config.mesh.dcn)}, remat {remat_text(config.remat)}, "
        f"{config.batch.microbatches} microbatches, {config.loss.chunks} chunks"
    )
    if candidate.failure:
        return f"{text}: {candidate.failure}"
    does = "" if candidate.fits else ", does not fit"
    return f"{text}: {duration(candidate.seconds)}, {size(candidate.peak)}{does}"


def chosen(search: Search) -> Candidate:
    """The best of a search: compiled where one of those fits, else by traces.

    UserError where all that fit by traces were compiled, and none of them fits.
    """
    usable = [one for one in search.ranked if one.fits and not one.failure]
    if not usable:
        tried = sum(bool(one.compiled or one.failure) for one in search.ranked)
        raise cfg.UserError(
            f"none of {search.looked} candidates fits: {tried} did by traces, but not when "
            f"compiled; the first of these is {describe(search.ranked[0])}; use more devices or "
            "fewer batch.sequences"
        )
    return next((one for one in usable if one.compiled), usable[0])


def run(
    config: cfg.Config,
    target: Target,
    measure: Callable[[cfg.Config], dict] | None,
    say: Callable[[str], None],
) -> Search:
    """Search; with `measure` the best plan.compile candidates are compiled."""
    estimator = Estimator(config, target)
    search = refuse_hopeless(config, target, analytic_search(config, target, estimator))
    if measure is None or not config.plan.compile:
        return search
    limit = estimate.memory_limit(target) * config.plan.memory or math.inf
    return compile_best(search, config.plan.compile, limit, measure, say)


def refuse_hopeless(config: cfg.Config, target: Target, search: Search) -> Search:
    """The search, or UserError where nothing is legal or nothing fits."""
    if not search.ranked:
        raise cfg.UserError(
            f"target={target.text}: no mesh of {target.size} devices divides the model and "
            f"batch.sequences={config.batch.sequences}; use fewer devices or a batch.sequences "
            f"that is a multiple of {target.size}"
        )
    if not search.ranked[0].fits:
        least = search.ranked[0]
        raise cfg.UserError(
            f"target={target.text}: none of {search.looked} candidates fits in "
            f"plan.memory={config.plan.memory:g} of {size(estimate.memory_limit(target))}; "
            f"the least is {describe(least)}; use more devices or "
            "fewer batch.sequences"
        )
    return search


def choose_mesh(config: cfg.Config, target: Target) -> tuple[cfg.Config, str]:
    """`mesh: auto` settled by traces, and why in a line; the cache remembers it.

    Nothing is compiled: a run is about to start, and compiles its program itself. The config's
    other settings change only where no mesh fits with them.
    """
    name = cache.key(config, "mesh", target=target.text, memory=config.plan.memory)
    kept = _kept(config, target, name)
    if kept is not None:
        return kept
    estimator = Estimator(config, target)
    search = analytic_search(config, target, estimator, mesh_only=True)
    if not search.ranked or not search.ranked[0].fits:
        search = refuse_hopeless(config, target, analytic_search(config, target, estimator))
    best = search.ranked[0]
    why = f"mesh: auto chose, of {search.looked} candidates, {describe(best)} ({best.limit})"
    cache.write(config, name, {"settings": settings(best.config), "why": why})
    return best.config, why


def _kept(config: cfg.Config, target: Target, name: str) -> tuple[cfg.Config, str] | None:
    """The choice that the cache remembers; None where its file is damaged or another's idea."""
    kept = cache.read(config, name)
    if kept is None:
        return None
    try:
        found, why = _apply(config, kept["settings"]), f"{kept['why']}; from plan.cache"
        validate(found, target.size)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return found, why


def settings(config: cfg.Config) -> dict[str, Any]:
    """What a search decides, as plain data."""
    return {
        "mesh": configfile.plain(config.mesh), "remat": configfile.plain(config.remat),
        "microbatches": config.batch.microbatches, "chunks": config.loss.chunks,
    }  # fmt: skip


def _apply(config: cfg.Config, kept: dict[str, Any]) -> cfg.Config:
    lists = {k: tuple(kept["remat"][k]) for k in ("names", "offload")}
    remat = cfg.Remat(policy=kept["remat"]["policy"], **lists)
    config = dataclasses.replace(config, mesh=cfg.Mesh(**kept["mesh"]))
    return with_settings(config, kept["microbatches"], remat, kept["chunks"])


def settle_run(config: cfg.Config, devices: list) -> cfg.Config:
    """`mesh: auto` of a run: as it was when the run started, or chosen for these devices now."""
    path = cfg.run_dir(config) / "config.yaml"
    if path.is_file():
        before = configfile.load(path)
        sizes = [getattr(before.mesh, axis) for axis in cfg.AXES]
        if not before.mesh.auto and math.prod(sizes) == len(devices):
            logger.info("mesh: auto keeps the mesh of %s", path)
            return _apply(config, settings(before))
    try:
        settled, why = choose_mesh(config, local_target(devices))
    except cfg.UserError:
        raise
    except Exception as error:  # a step that cannot be traced for these devices
        raise cfg.UserError(
            f"mesh=auto: no mesh can be chosen: {type(error).__name__}: {error}; give its axes, as "
            "mesh.fsdp=-1"
        ) from error
    logger.info("%s", why)
    return settled


def overrides(config: cfg.Config, sizes: dict[str, int]) -> list[str]:
    """The choices of a candidate as key=value."""
    remat = config.remat
    found = [f"mesh.{axis}={n}" for axis, n in sizes.items() if n > 1]
    found += [f"mesh.dcn.{axis}={n}" for axis, n in config.mesh.dcn.items()]
    found += [f"remat.policy={remat.policy}"]
    found += [f"remat.names=[{','.join(remat.names)}]"] if remat.names else []
    found += [f"batch.microbatches={config.batch.microbatches}"]
    return [*found, f"loss.chunks={config.loss.chunks}"]


def config_text(source: Path, out: str, best: Candidate, target: Target) -> str:
    """A config file that includes the original and has the choices of a candidate."""
    original = configfile.load(source)
    far = {axis: 1 for axis in original.mesh.dcn} | best.config.mesh.dcn  # tables only grow
    wanted = dataclasses.replace(best.config, mesh=dataclasses.replace(best.config.mesh, dcn=far))
    changed = _changes(configfile.to_dict(original), configfile.to_dict(wanted))
    how = "compiled" if best.compiled else "estimated by its trace, not compiled"
    include = os.path.relpath(source, Path(out).parent)
    include = f"./{include}" if include.startswith("~") else include  # not a home directory
    lines = [
        f"# Found by jaxlm plan --search for {target.text}: {describe(best)};",
        f"# {how}. Limited by {best.limit}.",
        f"include: {yaml_text(include)}",
        *(line for _, line in configfile.yaml_lines(changed)),
    ]
    return "\n".join(lines) + "\n"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The part of nested plain data that differs."""
    found = {}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inside := _changes(before, value):
                found[name] = inside
        elif value != before:
            found[name] = value
    return found


def to_dict(search: Search) -> dict[str, Any]:
    """A search as plain data: the keys of `--search --json`."""
    front, best = {id(one) for one in pareto(search.ranked)}, chosen(search)
    rows = [
        {
            "mesh": {axis: n for axis, n in one.sizes.items() if n > 1},
            "dcn": dict(one.config.mesh.dcn), "remat": remat_text(one.config.remat),
            "microbatches": one.config.batch.microbatches, "loss_chunks": one.config.loss.chunks,
            "step_seconds": one.seconds, "peak_bytes": one.peak, "fits": one.fits,
            "compiled": one.compiled is not None, "failure": one.failure,
            "guess": {"step_seconds": one.guess.time.seconds, "peak_bytes": one.guess.cost.peak},
            "pareto": id(one) in front, "overrides": overrides(one.config, one.sizes),
        }
        for one in search.ranked
    ]  # fmt: skip
    return {
        "looked": search.looked, "legal": search.space,
        "best": overrides(best.config, best.sizes), "candidates": rows,
    }  # fmt: skip
