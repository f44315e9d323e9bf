"""Bits per byte against a count by hand, from the texts and the library's own spans of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from jaxlm import evaluate
from jaxlm.config import Batch
from jaxlm.data import open_split
from jaxlm.data.load import evaluation_batches
from jaxlm.data.pack import predicted_bytes
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenize import load_tokenizer, make_bytes, make_characters, train_bpe
from jaxlm.program import make_eval_step, make_program
from jaxlm.sharding import batch_shardings
from jaxlm.state import create_state

TEXTS = [
    "12345",
    "the cat",
    "x",
    "caf\u00e9 \u4f60\u597d\n",
    "the cat sat on the mat " * 9,
    "ab" * 20,
]
SEPARATORS = {
    "both in one": ("<s>", "<s>"),
    "two": ("<s>", "</s>"),
    "no bos": ("none", "</s>"),
    "no eos": ("<s>", "none"),
    "none": ("none", "none"),
    "a text's own": ("x", "c"),  # separators that are text too, where they stand in a text
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Texts as JSON lines, and three tokenizers that keep every byte."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    for name, tokenizer in {
        "bytes": make_bytes(),
        "bpe": train_bpe(TEXTS, 300),
        "characters": make_characters(TEXTS),
    }.items():
        engine = Engine.from_str(tokenizer.data.decode())
        engine.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
        (root / name).mkdir()
        engine.save(str(root / name / "tokenizer.json"))
    return root


def prepared(root: Path, name: str, separators: str):
    out = root / f"{name} {separators}"
    if not out.exists():
        bos, eos = SEPARATORS[separators]
        options = dict(bos=bos, eos=eos, validation_fraction=0.0, report=lambda _: None)
        prepare(out, [root / "texts.jsonl"], str(root / name), **options)
    return open_split(out, "train")


def by_hand(root: Path, name: str, split, cost_V: np.ndarray, places: int) -> tuple[float, float]:
    """(nats, bytes) of the first places targets, token by token."""
    engine = load_tokenizer(root / name).engine
    stream = []  # (token, bytes of text, whether it is predicted)
    for text in TEXTS:
        encoding = engine.encode(text, add_special_tokens=False)
        tokens = []
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # Tokens of one character share its bytes, whichever has them, where all are predicted.
            shared = sum(span == (start, end) for span in encoding.offsets)
            tokens.append((index, len(text[start:end].encode()) / shared))
        if split.bos is not None:
            tokens.insert(0, (split.bos, 0))
        if split.eos is not None and split.eos != split.bos:
            tokens.append((split.eos, 0))
        joined = split.bos is not None and split.bos == split.eos
        stream += [(*each, place > 0 or joined) for place, each in enumerate(tokens)]
    predicted = [(token, size) for token, size, known in stream[1 : places + 1] if known]
    return sum(cost_V[token] for token, _ in predicted), sum(size for _, size in predicted)


@pytest.mark.parametrize("separators", SEPARATORS)
@pytest.mark.parametrize("name", ["bytes", "bpe", "characters"])
def test_bits_per_byte_of_what_is_predicted(made, mesh, name, separators):
    split = prepared(made, name, separators)
    cost_V = np.random.default_rng(0).uniform(1, 9, split.vocab_size)

    def eval_step(_, __, batch):
        weights = np.asarray(batch["weights"], np.float64)
        return (cost_V[np.asarray(batch["targets"])] * weights).sum(1), weights.sum(1)

    for length in (4, 7, 1000):  # documents are cut, or not
        for limit in (0, 1, 3):  # batches; 0: the whole split
            for segments in (True, False):
                batch = Batch(sequences=2, sequence_length=length)
                batches = evaluation_batches(
                    split, batch, NamedSharding(mesh, P("data")), limit, segments=segments
                )
                found = evaluate.evaluate(eval_step, {}, {}, batches, split)
                places = limit * 2 * length or split.tokens
                nats, size = by_hand(made, name, split, cost_V, places)
                bits = nats / math.log(2) / size
                assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-12), (length, limit)


def test_five_bytes_with_two_separators(tmp_path, made):
    """A uniform model pays log2(V) for 5 bytes and one end: 6/5 of it a byte, not 7/5."""
    (tmp_path / "texts.jsonl").write_text('{"text": "12345"}\n' * 30)
    options = dict(bos="<s>", eos="</s>", report=lambda _: None)
    prepare(tmp_path / "data", [tmp_path / "texts.jsonl"], str(made / "bytes"), **options)
    split = open_split(tmp_path / "data", "train")
    config = tiny.config("llama", f"data.path={tmp_path / 'data'}", "model.vocab_size=300")
    program = make_program(config, jax.devices()[:1])
    mesh, layout, structure, optimizer = program[:4]
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optimizer, mesh)
        zeros = {name: 0 * value for name, value in state.params.items()}
        step = make_eval_step(config, structure, layout, {})
        shardings = batch_shardings(config, layout, mesh)
        for limit in (0, 1):
            batches = evaluation_batches(split, config.batch, shardings, limit)
            found = evaluate.evaluate(step, zeros, state.fixed, batches, split)
            assert found["loss"] == pytest.approx(math.log(300), rel=1e-6)
            if not limit:
                assert found["bits_per_byte"] == pytest.approx(1.2 * math.log2(300), rel=1e-6)


def test_a_tokenizer_that_changes_a_text_shares_its_bytes(tmp_path, made):
    """Where tokens do not keep every byte, all of the text still has split.bytes."""
    engine = Engine.from_str((made / "bytes" / "tokenizer.json").read_text())
    engine.pre_tokenizer.add_prefix_space = True
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts.jsonl").write_text('{"text": "1234567"}\n' * 10)
    for bos, share in (("<s>", 1.0), ("none", 7 / 8)):
        out = tmp_path / bos
        options = dict(bos=bos, eos="</s>", validation_fraction=0.0, report=lambda _: None)
        prepare(out, [tmp_path / "texts.jsonl"], str(tmp_path / "tokenizer.json"), **options)
        split = open_split(out, "train")
        assert predicted_bytes(split, split.tokens) == pytest.approx(70 * share)
        half = predicted_bytes(split, split.tokens // 2 - 1)
        assert half == pytest.approx(35 * share)
