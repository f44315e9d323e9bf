"""config.json with null, missing and renamed keys: read as transformers reads it, or refused."""

import json

import pytest
import torch
import transformers

from jaxlm.config import UserError
from jaxlm.configfile import model_class
from jaxlm.interop.read import read_model
from jaxlm.models import family_module

SHARED = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, vocab_size=300, rms_norm_eps=1e-4, initializer_range=0.1,
    hidden_act="silu", max_position_embeddings=64, rope_theta=5e3, rope_scaling=None,
    tie_word_embeddings=False,
)  # fmt: skip
EXPERTS = SHARED | dict(num_experts_per_tok=2, router_aux_loss_coef=0.3)
CONFIGS = {
    "llama": SHARED | dict(attention_bias=False, mlp_bias=False),
    "gpt2": dict(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, vocab_size=300,
        initializer_range=0.1, layer_norm_epsilon=1e-4, activation_function="gelu_new",
        tie_word_embeddings=True, scale_attn_weights=True, reorder_and_upcast_attn=False,
        scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    ),
    "mixtral": EXPERTS | dict(num_local_experts=4, router_jitter_noise=0.0, sliding_window=9),
    "qwen3_moe": EXPERTS | dict(
        num_experts=4, moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], attention_bias=False, use_sliding_window=False, sliding_window=4096,
    ),
}  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
OURS = {"architectures", "transformers_version", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx"}
OURS |= {"max_position_embeddings", "head_dim", "n_inner"}  # null has a meaning in the last two


def write(directory, values):
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def theirs(directory):
    """The config as transformers reads it; None where it, or the model, is refused."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            transformers.AutoModelForCausalLM.from_config(config)
        return config
    except Exception:  # of many types
        return None


def check(tmp_path, kind, values, but=()):
    """Ours is read as theirs is: the config that it is translated back to is the same to them."""
    expected = theirs(write(tmp_path, values | dict(model_type=kind)))
    if expected is None:
        with pytest.raises(UserError) as caught:
            read_model(tmp_path)
        return str(caught.value)
    values = read_model(tmp_path)[0]
    model = model_class(values["family"])(**values)
    write(tmp_path, family_module(model.family).to_hugging_face(model))
    found = theirs(tmp_path).to_dict()
    for key, value in expected.to_dict().items():
        if key in found and key not in OURS and key not in but:
            assert found[key] == value, key
    assert found.get("head_dim") in (None, expected.to_dict().get("head_dim") or model.head_dim)
    return ""


def check_null(tmp_path, kind, values, key):
    """A key that is null."""
    message = check(tmp_path, kind, values | {key: None})
    if message:
        assert f"{tmp_path}/config.json: {key}=null" in message and "--" not in message


def check_missing(tmp_path, kind, values, key):
    """A key that is not there; the message where it is refused."""
    return check(tmp_path, kind, {name: value for name, value in values.items() if name != key})


CASES = [(family, key) for family, config in CONFIGS.items() for key in config]


@pytest.mark.parametrize(("family", "key"), CASES)
def test_null_is_read_as_transformers_reads_it(family, key, tmp_path):
    check_null(tmp_path, family, CONFIGS[family], key)


@pytest.mark.parametrize(("family", "key"), CASES)
def test_a_missing_key_is_read_as_transformers_reads_it(family, key, tmp_path):
    message = check_missing(tmp_path, family, CONFIGS[family], key)
    assert not message or (family, key) == ("gpt2", "n_head")  # its default does not divide n_embd


SPELLINGS = {
    "names of other families": ("gpt2", {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}),
    "heads and positions": (
        "gpt2", {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"},
    ),
    "experts of Mixtral": ("mixtral", {"num_local_experts": "num_experts"}),
    "experts of Qwen3": ("qwen3_moe", {"num_experts": "num_local_experts"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_other_names_of_keys(case, tmp_path):
    family, names = SPELLINGS[case]
    values = {names.get(key, key): value for key, value in CONFIGS[family].items()}
    assert not check(tmp_path, family, values)


VALUES = {
    "both ropes": dict(rope_scaling=dict(rope_theta=7.0), rope_parameters=dict(rope_theta=9.0)),
    "rope without theta": dict(rope_parameters=dict(rope_type="default")),
    "theta null in rope": dict(rope_parameters=dict(rope_theta=None)),
    "type null": dict(rope_scaling=dict(rope_type=None)),
    "no original length": dict(rope_scaling=LLAMA3),
    "outer original length": dict(
        rope_scaling=LLAMA3 | dict(original_max_position_embeddings=16),
        original_max_position_embeddings=33,
    ),
    "factor null": dict(rope_scaling=LLAMA3 | dict(factor=None)),
    "no factor": dict(rope_scaling=dict(rope_type="llama3")),
    "swish": dict(hidden_act="swish"),
    "text for a number": dict(rms_norm_eps="1e-5"),
    "text for a flag": dict(tie_word_embeddings="true"),
    "a fraction": dict(vocab_size=300.5),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values_are_read_as_transformers_reads_them(case, tmp_path):
    two_names = ("hidden_act",) if case == "swish" else ()
    message = check(tmp_path, "llama", CONFIGS["llama"] | VALUES[case], two_names)
    assert not message or message.startswith(f"{tmp_path}/config.json: ")
