"""A conversation model from a Hugging Face directory through a run and back, read by transformers.

The directories are made here as their publishers write them: with chat templates, lists of ends,
padding tokens and a generation_config.json.
"""

import copy
import dataclasses
import json
import os
import stat

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxlm import run
from jaxlm.cli import main
from jaxlm.data import prepare
from jaxlm.interop import carried

SPECIAL = ["<|bos|>", "<|eos|>", "<|eot|>", "<|pad|>"]  # ids 0 to 3
TEXTS = ["the mesh and the axis", "a shard of every layer", "gather and reduce the batch"]
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
MASK = 0o027
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the mesh?"}]
SHARED = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=270, rms_norm_eps=1e-5, initializer_range=0.2, hidden_act="silu", use_cache=True,
    attention_dropout=0.0, max_position_embeddings=300, transformers_version="4.46.0",
    torch_dtype="bfloat16", _name_or_path="somebody/model",
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What its publisher says of a model."""

    config: dict  # config.json
    generation: dict  # generation_config.json
    tokenizer: dict  # tokenizer_config.json
    files: dict = dataclasses.field(default_factory=dict)  # others: name -> text
    bos: bool = False  # tokenizer.json puts one before a text


CASES = {
    "llama": Case(  # as Llama 3.2, of which factor times original is not the longest
        SHARED | dict(
            model_type="llama", architectures=["LlamaForCausalLM"], intermediate_size=48,
            tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=LLAMA3, pretraining_tp=1,
            attention_bias=False, mlp_bias=False, bos_token_id=0, eos_token_id=[1, 2, 999],
        ),
        dict(bos_token_id=0, eos_token_id=[1, 2, 999], do_sample=True, temperature=0.6, top_p=0.9),
        dict(bos_token="<|bos|>", eos_token="<|eot|>", chat_template=TEMPLATE),
        {"LICENSE": "terms\n"},
        bos=True,
    ),
    "qwen3_moe": Case(
        SHARED | dict(
            model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], intermediate_size=48,
            moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
            rope_theta=1e6, rope_scaling=None, sliding_window=None, max_window_layers=2,
            mlp_only_layers=None, tie_word_embeddings=False, router_aux_loss_coef=0.001,
            eos_token_id=2, pad_token_id=3, output_router_logits=False,
        ),
        dict(eos_token_id=[2, 1], pad_token_id=3, repetition_penalty=1.05, top_k=20),
        dict(bos_token=None, eos_token="<|eot|>"),
        {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool.jinja": "T" + TEMPLATE},
    ),
    "mixtral": Case(  # as transformers 5 writes it
        {k: v for k, v in SHARED.items() if k != "torch_dtype"} | dict(
            model_type="mixtral", architectures=["MixtralForCausalLM"], intermediate_size=16,
            num_local_experts=4, num_experts_per_tok=2, dtype="bfloat16", sliding_window=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=False,
        ),
        dict(bos_token_id=0, eos_token_id=1, pad_token_id=3),
        dict(bos_token="<|bos|>", eos_token="<|eos|>", add_bos_token=True, add_eos_token=False),
        {"chat_template.jinja": TEMPLATE},
        bos=True,
    ),
    "gpt2": Case(
        dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=32, n_layer=2, n_head=4,
            n_positions=128, n_ctx=128, vocab_size=270, bos_token_id=1, eos_token_id=1,
            attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, initializer_range=0.2,
            summary_type="cls_index", layer_norm_epsilon=1e-5,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
        dict(bos_token_id=1, eos_token_id=1, max_new_tokens=9, _from_model_config=True),
        dict(
            bos_token="<|eos|>", eos_token="<|eos|>", unk_token="<|eos|>",
            chat_template=[
                {"name": "default", "template": TEMPLATE}, {"name": "tool", "template": "T"},
            ],
        ),
    ),
}  # fmt: skip


def make_tokenizer(bos):
    """A byte-level BPE tokenizer of 270 tokens, whose special tokens come first."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=266, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(TEXTS, trainer)
    engine.add_special_tokens([AddedToken("<|call|>", special=True)])
    if bos:
        engine.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    return engine


def write(directory, name, values):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(values if isinstance(values, str) else json.dumps(values))


def publish(directory, case, weights=True):
    """A directory as a publisher writes it."""
    directory.mkdir()
    if weights:
        torch.manual_seed(0)
        values = copy.deepcopy(case.config)  # transformers writes into it
        kind = transformers.AutoConfig.for_model(**values)
        transformers.AutoModelForCausalLM.from_config(kind).float().save_pretrained(directory)
    make_tokenizer(case.bos).save(str(directory / "tokenizer.json"))
    about = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=123456)
    about |= dict(pad_token="<|pad|>", clean_up_tokenization_spaces=False)
    write(directory, "config.json", case.config)
    write(directory, "generation_config.json", case.generation)
    write(directory, "tokenizer_config.json", about | case.tokenizer)
    for name, text in case.files.items():
        write(directory, name, text)


