"""Config files, validation and explanations: tables of cases, and random mistakes."""

import dataclasses
import pwd
import random
import shlex
from pathlib import Path

import pytest
import tiny
import yaml

from jaxlm.cli import main
from jaxlm.config import (
    AXES,
    DIMS,
    FAMILIES,
    RULES,
    STORAGE,
    Mesh,
    UserError,
    padded_vocab,
    run_dir,
)
from jaxlm.configfile import (
    differences,
    dump,
    load,
    load_with_sources,
    schema,
    to_dict,
)
from jaxlm.explain import CHANGES, explain, show
from jaxlm.run import load_config
from jaxlm.validate import resolve_mesh, validate

BASE = """\
steps: 100
model:
  family: llama
  num_layers: 2
  embed_dim: 64
  num_heads: 8
  num_kv_heads: 4
  head_dim: 8
  mlp_dim: 96
  vocab_size: 1000
batch: {sequences: 16, sequence_length: 64}
optimizer: {learning_rate: 3e-4}
data: {path: data/tokens}
"""
GPT2 = BASE.replace("llama", "gpt2").replace("num_kv_heads: 4", "num_kv_heads: 8")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A directory with base.yaml and gpt2.yaml, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "gpt2.yaml").write_text(GPT2)
    return tmp_path


