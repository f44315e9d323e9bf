"""Small tokenizers of the kinds that people bring, built with the tokenizers library."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = ["the cat sat on the mat, and the dog ran.", "the dog's mat is on the cat! 12 + 34 = 46"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(special: list[str], split: str | None = None) -> Tokenizer:
    """A byte-level BPE of 300 tokens and some special ones, without a post-processor."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        parts = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
        parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        engine.pre_tokenizer = pre_tokenizers.Sequence(parts)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(TEXTS, trainer)
    engine.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return engine


def llama3(directory: Path) -> dict:
    """A template that puts <|begin_of_text|> first, and two tokens that end a text."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    engine = byte_level(special, LLAMA3_SPLIT)
    begin = engine.token_to_id(special[0])
    template = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], begin)]
    )
    post = [processors.ByteLevel(trim_offsets=True), template]
    engine.post_processor = processors.Sequence(post)
    about = {"bos_token": special[0], "eos_token": special[1]}
    return _save(directory, engine, about, "PreTrainedTokenizerFast", special[0], special[1:])


def llama2(directory: Path) -> dict:
    """SentencePiece's kind: words begin with a mark, unknown characters are bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = ["\u2581", *sorted(set("".join(TEXTS)) - {" "})]
    merges = [("\u2581", letter) for letter in "tscdmo"] + [("a", "t"), ("h", "e")]
    merges += [("\u2581t", "he"), ("\u2581c", "at"), ("\u2581s", "at"), ("\u2581m", "at")]
    for token in [*letters, *map("".join, merges)]:
        vocab.setdefault(token, len(vocab))
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    engine = Tokenizer(model)
    mark = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    engine.normalizer = normalizers.Sequence(mark)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    engine.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    engine.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    about = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return _save(directory, engine, about, "LlamaTokenizer", "<s>", ["</s>"])


def gpt2(directory: Path) -> dict:
    """One token begins and ends documents, and none is put before a prompt."""
    engine = byte_level(["<|endoftext|>"])
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    about = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return _save(directory, engine, about, "GPT2Tokenizer", "<|endoftext|>", ["<|endoftext|>"])


def digits(directory: Path) -> dict:
    """SmolLM's kind: GPT-2's class, but each digit is a token, which that class does not know."""
    engine = byte_level(["<|endoftext|>"])
    split = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    engine.pre_tokenizer = pre_tokenizers.Sequence(split)
    about = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return _save(directory, engine, about, "GPT2Tokenizer", "<|endoftext|>", ["<|endoftext|>"])


def qwen(directory: Path) -> dict:
    """No token begins a document; two end a text, and the model's first one is another still."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    engine = byte_level(special, LLAMA3_SPLIT.replace("{1,3}", ""))
    engine.normalizer = normalizers.NFC()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    about = {"bos_token": None, "eos_token": special[2], "pad_token": special[0]}
    about |= {"add_bos_token": False, "chat_template": "{{ messages }}"}
    return _save(directory, engine, about, "Qwen2Tokenizer", special[0], special[::-2])


KINDS = {"llama3": llama3, "llama2": llama2, "gpt2": gpt2, "digits": digits, "qwen": qwen}


def _save(directory: Path, engine: Tokenizer, about: dict, kind: str, bos: str, ends: list) -> dict:
    """Write the files of a tokenizer; returns the ids that the model's config.json has."""
    directory.mkdir(exist_ok=True)
    engine.save(str(directory / "tokenizer.json"))
    about = about | {"tokenizer_class": kind, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    ids = [engine.token_to_id(text) for text in ends]
    return {"bos_token_id": engine.token_to_id(bos), "eos_token_id": ids if ids[1:] else ids[0]}
