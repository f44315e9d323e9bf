"""Islands that are jobs of their own, in the loop: how one arrives, is saved, and comes back.

The first island holds the lease "founder": it trains outer.start_step steps alone and publishes
what all start from. Others wait for that, or join later with the newest parameters and step. A
checkpoint holds the merged parameters as its params and fixed, and the island's own beside them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import checkpoint, data, metrics
from jaxlm import config as cfg
from jaxlm.config import UserError
from jaxlm.outer import about as facts_of
from jaxlm.outer import adopt, contribute, courier, island, presence, records, snapshots
from jaxlm.outer import boxes as placed
from jaxlm.outer import claims as claimed
from jaxlm.outer import ledger as books
from jaxlm.outer.courier import Boxes, Contribution
from jaxlm.outer.island import Island
from jaxlm.outer.meeting import Meeting
from jaxlm.outer.presence import Process
from jaxlm.outer.records import Damaged, Identity
from jaxlm.outer.serve import TRAINING
from jaxlm.outer.store import open_store, patient
from jaxlm.program import Program
from jaxlm.state import Arrays, State, abstract_state
from jaxlm.validate_outer import parse_keys

logger = logging.getLogger("jaxlm")
KEY_FILE = "island.key"  # in the run's directory
FOUNDER = "founder"


@dataclasses.dataclass
class Post:
    """An island's place in the loop: what is opened at its arrival and closed at the end."""

    config: cfg.Config
    program: Program
    names: tuple[str, ...]  # the arrays that are merged
    isle: Island | None = None
    end_beats: Any = None


def meet(config: cfg.Config, program: Program) -> Meeting:
    """This job as an island of outer.store."""
    post = Post(config, program, ())

    def restore(directory: Path, step: int) -> State:
        abstract = abstract_state(config, program.layout, program.optimizer, program.mesh)
        state = checkpoint.restore_state(directory, step, abstract)
        facts = checkpoint.read_data(directory, step).get("outer")
        if facts is None or facts["state"] != TRAINING:
            return arrive(post, state)
        return come_back(post, state, directory, step, facts)

    def step(state: State, batch: Arrays):
        state, values = program.train_step(state, batch)
        isle = _isle(post)
        if isle.state == island.FOUNDING and isle.step + 1 == config.outer.start_step:
            isle.step += 1
            state = found(post, state)
        else:
            arrays = adopt.after_step(isle, placed.mergeable(post.program.structure, state))
            state = state if arrays is None else placed.with_arrays(state, arrays)
        _began(isle)
        return state, (values, dict(isle.numbers))

    return Meeting(
        enter=lambda: open_island(post), begin=lambda state: arrive(post, state),
        restore=restore, step=step, read=read,
        merged=lambda state: merged(post, state), saved=lambda state: saved(post, state),
        places=lambda item: place_of(_isle(post), item), facts=lambda: facts(_isle(post)),
        close=lambda: close(post),
    )  # fmt: skip


def _isle(post: Post) -> Island:
    assert post.isle is not None
    return post.isle


def _began(isle: Island) -> None:
    """From its first step on, rounds wait for an island."""
    if isle.state == island.STARTING:
        isle.state = TRAINING


def read(values: tuple[Arrays, dict[str, float]]) -> dict[str, float]:
    """A step's metrics as numbers: the island's own, and where it stands among the others."""
    return metrics.numbers(values[0]) | {
        f"outer/{name}": value for name, value in values[1].items()
    }


# --- arriving ------------------------------------------------------------------------------------


