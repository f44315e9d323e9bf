"""Hugging Face directories: sharded files, what is refused and in which words, the commands."""

import json
import shutil
import struct
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import transformers
import yaml
from safetensors.numpy import load_file, save_file

from jaxlm.cli import main
from jaxlm.config import UserError
from jaxlm.interop.hugging_face import _run_config, import_run
from jaxlm.interop.read import load_params, read_model
from jaxlm.interop.safetensors_files import INDEX, SINGLE
from jaxlm.interop.write import save_params
from jaxlm.mesh import open_mesh
from jaxlm.models.llama import to_hugging_face
from jaxlm.state import init_params, model_structure

FIRST = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def ours():
    """(config, params) of a tiny Llama on one device."""
    config = tiny.config("llama", "batch.sequences=8", "model.tie_embeddings=false")
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return config, jax.jit(lambda: init_params(config, layout))()[0]


@pytest.fixture
def source(ours, tmp_path):
    """A directory with the tiny Llama, one file."""
    save_params(tmp_path / "hf", ours[1], ours[0].model)
    return tmp_path / "hf"


def load(directory):
    model, _ = read_model(directory)
    values = [f"model.{k}={str(v).lower()}" for k, v in model.items()]
    config = tiny.config("llama", *values)
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
        return load_params(directory, structure, layout, mesh)


