"""What `jaxlm data prepare` reads: which files, in which encodings, and what it leaves out."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import tokenizers
import zstandard
from tiny import message

from jaxlm import cli, run
from jaxlm.data import open_split, sources
from jaxlm.data.files import Tally, find_files
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenize import make_bytes

TEXT = "caf\u00e9 \u4f60\u597d \U0001f600\nsecond line\n"
MAKERS = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def quiet(line: str) -> None:
    """Drop a line of progress."""


def read(*inputs: str | Path, **kwargs) -> list[str]:
    return [each.text for each in sources.read_documents(find_files(inputs), **kwargs)]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rows(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# Which files


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A directory with links of every kind, and what can be found in one by accident."""
    for name in ("in/a.txt", "in/sub/b.md", "in/sub/deep/c.txt", "far/d.txt"):
        write(tmp_path / name, name)
    for name in ("in/.hidden.txt", "in/.git/e.txt", "in/picture.png", "in/README"):
        write(tmp_path / name, name)
    for name, target in {
        "far_link": "../far", "a_link.txt": "a.txt", "same": "sub", "broken.txt": "nowhere",
        "self.txt": "self.txt", "loop": ".", "sub/up": "..", "above": "../..",
    }.items():  # fmt: skip
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "far" / "back").symlink_to("../in")
    (tmp_path / "in_link").symlink_to("in")
    os.link(tmp_path / "in/sub/b.md", tmp_path / "in/hard.md")
    os.mkfifo(tmp_path / "in/pipe.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_spelling_of_a_directory_gives_the_same_files(tree):
    wanted = ["a.txt", "far_link/d.txt", "hard.md", "sub/deep/c.txt"]
    counts = {
        "broken links": 2,
        "hidden": 2,
        "links to a directory above them": 3,
        "links to directories that are read already": 2,
        "not regular files (FIFOs, devices, sockets)": 1,
        "of unknown suffix": 2,
        "other names of files that are read": 2,
    }
    spellings = ["in", "./in/", str(tree / "in"), "in/*", "in/**", "in/**/*", "in_link", "i[n]"]
    for inputs in [*([spelling] for spelling in spellings), spellings, ["in/a.txt", "in"]]:
        left_out: Tally = {}
        files = find_files(inputs, left_out)
        assert [file.id for file in files] == wanted, inputs
        assert {reason: facts["count"] for reason, facts in left_out.items()} == counts, inputs
        assert {file.path.read_text() for file in files} == {
            "in/a.txt", "far/d.txt", "in/sub/b.md", "in/sub/deep/c.txt",
        }  # fmt: skip
    names = {Path(facts["first"]).name for facts in left_out.values()}
    assert {"broken.txt", ".git", "above", "pipe.txt", "README", "a_link.txt"} <= names


@pytest.mark.parametrize(
    "inputs, wanted",
    {
        "in/*.txt": ["a.txt"],
        "in/**/*.txt": ["a.txt", "far_link/d.txt", "sub/deep/c.txt"],
        "in/*/*.txt": ["d.txt"],
        "in/s*": ["b.md", "deep/c.txt"],
        "in/sub in/a_link.txt": ["a_link.txt", "sub/b.md", "sub/deep/c.txt"],
        "in/README in/*.png": ["README", "picture.png"],
        "in/.hidden.txt in/.g*": [".git/e.txt", ".hidden.txt"],
    }.items(),
)
def test_globs_and_names(tree, inputs, wanted):
    assert [file.id for file in find_files(inputs.split())] == wanted


def test_brackets_in_names_that_exist_are_no_wildcards(tree):
    """As "a [1]" names a directory, so it does within a glob; one that does not exist matches."""
    for name in ("a [1]/x.txt", "a [1]/deep [x]/y.txt", "a 1/z.txt", "star */w.txt"):
        write(tree / name, name)
    for name, wanted in {
        "a [1]": ["deep [x]/y.txt", "x.txt"], "a [1]/*": ["deep [x]/y.txt", "x.txt"],
        "a [1]/*.txt": ["x.txt"], "a [1]/deep [x]/*.txt": ["y.txt"], "./a [1]/d*/": ["y.txt"],
        "a [[]1]/*.txt": ["x.txt"], "a [0-9]/*": ["z.txt"], "star */*.txt": ["w.txt"],
    }.items():  # fmt: skip
        assert [file.id for file in find_files([name])] == wanted, name
    assert "a [1]/none.txt: no such file" in message(find_files, ["a [1]/none.txt"])


def test_what_is_named_itself_must_be_a_file(tree):
    for name, wanted in {
        "in/pipe.txt": "not a regular file", "in/broken.txt": "cannot be read",
        "in/self.txt": "cannot be read", "in/none.txt": "no such file", "in/z*": "matches no file",
        "none/*": "matches no file", "in/pi*.txt": "left out: 1 not regular",
        "*/../in": ".. cannot follow a wildcard",
    }.items():  # fmt: skip
        assert wanted in message(find_files, [name])


def test_a_link_that_is_named_has_the_format_of_its_target(tree):
    write(tree / "rows.jsonl", rows({"text": "a"}, {"text": "b"}))
    write(tree / "ROWS.JSONLINES", rows({"text": "a"}, {"text": "b"}))
    for name, target in {"latest": "rows.jsonl", "older": "ROWS.JSONLINES"}.items():
        (tree / name).symlink_to(target)
        assert read(name) == ["a", "b"]


def test_odd_bytes_in_names_are_reported(tmp_path, capfd):
    write(tmp_path / "a.txt", TEXT)
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")), "")
    prepare(tmp_path / "out", [tmp_path], "bytes", validation_fraction=0.0)
    assert "\\udcff.png" in capfd.readouterr().out.splitlines()[-1]


def test_the_output_is_no_input(tree, tmp_path):
    options = dict(validation_fraction=0.0, overwrite=True)
    lines: list[str] = []
    for _ in range(2):  # the second time it holds a tokenizer.json and a manifest.json
        manifest = prepare("in/out", ["in"], "bytes", report=lines.append, **options)
        assert manifest["splits"]["train"]["documents"] == 4
    assert lines[-1].startswith("left out: 2 broken links (first: in/broken.txt), 1 directories")
    write(tree / "in/out/mine.txt", "precious")
    for inputs in (["in/out"], ["in/out/mine.txt"], ["in/out/*"]):
        assert "holds the input" in message(prepare, "in/out", inputs, report=quiet, **options)
    assert (tree / "in/out/mine.txt").read_text() == "precious"


def test_a_held_out_file_is_not_trained_on_under_another_name(tree):
    for name in ("in/a_link.txt", "in/hard.md", "in_link/s*/b.md", "far"):
        wanted = "among the training inputs"
        held_out = dict(validation_inputs=[name], report=quiet)
        assert wanted in message(prepare, "out", ["in"], "bytes", **held_out)
    assert not (tree / "out").exists()


# Bytes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_byte_order_marks_are_dropped(tmp_path, encoding):
    part = ("\ufeff" + TEXT).encode(encoding)
    line = ("\ufeff" + json.dumps({"text": TEXT}) + "\n").encode(encoding)
    assert read(write(tmp_path / "a.txt", part)) == [TEXT]
    assert read(write(tmp_path / "twice.txt", part * 2)) == [TEXT * 2]
    assert read(write(tmp_path / "a.jsonl", line)) == [TEXT]
    assert read(write(tmp_path / "twice.jsonl", line * 2)) == [TEXT] * 2
    array = ("\ufeff" + json.dumps([{"text": TEXT}])).encode(encoding)
    assert read(write(tmp_path / "array.json", array * 2)) == [TEXT] * 2
    for suffix, compress in MAKERS.items():  # a mark in each member, frame or stream
        assert read(write(tmp_path / f"a.txt.{suffix}", compress(part) * 2)) == [TEXT * 2]
        assert read(write(tmp_path / f"a.jsonl.{suffix}", compress(line) * 2)) == [TEXT] * 2


def test_a_mark_is_no_part_of_a_record(tmp_path):
    records = {"text": "\ufeffa\ufeffb"}
    assert read(write(tmp_path / "a.jsonl", rows(records))) == ["a\ufeffb"]
    parquet.write_table(pyarrow.table({"text": ["\ufeffa"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a"]


@pytest.mark.parametrize("suffix", MAKERS)
def test_compressed_files(tmp_path, suffix):
    compress, path = MAKERS[suffix], tmp_path / f"a.jsonl.{suffix}"
    data = rows(*({"text": f"{n} {os.urandom(30).hex()}"} for n in range(2000)))
    wanted = [json.loads(line)["text"] for line in data.splitlines()]
    cut = len(data) // 3  # within a line
    parts = compress(data[:cut]) + compress(b"") + compress(data[cut:])
    assert read(write(path, parts)) == wanted
    assert read(write(tmp_path / "named_wrong.jsonl", parts)) == wanted
    assert read(write(tmp_path / "other.jsonl.gz", parts)) == wanted
    for broken in (parts[:-5], compress(data)[:-9], parts + b"more", b"plain text"):
        text = message(read, write(path, broken))
        assert text.startswith(f"{path}: cannot be read: ")
    padded = (
        compress(data) + bytes(512) + compress(data) + bytes(1)
    )  # as tape drives and tar leave it
    assert read(write(path, padded)) == wanted * 2
    array = compress(json.dumps([{"text": text} for text in wanted]).encode())
    text = message(read, write(tmp_path / f"array.json.{suffix}", array[:-9]))
    assert "cannot be read: truncated" in text and "not JSON" not in text
    skipped: list = []
    documents = read(write(path, parts[: len(parts) // 2]), on_bad=skipped.append)
    assert 0 < len(documents) and documents == wanted[: len(documents)]
    assert [bad.kind for bad in skipped] == ["damaged file"]
    assert "compressed twice" in message(read, write(path, compress(compress(data))))


def test_wide_windows_of_zstd(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    engine = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = engine.compress(TEXT.encode()) + engine.flush()
    with pytest.raises(zstandard.ZstdError):  # the case is one
        zstandard.ZstdDecompressor().decompressobj().decompress(data)
    assert read(write(tmp_path / "a.txt.zst", data)) == [TEXT]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # as pzstd writes first
    assert read(write(tmp_path / "b.txt.zst", skippable + data)) == [TEXT]


def test_other_formats_are_named(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a.txt", TEXT)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made:
        made.addfile(tarfile.TarInfo("a.txt"))
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a"]}), table)
    for name, data, wanted in (
        ("a.zip", archive.getvalue(), "is a zip archive; unpack it"),
        ("a.jsonl", archive.getvalue(), "is a zip archive"),
        ("a.tar", tar.getvalue(), "is a tar archive"),
        ("a.tar.gz", gzip.compress(tar.getvalue()), "is a tar archive"),
        ("a.txt", table.getvalue(), "is a Parquet file; name it .parquet"),
        ("b.txt", TEXT.encode("utf-16-le"), "not UTF-8"),
        ("c.txt", "plain words".encode("utf-16-le"), "looks like UTF-16 without a byte order mark"),
        ("d.txt", codecs.BOM_UTF16_LE + b"abc", "not UTF-16-LE, as its byte order mark says"),
        ("e.txt", b"caf\xe9", "not UTF-8 at byte 3"),
    ):
        assert f"{name}: {wanted}" in message(read, write(tmp_path / name, data))
    mixed = gzip.compress("\ufeffa".encode("utf-16-le")) + gzip.compress(b"b")
    assert "part 2 has no byte order mark" in message(read, write(tmp_path / "f.txt.gz", mixed))


# JSON


@pytest.mark.parametrize("piece", [1, 7, 1 << 14])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_that_is_no_json_lines(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr("jaxlm.data.contents.READ", piece)
    texts = [TEXT, "", '"quoted" \\ ][}{,', "x" * 300, "last"]
    records = [{"n": -1.5e3, "more": [1, {"a": None}], "text": text} for text in texts]
    array = json.dumps(records, indent=indent, ensure_ascii=False)
    for name, data in {
        "array.json": array, "array.jsonl": f" \n{array}\n\n", "empty_array.json": "[ ]",
        "objects.json": "\n".join(json.dumps(record, indent=1) for record in records),
        "object.json": json.dumps(records[0], indent=1),
        "one_line.json": "".join(json.dumps(record) for record in records),
        "rows_of_objects.json": " ".join(json.dumps(record) for record in records[:3])
        + "".join("\n" + json.dumps(record) for record in records[3:]),
        "broken_lines.json": "\n".join(
            json.dumps(record).replace(": ", ":\n") for record in records
        ),
    }.items():  # fmt: skip
        wanted = {"empty_array.json": [], "object.json": [TEXT]}.get(name, texts)
        assert read(write(tmp_path / name, data)) == wanted, name


def test_broken_json_arrays(tmp_path):
    good = '{"text": "a"}'
    for data, wanted in {
        f"[{good}, {good}": "item 3: not JSON: the array has no end",
        f"[{good} {good}]": "item 2: not JSON: no comma",
        f"[{good}, {{oops" + " " * 50 + "}]": "item 2: not JSON: Expecting property name",
        f'[{good}, {{"text": "a': "item 2: not JSON: Unterminated string",
        f"[{good}, 3]": "item 2: no field 'text': it is int",
    }.items():
        skipped: list = []
        path = write(tmp_path / "a.json", data)
        assert f"a.json: {wanted}" in message(read, path)
        assert len(read(path, on_bad=skipped.append)) in (1, 2) and len(skipped) == 1
    # An array on the first of several lines is a bad row of JSON lines.
    path = write(tmp_path / "b.jsonl", rows([1], {"text": "a"}))
    assert "b.jsonl:1: no field 'text': it is list" in message(read, path)


def test_a_huge_json_array_is_read_in_little_memory(tmp_path, monkeypatch):
    import tracemalloc

    path = write(tmp_path / "a.json", json.dumps([{"text": "x" * 1000}] * 20000))
    files = find_files([path])
    tracemalloc.start()
    assert sum(1 for _ in sources.read_documents(files)) == 20000
    assert tracemalloc.get_traced_memory()[1] < 5e6 < os.path.getsize(path)
    tracemalloc.stop()


# Records


def test_nested_fields(tmp_path):
    own = {"content.text": "own", "content": {"text": "nested"}}
    deep = {"a.b": {"c": "deep"}, "a": None}
    path = write(tmp_path / "a.jsonl", rows(own, {"content": {"text": "b"}}))
    assert read(path, text_field="content.text") == ["own", "b"]
    assert read(write(tmp_path / "b.jsonl", rows(deep)), text_field="a.b.c") == ["deep"]
    for record in ({"content": "text"}, {"content": {"body": ""}}, {"content": [{"text": ""}]}):
        path = write(tmp_path / "c.jsonl", rows(record))
        assert "no field 'content.text' (there is: content)" in message(
            read, path, text_field="content.text"
        )
    path = write(tmp_path / "d.jsonl", rows({"content": None}))
    assert "is NoneType" in message(read, path, text_field="content.text")


def test_columns_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    structs = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    parquet.write_table(pyarrow.table({"content": structs}), path)
    assert read(path, text_field="content.text") == ["a", "b"]
    assert "no column 'content.body'" in message(read, path, text_field="content.body")
    assert "'content' is dict" in message(read, path, text_field="content")
    both = pyarrow.table({"content": structs, "content.text": ["own", "wins"]})
    parquet.write_table(both, path)
    assert read(path, text_field="content.text") == ["own", "wins"]
    texts = pyarrow.array([TEXT, "b", TEXT])
    for column in (
        texts.cast(pyarrow.binary()), texts.cast(pyarrow.large_string()),
        texts.cast(pyarrow.large_binary()), texts.dictionary_encode(),
    ):  # fmt: skip
        parquet.write_table(pyarrow.table({"text": column}), path)
        assert read(path) == [TEXT, "b", TEXT]


BAD_ROWS = {  # kind: a line of JSON
    "null text": b'{"text": null}',
    "missing field": b'{"body": "a"}',
    "text not a string": b'{"text": ["a"]}',
    "not an object": b'"text"',
    "invalid JSON": b'{"text": "cut',
    "invalid UTF-8": b'{"text": "\xff"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
}


def test_bad_records_are_skipped_and_named(tmp_path):
    good = rows({"text": "a"}, {"text": "b"})
    lines = b"\n".join([*BAD_ROWS.values(), *BAD_ROWS.values(), b""])
    write(tmp_path / "in/rows.jsonl", good + lines + good)
    strings = pyarrow.array([b"c", None, b"\xff"]).view(pyarrow.string())  # nobody checks
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "in/table.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "in/wrong.parquet")
    write(tmp_path / "in/zlatin.txt", b"caf\xe9")
    options = dict(validation_fraction=0.0, report=quiet)
    assert "rows.jsonl:3: field 'text' is NoneType" in (
        text := message(prepare, tmp_path / "out", [tmp_path / "in"], **options)
    )
    assert text.endswith("to go on without such records use --on-bad=skip")
    lines: list[str] = []
    options |= dict(on_bad="skip", report=lines.append, vocab_size=300)  # bpe reads it all twice
    manifest = prepare(tmp_path / "out", [tmp_path / "in"], **options)
    assert manifest["splits"]["train"]["documents"] == 5
    left_out = manifest["left_out"]
    counts = dict.fromkeys(BAD_ROWS, 2) | {"null text": 3, "missing field": 4, "invalid UTF-8": 4}
    assert {kind: facts["count"] for kind, facts in left_out.items()} == counts
    for number, kind in enumerate(BAD_ROWS, 3):
        assert left_out[kind]["first"].startswith(f"rows.jsonl:{number}: ")
        assert f"{counts[kind]} {kind} (first: rows.jsonl:{number}: " in lines[-1]
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    write(tmp_path / "clean.jsonl", good + good + rows({"text": "c"}))
    options |= dict(on_bad="fail")
    clean = prepare(tmp_path / "clean", [tmp_path / "clean.jsonl"], **options)
    assert clean["splits"] == manifest["splits"] and clean["left_out"] == {}
    assert "--on-bad=drop" in message(prepare, tmp_path / "x", [tmp_path], on_bad="drop")
    bad = write(tmp_path / "bad.jsonl", BAD_ROWS["null text"])
    text = message(prepare, tmp_path / "x", [bad], "bytes", on_bad="skip", report=quiet)
    assert "would be empty (left out: 1 null text (first: bad.jsonl:1: " in text


def test_documents_without_tokens_are_skipped(tmp_path):
    engine = tokenizers.Tokenizer.from_str(make_bytes().data.decode())
    engine.normalizer = tokenizers.normalizers.Strip()
    engine.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "a.jsonl", rows(*({"text": text} for text in ("a ", " \n", "", "b"))))
    options = dict(bos="none", eos="none", report=quiet)
    arguments = ([path], str(tmp_path / "tokenizer.json"))
    for name, bos, tokens in (("plain", "none", 2), ("separated", "<|endoftext|>", 4)):
        out = tmp_path / name
        manifest = prepare(out, *arguments, validation_fraction=0.0, **options | dict(bos=bos))
        assert manifest["left_out"] == {
            "documents without tokens": {"count": 2, "first": "a.jsonl:2"}
        }
        assert open_split(out, "train").tokens == tokens  # it was refused for ever
    blank = write(tmp_path / "blank.txt", "  ")
    for held_out, inputs in (
        (dict(validation_inputs=[blank]), [path]),
        (
            dict(split_within=True, validation_fraction=0.5),
            [write(tmp_path / "b.md", "b         ")],
        ),
    ):
        text = message(prepare, tmp_path / "x", inputs, arguments[1], **options | held_out)
        assert text.startswith("the validation split would be empty (left out: "), text
    assert not (tmp_path / "x").exists()


def test_a_vocabulary_of_nothing_says_what_was_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", rows({"text": None}, {"x": 1}))
    options = dict(on_bad="skip", report=quiet)
    for tokenizer in ("characters", "bytes", "bpe"):
        text = message(prepare, tmp_path / "out", [path], tokenizer, **options)
        assert "left out: 1 null text (first: a.jsonl:1" in text and "1 missing field" in text


def test_separators_are_refused_where_they_are_not_chosen(tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    for tokenizer in ("characters", "bytes", "bpe"):
        for flag, text in (("bos", "<s>"), ("eos", "none")):
            words = message(prepare, tmp_path / "out", [path], tokenizer, **{flag: text})
            assert words.startswith(f"--{flag}={text} is for a tokenizer that is loaded")


# Interrupts, and the built-in corpus


@pytest.mark.parametrize("moment", ["_write_splits", "rename 1", "rename 2"])
def test_an_interrupted_prepare_leaves_nothing(tmp_path, monkeypatch, capsys, moment):
    path = write(tmp_path / "a.txt", TEXT)
    old = prepare(tmp_path / "old", [path], "bytes", validation_fraction=0.0, report=quiet)
    before = sorted(os.listdir(tmp_path))
    real, calls = os.rename, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) >= int(moment[-1]) if moment[-1].isdigit() else 1:
            monkeypatch.setattr(os, "rename", real)
            raise KeyboardInterrupt
        real(*args)

    name = "os.rename" if moment.startswith("rename") else f"jaxlm.data.prepare.{moment}"
    for out in ("old", "new/er/out") if moment != "rename 2" else ("old",):
        calls.clear()
        monkeypatch.setattr(name, interrupt)
        command = ["data", "prepare", "--out", str(tmp_path / out), "--overwrite", str(path)]
        assert cli.main([*command, "--tokenizer", "bytes", "--validation-fraction", "0"]) == 130
        assert "nothing half-made is left" in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == before
        assert json.loads((tmp_path / "old/manifest.json").read_text()) == old


@pytest.mark.parametrize(
    "command, name",
    {
        "train x": "_train", "eval x": "_eval", "generate x": "_generate", "export x y": "_export",
        "import x y": "_import", "verify-layout x": "_verify", "config show x": "_show",
    }.items(),
)  # fmt: skip
def test_only_train_promises_to_go_on(monkeypatch, capsys, command, name):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, name, interrupt)
    assert cli.main(command.split()) == 130
    words = capsys.readouterr().err
    assert ("checkpoint" in words) == (name == "_train")
    assert "from the beginning" in words


def test_a_reader_that_leaves_is_not_the_disk(tmp_path):
    def left(line: str) -> None:
        if line.startswith("tokenizer"):
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        prepare(tmp_path / "out", [write(tmp_path / "a.txt", TEXT)], "bytes", report=left)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_run_goes_on_without_the_reader_of_its_lines(tmp_path):
    """As in `jaxlm train x | head -1`: no traceback for each line that nobody reads."""
    code = (
        "import logging, sys, jaxlm.cli as cli\n"
        "def run(args):\n"
        "    logging.getLogger('jaxlm').setLevel(logging.INFO)\n"
        "    sys.stdin.read()\n"
        "    for _ in range(3): logging.getLogger('jaxlm').info('line')\n"
        "cli._train = run\n"
        "raise SystemExit(cli.main(['train', 'x']))\n"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_an_interrupt_while_modules_load_is_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_parser", interrupt)
    assert cli.main(["data", "prepare"]) == 130
    assert "interrupted before anything was done" in capsys.readouterr().err


def test_a_corpus_is_made_at_its_own_place_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    monkeypatch.setattr(run, "prepare_corpus", lambda name, path: made.append(f"{name} {path}"))
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    load = lambda *overrides: run.load_config(quickstart, overrides)
    run.prepare_data(load())
    run.prepare_data(load(f"data.path={tmp_path}/data/../data/python-stdlib"))
    assert made == ["python-stdlib data/python-stdlib"] + [
        f"python-stdlib {tmp_path}/data/../data/python-stdlib"
    ]
    for path in ("data/python-stdlb", str(tmp_path / "mistyped"), "other/python-stdlib"):
        text = message(run.prepare_data, load(f"data.path={path}"))
        assert f"data.path={path} does not exist" in text and "data/python-stdlib" in text
        assert f"`jaxlm data prepare --corpus python-stdlib --out {path}`" in text
    assert len(made) == 2 and not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    run.prepare_data(load("data.path=mine"))  # what exists is read, and not made
    run.prepare_data(load("data.path=mistyped", "data.corpus=none"))
    assert len(made) == 2