def open_island(post: Post) -> None:
    """Open the store, agree with the other islands, and take this island's name.

    Only then it is known which checkpoint is the newest: until another process that trains as this
    island is gone, it saves and removes checkpoints.
    """
    config, program, outer = post.config, post.program, post.config.outer
    stop = threading.Event()
    store = patient(open_store(outer.store), stop)
    identity = _identity(config)
    state = abstract_state(config, program.layout, program.optimizer, program.mesh)
    arrays = placed.mergeable(program.structure, state)
    kinds = {n: (x.shape, "params" if n in state.params else "fixed") for n, x in arrays.items()}
    body = facts_of.describe(kinds, outer, _data_facts(config), config.batch.sequences)
    problem = None
    if island.leads():
        try:
            facts_of.found(store, identity, body)
        except UserError as error:
            problem = error
    if not island.agree(int(problem is None)):
        raise problem or UserError(f"outer.store={outer.store}: see what process 0 says")
    _, about, identity = facts_of.read(store, identity)
    process = Process(store, identity, presence.patience(outer.grace))
    isle = Island(
        process, about, claimed.Claims(process, about.block, [], island.leads()),
        config.batch.sequences * config.batch.sequence_length, config.batch.sequences,
        config.steps, stop,
        concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="outer"),
    )  # fmt: skip
    post.isle = isle
    _take_name(post, isle)


def _identity(config: cfg.Config) -> Identity:
    outer = config.outer
    keys = parse_keys(outer.keys)
    if not keys or not island.leads():  # process 0 signs for all
        return Identity(outer.island, "", None, keys)
    file = cfg.run_dir(config) / KEY_FILE
    private, public, made = records.load_private_key(file, "outer.keys")
    if made:
        logger.info(
            "made the private key %s; its entry in outer.keys: %s:%s", file, outer.island, public
        )
    identity = Identity(outer.island, "", private, keys)
    records.check_own_key(identity, public, file)
    if records.MERGER not in dict(keys):
        raise UserError(
            f"outer.keys names no {records.MERGER}; add {records.MERGER}:PUBLIC_KEY, which "
            "`jaxlm outer serve STORE --key FILE` shows"
        )
    return identity


def _data_facts(config: cfg.Config) -> dict[str, Any]:
    split = data.open_split(config.data.path, "train")
    length = config.batch.sequence_length
    return {
        "tokenizer_sha256": split.tokenizer_sha256, "fingerprint": split.fingerprint,
        "seed": config.seed, "sequence_length": length, "segments": config.data.segments,
        "items": (split.tokens - 1) // length,
    }  # fmt: skip


def _take_name(post: Post, isle: Island) -> None:
    """Wait until no other process trains as this island."""
    told = False
    if island.leads():
        while not presence.take_lease(isle.process, contribute.lease_of(isle.name), isle.watch):
            if not told:
                logger.info("waiting until the process that trains as island %s is gone", isle.name)
            told = True
            isle.stop.wait(isle.process.patience / presence.BEATS)
        post.end_beats = presence.start_beats(isle.process, lambda: island.facts(isle))
        presence.forget_predecessors(isle.process)
    island.agree(0)


def _find_claims(isle: Island, blocks: list[int]) -> None:
    """The island's blocks of data: those that a checkpoint knows, and those in the store.

    Only once it has its name: a process that had it before may have claimed some until then.
    """
    isle.claims = claimed.open_claims(isle.process, isle.about.block, blocks, island.leads())


def arrive(post: Post, state: State) -> State:
    """A state without a past in the store: found what all start from, or join the others."""
    isle = _isle(post)
    _find_claims(isle, [])
    isle.step = int(state.step)
    isle.origin = (isle.step, isle.step * isle.sequences)
    said = ""
    while True:
        choice = 0
        if island.leads():
            if records.numbers(isle.process.store, "snapshots"):
                choice = 1
            elif presence.take_lease(isle.process, FOUNDER, isle.watch):
                choice = 2
        choice = island.agree(choice)
        if choice == 1:
            return join(post, state)
        if choice == 2:
            break
        said = _tell_wait(isle, said)
        isle.stop.wait(isle.process.patience / presence.BEATS)
    isle.state = island.FOUNDING
    if isle.step >= post.config.outer.start_step:
        return found(post, state)
    logger.info("island %s trains the first %d steps alone", isle.name, isle.about.outer.start_step)
    return state


