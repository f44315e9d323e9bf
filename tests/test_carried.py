"""What a run keeps of a Hugging Face directory, what of it stays true, and what an export says."""

import dataclasses
import json

import pytest
import tiny
import transformers
from test_round_trip import CASES, publish

from jaxlm import run
from jaxlm.config import UserError
from jaxlm.configfile import model_class
from jaxlm.data import load_tokenizer
from jaxlm.data.tokenize import make_bytes
from jaxlm.interop import carried
from jaxlm.interop.read import read_model
from jaxlm.models import family_module


def imported(root, family="llama"):
    """(published directory, run directory with all but weights)."""
    source, out = root / "published", root / "imported"
    publish(source, CASES[family], weights=False)
    (source / carried.SPECIAL).write_text('{"bos_token": "<|bos|>", "pad_token": "<|pad|>"}')
    carried.keep(source, out)
    run.keep_tokenizer(out, load_tokenizer(source))
    return source, out


def take_along(source, tokenizer, out, *overrides):
    config = tiny.config("llama", f"run.dir={out}", f"checkpoint.start_from={source}", *overrides)
    carried.take_along(config, tokenizer)
    return out / carried.FOLDER


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def give_back(out, kept, tokenizer, model, length):
    """config.json of an export."""
    out.mkdir()
    ours = family_module(model.family).to_hugging_face(model, length or 1)
    ours["torch_dtype"] = "float32"
    carried.give_back(out, kept, tokenizer, ours, model, length)
    return json.loads((out / "config.json").read_text())


def test_the_same_tokens_carry_all_along(tmp_path):
    source, old = imported(tmp_path)
    (tmp_path / "run" / carried.FOLDER).mkdir(parents=True)
    (tmp_path / "run" / carried.FOLDER / "chat_template.jinja").write_text("of another start")
    kept = take_along(old, load_tokenizer(old), tmp_path / "run")
    assert contents(kept) == contents(old / carried.FOLDER)
    assert all((source / name).read_bytes() == data for name, data in contents(kept).items())
    run.keep_tokenizer(tmp_path / "run", load_tokenizer(old))
    again = take_along(tmp_path / "run", load_tokenizer(old), tmp_path / "on")  # and so on
    assert contents(again) == contents(kept)


def test_a_new_run_removes_no_model_that_lies_in_its_directory(tmp_path):
    _, old = imported(tmp_path, "qwen3_moe")
    config = tiny.config("qwen3_moe", f"run.dir={old}")
    model = old / carried.FOLDER / "model.safetensors"
    model.write_bytes(b"weights")
    before = contents(old)
    with pytest.raises(UserError, match=r"there is .*model\.safetensors; move it away"):
        carried.take_along(config, load_tokenizer(old))
    assert contents(old) == before
    model.unlink()
    (old / carried.FOLDER).rename(tmp_path / "elsewhere")
    (old / carried.FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="there is a link; move it away"):
        carried.take_along(config, load_tokenizer(old))
    (old / carried.FOLDER).unlink()
    (tmp_path / "elsewhere").rename(old / carried.FOLDER)
    carried.take_along(config, load_tokenizer(old))  # of a start that saved nothing
    assert not (old / carried.FOLDER).exists()


def test_another_tokenizer_carries_no_tokens_along(tmp_path, caplog):
    _, old = imported(tmp_path)
    kept = take_along(old, make_bytes(), tmp_path / "run")
    assert sorted(path.name for path in kept.iterdir()) == ["LICENSE", "config.json"]
    config = json.loads((kept / "config.json").read_text())
    assert not config.keys() & set(carried.IDS) and config["max_position_embeddings"] == 300
    assert "the tokenizer of data.path is not the tokenizer of that run" in caplog.text
    run.keep_tokenizer(tmp_path / "run", make_bytes())
    model = model_class("llama")(**read_model(kept)[0])
    give_back(tmp_path / "out", kept, tmp_path / "run", model, 16)
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 0, None)
    assert found.max_position_embeddings == 300


def test_other_separators_are_written_into_what_is_carried(tmp_path):
    _, old = imported(tmp_path)
    tokenizer = load_tokenizer(old)
    around = dataclasses.replace(tokenizer.separators, bos=2, eos=1, stop=(3,), prompt=None)
    tokenizer = dataclasses.replace(tokenizer, separators=around)
    kept = take_along(old, tokenizer, tmp_path / "run")
    run.keep_tokenizer(tmp_path / "run", tokenizer)
    special = json.loads((kept / carried.SPECIAL).read_text())
    assert special == {"bos_token": "<|eot|>", "pad_token": "<|pad|>", "eos_token": "<|eos|>"}
    give_back(
        tmp_path / "out", kept, tmp_path / "run", model_class("llama")(**read_model(kept)[0]), 16
    )
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (read.bos_token_id, read.eos_token_id, read.temperature) == (2, [1, 3], 0.6)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (2, 1, 3)
    assert read.chat_template and read("a")["input_ids"][0] == 2


def test_another_family_carries_nothing_along(tmp_path, caplog):
    _, old = imported(tmp_path, "mixtral")
    assert not take_along(old, load_tokenizer(old), tmp_path / "run").exists()
    assert "model_type=mixtral there, and model.family=llama here" in caplog.text


