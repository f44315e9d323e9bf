"""Our models against transformers: logits, every gradient, and round trips that keep all bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxlm import generate, verify
from jaxlm.interop.name_map import tensors, to_theirs
from jaxlm.interop.read import load_params, read_model
from jaxlm.interop.write import save_params
from jaxlm.mesh import open_mesh
from jaxlm.models.decoder import logits
from jaxlm.program import loss_and_grads
from jaxlm.sharding import batch_shardings
from jaxlm.state import State, init_params, model_structure

TOLERANCE, ROWS, LENGTH = 1e-4, 4, 32
LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    vocab_size=301, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
    rope_theta=5000.0,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
GPT2 = dict(
    n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=301, initializer_range=0.2,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
MIXTRAL = LLAMA | dict(
    num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, router_aux_loss_coef=0.3
)
QWEN3_MOE = LLAMA | dict(
    num_experts=8, num_experts_per_tok=3, num_key_value_heads=2, head_dim=16,
    moe_intermediate_size=24, router_aux_loss_coef=0.3,
)  # fmt: skip
MODELS = {
    "llama, untied": ("llama", LLAMA | dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "llama, tied": ("llama", LLAMA | dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama, rope of llama3": ("llama", LLAMA | dict(num_key_value_heads=1, rope_scaling=LLAMA3)),
    "llama, head_dim": ("llama", LLAMA | dict(num_key_value_heads=2, head_dim=16)),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, n_inner": ("gpt2", GPT2 | dict(tie_word_embeddings=False, n_inner=48)),
    "mixtral": ("mixtral", MIXTRAL | dict(tie_word_embeddings=False)),
    "mixtral, window": ("mixtral", MIXTRAL | dict(sliding_window=9)),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | dict(norm_topk_prob=True)),
    "qwen3_moe, gates as they are": ("qwen3_moe", QWEN3_MOE | dict(norm_topk_prob=False)),
}
KINDS = {
    "llama": transformers.LlamaConfig, "gpt2": transformers.GPT2Config,
    "mixtral": transformers.MixtralConfig, "qwen3_moe": transformers.Qwen3MoeConfig,
}  # fmt: skip
MESHES = {"one device": (1, []), "fsdp x tensor": (4, ["mesh.fsdp=2", "mesh.tensor=2"])}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """name of a case -> (directory, transformers model with all weights random)."""

    @functools.cache
    def make(case):
        family, values = MODELS[case]
        directory = tmp_path_factory.mktemp("hf")
        return directory, make_theirs(KINDS[family](**values), directory)

    return make


def make_theirs(config, directory):
    """A transformers model with all weights random, saved in the directory."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # norms are made with ones, biases with zeros
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def config_of(directory, *overrides):
    """A config with the model of a Hugging Face directory."""
    model = [f"model.{k}={str(v).lower()}" for k, v in read_model(directory)[0].items()]
    batch = [f"batch.sequences={ROWS}", f"batch.sequence_length={LENGTH}", "loss.z_loss=0"]
    return tiny.config(read_model(directory)[0]["family"], *model, *batch, *overrides)


def opened(directory, mesh_case, *overrides):
    """(config, mesh, layout, structure, params) of a directory on some mesh."""
    count, axes = MESHES[mesh_case]
    config = config_of(directory, *axes, *overrides)
    mesh, layout = open_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
        params = load_params(directory, structure, layout, mesh)
    return config, mesh, layout, structure, params


