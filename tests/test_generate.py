"""Generated tokens: as from the full forward, as from transformers, and the same on every mesh."""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizer_kinds
from jax.sharding import NamedSharding
from tokenizers import normalizers

from jaxlm import devices, generate
from jaxlm.config import Devices, UserError
from jaxlm.data.tokenize import decode, encode, load_tokenizer, make_bytes, make_characters
from jaxlm.mesh import open_mesh
from jaxlm.models.decoder import logits
from jaxlm.state import model_structure

MODEL = ["model.tie_embeddings=false"]  # 300 of 384 rows of the vocabulary are real
MESHES = {
    "one device": (1, []),
    "fsdp x tensor": (4, ["mesh.fsdp=2", "mesh.tensor=2"]),
    "tensor, kv heads replicated": (4, ["mesh.tensor=4"]),
    "data x fsdp x expert": (8, ["mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"]),
    "cache split over its slots": (
        4,
        ["mesh.tensor=4", "rules.cache_seq=[tensor]", "rules.cache_kv_heads=[]"],
    ),
    "sequence split in training": (4, ["mesh.context=2", "mesh.tensor=2"]),
    "cache replicated": (4, ["mesh.fsdp=4", "rules.cache_batch=[]", "gather_at=step"]),
}
FAMILIES = ("llama", "gpt2")
PROMPTS = [[1, 2, 3], [250, 4, 5, 6, 7, 8, 9, 10, 11], [7]]


@functools.cache
def build(family, mesh="one device", *overrides):
    """The leading arguments of generate_tokens, for random weights."""
    count, axes = MESHES[mesh]
    config = tiny.config(family, *MODEL, *axes, *overrides)
    mesh, layout = open_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(name.endswith("scale"), 0.2, shape).astype(np.float32)
        for name, shape in structure.shapes.items()
    }
    return config, structure, layout, mesh, put_weights(arrays, structure, layout, mesh)


def put_weights(arrays, structure, layout, mesh):
    home = lambda name: NamedSharding(mesh, layout.stored(structure.dims[name]))
    put = lambda name, x: jax.make_array_from_callback(x.shape, home(name), lambda i: x[i])
    return {name: put(name, array) for name, array in arrays.items()}


def cached_scores(parts, rows_BS, lengths):
    """Scores [B, N, V] of tokens read one by one after the first `lengths` of each row."""
    _, structure, layout, mesh, params = parts
    layout = layout.replace(seq=(), residual_seq=())
    count = rows_BS.shape[1] - max(lengths)
    prompts = [row[:length].tolist() for row, length in zip(rows_BS, lengths, strict=True)]
    prompts_BS, lengths_B = generate.pad(prompts, len(prompts))
    later_BN = [row[length : length + count] for row, length in zip(rows_BS, lengths, strict=True)]
    put = lambda x, dims: jax.device_put(x, NamedSharding(mesh, layout.spec(dims)))

    def run(model, prompts_BS, lengths_B, later_BN):
        first, cache = generate.read_prompts(model, prompts_BS, lengths_B, layout, count)

        def step(carry, token_B):
            n, cache = carry
            scores, cache = generate.read_token(model, token_B, lengths_B + n, layout, cache)
            return (n + 1, cache), scores

        _, later = jax.lax.scan(step, (0, cache), later_BN.T)
        return jnp.concatenate([first[None], later])

    with jax.set_mesh(mesh):
        args = put(prompts_BS, "batch _"), put(lengths_B, "batch")
        out = jax.jit(run)(structure.merge(params), *args, put(np.stack(later_BN), "batch _"))
    return np.moveaxis(np.asarray(out), 0, 1)


@functools.cache
def full_forward(layout):
    """jit(model, rows_BS) -> scores [B, S, V] after every token, from the forward of training."""

    def run(model, rows_BS):
        positions_BS = jnp.broadcast_to(jnp.arange(rows_BS.shape[1]), rows_BS.shape)
        hidden_BSD, _, _ = model(rows_BS, positions_BS, None, layout)
        return logits(hidden_BSD, model.head_weight(layout), model.config)

    return jax.jit(run)


