"""Qwen 2 and 3 against transformers, config.json both ways, and every layout."""

import pytest
import test_config_json
import test_parity
import tiny
import transformers

from jaxlm.config import UserError
from jaxlm.models import qwen

SHAPE = test_parity.LLAMA | dict(num_key_value_heads=2, eos_token_id=None)
MODELS = {
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
}
FILES = {
    "qwen2": test_config_json.SHARED | dict(
        use_sliding_window=False, sliding_window=4096, layer_types=["full_attention"] * 2,
    ),
    "qwen3": test_config_json.SHARED | dict(attention_bias=False, layer_types=None),
}  # fmt: skip
UNSUPPORTED = {
    "use_sliding_window": True, "attention_bias": True, "hidden_act": "gelu",
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": dict(rope_type="yarn", factor=4.0),
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
    test_parity.check_greedy(*theirs, "fsdp x tensor", [[1, 2, 3], [250, 4, 5, 6, 7]], 12)


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in FILES for key in FILES[kind]])
def test_null_and_missing_keys_are_read_as_transformers_reads_them(kind, key, tmp_path):
    test_config_json.check_null(tmp_path, kind, FILES[kind], key)
    message = test_config_json.check_missing(tmp_path, kind, FILES[kind], key)
    assert not message or key == "num_hidden_layers" and "layer_types" in message


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_is_not_supported_is_named(key):
    hf = qwen.to_hugging_face(tiny.config("qwen").model)
    with pytest.raises(UserError, match=key):
        qwen.from_hugging_face(hf | {key: UNSUPPORTED[key]})


def test_norms_with_biases_are_no_model_of_transformers():
    with pytest.raises(UserError, match="model.qk_norm=True with model.qkv_biases=True"):
        qwen.to_hugging_face(tiny.config("qwen", "model.qkv_biases=true").model)


def test_a_layout_trains_the_same_model():
    """With all that a block can have, and fewer kv heads than devices along tensor."""
    config = tiny.config("qwen", "model.qkv_biases=true")
    test_parity.check_layout(config, {"data": 2, "tensor": 4})