def make_batch(vocab_size, lengths=(LENGTH,)):
    """Random tokens, each row packed with documents of these lengths."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab_size, (ROWS, LENGTH + 1), np.int32)
    per_row = lambda parts: np.tile(np.concatenate(parts).astype(np.int32), (ROWS, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "positions": per_row([np.arange(n) for n in lengths]),
        "segments": per_row([np.full(n, i + 1) for i, n in enumerate(lengths)]),
    }


def place_batch(batch, config, layout, mesh):
    shardings = batch_shardings(config, layout, mesh)
    return {name: jax.device_put(batch[name], shardings[name]) for name in shardings}


def our_logits(config, mesh, layout, structure, params, batch):
    @jax.jit
    def forward(params, batch):
        model = structure.merge(params)
        hidden, _, _ = model(batch["tokens"], batch["positions"], batch["segments"], layout)
        whole = jax.sharding.PartitionSpec()
        head = jax.sharding.reshard(model.head_weight(layout), whole)
        return logits(jax.sharding.reshard(hidden, whole), head, config.model)

    with jax.set_mesh(mesh):
        scores = np.asarray(forward(params, place_batch(batch, config, layout, mesh)))
    assert np.isneginf(scores[..., config.model.vocab_size :]).all()
    return scores[..., : config.model.vocab_size]


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def error(ours, expected, norm=0.0):
    """Largest difference relative to the largest value, or to a small part of the global norm."""
    return np.abs(ours - expected).max() / max(np.abs(expected).max(), 1e-4 * norm)


def in_files(case, name, array):
    """(name, array) in the files of a parameter: in memory a layer's experts are one array."""
    mixtral = case.startswith("mixtral")
    name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
    if ".experts." not in name:
        return [(name, array)]
    layer, which = name.rsplit(".", 1)
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    if which == "down_proj":
        return [(f"{layer}.{e}.{down}.weight", one) for e, one in enumerate(array)]
    halves = [(e, np.split(one, 2)) for e, one in enumerate(array)]
    return [
        (f"{layer}.{e}.{part}.weight", half)
        for e, pair in halves
        for part, half in zip((gate, up), pair, strict=True)
    ]


def their_balance_loss(model, out):
    """The sum over layers of transformers' loss for one layer, times its coefficient."""
    c, logits = model.config, getattr(out, "router_logits", None) or ()
    one = lambda x: load_balancing_loss_func((x,), c.num_local_experts, c.num_experts_per_tok)
    return sum((c.router_aux_loss_coef * one(x) for x in logits), torch.zeros(()))


# test_every_layout.py holds every family on a mesh to one device.
@pytest.mark.parametrize("mesh_case", ["one device", tiny.nightly("fsdp x tensor")])
@pytest.mark.parametrize("case", MODELS)
def test_logits_and_gradients_are_those_of_transformers(case, mesh_case, theirs):
    check_logits_and_gradients(*theirs(case), mesh_case, case)


def check_logits_and_gradients(directory, model, mesh_case, case=""):
    """Of one batch, within TOLERANCE; the balance loss of experts too."""
    config, mesh, layout, structure, params = opened(directory, mesh_case, "loss.z_loss=0.01")
    batch = make_batch(config.model.vocab_size)
    weights = np.random.default_rng(2).random((ROWS, LENGTH), np.float32)
    batch["weights"] = weights * (weights > 0.2)
    scores = our_logits(config, mesh, layout, structure, params, batch)
    expected = their_logits(model, batch["tokens"])
    assert np.abs(expected).max() > 1
    found = {"logits": error(scores, expected)}

    state = State(jnp.zeros((), jnp.int32), params, {}, ())
    step = jax.jit(lambda state, batch: loss_and_grads(config, structure, state, batch, layout))
    with jax.set_mesh(mesh):
        loss, weight, grads, aux = step(state, place_batch(batch, config, layout, mesh))
    assert float(weight) == pytest.approx(batch["weights"].sum(), rel=1e-6)
    model.zero_grad()
    options = {"output_router_logits": True} if "experts_per_token" in vars(config.model) else {}
    out = model(torch.tensor(batch["tokens"], dtype=torch.long), **options)
    scores, balance = out.logits, their_balance_loss(model, out)
    targets, w = torch.tensor(batch["targets"], dtype=torch.long), torch.tensor(batch["weights"])
    nll = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    log_z = torch.logsumexp(scores, -1)
    ((w * (nll + 0.01 * log_z**2)).sum() / w.sum() + balance).backward()
    if options:
        ours = float(aux["router/balance_loss"]) / float(weight)
        assert ours == pytest.approx(balance.item(), rel=1e-5)
    mean = (w * nll).sum() / w.sum()
    assert float(loss) / float(weight) == pytest.approx(mean.item(), rel=1e-5)
    grads_there = ((name, p.grad.numpy()) for name, p in model.named_parameters())
    wanted = dict(pair for each in grads_there for pair in in_files(case, *each))
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in wanted.values()))
    grads = {name: np.asarray(g) / batch["weights"].sum() for name, g in grads.items()}
    places = tensors(config.model, structure.shapes)
    assert {place.name for place in places} == wanted.keys()
    for place in places:
        ours = to_theirs(grads[place.ours][place.place], place)
        found[place.name] = error(ours, wanted[place.name], norm)
    worst = max(found, key=found.__getitem__)
    print(f"{case}, {mesh_case}: logits {found['logits']:.1e}, worst {worst} {found[worst]:.1e}")
    assert found[worst] < TOLERANCE, (worst, found[worst])