def full_scores(family, rows_BS):
    _, structure, layout, mesh, params = build(family)
    with jax.set_mesh(mesh):
        return np.asarray(full_forward(layout)(structure.merge(params), rows_BS))


@functools.cache
def reference(family):
    rows_BS = np.random.default_rng(0).integers(0, 300, (8, 24), np.int32)
    return rows_BS, full_scores(family, rows_BS)


LLAMA = [("llama", mesh) for mesh in MESHES]


@pytest.mark.parametrize("family, mesh", LLAMA + [("gpt2", mesh) for mesh in list(MESHES)[:3]])
def test_scores_with_a_cache_are_those_of_the_full_forward(family, mesh):
    rows_BS, expected = reference(family)
    lengths = [3, 9, 1, 16, 2, 12, 8, 5]
    found = cached_scores(build(family, mesh), rows_BS, lengths)
    for row, length in enumerate(lengths):
        one = expected[row, length - 1 : length + 8, :300]
        np.testing.assert_allclose(found[row, :, :300], one, rtol=1e-5, atol=1e-5)
        assert np.isneginf(found[row, :, 300:]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_a_forward_at_each_length(family):
    found = generate.generate_tokens(*build(family), PROMPTS, tokens=8)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        row = list(prompt)
        for token in tokens:
            rows_BS = np.zeros((8, 24), np.int32)
            rows_BS[0, : len(row)] = row
            assert full_scores(family, rows_BS)[0, len(row) - 1].argmax() == token
            row.append(token)


@pytest.mark.parametrize("family, mesh", [LLAMA[2], ("gpt2", "data x fsdp x expert")])
def test_every_mesh_gives_the_same_samples(family, mesh):
    settings = dict(tokens=8, temperature=0.9, top_k=40, top_p=0.95, seed=7)
    one, other = (
        generate.generate_tokens(*build(family, m), PROMPTS, **settings)
        for m in ("one device", mesh)
    )
    assert one == other
    assert len({token for row in one for token in row}) > 6


def huggingface(family, config):
    """A random transformers model of the same shape."""
    import torch  # late: the processes below do without, and start in half the time
    import transformers

    torch.manual_seed(0)
    m = config.model
    if family == "llama":
        theirs = transformers.LlamaConfig(
            vocab_size=m.vocab_size, hidden_size=m.embed_dim, intermediate_size=m.mlp_dim,
            num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads,
            num_key_value_heads=m.num_kv_heads, head_dim=m.head_dim, rms_norm_eps=m.norm_epsilon,
            rope_theta=m.rope_theta, initializer_range=0.2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(theirs).eval()
    theirs = transformers.GPT2Config(
        vocab_size=m.vocab_size, n_embd=m.embed_dim, n_inner=m.mlp_dim, n_layer=m.num_layers,
        n_head=m.num_heads, n_positions=m.max_positions, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(theirs).eval()


def weights(family, model, m):
    """Our arrays from those of a transformers model."""
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    pad = lambda x: np.pad(x, [(0, -len(x) % m.vocab_multiple), (0, 0)])
    heads = lambda x, n: x.reshape(x.shape[0], n, m.head_dim)  # [D, H*C] -> [D, H, C]
    block = {"llama": llama_block, "gpt2": gpt2_block}[family]
    layers = [block(theirs, i, heads, m) for i in range(m.num_layers)]
    arrays = {f"groups.0.0.{name}": np.stack([x[name] for x in layers]) for name in layers[0]}
    if family == "llama":
        return arrays | {
            "embed": pad(theirs["model.embed_tokens.weight"]),
            "head": pad(theirs["lm_head.weight"]),
            "final_norm.scale": theirs["model.norm.weight"],
        }
    return arrays | {
        "embed": pad(theirs["transformer.wte.weight"]),
        "head": pad(theirs["lm_head.weight"]),
        "positions": theirs["transformer.wpe.weight"],
        "final_norm.scale": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }


def llama_block(theirs, i, heads, m):
    w = lambda name: theirs[f"model.layers.{i}.{name}.weight"].T
    return {
        "attention_norm.scale": w("input_layernorm"),
        "attention.q": heads(w("self_attn.q_proj"), m.num_heads),
        "attention.k": heads(w("self_attn.k_proj"), m.num_kv_heads),
        "attention.v": heads(w("self_attn.v_proj"), m.num_kv_heads),
        "attention.o": w("self_attn.o_proj").reshape(m.num_heads, m.head_dim, m.embed_dim),
        "mlp_norm.scale": w("post_attention_layernorm"),
        "gate": w("mlp.gate_proj"),
        "up": w("mlp.up_proj"),
        "down": w("mlp.down_proj"),
    }


def gpt2_block(theirs, i, heads, m):
    get = lambda name: theirs[f"transformer.h.{i}.{name}"]
    qkv = np.split(get("attn.c_attn.weight"), 3, axis=1)
    arrays = {
        "qkv": np.stack([heads(x, m.num_heads) for x in qkv]),
        "qkv_bias": get("attn.c_attn.bias").reshape(3, m.num_heads, m.head_dim),
        "o": get("attn.c_proj.weight").reshape(m.num_heads, m.head_dim, m.embed_dim),
        "o_bias": get("attn.c_proj.bias"),
    }
    for ours, name in (("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
        arrays |= {ours: get(f"{name}.weight"), f"{ours}_bias": get(f"{name}.bias")}
    for ours, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        arrays |= {f"{ours}.scale": get(f"{name}.weight"), f"{ours}.bias": get(f"{name}.bias")}
    return arrays


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family):
    import torch

    config, structure, layout, mesh, _ = build(family, "fsdp x tensor")
    model = huggingface(family, config)
    arrays = weights(family, model, config.model)
    assert {name: x.shape for name, x in arrays.items()} == structure.shapes
    arrays = put_weights(arrays, structure, layout, mesh)
    found = generate.generate_tokens(config, structure, layout, mesh, arrays, PROMPTS, tokens=20)
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            row = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
        assert row == prompt + tokens


def test_bfloat16_generates():
    parts = build("llama", "tensor, kv heads replicated", "precision.compute=bfloat16")
    assert [len(row) for row in generate.generate_tokens(*parts, PROMPTS, tokens=4)] == [4, 4, 4]


def test_the_likeliest_alone_is_greedy():
    parts = build("llama")
    greedy = generate.generate_tokens(*parts, PROMPTS, tokens=8)
    settings = dict(temperature=5.0, top_k=1, top_p=0.5)
    assert generate.generate_tokens(*parts, PROMPTS, tokens=8, **settings) == greedy
    scores = jax.random.normal(jax.random.key(0), (100, 50))
    for top_k, top_p in ((1, 1.0), (0, 1e-6), (3, 0.01)):
        sampling = generate.Sampling(5.0, top_k, top_p)
        np.testing.assert_array_equal(generate.choose(scores, sampling, 0, 0), scores.argmax(1))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (6, 0.9)])
def test_samples_follow_the_distribution(top_k, top_p):
    count, temperature = 20_000, 0.7
    scores_V = np.random.default_rng(1).normal(size=12).astype(np.float32)
    scores_V[10:] = -np.inf  # padding
    sampling = generate.Sampling(temperature, top_k, top_p)
    rows = jnp.broadcast_to(scores_V, (count, 12))
    tokens_B = jax.jit(lambda x: generate.choose(x, sampling, np.uint32(3), 0))(rows)
    found_V = np.bincount(tokens_B, minlength=12)
    expected_V = count * probabilities(scores_V / temperature, top_k, top_p)
    kept_V = expected_V > 0
    assert not found_V[~kept_V].any()
    chi_square = np.sum((found_V - expected_V)[kept_V] ** 2 / expected_V[kept_V])
    assert chi_square < 30  # at most 9 degrees of freedom: exceeded once in 2000 seeds


def probabilities(scores_V, top_k, top_p):
    """Softmax, top-k, top-p in numpy, a token at a time."""
    p_V = np.exp(scores_V - scores_V.max())
    order = np.argsort(-p_V, kind="stable")
    p_V[order[top_k or p_V.size :]] = 0
    p_V, total = p_V / p_V.sum(), 0.0
    for token in order:
        p_V[token], total = (p_V[token] if total < top_p else 0), total + p_V[token]
    return p_V / p_V.sum()


def test_equal_scores_are_kept_in_the_order_of_tokens():
    scores = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    kept = lambda top_k, top_p: np.isfinite(generate.likeliest(scores, top_k, top_p)).tolist()
    yes, no = True, False
    assert kept(2, 1.0) == [[no, yes, yes, no, no], [yes, yes, no, no, no]]
    assert kept(0, 0.5) == [[no, yes, yes, no, no], [yes, yes, yes, no, no]]


def test_padding_of_the_vocabulary_is_never_sampled():
    found = generate.generate_tokens(*build("gpt2"), [[1]] * 16, tokens=40, temperature=100.0)
    seen = {token for row in found for token in row}
    assert max(seen) < 300 and len(seen) > 200


def test_a_row_ends_before_eos_and_the_others_go_on():
    parts = build("llama")
    whole = generate.generate_tokens(*parts, PROMPTS, tokens=8)
    eos = whole[1][3]
    found = generate.generate_tokens(*parts, PROMPTS, tokens=8, eos=eos)
    assert found == [row[: row.index(eos)] if eos in row else row for row in whole]
    assert len(found[1]) < 8 and max(map(len, found)) == 8


def test_a_row_ends_at_whichever_end_comes_first():
    parts = build("llama")
    whole = generate.generate_tokens(*parts, PROMPTS, tokens=8)
    ends = [whole[0][5], whole[1][3], whole[1][6], 299]
    found = generate.generate_tokens(*parts, PROMPTS, tokens=8, eos=ends)
    until = lambda row: next((n for n, token in enumerate(row) if token in ends), len(row))
    assert found == [row[: until(row)] for row in whole]
    assert len({len(row) for row in found}) > 1


def test_prompt_and_continuation_read_as_one_text(tmp_path):
    tokenizer_kinds.llama2(tmp_path)
    marked = load_tokenizer(tmp_path)
    ids = lambda tokenizer, text: encode(tokenizer, text).tolist()

    def text(tokenizer, prompt, made, read=None):
        read = ids(tokenizer, prompt) if read is None else read
        return generate.continuation(tokenizer, prompt, read, made)

    sat, letter = ids(marked, "sat on"), [token - 1 for token in ids(make_bytes(), "\u20ac")]
    assert decode(marked, sat) == "sat on", "the decoder drops the first space"
    assert text(marked, "the cat", sat) == " sat on"
    assert text(marked, "the cat", sat, [1, *ids(marked, "the cat")]) == " sat on"
    assert text(marked, "", sat, [1]) == "sat on"
    # Bytes, some of them without the rest of their character.
    bytes_ = [3 + byte for byte in letter]
    assert text(marked, "the \u20ac", bytes_) == "\u20ac"
    assert text(marked, "the \u20ac", bytes_[:1] + sat) == "\ufffd sat on"
    assert text(make_bytes(), "\u20ac", [byte + 1 for byte in letter[:2]]) == "\ufffd"
    # A tokenizer that changes its text.
    engine = marked.engine
    engine.normalizer = normalizers.Sequence([normalizers.Strip(), engine.normalizer])
    assert text(marked, "the cat ", sat) == "sat on"
    assert text(marked, " the cat", sat) == " sat on"
    engine.normalizer = normalizers.Sequence([normalizers.Lowercase(), engine.normalizer])
    assert text(marked, "The CAT", sat) == " sat on"


def test_a_row_does_not_depend_on_the_others():
    parts, settings = build("llama", "fsdp x tensor"), dict(tokens=8, temperature=1.0, seed=5)
    found = generate.generate_tokens(*parts, PROMPTS, **settings)
    other = generate.generate_tokens(*parts, [[9] * 40, PROMPTS[1], [3] * 5, [4]], **settings)
    alone = generate.generate_tokens(*parts, PROMPTS[:1], **settings)
    assert found[1] == other[1] and found[:1] == alone
    twice = generate.generate_tokens(*parts, PROMPTS[:1] * 3, **settings)
    assert twice[0] != twice[1], "rows draw their own numbers"
    reseeded = generate.generate_tokens(*parts, PROMPTS, **settings | {"seed": 6})
    assert reseeded != found


def test_other_weights_prompts_and_seeds_run_the_same_program():
    config, structure, layout, mesh, params = build("llama", "fsdp x tensor")
    settings = dict(tokens=5, temperature=0.5, top_k=3, eos=None)
    generate.make_program.cache_clear()
    for i in range(3):
        weights = {name: x * (1 + i) for name, x in params.items()}
        with jax.set_mesh(mesh):
            generate.generate_tokens(
                config, structure, layout, mesh, weights, [[i + 1] * (i + 1)] * 2, seed=i,
                **settings | {"eos": i},
            )  # fmt: skip
    assert generate.make_program.cache_info().currsize == 1
    layout = layout.replace(seq=(), residual_seq=())
    program = generate.make_program(layout, 5, generate.Sampling(0.5, 3, 1.0), ())
    assert program._cache_size() == 1


def test_text():
    parts = build("gpt2")
    continue_ = lambda tokenizer, *prompts: generate.generate_text(
        *parts, tokenizer, list(prompts), tokens=5
    )
    assert continue_(make_bytes()) == []
    tokens = generate.generate_tokens(*parts, [[0], [0, 98, 99]], tokens=5, eos=0)
    texts = [make_bytes().engine.decode(row) for row in tokens]
    assert continue_(make_bytes(), "", "ab") == texts
    letters = make_characters(["abc"])
    assert len(continue_(letters, "abc")) == 1
    with pytest.raises(UserError, match="prompt '' is empty"):
        continue_(letters, "a", "")
    with pytest.raises(UserError, match="character 'd'"):
        continue_(letters, "abcd")
    with pytest.raises(UserError, match=r"prompt='a.udce9' has a byte that is not UTF-8"):
        continue_(letters, os.fsdecode(b"a\xe9"))


BAD = {
    "tokens=0 must": dict(tokens=0),
    "prompt 1 of 2 has no tokens": dict(prompts=[[1], []]),
    "token 300, and model.vocab_size=300": dict(prompts=[[1, 300]]),
    "top_k=301 must be 0": dict(top_k=301, temperature=1.0),
    "top_p=0 must": dict(top_p=0.0),
    "temperature=-1 must": dict(temperature=-1.0),
    "seed=-1 must": dict(seed=-1),
    "61 tokens and tokens=5 .* model.max_positions=64; use tokens=4": dict(prompts=[[1] * 61]),
    "65 tokens .* give at most 64": dict(prompts=[[1] * 65]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message):
    with pytest.raises(UserError, match=message) as error:
        generate.generate_tokens(*build("gpt2"), **{"prompts": [[1]], "tokens": 5} | BAD[message])
    assert "\n" not in str(error.value)


def test_the_last_position_is_used():
    assert len(generate.generate_tokens(*build("gpt2"), [[1] * 60], tokens=5)[0]) == 5


def test_two_processes_generate_what_one_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    call = "import test_generate as t; t.generate_in_process({}, {})"
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", call.format(port, i)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in (0, 1)
    ]  # fmt: skip
    expected = generate.generate_tokens(*build("llama"), PROMPTS, tokens=8)
    for process in processes:
        assert json.loads(tiny.finish(process).splitlines()[-1]) == expected


def generate_in_process(port, index):
    """Print the greedy tokens on a mesh of two processes; run in a process of its own."""
    devices.start(
        Devices(
            simulate=2, coordinator=f"localhost:{port}", num_processes=2, process_id=index
        )
    )  # fmt: skip
    parts = build("llama", "fsdp x tensor")
    print(json.dumps(generate.generate_tokens(*parts, PROMPTS, tokens=8)))