def _tell_wait(isle: Island, said: str) -> str:
    """Log how far the founder is, where that has changed by a tenth."""
    beats = presence.read_beats(isle.process.store, isle.process.identity).values()
    step = max((b["step"] for b in beats if b.get("state") == island.FOUNDING), default=0)
    tenths = 10 * step // max(1, isle.about.outer.start_step)
    text = f"waiting for the first island: {tenths * 10} % of outer.start_step"
    if text != said:
        logger.info("%s", text)
    return text


def found(post: Post, state: State) -> State:
    """Publish what all start from; where another island was first, join it."""
    isle, arrays = _isle(post), placed.mergeable(post.program.structure, state)
    theta = placed.from_devices(arrays)
    owned = placed.sent_here(arrays)
    own = {key: box for key, box in theta.items() if key in owned}
    payloads = island.all_of(courier.upload_first(isle.process, own))
    made = island.leads() and courier.announce_first(isle.process, payloads, isle.step)
    if not island.agree(int(made)):
        return join(post, state)
    logger.info("island %s has published the parameters that all start from", isle.name)
    adopt.begin(isle, books.Position(step=isle.step), theta, arrays)
    return state


def join(post: Post, state: State) -> State:
    """Go on from the newest parameters, at the step and with the outer state of the others."""
    isle, arrays = _isle(post), placed.mergeable(post.program.structure, state)
    position, whole = adopt.wait_for_snapshot(isle, -1)
    base = placed.of_whole(whole, placed.from_devices(arrays))
    isle.step = position.step
    adopt.begin(isle, position, base, arrays)
    theta = adopt.catch_up(isle, dict(base), earlier=True)
    isle.step = max(isle.step, isle.position.step)
    isle.taken, isle.last = [isle.step] * isle.fragments, isle.step
    isle.origin = (isle.step, island.agree(_items_read(isle) if island.leads() else 0))
    logger.info("island %s joins at merge %d, step %d", isle.name, isle.position.number, isle.step)
    return placed.at_step(placed.with_arrays(state, placed.to_devices(theta, arrays)), isle.step)


def _items_read(isle: Island) -> int:
    """The items that an earlier life of this island contributed; its blocks hold them."""
    folder = f"contributions/{isle.name}"
    for number in reversed(records.numbers(isle.process.store, folder)):
        try:
            name = records.numbered(folder, number)
            return records.read_record(isle.process.store, isle.process.identity, name, isle.name)[
                "items"
            ]
        except (KeyError, Damaged):
            continue
    return 0


def place_of(isle: Island, item: int) -> int:
    """Where an item of this run's stream lies in the stream that all islands share."""
    step, items = isle.origin
    return claimed.place(isle.claims, item - step * isle.sequences + items)


# --- checkpoints ---------------------------------------------------------------------------------


def merged(post: Post, state: State) -> State:
    """The model that all islands agree on; before they part, the one that is trained."""
    isle = _isle(post)
    if not isle.base:
        return state
    return placed.with_arrays(
        state, placed.to_devices(isle.base, placed.mergeable(post.program.structure, state))
    )


def saved(post: Post, state: State) -> tuple[State, Arrays]:
    """What a checkpoint keeps: the merged model and the island's optimizer; `outer`: its own
    parameters, what the wire lost, and the contribution that is under way."""
    isle, own = _isle(post), placed.mergeable(post.program.structure, state)
    contribute.check_lease(isle)  # the run's directory is another process's, where that has it
    if not isle.base:
        return state, {}
    groups = {"own": own}
    if isle.error:
        like = {name: own[name] for name in own if name in state.params}
        groups["error"] = placed.to_devices(isle.error, like)
    if isle.outstanding is not None:
        sent = {key: np.zeros_like(box) for key, box in isle.base.items()}
        fragment = isle.outstanding.own.fragment
        for key, inside, rows, _ in placed.pieces(isle.about, sent, fragment):
            sent[key][inside] = isle.outstanding.deltas[rows]
        groups["sent"] = placed.to_devices(sent, own)
    return merged(post, state), {
        f"{group}.{name}": array
        for group, arrays in groups.items()
        for name, array in arrays.items()
    }