def get(config, name):
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def error_of(function, *args):
    """The message of the UserError that a call raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


# Loading.


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("mesh.tensor=2", "mesh.tensor", 2),
        ("mesh={tensor: 2}", "mesh.tensor", 2),
        ("mesh.dcn={data: 2}", "mesh.dcn", {"data": 2}),
        ("mesh.dcn.data=2", "mesh.dcn", {"data": 2}),
        ("rules.kv_heads=[]", "rules", {"kv_heads": ()}),
        ("rules.mlp=tensor", "rules", {"mlp": ("tensor",)}),
        ('sample.prompts=["a","b, c"]', "sample.prompts", ("a", "b, c")),
        ("sample.prompts=one text", "sample.prompts", ("one text",)),
        ("sample.prompts=[1, true]", "sample.prompts", ("1", "true")),
        ("optimizer.train=*norm*", "optimizer.train", ("*norm*",)),
        ("remat.names=[]", "remat.names", ()),
        ("run.dir=x", "run.dir", "x"),
        ("run.dir=", "run.dir", ""),
        ("run.dir=5", "run.dir", "5"),
        ("run.dir='5'", "run.dir", "5"),
        ("name=1e3", "name", "1e3"),
        ("data.path=C:\\x=y", "data.path", "C:\\x=y"),
        ("steps=1e3", "steps", 1000),
        ("steps=8_192", "steps", 8192),
        ("steps=8.0", "steps", 8),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.weight_decay=1", "optimizer.weight_decay", 1.0),
        ("log.wandb=true", "log.wandb", True),
        ("model.rope_theta=5e5", "model.rope_theta", 5e5),
    ],
)
def test_override(base, override, name, value):
    config, sources = load_with_sources("base.yaml", [override])
    assert get(config, name) == value and type(get(config, name)) is type(value)
    assert "override" in sources.values()


TEXTS = [
    "# Introduction", "a #2", "!old", "Q: why?", "*x", "&a", "&a b", "@x", "%x", "- x", "? x",
    "a: b", "123", "true", "null", "~", "1e5", "2024-01-02", "k=v=w", " two  gaps ", "line\n\nline",
    "tab\there", "'Twas", '"', "'", '"Hi" she said', '"a" # b', "a, b", "it's", "x]", "}", "`x`",
    "|", "> x", "--- a", "...", "\\n", "caf\u00e9", "{x", "[x", "", "\x07",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(base, text):
    """The literal text of an override; in quotes and in brackets what PyYAML reads there."""
    bracketed = text.startswith(("{", "["))
    for written in [] if bracketed else [text]:
        config = load("base.yaml", [f"sample.prompts={written}", f"data.path=./{written}"])
        assert config.sample.prompts == (text,) and config.data.path == f"./{text}"
        (base / "again.yaml").write_text(dump(config), encoding="utf-8")
        assert load("again.yaml") == config
        if text != "~":
            assert load("base.yaml", [f"run.dir={text}", f"name={text}"]).run.dir == text
    for style in "'\"":
        quoted = yaml.safe_dump(text, default_style=style, width=10**6).strip()
        assert yaml.safe_load(quoted) == text
        config = load("base.yaml", [f"name={quoted}", f"sample.prompts=[{quoted}, b]"])
        assert (config.name, config.sample.prompts) == (text, (text, "b"))
        one = load("base.yaml", [f"sample.prompts={quoted}"])
        assert one.sample.prompts == (text,)


def test_tags_in_files_are_not_dropped(base):
    for text in ("run: {dir: !old }", "sample: {prompts: [!a b]}", "sample: {prompts: !x [a]}"):
        (base / "f.yaml").write_text(f"{BASE}{text}\n")
        assert "write text that starts with ! in quotes" in error_of(load, "f.yaml")


def test_home_directories(base, monkeypatch):
    """~ and ~user in every path, of overrides and of files; a run keeps what it meant."""
    monkeypatch.setenv("HOME", str(base / "me"))
    root = pwd.getpwuid(0)
    (base / "more.yaml").write_text("run: {dir: ~/runs/x}\nplan: {cache: ~/cache}\n")
    (base / "me").mkdir()
    (base / "me" / "mine.yaml").write_text("seed: 7\n")
    (base / "home.yaml").write_text("include: [base.yaml, more.yaml, ~/mine.yaml]\n")
    paths = ["data.path=~/d", f"checkpoint.start_from=~{root.pw_name}/r", "sample.prompts=~/p"]
    config = load("home.yaml", paths)
    assert config.run.dir == str(run_dir(config)) == str(base / "me" / "runs" / "x")
    assert (config.data.path, config.plan.cache) == (f"{base}/me/d", f"{base}/me/cache")
    assert config.checkpoint.start_from == f"{root.pw_dir.rstrip('/')}/r"
    assert config.sample.prompts == ("~/p",) and config.seed == 7
    assert f"path: {base}/me/d" in show(config, {})
    (base / "again.yaml").write_text(dump(config))
    assert differences(to_dict(config), load("home.yaml", paths), "data") == []
    monkeypatch.setenv("HOME", "/elsewhere")
    assert load("again.yaml") == config
    for name in ("a~b", "./~", "x/~/y"):
        assert load("base.yaml", [f"run.dir={name}"]).run.dir == name
    assert load("base.yaml", ["run.dir='~'"]).run.dir == "/elsewhere"


def test_home_directories_of_arguments(base, monkeypatch, capsys):
    """Shells leave ~ in --out=~/x and in quotes; a file of that name is meant itself."""
    monkeypatch.setenv("HOME", str(base / "me"))
    (base / "me").mkdir()
    (base / "me" / "mine.yaml").write_text(BASE + "seed: 7\n")
    assert main(["config", "show", "~/mine.yaml"]) == 0
    assert "seed: 7 " in capsys.readouterr().out
    (base / "~run").mkdir()
    (base / "~run" / "config.yaml").write_text(BASE)
    assert load_config("~run").run.dir == "./~run"
    assert main(["config", "show", "~run"]) == 0
    assert main(["config", "show", "~nobody-here/x.yaml"]) == 2
    assert "~nobody-here is no user's home directory" in capsys.readouterr().err
    (base / "text.txt").write_text("words to train on\n\nand more\n")
    made = ["data", "prepare", "text.txt", "--tokenizer", "bytes", "--out=~/d"]
    assert main(made) == 0 and (base / "me" / "d" / "manifest.json").is_file()
    plan = ["plan", "~/mine.yaml", "target=cpu:1", "--analytic", "--html=~/p.html"]
    main([*plan, f"plan.cache={base}/cache"])
    assert (base / "me" / "p.html").is_file() and not (base / "~").exists()


def test_defaults_sources_and_types(base):
    config, sources = load_with_sources("base.yaml", ["mesh.tensor=2", "rules.mlp=[]"])
    assert sources["steps"] == "base.yaml:1"
    assert sources["model.mlp_dim"] == "base.yaml:9"
    assert sources["optimizer.learning_rate"] == "base.yaml:12"
    assert sources["mesh.tensor"] == sources["rules.mlp"] == "override"
    assert sources["mesh.data"] == sources["storage"] == sources["mesh.dcn"] == "default"
    assert config.optimizer.learning_rate == 3e-4
    assert config.mesh.data == 1 and config.sample.prompts == ("",)
    assert type(config.model).__module__ == "jaxlm.models.llama"
    assert load("base.yaml") == load(base / "base.yaml") != config


def test_last_override_wins(base):
    assert load("base.yaml", ["seed=1", "seed=2"]).seed == 2


def test_include(base):
    (base / "sub").mkdir()
    (base / "sub" / "wide.yaml").write_text("model: {mlp_dim: 128}\nrules: {mlp: [tensor, fsdp]}\n")
    (base / "sub" / "run.yaml").write_text(
        "seed: 3\ninclude: [../base.yaml, wide.yaml]\nmodel:\n  head_dim: 16\n"
        "rules: {heads: []}\nmesh: {dcn: {data: 2}}\n"
    )
    config, sources = load_with_sources("sub/run.yaml", ["mesh.dcn.fsdp=2", "rules.mlp=[fsdp]"])
    assert (config.seed, config.model.mlp_dim, config.model.head_dim) == (3, 128, 16)
    assert config.model.embed_dim == 64
    assert config.mesh.dcn == {"data": 2, "fsdp": 2}
    assert config.rules == {"mlp": ("fsdp",), "heads": ()}
    assert sources["model.mlp_dim"] == "sub/wide.yaml:1"
    assert sources["model.head_dim"] == "sub/run.yaml:4"
    assert sources["model.embed_dim"] == "base.yaml:5"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["mesh.tensr=2"], ["override", "mesh.tensr", "did you mean mesh.tensor?"]),
        (["num_layers=2"], ["did you mean model.num_layers?"]),
        (["modle.mlp_dim=2"], ["did you mean model.mlp_dim?"]),
        (["mesh.qqqqqq=2"], ["mesh has replica, stage"]),
        (["qqqqqq=2"], ["top-level names are name, steps"]),
        (["model.max_positions=9"], ["key of family gpt2; model.family is llama"]),
        (["model.family=gtp2"], ["must be one of ", "gpt2, llama, mixtral", "did you mean gpt2?"]),
        (["model.family=[a]"], ["must be text, not a list"]),
        (["mesh=3"], ["mesh=3 must be a mapping"]),
        (["mesh=null"], ["must be a mapping; leave it out"]),
        (["mesh.dcn=[1]"], ["mesh.dcn=[1] must be a mapping"]),
        (["mesh.dcn.data=x"], ["mesh.dcn.data=x must be an integer"]),
        (["rules.mlp={a: b}"], ["must be text, not a mapping"]),
        (["steps=two"], ["steps=two must be an integer"]),
        (["steps=2.5"], ["must be an integer; nearest: 2 or 3"]),
        (["steps=1e30"], ["below 2**63"]),
        (["steps=null"], ["steps=null is null; leave the key out"]),
        (["steps="], ["steps= must be an integer"]),
        (["steps=0"], ["steps=0 must be at least 1"]),
        (["seed=5000000000"], ["must be at most 4294967295"]),
        (["optimizer.b1=1.5"], ["must be at most 1.0"]),
        (["optimizer.learning_rate=nan"], ["must be a finite number"]),
        (["optimizer.learning_rate=.inf"], ["must be a finite number"]),
        (["optimizer.learning_rate=-.Inf"], ["must be a"]),
        (["optimizer.learning_rate=1e999"], ["must be a finite number"]),
        (["log.wandb=1"], ["must be true or false"]),
        (["log.wandb=yes"], ["must be true or false"]),
        (["remat.policy=ful"], ["must be one of none, full", "did you mean full?"]),
        (["name=[a"], ["name=[a", "not valid YAML"]),
        (["sample.prompts=[a, null]"], ["is null"]),
        (["seed=null"], ["is null"]),
        (['name="a\\q"'], ["not valid YAML", "quote"]),
        (['name="a": "b"'], ["must be text, not a mapping", "in quotes"]),
        (["sample.prompts=[INST] hi [/INST]"], ["not valid YAML", "quote"]),
        (
            ["devices.coordinator=[::1]:80"],
            ["not valid YAML", "'devices.coordinator=\"[::1]:80\"'"],
        ),
        (["sample.prompts='a' or 'b'"], ["not valid YAML", "sample.prompts="]),
        (["sample.prompts=[Q: why]"], ["must be text, not a mapping", "in quotes"]),
        (["optimizer.train=[*.norm]"], ["not valid YAML", "['*norm*']"]),
        (["run={dir: !old }"], ["run.dir", "YAML tag !old", "in quotes"]),
        (["seed=!x 3"], ["YAML tag !x"]),
        (["mesh={data: 2"], ["not valid YAML"]),
        (["run.dir=~no-such-user/x"], ["~no-such-user", "./~no-such-user/x"]),
        (["data.path=~\0"], ["no user's home"]),
        (["tensor"], ["is not key=value"]),
        (["=3"], ["is not key=value"]),
        (["include=base.yaml"], ["in files only"]),
        (["a\nb=3"], ["unknown key a b"]),
    ],
)
def test_override_errors(base, overrides, parts):
    message = error_of(load, "base.yaml", overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("text", ["[INST] hi [/INST]", "'a' or 'b'", "[x](y)", "{x}/\ny", "[a"])
def test_the_quotes_that_an_error_names_work(base, text):
    advice = error_of(load, "base.yaml", [f"sample.prompts={text}"]).partition("one text: ")[2]
    assert load("base.yaml", shlex.split(advice)).sample.prompts == (text,)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["f.yaml: the file is empty"]),
        ("# nothing\n", ["f.yaml: the file is empty"]),
        ("- 1\n", ["f.yaml:1", "not a list"]),
        ("3\n", ["not a single value"]),
        ("a: [1\nb: 2\n", ["f.yaml:2", "not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
        ('a: "\\UFFFFFFFF"\n', ["not valid YAML"]),
        ("a: " + "[" * 5000, ["not valid YAML"]),
        ("a: \x01\n", ["not valid YAML"]),
        (BASE + "steps: 3\n", ["f.yaml:14", "steps is given twice"]),
        (BASE + "mesh: {data: 1, data: 2}\n", ["mesh.data is given twice"]),
        (BASE + "mesh:\n", ["f.yaml:14", "mesh", "must be a mapping; leave it out"]),
        (BASE + "mesh: {tensr: 1}\n", ["f.yaml:14: unknown key mesh.tensr"]),
        (BASE + "mesh.data: 2\n", ["in a file write mesh: {data: ...}"]),
        (BASE + "name: 3\n", ["name=3 must be text; write '3' in quotes"]),
        (BASE + "name: no\n", ["must be text; write 'no' in quotes"]),
        (BASE + "name: 2024-01-02\n", ["must be text"]),
        (BASE + "seed: !!int x\n", ["must be an integer"]),
        (BASE + "log: {wandb: on}\n", ["must be true or false"]),
        (BASE + "remat: &x {names: *x}\n", ["must be text, not a mapping"]),
        (BASE + "remat:\n  names: &x [*x]\n", ["must be text, not a list"]),
        (BASE + "? [a]\n: 1\n", ["a key must be a plain word"]),
        (BASE.replace("  mlp_dim: 96\n", ""), ["required and not set: model.mlp_dim"]),
        ("steps: 3\n", ["model.family, model.num_layers", "data.path"]),
        (
            "steps: 3\nmodel: {rope_theta: 1}\n",
            ["is a key of family ", "; set model.family=", "llama or mixtral"],
        ),
        (GPT2 + "include: nowhere.yaml\n", ["f.yaml:14: include: nowhere.yaml", "No such file"]),
        (GPT2 + "include: f.yaml\n", ["cycle: f.yaml -> f.yaml"]),
        (GPT2 + "include: back.yaml\n", ["cycle: f.yaml -> back.yaml -> f.yaml"]),
        (GPT2 + "include: 3\n", ["include=3 must be text"]),
        (GPT2 + "include: .\n", ["Is a directory"]),
    ],
)
def test_file_errors(base, text, parts):
    (base / "back.yaml").write_text("include: f.yaml\n")
    (base / "f.yaml").write_text(text)
    message = error_of(load, "f.yaml")
    assert all(part in message for part in parts), message


def test_unreadable_files(base):
    (base / "latin.yaml").write_bytes(b"name: \xff\n")
    assert "latin.yaml: not UTF-8" in error_of(load, "latin.yaml")
    assert "gone.yaml: cannot be read: No such file" in error_of(load, "gone.yaml")
    assert "Is a directory" in error_of(load, base)
    assert "cannot be read" in error_of(load, "a\0b")


# Writing.


@pytest.mark.parametrize("file", ["base.yaml", "gpt2.yaml"])
def test_dump_and_show_round_trip(base, file):
    odd = ["name='3e-4'", "sample.prompts=['', ' x', \"a\\nb: #\\t\", 'null', '\u00e9\U0001f600']"]
    more = ["run.dir='no: x'", "mesh.dcn.data=2", "rules.mlp=[]", "optimizer.epsilon=1e-30"]
    config, sources = load_with_sources(file, odd + more)
    for text in (dump(config), show(config, sources)):
        (base / "again.yaml").write_text(text, encoding="utf-8")
        assert load("again.yaml") == config
    assert yaml.safe_load(dump(load(file))) == to_dict(load(file))
    lines = show(config, sources).splitlines()
    assert len(lines) == len(dump(config).splitlines())
    assert any(line.startswith("steps: 100 ") and line.endswith(f"# {file}:1") for line in lines)


def test_differences(base):
    old = to_dict(load("base.yaml"))
    new = load("base.yaml", ["model.mlp_dim=128", "seed=1", "mesh.tensor=2"])
    assert differences(old, new, "checkpoint") == [("model.mlp_dim", 96, 128)]
    assert [key for key, *_ in differences(old, new, "numbers")] == ["seed", "model.mlp_dim"]
    assert differences(old, load("base.yaml"), "recompiles") == []
    del old["model"]["qk_norm"], old["optimizer"]  # an older run: keys had their defaults
    assert differences(old, load("base.yaml"), "checkpoint") == []
    assert ("model.family", "llama", "gpt2") in differences(old, load("gpt2.yaml"), "checkpoint")
    assert differences({}, new, "data")[0] == ("seed", 0, 1)


@pytest.mark.parametrize(
    "family, overrides, expected",
    [
        ("llama", (), False),
        ("gpt2", (), False),
        ("mixtral", (), True),
        ("qwen3_moe", ("model.router=sigmoid", "model.dispatch=capacity"), True),
        ("mixtral", ("model.balance_coefficient=0", "model.router_z_loss=0.1"), False),
        ("qwen3_moe", ("model.balance=bias", "model.dispatch=capacity"), False),
        ("mixtral", ("model.balance=none",), False),
    ],
)
def test_microbatches_change_numbers_where_a_loss_balances_experts(family, overrides, expected):
    """test_moe.py trains with several microbatches: the losses differ there and there alone."""
    old = tiny.config(family, *overrides)
    new = tiny.config(family, *overrides, "batch.microbatches=8")
    assert new.model.microbatches_change_numbers == expected
    found = differences(to_dict(old), new, "numbers")
    assert found == ([("batch.microbatches", 1, 8)] if expected else [])
    assert ("changing it: numbers" in explain("batch.microbatches", new)) == expected
    assert "where experts have model.balance=loss" in explain("batch.microbatches")


# The schema and its explanations.


def test_schema():
    keys = schema(*FAMILIES)
    assert len(keys) < 150
    for key in keys.values():
        assert key.field.metadata["doc"], key.name
        assert set(key.field.metadata["changes"]) <= set(CHANGES), key.name
        assert key.field.metadata["doc"] in explain(key.name)
    assert keys["model.num_heads"].families == ()
    assert keys["model.rope_theta"].families == tuple(f for f in FAMILIES if f != "gpt2")
    assert set(RULES) | set(STORAGE) <= set(DIMS)
    assert {axis for table in (RULES, STORAGE) for axes in table.values() for axis in axes} <= set(
        AXES
    )


def test_explain(base):
    config = load("base.yaml", ["mesh.tensor=2"])
    text = explain("mesh.tensor", config)
    assert "an integer, default 1" in text and "now: 2" in text and "recompiles" in text
    assert "family gpt2 only" in explain("model.max_positions", config)
    text = explain("model.rope_theta")  # families have other defaults
    assert "default 10000.0, family llama only" in text and "or qwen3_moe only" in text
    assert "default 10000.0, family" in explain("model.rope_theta", config)
    assert "default false" in explain("model.tie_embeddings")  # not that of one family
    assert "one of adamw" in explain("optimizer.name") and "required" in explain("steps")
    assert "model.biases" in explain("model") and "model.rope_theta" in explain("model")
    assert "default [tensor]" in explain("rules.mlp") and "dimensions" in explain("rules")
    assert len(explain("")) > len(explain("optimizer")) > 500
    assert "did you mean mesh.tensor?" in error_of(explain, "mesh.tensr")
    assert "did you mean mlp?" in error_of(explain, "rules.mpl")


def test_derived_values(base):
    config = load("base.yaml")
    assert run_dir(config).as_posix() == "runs/run"
    assert run_dir(load("base.yaml", ["run.dir=/x/y"])).as_posix() == "/x/y"
    assert padded_vocab(config.model) == 1024
    assert padded_vocab(dataclasses.replace(config.model, vocab_size=1024)) == 1024


# Validation.


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ({}, 1, {}),
        ({"data": 2, "tensor": 4}, 8, {"data": 2, "tensor": 4}),
        ({"data": -1}, 8, {"data": 8}),
        ({"data": -1, "tensor": 4}, 8, {"data": 2, "tensor": 4}),
        ({"fsdp": -1, "tensor": 8}, 8, {"tensor": 8}),
    ],
)
def test_resolve_mesh(mesh, devices, sizes):
    resolved = resolve_mesh(Mesh(**mesh), devices)
    assert resolved == dict.fromkeys(AXES, 1) | sizes
    assert tuple(resolved) == AXES


@pytest.mark.parametrize(
    ("mesh", "devices", "parts"),
    [
        ({"data": -1, "fsdp": -1}, 8, ["mesh.data=-1 and mesh.fsdp=-1", "only one"]),
        ({"data": 0}, 8, ["mesh.data=0 must be at least 1"]),
        ({"data": -2}, 8, ["mesh.data=-2 must be at least 1"]),
        ({"tensor": 16}, 8, ["needs 16", "too few: 8", "mesh.tensor=8", "devices.simulate=16"]),
        ({"tensor": 2}, 8, ["uses 2 of 8", "mesh.data=-1"]),
        ({"tensor": 3}, 8, ["uses 3 of 8", "mesh.tensor=-1"]),
        ({"data": 2, "tensor": 3}, 7, ["uses 6 of 7", "1 or 7"]),
        ({"tensor": 3, "data": -1}, 8, ["mesh.data=-1", "divide by 3", "2 or 4"]),
        ({"tensor": 16, "data": -1}, 8, ["needs 16", "too few: 8"]),
    ],
)
def test_resolve_mesh_errors(mesh, devices, parts):
    message = error_of(resolve_mesh, Mesh(**mesh), devices)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("file", "overrides", "devices"),
    [
        ("base.yaml", [], None),
        ("base.yaml", [], 1),
        ("gpt2.yaml", [], 1),
        ("base.yaml", ["mesh.data=-1"], 16),
        ("base.yaml", ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=4"], 16),
        ("base.yaml", ["mesh.tensor=8"], 8),  # kv heads are replicated
        ("base.yaml", ["mesh.expert=2"], 2),
        ("base.yaml", ["mesh.data=4", "mesh.dcn.data=2", "batch.microbatches=4"], 4),
        ("base.yaml", ["mesh.fsdp=2", "storage.mlp=[fsdp]", "storage.embed=[]"], 2),
        ("base.yaml", ["rules.kv_heads=[]", "mesh.tensor=8"], 8),
        ("base.yaml", ["rules.seq=[tensor]"], 1),  # a conflict that no device meets
        ("base.yaml", ["remat.policy=names", "remat.names=[mlp,key]", "remat.offload=mlp"], 1),
        ("base.yaml", ["optimizer.schedule=wsd", "optimizer.warmup_steps=80"], 1),
        ("base.yaml", ["devices.coordinator=h:1", "devices.num_processes=2"], 1),
    ],
)
def test_valid(base, file, overrides, devices):
    validate(load(file, overrides), devices)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["mesh.data=-1", "mesh.fsdp=-1"], ["only one axis"]),
        (["mesh.data=0"], ["mesh.data=0"]),
        (["pipeline.repeats=2"], ["pipeline.repeats=2 has no effect with mesh.stage=1"]),
        (
            ["mesh.context=2", "batch.sequence_length=4102", "loss.chunks=1"],
            ["=4102 is not divisible by 2 x mesh.context=2", "4100 or 4104"],
        ),
        (
            ["mesh.context=8", "attention.context=all_to_all", "batch.sequence_length=4100"],
            ["=4100 is not divisible by", "mesh.context=8"],
        ),
        (
            ["mesh.context=16", "attention.context=all_to_all"],
            ["model.num_heads=8 is not divisible by mesh.context=16"],
        ),
        (["attention.backend=cudnn", "model.sliding_window=50"], ["not given a window"]),
        (["mesh.dcn.dta=2"], ["mesh.dcn.dta", "did you mean data?"]),
        (["mesh.dcn.data=0"], ["mesh.dcn.data=0 must be at least 1"]),
        (["mesh.data=4", "mesh.dcn.data=3"], ["does not divide mesh.data=4; use 2 or 4"]),
        (["rules.hed=[tensor]"], ["'hed' is not a dimension; did you mean heads?"]),
        (["storage.embed=[fdsp]"], ["'fdsp' is not a mesh axis; did you mean fsdp?"]),
        (["rules.mlp=[tensor,tensor]"], ["axis tensor is given twice"]),
        (["rules.layers=[fsdp]"], ["rules.layers", "use rules.layers=[]"]),
        (["rules.norm=[tensor]"], ["rules.norm", "use rules.norm=[]"]),
        (["rules.parts=[tensor]"], ["rules.parts", "use rules.parts=[]"]),
        (["storage.parts=[fsdp]"], ["storage.parts", "use storage.parts=[]"]),
        (
            ["mesh.fsdp=8", "rules.cache_kv_heads=[fsdp]", "rules.cache_batch=[]"],
            ["model.num_kv_heads", "mesh.fsdp=8"],
        ),
        (["rules.seq=[tensor]", "mesh.tensor=2"], ["rules.seq and rules.heads both use axis"]),
        (["mesh.data=32"], ["batch.sequences=16", "mesh.data=32", "batch.sequences=32", "=16"]),
        (["mesh.data=4", "batch.microbatches=3"], ["12 (mesh.data=4 x batch.microbatches=3)"]),
        (["batch.microbatches=3"], ["nearest: batch.sequences=15 or 18", "microbatches=2 or 4"]),
        (["batch.sequence_length=66"], ["loss.chunks=4", "batch.sequence_length=64 or 68"]),
        (["batch.sequence_length=65", "mesh.tensor=2"], ["mesh.tensor=2", "64 or 66"]),
        (["mesh.tensor=16"], ["model.num_heads=8", "model.num_heads=16, or mesh.tensor=8"]),
        (["model.num_kv_heads=3"], ["does not divide model.num_heads=8", "2 or 4"]),
        (
            ["model.num_heads=12", "mesh.tensor=6"],
            ["model.num_kv_heads=4", "mesh.tensor=4 or 12", "rules.kv_heads=[]"],
        ),
        (["model.mlp_dim=97", "mesh.tensor=2"], ["model.mlp_dim=97", "96 or 98"]),
        (["model.embed_dim=63", "mesh.fsdp=2"], ["model.embed_dim=63", "62 or 64"]),
        (
            ["model.num_heads=3", "model.num_kv_heads=3", "mesh.tensor=3"]
            + ["batch.sequence_length=48"],
            ["padded to 1024", "2 or 4", "model.vocab_multiple=384"],
        ),
        (["storage.mlp=[data]", "mesh.data=4", "model.mlp_dim=98"], ["model.mlp_dim=98"]),
        (["model.head_dim=7"], ["must be even", "6 or 8"]),
        (["model.rope_theta=0"], ["model.rope_theta=0.0 must be above 0"]),
        (["model.rope_scaling=llama3", "model.rope_low_freq_factor=9"], ["must be below"]),
        (["optimizer.b2=1"], ["optimizer.b2=1.0 must be below 1"]),
        (["optimizer.train=[]"], ["optimizer.train is empty"]),
        (["remat.names=[mlp]"], ["remat.names has no effect with remat.policy=full"]),
        (["remat.policy=names"], ["needs remat.names"]),
        (["remat.policy=names", "remat.names=[mpl]"], ["did you mean mlp?"]),
        (["remat.policy=names", "remat.names=mlp", "remat.offload=key"], ["key must be in"]),
        (["devices.coordinator=h:1"], ["without devices.num_processes"]),
        (["devices.coordinator=h", "devices.num_processes=2"], ["must be host:port"]),
        (["devices.process_id=1"], ["works with devices.coordinator only"]),
        (
            ["devices.coordinator=h:1", "devices.num_processes=2", "devices.process_id=2"],
            ["from 0 to 1"],
        ),
        (["attention.backend=cudnn", "model.attention_softcap=50"], ["no soft cap"]),
        (["attention.backend=cudnn", "precision.compute=float32"], ["bfloat16 only"]),
        (["precision.reduce=bfloat16", "precision.compute=float32"], ["has no effect"]),
        (["checkpoint.keep_every=750"], ["checkpoint.keep_every=500 or 1000"]),
        (["checkpoint.keep_every=5", "checkpoint.every=0"], ["checkpoint.every=5"]),
        (["name=a/b"], ["name='a/b'"]),
        (["name="], ["name=''"]),
        (["name=.."], ["name='..'"]),
        (["data.path="], ["data.path is empty"]),
        (["sample.every=5", "sample.prompts=[]"], ["sample.prompts is empty"]),
        (["sample.top_k=2000"], ["model.vocab_size=1000"]),
        (["sample.top_p=0"], ["sample.top_p=0.0"]),
    ],
)
def test_invalid(base, overrides, parts):
    message = error_of(validate, load("base.yaml", overrides), None)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["batch.sequence_length=2048"], ["model.max_positions=1024", "model.max_positions=2048"]),
        (["model.num_kv_heads=4"], ["use model.num_kv_heads=8"]),
        (["sample.every=1", "sample.tokens=4096"], ["sample.tokens=4096"]),
        (
            ["storage.positions=[data]", "mesh.data=2", "model.max_positions=65"],
            ["model.max_positions=65"],
        ),
    ],
)
def test_invalid_gpt2(base, overrides, parts):
    message = error_of(validate, load("gpt2.yaml", overrides), None)
    assert all(part in message for part in parts), message


def test_devices_are_checked(base):
    assert "uses 1 of 8" in error_of(validate, load("base.yaml"), 8)
    config = load("base.yaml", ["mesh.data=-1"])
    validate(config, None)
    assert "batch.sequences=16" in error_of(validate, config, 6)


def test_all_that_does_not_fit_is_named_and_so_are_near_meshes(base):
    config = load("base.yaml", ["mesh.tensor=3", "mesh.data=4"])
    message = error_of(validate, config, 12)
    for name in ("num_heads=8", "num_kv_heads=4", "vocab_size=1000, padded to 1024,"):
        assert f"model.{name} is not divisible by mesh.tensor=3" in message
    message = error_of(validate, load("base.yaml", ["mesh.tensor=16", "mesh.data=1"]), 16)
    *_, hint = message.split("; nearest meshes that fit: ")
    for mesh in hint.split(" or "):
        sizes = [f"mesh.{part}" for part in mesh.split(",")]
        validate(load("base.yaml", sizes), 16)
    assert "tensor=8" in hint


# Random mistakes.

JUNK = [
    "null", "~", "[", "]", "{a: b}", "[a, [b]]", "nan", "-.inf", "1e999", "-1", "0", "2.5", "true",
    "x", "''", '"a\\nb"', "&a [*a]", "*a", "!!int x", "!!python/object:os.system x", "2024-99-99",
    "1:30", "a: b: c", "%", "@", "\x00", "\u2028", "9" * 5000, "0x1f", "- a", "[null]", "{}", "",
    "? a", "3", "tensor", "[tensor]", "{tensor: -1}", "[[[[", "\ud800", "1_", "--- a", "...", "#",
]  # fmt: skip


def test_fuzz(base):
    """Whatever is written, loading and validating end well or in a UserError of one line."""
    rng = random.Random(0)
    names = [
        *schema(*FAMILIES),
        "mesh",
        "model",
        "rules",
        "mesh.dcn.tensor",
        "rules.mlp",
        "include",
    ]
    refused = 0
    for _ in range(1500):
        name = rng.choice(names)
        if rng.random() < 0.3:
            at = rng.randrange(len(name))
            name = (
                name[:at] + rng.choice(["", ".", "x", "\n", "=", " ", ":", "..a"]) + name[at + 1 :]
            )
        override = f"{name}={rng.choice(JUNK)}"
        try:
            validate(load("base.yaml", [override]), rng.choice([None, 1, 2, 6]))
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, override
    assert refused > 900


def test_fuzz_files(base):
    rng = random.Random(1)
    for _ in range(300):
        lines = GPT2.splitlines()
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(lines))
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(["", *JUNK, ":", "  ", "\t", "\n- "])
        text = "\n".join(lines).encode("utf-8", "replace")
        (base / "f.yaml").write_bytes(text)
        try:
            validate(load("f.yaml"), None)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, text


@pytest.mark.parametrize(
    "name, devices",
    [("quickstart", 1), ("quickstart", 8), ("tinyshakespeare", 1), ("gpt2-124m", 8)]
    + [("llama3-8b", 64), ("llama3-8b", 256)],
)
def test_the_configs_that_we_ship_run_on_what_they_name(name, devices):
    file = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
    validate(load(file), devices)