CHANGES = {  # a key of the model -> what transformers then reads
    "llama": ("rope_theta", 7000.0, lambda config: config.rope_parameters["rope_theta"]),
    "mixtral": ("sliding_window", 5, lambda config: config.sliding_window),
    "qwen3_moe": ("normalize_gates", False, lambda config: config.norm_topk_prob),
    "gpt2": ("norm_epsilon", 1e-3, lambda config: config.layer_norm_epsilon),
}


@pytest.mark.parametrize("family", CHANGES)
def test_what_a_run_changed_is_written_and_nothing_else(family, tmp_path):
    source, old = imported(tmp_path, family)
    key, value, read = CHANGES[family]
    model = model_class(family)(**read_model(source)[0])
    kept = old / carried.FOLDER
    same = give_back(tmp_path / "same", kept, old, model, 16)
    changed = dataclasses.replace(model, **{key: value})
    there = give_back(tmp_path / "out", kept, old, changed, 16)
    assert read(transformers.AutoConfig.from_pretrained(tmp_path / "out")) == value
    assert read(transformers.AutoConfig.from_pretrained(tmp_path / "same")) != value
    assert len([k for k in same.keys() | there.keys() if same.get(k) != there.get(k)]) == 1
    if family != "gpt2":
        long = give_back(tmp_path / "long", kept, old, changed, 400)  # trained beyond 300
        assert long == there | {"max_position_embeddings": 400}


def test_theta_of_version_5_is_changed_in_one_spelling(tmp_path):
    source, old = imported(tmp_path, "mixtral")  # it has rope_parameters
    model = model_class("mixtral")(**read_model(source)[0] | {"rope_theta": 7.0})
    there = give_back(tmp_path / "out", old / carried.FOLDER, old, model, 16)
    assert "rope_parameters" not in there and there["rope_theta"] == 7.0
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert found.rope_parameters["rope_theta"] == 7.0


def test_a_run_of_its_own_says_how_to_generate(tmp_path):
    (tmp_path / "run").mkdir()
    run.keep_tokenizer(tmp_path / "run", make_bytes())
    model = tiny.config("llama").model
    there = give_back(tmp_path / "out", None, tmp_path / "run", model, 48)
    assert there["max_position_embeddings"] == 48 and "pad_token_id" not in there
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 0, 0)


def test_an_import_without_tokenizer_json_takes_none_from_some_data(tmp_path):
    _, old = imported(tmp_path)
    (old / "tokenizer.json").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_bytes(make_bytes().data)
    config = tiny.config("llama", f"run.dir={old}", f"data.path={tmp_path / 'data'}")
    assert run.tokenizer_place(config) is None
    with pytest.raises(UserError, match=r"has no tokenizer\.json; import the model from a"):
        run.find_tokenizer(config)
    (old / carried.FOLDER).rename(tmp_path / "gone")  # an old run, trained on this data
    assert run.tokenizer_place(config) == tmp_path / "data"


def test_only_small_files_of_data_are_kept(tmp_path):
    source, _ = imported(tmp_path)
    for name in ("modeling_x.py", "pytorch_model.bin", "adapter_config.json", "x.safetensors"):
        (source / name).write_bytes(b"{}")
    about = json.loads((source / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": ["x--modeling_x.T", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.C"}}))
    carried.keep(source, tmp_path / "run")
    kept = tmp_path / "run" / carried.FOLDER
    names = {"config.json", "generation_config.json", "tokenizer_config.json", carried.SPECIAL}
    assert {path.name for path in kept.iterdir()} == names | {"LICENSE"}
    run.keep_tokenizer(tmp_path / "run", load_tokenizer(source))
    model = model_class("llama")(**read_model(source)[0])
    there = give_back(tmp_path / "out", kept, tmp_path / "run", model, 0)
    assert "auto_map" not in there and "_name_or_path" not in there
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_links_and_large_files_are_refused(tmp_path, monkeypatch):
    source, _ = imported(tmp_path, "qwen3_moe")
    outside = tmp_path / "secret"
    outside.write_text("secret")
    for name in ("added_tokens.json", "additional_chat_templates/x.jinja"):
        (source / name).symlink_to(outside)
        with pytest.raises(UserError, match="leads out"):
            carried.keep(source, tmp_path / "run")
        (source / name).unlink()
    (source / "additional_chat_templates").rename(tmp_path / "templates")
    (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(UserError, match="leads out"):
        carried.keep(source, tmp_path / "run")
    (source / "additional_chat_templates").unlink()
    monkeypatch.setattr(carried, "LIMIT", 100)
    with pytest.raises(UserError, match=r"config\.json: has \d+ bytes, and at most 100"):
        carried.keep(source, tmp_path / "run")
    assert "secret" not in str(contents(tmp_path / "run"))


def test_links_of_a_cache_are_followed(tmp_path):
    source, _ = imported(tmp_path, "qwen3_moe")
    before, snapshot = contents(source), tmp_path / "cache" / "snapshots" / "0123"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for i, name in enumerate(before):
        (source / name).rename(tmp_path / "cache" / "blobs" / str(i))
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{i}")
    carried.keep(snapshot, tmp_path / "run")
    kept = contents(tmp_path / "run" / carried.FOLDER)
    assert kept == {name: data for name, data in before.items() if name != "tokenizer.json"}
    assert "additional_chat_templates/tool.jinja" in kept
