"""Data: sources, tokenizers, prepared datasets, packing and batches, against naive oracles."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import tokenizers
import zstandard
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import message

from jaxlm.config import Batch, UserError
from jaxlm.data import check_vocab, open_split, prepare_corpus, sources
from jaxlm.data.command import add_parser
from jaxlm.data.files import Tally, find_files
from jaxlm.data.load import (
    batches,
    check_data_state,
    data_state,
    evaluation_batches,
    item_order,
    local_rows,
)
from jaxlm.data.pack import FIELDS, evaluation_items, item, pack
from jaxlm.data.prepare import prepare
from jaxlm.data.separators import Prompt
from jaxlm.data.shards import read_manifest, verify
from jaxlm.data.tokenize import (
    decode,
    encode,
    encode_batch,
    load_tokenizer,
    make_bytes,
    make_characters,
    separate,
    train_bpe,
)

ODD_TEXTS = [
    "",
    " ",
    "\r\n\t\x00\x7f",
    "def f(x):\n\n    return x  # done\n",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469 e\u0301",
    "\ufeff\u202eabc\ud7ff\ue000\uffff\U0010ffff",
    "a<|endoftext|>b",
    "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000),
]


def quiet(line: str) -> None:
    """Drop a line of progress."""


def write_texts(directory: Path, count: int = 40) -> Path:
    """Make text files of very different lengths."""
    directory.mkdir()
    for index in range(count):
        text = f"file {index}\n" + "lorem ipsum dolor sit amet " * (index % 9)
        (directory / f"{index:03d}.txt").write_text(text)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A directory with a corpus of 40 text files and datasets made of it."""
    root = tmp_path_factory.mktemp("data")
    texts = write_texts(root / "texts")
    options = dict(validation_fraction=0.25, report=quiet)
    prepare(root / "one", [texts], "bytes", **options)  # bos == eos
    prepare(root / "many", [texts], "bytes", shard_tokens=300, **options)
    prepare(root / "plain", [texts], "characters", **options)  # no separator
    engine = tokenizers.Tokenizer.from_str(make_bytes().data.decode())
    engine.add_special_tokens(["<s>", "</s>"])
    engine.save(str(root / "tokenizer.json"))
    prepare(root / "two", [texts], str(root / "tokenizer.json"), bos="<s>", eos="</s>", **options)
    return root


# Sources


def read(inputs, **kwargs) -> list[sources.Document]:
    return list(sources.read_documents(find_files(inputs), **kwargs))