def facts(isle: Island) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays, as JSON."""
    waiting = isle.outstanding
    own = {
        "state": TRAINING if isle.base else isle.state, "store": isle.about.store,
        "island": isle.name, "position": dataclasses.asdict(isle.position),
        "taken": isle.taken, "last": isle.last, "origin": isle.origin,
        "blocks": isle.claims.blocks, "numbers": isle.numbers,
        "outstanding": None if waiting is None else dataclasses.asdict(waiting.own),
    }  # fmt: skip
    return {"outer": own}


def come_back(post: Post, state: State, directory: Path, step: int, facts: dict[str, Any]) -> State:
    """Go on from a checkpoint: with what was not contributed yet, and the merges made since."""
    isle = _isle(post)
    if (facts["store"], facts["island"]) != (isle.about.store, isle.name):
        raise UserError(
            f"run.dir={directory.parent} is of island {facts['island']} in another outer.store, "
            f"not of {isle.name} in this one; choose another run.dir"
        )
    _find_claims(isle, facts["blocks"])
    arrays = placed.mergeable(post.program.structure, state)
    names = {"own": arrays}
    isle.step = step
    adopt.begin(isle, snapshots.read_position(facts), placed.from_devices(arrays), arrays)
    if isle.error:
        names["error"] = {name: arrays[name] for name in state.params}
    if facts["outstanding"]:
        names["sent"] = arrays
    kept = checkpoint.restore_outer(directory, step, {
        f"{group}.{name}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for group, like in names.items() for name, x in like.items()
    })  # fmt: skip
    group = lambda which: placed.from_devices({n: kept[f"{which}.{n}"] for n in names[which]})
    if isle.error:
        isle.error = group("error")
    isle.taken, isle.last = list(facts["taken"]), facts["last"]
    isle.origin = (facts["origin"][0], facts["origin"][1])
    isle.numbers |= facts["numbers"]
    theta = group("own")
    if facts["outstanding"]:
        _send_again(isle, Contribution(**facts["outstanding"]), group("sent"))
    theta = _what_came_since(isle, theta)
    logger.info(
        "island %s is back at merge %d, step %d", isle.name, isle.position.number, isle.step
    )
    return placed.at_step(placed.with_arrays(state, placed.to_devices(theta, arrays)), isle.step)


def _send_again(isle: Island, own: Contribution, sent: Boxes) -> None:
    """The contribution that was under way: its record may be there or not, and counts once."""
    found = placed.pieces(isle.about, sent, own.fragment)
    contribute.send(isle, own, {rows: sent[key][inside] for key, inside, rows, _ in found})


def _what_came_since(isle: Island, theta: Boxes) -> Boxes:
    """Take in the merges since a checkpoint. A contribution that is under way stays so, as if the
    run had not ended, unless an earlier life of this run has contributed after it."""
    waiting = isle.outstanding
    if waiting is not None:
        later = island.leads() and contribute.went_on(isle, waiting.own)
        if not island.agree(int(later)):
            return theta
        theta = adopt.settle(isle, theta)
    return adopt.catch_up(isle, theta, earlier=True)


def close(post: Post) -> None:
    """End the island's part: for good where its run has ended, else until it comes back."""
    isle = post.isle
    if isle is None:
        return
    if post.end_beats is not None:
        with metrics.only_informs("the store does not hear that this island has left"):
            post.end_beats(isle.step >= isle.steps)
    isle.stop.set()
    isle.worker.shutdown(wait=True, cancel_futures=True)
