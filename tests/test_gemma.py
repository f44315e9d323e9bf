"""Gemma 2 and 3 against transformers, config.json both ways, and a layout."""

import dataclasses

import pytest
import test_config_json
import test_parity
import tiny
import transformers

from jaxlm import shrink, verify
from jaxlm.config import UserError
from jaxlm.configfile import load
from jaxlm.interop import carried
from jaxlm.models import gemma, layer_windows

# Rows of 32 tokens are longer than the window; 5 layers are a pattern of 3 and two local layers.
SHAPE = test_parity.LLAMA | dict(
    num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=9,
    eos_token_id=None, pad_token_id=None, bos_token_id=None,
)  # fmt: skip
MODELS = {
    "gemma2": transformers.Gemma2Config(
        **SHAPE, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE | dict(num_hidden_layers=5), sliding_window_pattern=3, rope_local_base_freq=100.0,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    ),
}  # fmt: skip
FILE = {k: v for k, v in test_config_json.SHARED.items() if k not in ("hidden_act", "rope_scaling")}
FILE |= dict(
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24, sliding_window=9,
    attention_bias=False, final_logit_softcapping=30.0,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
FILES = {
    "gemma2": FILE | dict(attn_logit_softcapping=50.0, layer_types=LAYERS),
    "gemma3_text": FILE | dict(
        sliding_window_pattern=2, rope_local_base_freq=100.0, attn_logit_softcapping=None,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    ),
}  # fmt: skip
UNSUPPORTED = {
    "attention_bias": True, "hidden_activation": "silu", "use_bidirectional_attention": True,
    "attn_logit_softcapping": 50.0, "sliding_window": None, "layer_types": LAYERS[::-1],
    "rope_scaling": dict(rope_type="yarn", factor=4.0), "sliding_window_pattern": 0,
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def theirs(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return directory, test_parity.make_theirs(MODELS[request.param], directory)


@pytest.mark.parametrize("mesh_case", ["one device", tiny.nightly("fsdp x tensor")])
def test_logits_and_gradients_are_those_of_transformers(theirs, mesh_case):
    test_parity.check_logits_and_gradients(*theirs, mesh_case, theirs[1].config.model_type)


def test_there_and_back_keeps_all_bits(theirs, tmp_path):
    test_parity.check_round_trip(*theirs, tmp_path)


def test_greedy_is_that_of_transformers(theirs):
    test_parity.check_greedy(*theirs, "fsdp x tensor", [[1, 2, 3], [250, 4, 5, 6, 7]], 14)


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in FILES for key in FILES[kind]])
def test_null_and_missing_keys_are_read_as_transformers_reads_them(kind, key, tmp_path):
    if key != "sliding_window":  # null is a config, of which transformers makes no model: below
        test_config_json.check_null(tmp_path, kind, FILES[kind], key)
    message = test_config_json.check_missing(tmp_path, kind, FILES[kind], key)
    assert not message or key == "num_hidden_layers" and "layer_types" in message


SPELLINGS = {
    "of version 5": dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=7e4),
            sliding_attention=dict(rope_type="default", rope_theta=300.0),
        ),
    ),
    "one of both": dict(rope_parameters=dict(full_attention=dict(rope_theta=7e4))),
    "all local": dict(layer_types=LAYERS[:1] * 2),
    "all global": dict(layer_types=LAYERS[1:] * 2),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_ropes_and_patterns_are_read_as_transformers_reads_them(case, tmp_path):
    values = {k: v for k, v in FILES["gemma3_text"].items() if k != "rope_scaling"}
    unread = ("_sliding_window_pattern", "sliding_window_pattern")  # where there are layer_types
    assert not test_config_json.check(tmp_path, "gemma3_text", values | SPELLINGS[case], unread)


def test_a_changed_base_is_exported_with_the_other_one(tmp_path):
    """Spelt as in version 5, where both are in one key."""
    kept = FILES["gemma3_text"] | SPELLINGS["of version 5"] | dict(model_type="gemma3_text")
    del kept["rope_scaling"], kept["rope_theta"], kept["rope_local_base_freq"]
    before = gemma.Config(**gemma.from_hugging_face(kept))
    model = dataclasses.replace(before, rope_theta=5e4)
    ours = gemma.to_hugging_face(model) | dict(torch_dtype="float32")
    merged = carried._merge(kept, ours, model, 0)
    assert gemma.Config(**gemma.from_hugging_face(merged)) == model != before


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_is_not_supported_is_named(key):
    hf = gemma.to_hugging_face(tiny.config("gemma", "model.sliding_window=8").model)
    del hf["layer_types"]
    with pytest.raises(UserError, match=key if "rope" not in key else "rope of full layers"):
        gemma.from_hugging_face(hf | {key: UNSUPPORTED[key]})


@pytest.mark.parametrize(
    "keys", [["qk_norm=false"], ["attention_softcap=3"]], ids=["two bases", "a cap"]
)
def test_what_transformers_lacks_is_refused(keys):
    config = tiny.config("gemma", "model.sliding_window=8", *[f"model.{key}" for key in keys])
    with pytest.raises(UserError, match="Hugging Face's Gemma"):
        gemma.to_hugging_face(config.model)


def test_local_layers_need_a_window():
    with pytest.raises(UserError, match="sliding_window=0 with model.locals_per_global=5"):
        verify.validate(tiny.config("gemma"))


def test_layers_and_a_small_copy():
    """26 layers are four patterns and two local layers, of which a small copy keeps two and two."""
    config = load(tiny.CONFIGS.parent.parent / "configs/gemma3-4b.yaml", ["model.num_layers=26"])
    assert layer_windows(config.model) == ([1024] * 5 + [0]) * 4 + [1024] * 2
    small = shrink.shrink(config, [{"data": 2}])
    assert small.model.num_layers == 14
    assert small.model.query_pre_attn_scalar == small.model.head_dim


def test_a_layout_trains_the_same_model():
    """One pattern of two and a local layer; fewer kv heads than devices along tensor."""
    config = tiny.config(
        "gemma", "model.num_layers=3", "model.locals_per_global=1", "model.sliding_window=9",
        "model.attention_softcap=50", "model.logit_softcap=30",
    )  # fmt: skip
    test_parity.check_layout(config, {"data": 2, "tensor": 4})
