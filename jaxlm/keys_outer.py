"""Config keys of training across slow links (`outer:`) and of private training (`privacy:`)."""

from __future__ import annotations

from jaxlm.keys import key, section

RULES = ("average", "diloco", "delayed")
DEFENCES = ("none", "clip", "median", "trimmed", "cosine")
WIRES = ("float32", "bfloat16", "int8", "int4", "int2", "topk")


@section
class Outer:
    """Islands: copies of the model that train alone and merge what they learnt (mesh.replica)."""

    every: int = key(
        0, "local steps between outer steps; 0: no islands, replica splits the batch as data does",
        minimum=0, changes="recompiles checkpoint numbers",
    )  # fmt: skip
    rule: str = key(
        "diloco", "average: local SGD; diloco: Nesterov on what islands learnt; delayed: the same, "
        "each contribution applied as it comes (needs outer.store)",
        choices=RULES, changes="checkpoint numbers",
    )  # fmt: skip
    learning_rate: float = key(
        0.7, "of the outer step; average has none", minimum=0.0, changes="numbers"
    )
    momentum: float = key(
        0.9, "Nesterov's, of the outer step; average has none", minimum=0.0, maximum=0.999,
        changes="numbers",
    )  # fmt: skip
    start_step: int = key(
        0, "islands part at this step; before it the job (with outer.store: one island) trains the "
        "model that all start from", minimum=0, changes="numbers",
    )  # fmt: skip
    fragments: int = key(
        1, "parts of the model, every n-th layer, that are merged at different times", minimum=1,
        changes="checkpoint numbers",
    )  # fmt: skip
    overlap: int = key(
        0, "local steps that go on while a merge is under way", minimum=0, changes="numbers"
    )
    mix: float = key(
        0.0, "share of an island's own parameters in what it goes on from after a merge",
        minimum=0.0, maximum=1.0, changes="numbers",
    )  # fmt: skip
    wire: tuple[str, ...] = key(
        ("float32",), "format of what islands send, and of what they receive; one name: of both; "
        f"of {', '.join(WIRES)}", changes="checkpoint numbers",
    )  # fmt: skip
    defend: str = key(
        "clip", "against bad contributions, from three islands on; those that are not finite are "
        "always refused. clip: norms down to the median norm; median, trimmed: of each coordinate; "
        "cosine: clip, and refuse what points away from the median",
        choices=DEFENCES, changes="numbers",
    )  # fmt: skip
    store: str = key(
        "", "where islands that are separate jobs meet: a directory, or the URL of an object store "
        "(extra: store); empty: islands are mesh.replica of this job", path=True,
    )  # fmt: skip
    island: str = key("", "name of this island in outer.store")
    quorum: int = key(1, "contributions that close a round", minimum=1, changes="numbers")
    grace: float = key(
        60.0, "seconds that a round with a quorum waits for the other islands", minimum=0.0
    )
    adapt: bool = key(
        True, "delayed: an island that is slower makes fewer local steps in the same time",
        changes="numbers",
    )  # fmt: skip
    keys: tuple[str, ...] = key(
        (), "NAME:PUBLIC_KEY of each island and of the merger (Ed25519, 64 hexadecimal digits); "
        "what none of them signed is refused; none: nothing is signed",
    )  # fmt: skip


@section
class Privacy:
    """DP-SGD: each row's gradient is clipped, and noise is added once a step (docs/privacy.md)."""

    clip_norm: float = key(
        0.0, "largest norm of the gradient of one row's loss, which is the sum over its tokens "
        "divided by batch.sequence_length; 0: no privacy", minimum=0.0,
        changes="recompiles numbers data",
    )  # fmt: skip
    noise_multiplier: float = key(
        0.0, "standard deviation of the noise on the sum of gradients, in units of "
        "privacy.clip_norm; above 0", minimum=0.0, changes="recompiles numbers",
    )  # fmt: skip
    delta: float = key(
        1e-6, "chance that epsilon does not hold; below one over the number of rows", minimum=0.0,
        maximum=1.0, changes="recompiles numbers data",
    )  # fmt: skip
    epsilon: float = key(
        0.0, "budget: the run ends at the last step that it pays for; 0: none", minimum=0.0,
        changes="numbers",
    )  # fmt: skip