def refused(action, *words):
    """The action fails with one line that has these words."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def edit_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, value in arrays.items():
        # Padding of ours was initialised too; it is neither exported nor used.
        rows = slice(300 if name in ("embed", "head") else None)
        np.testing.assert_array_equal(np.asarray(value)[rows], np.asarray(expected[name])[rows])


def test_sharded_files_and_their_index(ours, tmp_path):
    config, params = ours
    save_params(tmp_path / "hf", params, config.model, shard_bytes=40_000)
    files = sorted(path.name for path in tmp_path.glob("hf/*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    held = {file: load_file(tmp_path / "hf" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    sizes = {file: sum(a.nbytes for a in arrays.values()) for file, arrays in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 40_000
    same(load(tmp_path / "hf"), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_rounded_once(dtype, ours, tmp_path):
    config, params = ours
    save_params(tmp_path / "hf", params, config.model, dtype=dtype)
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    narrow = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    assert about["torch_dtype"] == dtype
    assert {a.dtype for a in load_file(tmp_path / "hf" / SINGLE).values()} == {np.dtype(narrow)}
    same(load(tmp_path / "hf"), {n: np.asarray(a).astype(narrow) for n, a in params.items()})


def test_float16_refuses_what_it_cannot_hold(ours, tmp_path):
    params = ours[1] | {"final_norm.scale": ours[1]["final_norm.scale"] + 1e6}
    export = lambda: save_params(tmp_path / "hf", params, ours[0].model, dtype="float16")
    refused(export, "model.norm.weight", "bfloat16")
    assert not list(tmp_path.iterdir())


def test_files_of_the_bare_model_and_old_buffers(source, ours):
    arrays = load_file(source / SINGLE)
    arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
    arrays["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(arrays, source / SINGLE)
    same(load(source), ours[1])


INDEXED = {  # how a tied head is stored -> whether it is read
    "listed, absent": True,
    "listed, equal": True,
    "listed, different": False,
    "in the file, not listed": True,
    "in place of the embedding": True,
    "listed in a file that is absent": False,
    "an old buffer listed, absent": True,
}


def read_by_transformers(directory):
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(directory)
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("case", INDEXED)
def test_a_tied_head_in_an_index(case, prefix, source, ours):
    """As in transformers, but that a different head is refused: there 4 drops it, 5 unties it."""
    edit_json(source / "config.json", tie_word_embeddings=True)
    arrays = {n.replace("model.", prefix): a for n, a in load_file(source / SINGLE).items()}
    (source / SINGLE).unlink()
    embed = FIRST.replace("model.", prefix)
    arrays["lm_head.weight"] = arrays[embed] + (case == "listed, different")
    places = dict.fromkeys(arrays, "one.safetensors")
    if case == "in the file, not listed":
        del places["lm_head.weight"]
    if case == "in place of the embedding":
        del places[embed], arrays[embed]
    if case == "listed in a file that is absent":
        places["lm_head.weight"] = "two.safetensors"
    if case == "an old buffer listed, absent":
        places[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = "one.safetensors"
    if "absent" in case:
        del arrays["lm_head.weight"]
    save_file(arrays, source / "one.safetensors", metadata={"format": "pt"})
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if prefix == "model.":
        theirs = read_by_transformers(source)
        assert (theirs is None) == (case == "listed in a file that is absent")
        if theirs is not None:
            head, embedding = theirs.get_output_embeddings(), theirs.get_input_embeddings()
            assert (head.weight is embedding.weight) == INDEXED[case]
    if INDEXED[case]:
        read = load(source)
        assert "head" not in read
        same(read, {name: array for name, array in ours[1].items() if name != "head"})
    elif case == "listed, different":
        refused(lambda: load(source), "lm_head.weight", "tie_word_embeddings", "config.json")
    else:
        refused(lambda: load(source), "two.safetensors", "No such file")


def test_a_tied_head_of_one_file(source):
    edit_json(source / "config.json", tie_word_embeddings=True)
    refused(lambda: load(source), "lm_head.weight", "tie_word_embeddings", "config.json")
    arrays = load_file(source / SINGLE)
    save_file(arrays | {"lm_head.weight": arrays[FIRST]}, source / SINGLE)
    assert "head" not in load(source)
    del arrays["lm_head.weight"], arrays[FIRST]
    save_file(arrays, source / SINGLE)
    refused(lambda: load(source), FIRST, "missing")


TENSORS = {
    "missing": (lambda a: [a.pop(n) for n in sorted(a) if "mlp" in n], ["missing", "and 1 more"]),
    "unexpected": (lambda a: a.update(more=a[FIRST]), ["more: unexpected"]),
    "shape": (lambda a: a.update({FIRST: a[FIRST][1:]}), [FIRST, "[299, 32], not [300, 32]"]),
    "transposed": (lambda a: a.update({FIRST: a[FIRST].T.copy()}), [FIRST, "[32, 300]"]),
    "type": (lambda a: a.update({FIRST: a[FIRST].astype(np.int8)}), [FIRST, "I8", "type"]),
    "double": (lambda a: a.update({FIRST: a[FIRST].astype(np.float64)}), [FIRST, "F64"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors_are_refused_by_name(case, source):
    change, words = TENSORS[case]
    arrays = load_file(source / SINGLE)
    change(arrays)
    save_file(arrays, source / SINGLE)
    refused(lambda: load(source), *words)


def entry(start, stop, shape=(1,), dtype="F32"):
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]})


HEADERS = {
    "empty file": b"",
    "absurd length": struct.pack("<Q", 1 << 62) + b"{}",
    "longer than the file": struct.pack("<Q", 1000) + b"{}",
    "not JSON": f'{{"a":{entry(0, 4)}',
    "deep": '{"a":' * 10_000,
    "out of range": f'{{"a":{entry(0, 400)}}}',
    "overlapping": f'{{"a":{entry(0, 4)},"b":{entry(0, 4)}}}',
    "backwards": f'{{"a":{entry(4, 0)}}}',
    "overflow": f'{{"a":{entry(0, 4, (1 << 62, 4))}}}',
    "uncovered": f'{{"a":{entry(0, 2, (1,), "F16")}}}',
    "unknown type": f'{{"a":{entry(0, 4, (1,), "F99")}}}',
    "repeated name": f'{{"a":{entry(0, 4)},"a":{entry(0, 4)}}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused(case, source):
    data = HEADERS[case]
    if isinstance(data, str):
        data = struct.pack("<Q", len(data)) + data.encode() + bytes(4)
    (source / SINGLE).write_bytes(data)
    refused(lambda: load(source), SINGLE, "not a sound safetensors file")


WEIGHT_MAPS = {
    "above": ("../x.safetensors", "plain name"),
    "absolute": ("/etc/passwd", "plain name"),
    "below": ("a/x.safetensors", "plain name"),
    "dots": ("..", "plain name"),
    "number": (3, "plain name"),
    "surrogate": ("\ud800.safetensors", "plain name"),
    "link": ("link.safetensors", "leads out"),
    "absent": ("absent.safetensors", "absent.safetensors"),
}


@pytest.mark.parametrize("case", WEIGHT_MAPS)
def test_an_index_does_not_lead_out_of_its_directory(case, source):
    file, words = WEIGHT_MAPS[case]
    outside = source.parent / "x.safetensors"
    (source / SINGLE).rename(outside)
    (source / "link.safetensors").symlink_to(outside)
    names = dict.fromkeys(load_file(outside), file)
    (source / INDEX).write_text(json.dumps({"weight_map": names}))
    refused(lambda: load(source), words)


def test_links_within_a_cache_are_followed(source, ours):
    cache = source.parent / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in list(source.iterdir()):
        path.rename(cache / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    same(load(snapshot), ours[1])


INDEXES = {
    "repeated": ('{"weight_map": {"a": "b", "a": "c"}}', "repeats 'a'"),
    "no map": ("{}", "weight_map"),
    "list": ("[]", "not a JSON object"),
    "deep": ("[" * 100_000, "cannot be read"),
    "another tensor": ('{"weight_map": {"a": "one.safetensors"}}', "does not agree"),
    "a number": ('{"weight_map": {"a": 1, "b": "x"}}', "plain name"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_indexes_are_refused(case, source):
    text, words = INDEXES[case]
    (source / SINGLE).rename(source / "one.safetensors")
    (source / INDEX).write_text(text)
    refused(lambda: load(source), INDEX, words)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_is_never_read(name, source, ours):
    events = []
    watching = [True]
    hook = lambda event, _: events.append(event) if watching and "pickle" in event else None
    sys.addaudithook(hook)
    same(load(source), ours[1])
    (source / SINGLE).unlink()
    (source / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(lambda: load(source), name, "convert it to safetensors")
    watching.clear()
    assert "pickle.find_class" not in events


CONFIGS = {
    "attention_bias": (dict(attention_bias=True), "attention_bias=True"),
    "mlp_bias": (dict(mlp_bias=True), "mlp_bias=True"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantized"),
    "hidden_act": (dict(hidden_act="gelu"), "hidden_act=gelu"),
    "yarn": (dict(rope_scaling={"type": "yarn", "factor": 2}), "rope_scaling.rope_type=yarn"),
    "new yarn": (dict(rope_parameters={"rope_type": "yarn"}), "rope_parameters.rope_type=yarn"),
    "model_type": (dict(model_type="mamba"), "model_type=mamba"),
    "no model_type": (dict(model_type=None), "model_type=None"),
    "text": (dict(hidden_size="many"), "config.json"),
    "zero": (dict(num_attention_heads=0, head_dim=None), "config.json"),
    "layers": (dict(num_hidden_layers=10**9), "too few"),
    "other width": (dict(intermediate_size=48), "mlp.gate_proj.weight"),
}
GPT2 = dict(model_type="gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=300)
GPT2_CONFIGS = ["activation_function", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"]


@pytest.mark.parametrize("case", CONFIGS)
def test_unsupported_configs_name_the_key(case, source):
    values, words = CONFIGS[case]
    edit_json(source / "config.json", **values)
    out = source.parent / "run"
    refused(lambda: import_run(str(source), str(out), ["mesh.fsdp=8"]), words)
    assert sorted(path.name for path in source.parent.iterdir()) == ["hf"]


@pytest.mark.parametrize("key", GPT2_CONFIGS)
def test_unsupported_gpt2_configs_name_the_key(key, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert read_model(tmp_path)[0]["mlp_dim"] == 128
    edit_json(tmp_path / "config.json", **{key: "relu" if key == GPT2_CONFIGS[0] else True})
    refused(lambda: read_model(tmp_path), key)


def test_both_spellings_of_rope(source):
    rope = dict(rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=64)
    found = []
    for values in (
        dict(rope_theta=7.0, rope_scaling=rope),
        dict(rope_theta=1.0, rope_scaling=None, rope_parameters=rope | dict(rope_theta=7.0)),
    ):
        edit_json(source / "config.json", **values)
        found.append(read_model(source)[0])
    assert found[0] == found[1] and found[0]["rope_theta"] == 7.0
    assert found[0]["rope_scaling"] == "llama3" and found[0]["rope_original_length"] == 64


@pytest.mark.parametrize(
    "key", ["qk_norm=true", "attention_softcap=3", "logit_softcap=3", "sliding_window=3"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_transformers_lacks_is_not_exported(family, key, ours, tmp_path):
    model = tiny.config(family, f"model.{key}").model
    export = lambda: save_params(tmp_path / "out", ours[1], model)
    refused(export, f"model.{key.partition('=')[0]}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_the_size_of_files_is_checked(size, data, tmp_path, capsys):
    config = f"{tiny.CONFIGS / 'llama.yaml'}"
    arguments = ["export", config, str(tmp_path / "out"), f"data.path={data}", "mesh.data=-1"]
    assert main([*arguments, f"--shard-gb={size}"]) == 2
    assert "--shard-gb=" in capsys.readouterr().err


def test_an_existing_output_is_refused_and_kept(source, ours):
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    refused(lambda: save_params(source, ours[1], ours[0].model), str(source))
    refused(lambda: import_run(str(source), str(source), ["mesh.fsdp=8"]), str(source))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["hf"]
    empty = source.parent / "empty"
    empty.mkdir()
    save_params(empty, ours[1], ours[0].model)
    assert (empty / SINGLE).exists()


def test_import_and_export_as_commands(source, data, capsys):
    shutil.copy(data / "tokenizer.json", source)
    run, again = source.parent / "run", source.parent / "again"
    assert main(["import", str(source), str(run), "mesh.data=2", "mesh.fsdp=4"]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run"]["dir"] == str(run) and config["batch"]["sequence_length"] == 1024
    assert (run / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert main(["export", str(run), str(again), "--shard-gb", "1e-5"]) == 0
    about = json.loads((again / "config.json").read_text())
    assert about["bos_token_id"] == about["eos_token_id"] == 0
    assert json.loads((again / "tokenizer_config.json").read_text())["bos_token"]
    before, after = load_file(source / SINGLE), {}
    for file in again.glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert main(["import", str(source), str(run), "mesh.fsdp=8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_overrides_do_not_change_the_imported_model(source):
    model, hf = read_model(source)
    make = lambda *overrides: _run_config(source, source.parent / "run", model, hf, overrides, 8)
    refused(lambda: make("model.embed_dim=64"), "model.embed_dim=64", "says 32")
    assert make("model.vocab_multiple=64").model.vocab_multiple == 64
    assert to_hugging_face(make().model)["hidden_size"] == 32