@pytest.mark.parametrize("case", MODELS)
def test_there_and_back_keeps_all_bits(case, theirs, tmp_path):
    check_round_trip(*theirs(case), tmp_path)


def check_round_trip(directory, model, tmp_path):
    """Import, export: the same files, and the same logits in transformers."""
    config, _, _, _, params = opened(directory, "fsdp x tensor")
    save_params(tmp_path / "out", params, config.model)
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = make_batch(config.model.vocab_size)["tokens"]
    np.testing.assert_array_equal(their_logits(again, tokens), their_logits(model, tokens))


def check_layout(config, sizes):
    """Loss, metrics and gradients of the first batch on a mesh, against one device."""
    reference = lambda double: verify.measure(config, double, start_only=True)
    _, bad, _ = verify._compare(verify.replace_mesh(config, sizes), reference, True)
    assert not bad


def check_greedy(directory, model, mesh_case, prompts, count):
    """Greedy tokens after each prompt are those that transformers generates."""
    config, mesh, layout, structure, params = opened(directory, mesh_case)
    found = generate.generate_tokens(
        config, structure, layout, mesh, params, prompts, tokens=count
    )  # fmt: skip
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            row = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=count, pad_token_id=0,
                eos_token_id=None,
            )  # fmt: skip
        assert row[0].tolist() == prompt + tokens


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", []),
        ("llama", ["model.tie_embeddings=false"]),
        ("gpt2", []),
        ("gpt2", ["model.tie_embeddings=false"]),
        ("gpt2", ["model.biases=false"]),
        ("mixtral", []),
        ("qwen3_moe", []),
    ],
)
def test_our_model_in_transformers_and_back(family, overrides, tmp_path):
    axis = "expert" if family in ("mixtral", "qwen3_moe") else "fsdp"
    axes = [f"mesh.{axis}=2", "mesh.tensor=2", f"batch.sequences={ROWS}", "model.init_std=0.2"]
    config = tiny.config(family, *axes, *overrides)
    mesh, layout = open_mesh(config, jax.devices()[:4])
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
        params, _ = jax.jit(lambda: init_params(config, layout))()
        save_params(tmp_path / "out", params, config.model)
    batch = make_batch(config.model.vocab_size)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    scores = our_logits(config, mesh, layout, structure, params, batch)
    assert error(scores, their_logits(model, batch["tokens"])) < TOLERANCE
    _, _, _, _, again = opened(tmp_path / "out", "one device")
    rows = config.model.vocab_size
    for name, value in again.items():
        expected = np.asarray(params[name]) if name in params else np.zeros(value.shape)
        value, kept = np.asarray(value), slice(rows if name in ("embed", "head") else None)
        np.testing.assert_array_equal(value[kept], expected[kept], err_msg=name)
        assert name not in ("embed", "head") or not value[rows:].any()
    assert params.keys() <= again.keys()


@pytest.mark.parametrize("mesh_case", MESHES)
@pytest.mark.parametrize("case", ["llama, untied", "gpt2"])
def test_packed_documents_are_each_alone(case, mesh_case, theirs):
    directory, model = theirs(case)
    parts = opened(directory, mesh_case)
    batch = make_batch(parts[0].model.vocab_size, (13, LENGTH - 13))
    scores = our_logits(*parts, batch)
    first, second = batch["tokens"][:, :13], batch["tokens"][:, 13:]
    assert error(scores[:, :13], their_logits(model, first)) < TOLERANCE
    assert error(scores[:, 13:], their_logits(model, second)) < TOLERANCE


def test_padding_of_the_vocabulary_is_zero_and_not_exported(theirs, tmp_path):
    directory, _ = theirs("llama, untied")
    config, _, _, _, params = opened(directory, "fsdp x tensor", "model.vocab_multiple=256")
    assert params["head"].shape == (512, 32) and not np.asarray(params["head"])[301:].any()
    save_params(tmp_path / "out", params, config.model)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (301, 32)