def test_every_format_gives_the_same_texts(tmp_path):
    texts = ["one\n", "two \u00e9\r\n", "three"]
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    compress = zstandard.ZstdCompressor().compress
    cut = lines.index(b"\n") + 5  # two frames, cut within a line
    (tmp_path / "a.jsonl.zst").write_bytes(compress(lines[:cut]) + compress(lines[cut:]))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        documents = read([tmp_path / name])
        assert [document.text for document in documents] == texts
        assert [document.id for document in documents] == [f"{name}:{n}" for n in (1, 2, 3)]
    (tmp_path / "b.py").write_bytes(texts[1].encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (tmp_path / "b.txt.zst").write_bytes(compress(texts[1].encode()))
    for name in ("b.py", "b.txt.gz", "b.txt.zst"):
        assert read([tmp_path / name]) == [sources.Document(name, texts[1])]


def test_one_long_line_takes_linear_time():
    chunks = [b"x" * (1 << 14)] * 4000
    start = time.monotonic()
    lines = list(sources._lines(iter([b"a\n\nb", *chunks, b"c\nd\n", b"", b"e"])))
    assert time.monotonic() - start < 5  # 66 MB; joined anew for each piece: 131 GB
    assert [len(line) for line in lines] == [1, 0, 2 + (1 << 14) * 4000, 1, 1]


def test_order_and_ids_do_not_depend_on_inputs(tmp_path):
    for name in ("z.txt", "sub/y.txt", "sub/x.md", ".hidden/h.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    wanted = ["sub/x.md", "sub/y.txt", "z.txt"]
    left_out: Tally = {}
    assert [file.id for file in find_files([tmp_path], left_out)] == wanted
    assert left_out == {
        "hidden": {"count": 1, "first": str(tmp_path / ".hidden")},
        "of unknown suffix": {"count": 1, "first": str(tmp_path / "picture.png")},
    }
    mixed = [tmp_path / "z.txt", f"{tmp_path}/sub/*.txt", f"{tmp_path}/**/*.md", tmp_path]
    assert [file.id for file in find_files(mixed)] == wanted


def test_python_stdlib_is_the_library_without_tests():
    documents = list(sources.python_stdlib())
    ids = [document.id for document in documents]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert "json/decoder.py" in ids
    assert not [name for name in ids if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert 8e6 < sum(len(document.text) for document in documents) < 20e6


def broken_sources(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Inputs that cannot be read, each with what its error must say."""
    (tmp_path / "empty_dir").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    good = b'{"text": "a"}\n'
    compressed = zstandard.ZstdCompressor().compress(os.urandom(4096))
    contents = {
        "json.jsonl": (good + b"{oops\n", "json.jsonl:2: not JSON"),
        "list.jsonl": (b"[1]\n", "list.jsonl: item 1: no field 'text'"),
        "field.jsonl": (
            good + b'{"body": "b"}\n',
            "field.jsonl:2: no field 'text' (there is: body",
        ),
        "number.jsonl": (b'{"text": 3}\n', "number.jsonl:1: field 'text' is int"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl:1: field 'text' has half"),
        "deep.jsonl": (b"[" * 200000, "deep.jsonl: item 1: not JSON"),
        "latin.txt": (b"caf\xe9", "latin.txt: not UTF-8 at byte 3"),
        "latin.jsonl": (b'{"text": "\xff"}', "latin.jsonl:1: not UTF-8"),
        "cut.txt.gz": (gzip.compress(b"x" * 999)[:-9], "cut.txt.gz: cannot be read"),
        "not.txt.gz": (b"plain", "not.txt.gz: cannot be read"),
        "cut.txt.zst": (compressed[:-9], "cut.txt.zst: cannot be read: truncated"),
        "not.txt.zst": (b"plain", "not.txt.zst: cannot be read"),
        "not.parquet": (b"plain", "not.parquet: cannot be read as Parquet"),
    }
    cases = {}
    for name, (data, wanted) in contents.items():
        (tmp_path / name).write_bytes(data)
        cases[name] = (tmp_path / name, wanted)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    cases["dangling"] = (tmp_path / "dangling.txt", "dangling.txt: cannot be read")
    cases["fifo"] = (tmp_path / "pipe.txt", "pipe.txt: not a regular file")
    cases["device"] = (Path("/dev/zero"), "/dev/zero: not a regular file")
    cases["missing"] = (tmp_path / "missing.txt", "missing.txt: no such file")
    cases["glob"] = (tmp_path / "*.nothing", "matches no file")
    cases["directory"] = (tmp_path / "empty_dir", "empty_dir: no text, JSONL or Parquet")
    return cases


def test_unreadable_sources_are_named(tmp_path):
    for path, wanted in broken_sources(tmp_path).values():
        assert wanted in message(read, [path])
    assert "no input" in message(read, [])


def test_parquet_errors(tmp_path, monkeypatch):
    write = parquet.write_table
    write(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "row 2: field 'text' is NoneType" in message(read, [tmp_path / "null.parquet"])
    assert "no column 'body'" in message(read, [tmp_path / "null.parquet"], text_field="body")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow: pip install 'pyarrow>=15'" in message(read, [tmp_path / "null.parquet"])


# Tokenizers


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([text * 3 for text in ODD_TEXTS], 600)


def test_any_text_survives(bpe):
    every = make_characters(ODD_TEXTS)
    for tokenizer in (bpe, make_bytes(), every):
        again = tokenizers.Tokenizer.from_str(tokenizer.data.decode())
        for text in ODD_TEXTS:
            ids = encode(tokenizer, text)
            assert ids.dtype == np.uint32
            assert decode(tokenizer, ids) == text == again.decode(ids.tolist())
            assert len(ids) == 0 or ids.max() < tokenizer.vocab_size


def test_bytes_are_bytes():
    tokenizer = make_bytes()
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (257, 0, 0)
    for text in ODD_TEXTS:
        assert encode(tokenizer, text).tolist() == [byte + 1 for byte in text.encode()]
    assert decode(tokenizer, [0, 66, 0]) == "A"


def test_characters_are_sorted_and_closed():
    tokenizer = make_characters(["hello\n", "abc"])
    assert encode(tokenizer, "\nabc").tolist() == [0, 1, 2, 3]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (8, None, None)
    assert "character 'z' is not among" in message(encode, tokenizer, "abz")
    assert "no character" in message(make_characters, [""])


def test_bpe_is_deterministic_and_knows_its_size(bpe):
    assert train_bpe([text * 3 for text in ODD_TEXTS], 600).data == bpe.data
    assert (bpe.vocab_size, bpe.bos, bpe.eos) == (600, 0, 0)
    assert "--vocab-size=256" in message(train_bpe, ["a"], 256)
    text = "<|endoftext|>"
    assert 0 not in encode(bpe, text)  # text never becomes a separator


def test_long_text_is_cut_where_tokens_are(bpe, tmp_path, monkeypatch):
    text = "one two\n\n  three\nfour.\nfive\n" * 200
    whole = encode(bpe, text)
    marking = load_tokenizer_that_marks_starts(tmp_path)
    marked = encode(marking, text)
    trained = train_bpe([text], 300).data
    monkeypatch.setattr("jaxlm.data.text_cuts.PIECE", 100)
    monkeypatch.setattr("jaxlm.data.text_cuts.REACHES", (50, 100))
    assert np.array_equal(encode(bpe, text), whole)
    both = encode_batch(bpe, [text, "a", ""])
    assert np.array_equal(both[0], whole) and [len(ids) for ids in both[1:]] == [1, 0]
    assert np.array_equal(encode(marking, text), marked)
    assert train_bpe([text], 300).data == trained


def load_tokenizer_that_marks_starts(path: Path):
    """A tokenizer that cannot encode a text in pieces: its first word is another token."""
    engine = tokenizers.Tokenizer.from_str(make_bytes().data.decode())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


def test_separators_of_a_loaded_tokenizer(tmp_path):
    def save(directory: str, special: list[str], **files) -> Path:
        path = tmp_path / directory
        path.mkdir()
        engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
        engine.add_special_tokens(special)
        engine.enable_truncation(2)
        engine.save(str(path / "tokenizer.json"))
        for name, facts in files.items():
            (path / f"{name}.json").write_text(json.dumps(facts))
        return path

    def separators(path: Path, **flags) -> tuple[int | None, int | None]:
        tokenizer = load_tokenizer(path, **flags)
        return tokenizer.bos, tokenizer.eos

    assert separators(save("gpt2", ["<|endoftext|>"])) == (1, 1)
    llama2 = save("llama2", ["<s>", "</s>"])
    assert separators(llama2) == separators(llama2 / "tokenizer.json") == (1, 2)
    assert separators(llama2, bos="none") == (None, 2)
    assert separators(llama2, bos="</s>", eos="a") == (2, 0)
    assert separators(save("bare", [])) == (None, None)
    facts = {"bos_token": None, "eos_token": {"content": "<s>"}}
    assert separators(save("qwen", ["<s>", "</s>"], tokenizer_config=facts)) == (None, 1)
    facts = {"bos_token_id": 2, "eos_token_id": [1, 2]}
    assert separators(save("llama3", ["<s>", "</s>"], config=facts)) == (2, 1)
    wrong = save("wrong", [], tokenizer_config={"bos_token": "<x>"})
    assert "separator '<x>' is not in tokenizer.json" in message(load_tokenizer, wrong)
    assert "--bos=<x>" in message(load_tokenizer, llama2, bos="<x>")
    assert encode(load_tokenizer(llama2), "aaaa").tolist() == [0, 0, 0, 0]  # not truncated
    assert separate(load_tokenizer(llama2), np.zeros(1, np.uint32)).tolist() == [1, 0, 2]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in message(load_tokenizer, tmp_path)
    assert "cannot be read" in message(load_tokenizer, tmp_path / "nowhere")


# Prepared datasets


def test_separators_of_a_run(tmp_path):
    """separators.json rules; a run without it has those of its dataset, or else usual names."""
    (tmp_path / "data").mkdir()
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    engine.add_special_tokens(["<s>", "</s>", "<|im_end|>", "<|eot|>"])
    data = engine.to_str().encode()
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "config.yaml").write_text(f"data: {{path: {tmp_path / 'data'}}}")

    def found(**facts):
        if facts:
            (tmp_path / "separators.json").write_text(json.dumps(facts))
        around = load_tokenizer(tmp_path).separators
        return around.bos, around.eos, around.stop

    assert found() == (1, 2, ())
    manifest = {"bos": None, "eos": 3, "tokenizer_sha256": digest}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert found() == (None, 3, ())
    (tmp_path / "data" / "manifest.json").write_text(
        json.dumps(manifest | {"tokenizer_sha256": "0"})
    )
    assert found() == (1, 2, ())
    assert found(bos=None, eos=3, stop=[4, 2]) == (None, 3, (4, 2))
    assert found(bos=None, eos=None, stop=[], tokenizer_sha256=digest) == (None, None, ())
    assert load_tokenizer(tmp_path, bos="<s>").separators.eos is None
    for facts, words in (
        (dict(bos=7, eos=None, stop=[]), "bos: token 7 is not in the tokenizer.json beside it"),
        (dict(bos=True, eos=None, stop=[]), "bos: token True is not in"),
        (dict(bos=1, eos=2, stop=["</s>"]), "stop=['</s>'] must be the id of a token, a list"),
        (dict(bos=1, stop=[]), "is damaged: KeyError 'eos'"),
        (dict(bos=1, eos=2, stop=[], prompt=3), "is damaged"),
        (dict(bos=1, eos=2, stop=[], tokenizer_sha256="0"), "was written for another tokenizer"),
    ):
        text = message(found, **facts)
        assert "separators.json" in text and words in text, text


def test_separators_of_a_model(tmp_path):
    """What transformers reads: lists of ends, ids that the tokenizer lacks, who adds what."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    engine.add_special_tokens(["<s>", "</s>", "<|im_end|>", "<|eot|>"])
    template = tokenizers.processors.TemplateProcessing(
        "<s> <s> $A </s>", None, [("<s>", 1), ("</s>", 2)]
    )

    def found(post=None, **files):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        if post:
            engine.post_processor = post
        engine.save(str(path / "tokenizer.json"))
        for name, facts in {"config": {}, **files}.items():
            (path / f"{name}.json").write_text(json.dumps(facts))
        return load_tokenizer(path).separators

    ids = lambda around: (around.bos, around.eos, around.stop)
    nothing = {"bos_token_id": None, "eos_token_id": None}
    assert ids(found(config=nothing)) == (1, 2, ())
    assert ids(found(config={"bos_token_id": 1, "eos_token_id": [4, 3]})) == (1, 4, (3,))
    assert ids(found(config={"bos_token_id": 70, "eos_token_id": [80, 3, 3]})) == (None, 3, (80,))
    about = {"bos_token": None, "eos_token": "<|im_end|>"}
    chat = found(
        config={"bos_token_id": 4, "eos_token_id": 3},
        generation_config={"eos_token_id": [3, 4]},
        tokenizer_config=about,
    )
    assert ids(chat) == (None, 3, (4,))
    assert chat.prompt == Prompt(before=(), after=(), alone=(4,), special=True)
    assert "eos_token_id='x' must be" in message(found, config={"eos_token_id": "x"})

    around = lambda **about: found(tokenizer_config={"bos_token": "<s>", **about}).prompt
    assert around().before == around(add_bos_token=True).before == ()
    assert around(split_special_tokens=True).special is False
    assert found(template).prompt == Prompt(before=(1, 1), after=(2,), alone=(1,), special=True)
    assert around(add_bos_token=False).before == (1, 1), "tokenizer.json rules, as in transformers"


def stored_documents(path: Path, split: str) -> list[list[int]]:
    """The documents of a split, read with NumPy alone."""
    documents = []
    for shard in json.loads((path / "manifest.json").read_text())["splits"][split]["shards"]:
        tokens = np.load(path / shard["file"])
        ends = np.load(path / shard["file"].replace(".npy", ".documents.npy"))
        documents += [tokens[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    return documents


@pytest.mark.parametrize("name", ["one", "many", "two", "plain"])
def test_prepared_documents_are_the_texts(root, name):
    tokenizer = load_tokenizer(root / name)
    texts = {path.read_text() for path in (root / "texts").iterdir()}
    manifest = read_manifest(root / name)
    found = {}
    for split in ("train", "validation"):
        documents = stored_documents(root / name, split)
        found[split] = {decode(tokenizer, document) for document in documents}
        for document in documents:
            assert tokenizer.bos in (None, document[0])
            assert tokenizer.eos in (None, tokenizer.bos, document[-1])
        part = manifest["splits"][split]
        assert part["tokens"] == sum(map(len, documents)) == open_split(root / name, split).tokens
        assert part["documents"] == len(documents)
        assert part["bytes"] == sum(len(text.encode()) for text in found[split])
    assert found["train"] | found["validation"] == texts
    assert not found["train"] & found["validation"]
    assert 4 <= len(found["validation"]) <= 16
    verify(root / name)


def test_shards_hold_whole_documents(root):
    many = read_manifest(root / "many")["splits"]["train"]["shards"]
    assert len(many) > 5 and all(shard["tokens"] <= 300 for shard in many)
    for split in ("train", "validation"):
        assert stored_documents(root / "many", split) == stored_documents(root / "one", split)
    assert open_split(root / "one", "train").fingerprint != (
        open_split(root / "many", "train").fingerprint
    )


def test_a_long_document_has_its_own_shard(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("long" * 100)
    (tmp_path / "c.txt").write_text("short")
    (tmp_path / "d.txt").write_text("")
    inputs = [tmp_path / "*.txt"]
    out = tmp_path / "out"
    prepare(out, inputs, "bytes", validation_fraction=0.0, shard_tokens=8, report=quiet)
    shards = read_manifest(out)["splits"]["train"]["shards"]
    assert [shard["tokens"] for shard in shards] == [6, 401, 6]


def test_prepare_is_repeatable_and_seeded(tmp_path, root):
    def digest(out: str, **options) -> str:
        kwargs = dict(vocab_size=300, validation_fraction=0.3, report=quiet) | options
        return json.dumps(prepare(tmp_path / out, [root / "texts"], **kwargs))

    assert digest("a") == digest("b") != digest("c", seed=1)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_split_within_cuts_by_characters(tmp_path):
    text = "".join(chr(ord("a") + index % 26) for index in range(1003))
    (tmp_path / "input.txt").write_text(text)
    options = dict(validation_fraction=0.1, split_within=True, report=quiet)
    prepare(tmp_path / "out", [tmp_path / "input.txt"], "characters", **options)
    tokenizer = load_tokenizer(tmp_path / "out")
    train, validation = (
        decode(tokenizer, stored_documents(tmp_path / "out", split)[0])
        for split in ("train", "validation")
    )
    assert train == text[: int(1003 * 0.9)] and train + validation == text


def test_validation_files_and_empty_splits(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 50)
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    lines: list[str] = []
    prepare(tmp_path / "held", [a], "bytes", validation_inputs=[b], report=lines.append)
    assert stored_documents(tmp_path / "held", "validation") == [[0] + [ord("b") + 1] * 50]
    assert "among the training inputs" in message(
        prepare, tmp_path / "x", [tmp_path], "bytes", validation_inputs=[b], report=quiet
    )
    prepare(tmp_path / "none", [a], "bytes", validation_fraction=0.0, report=lines.append)
    assert any(line.startswith("the validation split is empty") for line in lines)
    assert "split validation has no tokens" in message(open_split, tmp_path / "none", "validation")
    (tmp_path / "empty.txt").write_text("")
    text = message(prepare, tmp_path / "x", [tmp_path / "empty.txt"], "bytes", report=quiet)
    assert text.startswith("the training split would be empty")
    assert "--validation-fraction=1.5" in message(
        prepare, tmp_path / "x", [a], "bytes", validation_fraction=1.5
    )
    assert "exclude" in message(
        prepare, tmp_path / "x", [a], validation_inputs=[b], split_within=True
    )
    assert "--shard-tokens=0" in message(prepare, tmp_path / "x", [a], shard_tokens=0)
    assert not (tmp_path / "x").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_existing_output_is_safe(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    arguments = ([tmp_path / "a.txt"], "bytes")
    options = dict(validation_fraction=0.0, report=quiet)
    out = tmp_path / "out"
    out.mkdir()
    prepare(out, *arguments, **options)  # an empty directory is taken
    assert "holds a dataset" in message(prepare, out, *arguments, **options)
    prepare(out, *arguments, overwrite=True, **options)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert "not UTF-8" in message(prepare, out, *arguments, overwrite=True, **options)
    verify(out)  # a failure leaves the old dataset
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("")
    for path, wanted in ((tmp_path / "home", "no dataset"), (tmp_path / "a.txt", "is a file")):
        assert wanted in message(prepare, path, *arguments, overwrite=True, **options)
    wanted = "cannot be written"
    assert wanted in message(prepare, tmp_path / "a.txt" / "out", *arguments, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.txt", "home", "out"]


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_failing_disk_leaves_nothing(tmp_path, root, monkeypatch, operation):
    real, calls = getattr(os, operation), []

    def fail(*args):
        calls.append(args)
        if len(calls) == wanted:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, operation, fail)
    for wanted in range(1, 9 if operation == "fsync" else 2):
        calls.clear()
        text = message(prepare, tmp_path / "out", [root / "texts"], "bytes", report=quiet)
        assert text.endswith("cannot be written: No space left on device")
        assert wanted == 8 or not list(tmp_path.iterdir())
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # 8: the fsync after the rename


def test_a_killed_prepare_leaves_nothing_that_looks_finished(tmp_path):
    out = tmp_path / "out"
    code = f"from jaxlm.data import prepare_corpus; prepare_corpus('python-stdlib', {str(out)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.preparing-*/tokenizer.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert "does not exist; make it with `jaxlm data prepare" in message(open_split, out, "train")


def test_builtin_corpus(tmp_path):
    start = sum(os.times()[:4])  # of the processors: others may be at work here
    manifest = prepare_corpus("python-stdlib", tmp_path / "corpus", report=quiet)
    assert sum(os.times()[:4]) - start < 60
    held_out = manifest["splits"]["validation"]["bytes"] / manifest["splits"]["train"]["bytes"]
    assert manifest["vocab_size"] == 8192 and 0.01 < held_out < 0.06
    assert "data.corpus=c4" in message(prepare_corpus, "c4", tmp_path / "x")
    assert "holds a dataset" in message(prepare_corpus, "python-stdlib", tmp_path / "corpus")


# Damaged datasets


def edit_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def first_shard(manifest: dict) -> dict:
    return manifest["splits"]["train"]["shards"][0]


DAMAGE = {
    "format": (lambda m: m.update(format=9), "format 9"),
    "dtype": (lambda m: m.update(dtype="object"), "dtype 'object'"),
    "missing": (lambda m: m.pop("splits"), "KeyError 'splits'"),
    "escape": (lambda m: first_shard(m).update(file="../x.npy"), "'../x.npy' is not a name"),
    "absent": (lambda m: first_shard(m).update(file="x.npy"), "no such file"),
    "count": (lambda m: m["splits"]["train"].update(tokens=7), "totals of split train"),
    "negative": (lambda m: m.update(bos=-1), "not a whole number"),
    "digest": (lambda m: first_shard(m).update(documents_sha256="0"), "was changed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_manifest(root, tmp_path, damage):
    path = tmp_path / "data"
    shutil.copytree(root / "one", path)
    change, wanted = DAMAGE[damage]
    edit_manifest(path, change)
    text = message(open_split, path, "train")
    assert wanted in text and str(path) in text


def test_unreadable_manifest(root, tmp_path):
    for name, written in (("no", f"{tmp_path}/no"), ("my [1]", f"'{tmp_path}/my [1]'")):
        words = message(open_split, tmp_path / name, "train")
        assert f"does not exist; make it with `jaxlm data prepare --out {written} FILES`" in words
    assert "manifest.json cannot be read" in message(open_split, tmp_path, "train")
    for data in (b"", b"{", b"\xff", b"[]", b"null"):
        (tmp_path / "manifest.json").write_bytes(data)
        assert "manifest.json" in message(open_split, tmp_path, "train")


def test_damaged_files(root, tmp_path):
    def damaged(name: str, change) -> str:
        path = tmp_path / "data"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(root / "one", path)
        change(path / name)
        text = message(open_split, path, "train")
        assert name in text
        return text

    def swap(array: np.ndarray):
        return lambda file: np.save(file, array)

    tokens, ends = "train-00000.npy", "train-00000.documents.npy"
    for name in (tokens, ends):
        for size in (0, 1, 100, 131, 200):
            damaged(name, lambda file, size=size: os.truncate(file, size))
        damaged(name, lambda file: file.unlink())
        damaged(name, lambda file: (file.unlink(), os.mkfifo(file)))
        damaged(name, lambda file: file.write_bytes(b"\x80\x04N."))  # a pickle
        damaged(name, swap(np.zeros(3, np.float32)))
        damaged(name, lambda file: np.save(file, np.array([print], object), allow_pickle=True))
    assert "longer than" in damaged(tokens, lambda file: file.open("ab").write(b"x"))
    count = read_manifest(root / "one")["splits"]["train"]["documents"]
    assert "does not describe" in damaged(ends, swap(np.zeros(count, np.int64)))


def test_bit_flips_are_found_by_verify(root, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(root / "one", path)
    file = path / "train-00000.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "was changed" in message(verify, path)
    (path / "tokenizer.json").write_bytes(make_characters(["ab"]).data)
    assert "is not the tokenizer" in message(load_tokenizer, path)


def test_a_bad_token_is_named_when_read(root, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(root / "one", path)
    file = path / "train-00000.npy"
    tokens = np.load(file, mmap_mode="r+")
    tokens[70] = 257
    tokens.flush()
    split = open_split(path, "train")
    texts = []
    for index in range(pack(split, 32, 0).num_items):
        try:
            item(pack(split, 32, 0), index)
        except UserError as error:
            texts.append(str(error))
    assert texts and all(f"{file}: token 257 at offset 70" in text for text in texts)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = Batch(sequences=64, sequence_length=32)
    assert "token 257" in message(next, batches(split, batch, 0, sharding))  # through threads


def test_a_file_that_shrinks_is_an_error_and_no_crash(root, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(root / "one", path)
    file = path / "train-00000.npy"
    split = open_split(path, "train")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stream = batches(split, Batch(sequences=4, sequence_length=32), 0, sharding)
    next(stream)
    os.truncate(file, 200)  # while two threads read ahead
    text = message(lambda: [next(stream) for _ in range(100)])
    assert f"{file}: has shrunk while it was read" in text
    assert message(item, pack(split, 32, 0), 0).startswith(f"{file}: has shrunk")


def test_vocabulary_and_size_checks(root):
    split = open_split(root / "one", "train")
    check_vocab(split, 257)
    text = message(check_vocab, split, 256)
    assert "model.vocab_size=256" in text and "257" in text and "data.path=" in text
    assert "batch.sequence_length + 1" in message(pack, split, split.tokens, 0)
    assert pack(split, split.tokens - 1, 0).num_items == 1


# Packing


def oracle(split, documents, length: int, segments: bool, pad: bool) -> list[dict[str, list]]:
    """Pack documents token by token."""
    stream = [
        (token, number, place)
        for number, document in enumerate(documents)
        for place, token in enumerate(document)
    ]
    joined = split.bos is not None and split.bos == split.eos
    items = []
    for begin in range(0, len(stream) - 1, length):
        made: dict[str, list] = {name: [0] * length for name in FIELDS}
        if begin + length + 1 > len(stream) and not pad:
            break
        segment = place = 0
        for index in range(min(length, len(stream) - 1 - begin)):
            token, number, _ = stream[begin + index]
            target, following, _ = stream[begin + index + 1]
            new = index == 0 or (segments and number != stream[begin + index - 1][1])
            segment, place = (segment + 1, 0) if new else (segment, place + 1)
            weight = 1 if following == number or joined else 0
            for name, value in zip(FIELDS, (token, target, weight, segment, place), strict=True):
                made[name][index] = value
        items.append(made)
    return items


def assert_items(packed, wanted: list[dict[str, list]]) -> None:
    assert packed.num_items == len(wanted)
    for index in np.random.default_rng(0).permutation(len(wanted)):  # random access
        made = item(packed, int(index))
        for name, dtype in FIELDS.items():
            assert made[name].dtype == dtype
            assert made[name].tolist() == wanted[index][name], (index, name)


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", ["one", "many", "two", "plain"])
def test_items_equal_a_naive_packing(root, name, length, segments):
    split = open_split(root / name, "train")
    documents = stored_documents(root / name, "train")
    packed = pack(split, length, 3, segments)
    order = np.argsort(np.random.PCG64(3).random_raw(len(documents)))
    shuffled = [documents[index] for index in order]
    assert_items(packed, oracle(split, shuffled, length, segments, pad=False))
    evaluated = evaluation_items(split, length, segments)
    wanted = oracle(split, documents, length, segments, pad=True)
    assert_items(evaluated, wanted)
    targets = [
        token
        for made in wanted
        for token, segment in zip(made["targets"], made["segments"], strict=True)
        if segment
    ]
    assert targets == sum(documents, [])[1:]  # every token predicted exactly once


def test_seed_orders_documents(root):
    split = open_split(root / "one", "train")
    first, again, other = (pack(split, 16, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.ends_D, again.ends_D)
    assert not np.array_equal(first.ends_D, other.ends_D)


# Batches


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "context"))


def rows(step_batch) -> list[bytes]:
    """Each row of a global batch as bytes, all fields."""
    arrays = [np.asarray(step_batch[name]) for name in FIELDS]
    return [b"".join(array[row].tobytes() for array in arrays) for row in range(len(arrays[0]))]


def test_item_order_is_a_pure_function_of_seed_and_place():
    order = item_order(10, 0)
    assert [int(order[place]) for place in range(10)] == GOLDEN_ORDER
    epochs = [[int(order[epoch * 10 + place]) for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [int(item_order(10, 0)[place]) for place in (25, 3)] == [epochs[2][5], epochs[0][3]]
    assert [int(item_order(10, 1)[place]) for place in range(10)] != epochs[0]
    assert int(item_order(1, 0)[5]) == 0
    assert 0 <= int(order[10**12 + 1]) < 10


GOLDEN_ORDER = [1, 2, 4, 5, 9, 7, 8, 6, 0, 3]


@pytest.mark.parametrize("spec", [P("data", "context"), P(("data", "context")), P(), P("context")])
def test_rows_are_items_on_every_layout(root, mesh, spec):
    split = open_split(root / "many", "train")
    batch = Batch(sequences=8, sequence_length=32)
    stream = batches(split, batch, 5, NamedSharding(mesh, spec))
    packed, order = pack(split, 32, 5), item_order(pack(split, 32, 5).num_items, 5)
    for step in range(packed.num_items // 8 + 3):  # past the first epoch
        made = next(stream)
        assert {array.sharding.spec for array in made.values()} == {spec}
        for row in range(8):
            wanted = item(packed, int(order[step * 8 + row]))
            for name in FIELDS:
                assert np.array_equal(np.asarray(made[name])[row], wanted[name])


def test_an_order_moves_the_tokens_of_every_row_and_field(root, mesh):
    split = open_split(root / "many", "train")
    batch, order = Batch(sequences=8, sequence_length=32), np.random.default_rng(0).permutation(32)
    sharding = NamedSharding(mesh, P("data", "context"))
    for make in (lambda **o: batches(split, batch, 5, sharding, **o),
                 lambda **o: evaluation_batches(split, batch, sharding, **o)):  # fmt: skip
        plain, moved = next(make()), next(make(order=order))
        for name in FIELDS:
            assert np.array_equal(np.asarray(moved[name]), np.asarray(plain[name])[:, order])


def test_shardings_may_differ_by_field(root, mesh):
    split = open_split(root / "one", "train")
    batch = Batch(sequences=4, sequence_length=16)
    shardings = {name: NamedSharding(mesh, P("data")) for name in FIELDS}
    shardings["segments"] = NamedSharding(mesh, P(None, "context"))
    mixed = next(batches(split, batch, 0, shardings))
    same = next(batches(split, batch, 0, NamedSharding(mesh, P())))
    assert rows(mixed) == rows(same)
    assert mixed["segments"].sharding.spec == P(None, "context")


def test_resume_continues_the_stream(root, mesh):
    split = open_split(root / "one", "train")
    batch = Batch(sequences=4, sequence_length=16)
    sharding = NamedSharding(mesh, P("data"))
    whole = batches(split, batch, 0, sharding)
    wanted = [rows(next(whole)) for _ in range(40)]
    for start in (0, 1, 17, 39):
        resumed = batches(split, batch, 0, sharding, start, prefetch=1)
        assert [rows(next(resumed)) for _ in range(40 - start)] == wanted[start:]
        resumed.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("spec", [P("data"), P("data", "context"), P("context"), P(None, "data")])
def test_processes_make_just_the_rows_they_hold(mesh, spec, processes):
    # Devices dealt to processes in several ways, so that either axis may span processes.
    indices = NamedSharding(mesh, spec).devices_indices_map((8, 32))
    for devices in (mesh.devices.flatten(), mesh.devices.T.flatten()):
        for local in np.split(devices, processes):
            wanted = {row for device in local for row in range(*indices[device][0].indices(8))}
            found = local_rows([indices[device] for device in local], 8)
            assert found.tolist() == sorted(wanted)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("zigzag", [False, True])
def test_processes_together_hold_the_batch(root, processes, zigzag):
    # One mesh for each process stands for its devices: the rows it makes are those of the whole.
    from jaxlm.data import load

    split = open_split(root / "one", "train")
    packed = pack(split, 32, 0)
    order = item_order(packed.num_items, 0)
    mesh = jax.make_mesh((2, 4), ("data", "context"))  # 4 processes: context spans two of them
    indices = NamedSharding(mesh, P("data", "context")).devices_indices_map((8, 32))
    batch: dict[int, bytes] = {}
    tokens_S = np.arange(32).reshape(8, 4)[[0, 7, 1, 6, 2, 5, 3, 4]].ravel() if zigzag else None
    for local in np.split(mesh.devices.flatten(), processes):
        rows_R = local_rows([indices[device] for device in local], 8)
        made = load._make_rows(
            lambda place: item(packed, int(order[place])), rows_R, 8, tokens_S, 3
        )
        for device in local:
            part = load._shard(made["tokens"], rows_R, 8, indices[device])
            for row, tokens in zip(range(8)[indices[device][0]], part, strict=True):
                wanted = item(packed, int(order[3 * 8 + row]))["tokens"]
                wanted = (wanted[tokens_S] if zigzag else wanted)[indices[device][1]]
                assert np.array_equal(tokens, wanted)
                batch[row] = b""
    assert sorted(batch) == list(range(8))


def test_evaluation_covers_the_split_once(root, mesh):
    split = open_split(root / "one", "validation")
    batch = Batch(sequences=4, sequence_length=16)
    sharding = NamedSharding(mesh, P("data"))
    made = list(evaluation_batches(split, batch, sharding))
    assert len(made) == -(-(split.tokens - 1) // 64)
    targets = np.concatenate(
        [np.asarray(each["targets"])[np.asarray(each["segments"]) > 0] for each in made]
    )
    assert targets.tolist() == sum(stored_documents(root / "one", "validation"), [])[1:]
    assert sum(float(each["weights"].sum()) for each in made) == split.tokens - 1
    limited = list(evaluation_batches(split, batch, sharding, 2))
    assert [rows(each) for each in limited] == [rows(each) for each in made[:2]]
    assert len(list(evaluation_batches(split, batch, sharding, 10**6))) == len(made)


def test_data_state_names_what_differs(root):
    split = open_split(root / "one", "train")
    batch = Batch(sequences=4, sequence_length=16)
    state = json.loads(json.dumps(data_state(7, split, batch, 0)))
    assert state["next_item"] == 28
    check_data_state(state, 7, split, batch, 0)
    other = Batch(sequences=8, sequence_length=32)
    text = message(check_data_state, state, 7, split, other, 1)
    assert "seed=1 (checkpoint: 0)" in text
    assert "batch.sequences=8 (checkpoint: 4)" in text
    assert "batch.sequence_length=32 (checkpoint: 16)" in text
    many, plain = open_split(root / "many", "train"), open_split(root / "plain", "train")
    assert "other tokens" in message(check_data_state, state, 7, many, batch, 0)
    assert "another tokenizer" in message(check_data_state, state, 7, plain, batch, 0)
    assert "item 32 (checkpoint: 28)" in message(check_data_state, state, 8, split, batch, 0)
    assert "format 2" in message(check_data_state, state | {"format": 2}, 7, split, batch, 0)


# Command


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="jaxlm")
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *arguments])
    return args.run(args)


def test_command(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--tokenizer", "bytes", "--validation-fraction", "0.3", "--seed", "1"]
    assert run_command("prepare", "--out", out, str(root / "texts"), *options) == 0
    assert "train: " in capsys.readouterr().out
    assert run_command("info", out, "--verify") == 0
    shown = capsys.readouterr().out
    assert "vocabulary: 257 tokens, uint16" in shown and "bos: 0 <|endoftext|>" in shown
    for split in ("train", "validation"):
        assert run_command("show", out, "--split", split, "--sequence-length", "64") == 0
        assert "--- segment 1: " in capsys.readouterr().out
    assert "--item=-1" in message(run_command, "show", out, "--item", "-1")
    assert "--sequence-length=0" in message(run_command, "show", out, "--sequence-length", "0")
    short = ["show", out, "--sequence-length", "10000000"]
    assert "--sequence-length=10000000 is not below" in message(run_command, *short)
    exclusive = ["--corpus", "python-stdlib", "a"]
    assert "exclude each other" in message(run_command, "prepare", "--out", "x", *exclusive)
    with pytest.raises(SystemExit):
        run_command("prepare", "--help")
    assert "jaxlm data prepare" in capsys.readouterr().out


def test_command_does_not_import_jax():
    code = "import sys, jaxlm.data.command; raise SystemExit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