@pytest.fixture(scope="module")
def trips(tmp_path_factory):
    """family -> {what: directory}: published, imported, exported; trained for a step, exported."""
    made = {}

    def travel(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            usual = os.umask(MASK)
            try:
                made[family] = journey(root, CASES[family])
            finally:
                os.umask(usual)
        return made[family]

    return travel


def journey(root, case):
    names = ("published", "imported", "untrained", "data", "trained", "moved", "again")
    places = {name: root / name for name in names}
    publish(places["published"], case)
    command("import", places["published"], places["imported"], "mesh.data=8")
    command("export", places["imported"], places["untrained"])
    (root / "text.txt").write_text("\n".join(TEXTS * 40))
    prepare.prepare(places["data"], [root / "text.txt"], places["imported"], report=lambda _: None)
    command("train", *start_from(places["imported"], places["data"], places["trained"]))
    places["trained"].rename(places["moved"])
    command("export", places["moved"], places["again"], "--dtype", "bfloat16")
    return places


def command(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def start_from(imported, data, out, *overrides):
    """The arguments of a training of one step from imported weights."""
    overrides = ["steps=1", "mesh.data=8", "batch.sequence_length=16", "loss.chunks=1", *overrides]
    return [
        imported / "config.yaml", f"checkpoint.start_from={imported}", f"data.path={data}",
        f"run.dir={out}", "optimizer.warmup_steps=0", "precision.compute=float32", *overrides,
    ]  # fmt: skip


def facts(directory):
    """config.json and generation_config.json as transformers reads them."""
    model = transformers.AutoConfig.from_pretrained(directory).to_dict()
    generation = transformers.GenerationConfig.from_pretrained(directory).to_dict()
    return model, generation


def read_json(directory, name):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("export", ["untrained", "again"])
def test_every_fact_comes_back(family, export, trips):
    places = trips(family)
    (before, generation), (after, generation_after) = map(
        facts, (places["published"], places[export])
    )
    assert after.pop("dtype") == {"untrained": "float32", "again": "bfloat16"}[export]
    before.pop("dtype", None)
    before.pop("_name_or_path", None), after.pop("_name_or_path", None)
    assert after == before
    assert generation_after == generation
    # In the words of the publisher too, but for what tells of the weights and of other places.
    there, here = (read_json(places[place], "config.json") for place in ("published", export))
    for gone in carried.NOT_CARRIED:
        there.pop(gone, None), here.pop(gone, None)
    assert {key: here[key] for key in there} == there
    for name, text in CASES[family].files.items():
        assert (places[export] / name).read_text() == text


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("export", ["untrained", "again"])
def test_a_chat_is_the_same_tokens(family, export, trips):
    places = trips(family)
    before, after = (
        transformers.AutoTokenizer.from_pretrained(places[place]) for place in ("published", export)
    )
    for options in ({}, {"add_generation_prompt": True}):
        text, ids = (
            before.apply_chat_template(CHAT, tokenize=tokenize, **options)
            for tokenize in (False, True)
        )
        assert after.apply_chat_template(CHAT, tokenize=False, **options) == text
        assert after.apply_chat_template(CHAT, **options)["input_ids"] == ids["input_ids"]
    assert after.chat_template == before.chat_template
    assert after.model_max_length == before.model_max_length == 123456
    assert after.pad_token == "<|pad|>" and after.eos_token == before.eos_token
    assert after.convert_tokens_to_ids("<|call|>") == before.convert_tokens_to_ids("<|call|>")


@pytest.mark.parametrize("family", CASES)
def test_transformers_generates_with_what_comes_back(family, trips):
    places = trips(family)
    tokens = {}
    for place in ("published", "untrained", "again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(places[place], dtype="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(places[place])
        chat = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**chat, do_sample=False, max_new_tokens=12)
        tokens[place] = made[0].tolist()
        assert model.generation_config.eos_token_id == CASES[family].generation["eos_token_id"]
    assert tokens["untrained"] == tokens["published"]
    length = chat["input_ids"].shape[1]
    assert tokens["again"][:length] == tokens["published"][:length]
    assert len(tokens["again"]) > length


@pytest.mark.parametrize("family", CASES)
def test_all_that_commands_write_has_the_usual_permissions(family, trips):
    places = trips(family)
    for name in ("imported", "untrained", "data", "moved", "again"):
        for path in [places[name], *places[name].rglob("*")]:
            usual = (0o777 if path.is_dir() else 0o666) & ~MASK
            assert stat.S_IMODE(path.stat().st_mode) == usual, path


def test_texts_beyond_the_positions_of_a_model_are_warned_of(trips, caplog, capsys):
    places, words = trips("llama"), "max_position_embeddings=300"
    generate = ["generate", places["imported"], "--prompt", "the", "--temperature", "0"]
    assert not list(carried.beyond(run.load_config(places["imported"]), "", 300))
    command(*generate, "--tokens", 300)
    assert f"tokens=300 to generate is above {words}" in caplog.text
    caplog.clear()
    long = "batch.sequence_length=304"
    command("config", "check", *start_from(places["imported"], places["data"], "x", long))
    assert f"{long} is above {words}" in capsys.readouterr().out
    command("eval", places["imported"], "--split", "train", f"data.path={places['data']}", long)
    assert f"{long} is above {words}" in caplog.text
    places = trips("gpt2")  # learned positions: there nothing can be computed beyond
    assert main(["generate", str(places["imported"]), "--tokens", "400"]) == 2
