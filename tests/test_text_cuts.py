"""Long texts encoded in pieces: the tokens are those that the library gives for the whole text."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

from jaxlm.config import UserError
from jaxlm.data import text_cuts, tokenize
from jaxlm.data.separators import Separators
from jaxlm.data.tokenize import encode, encode_batch, make_bytes, make_characters, train_bpe

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\P{N}+"  # grouped from the right
WORDS = (
    "the cat sat on the mat don't we'll HTTP 12345678 3.14 x=y; fn(a,b) \u4f60\u597d\uff0c"
    " \u65e5\u672c\u8a9e\u306e\u6587\u3002 e\u0301a\u0300\u0323 \U0001f600 <think> </think>"
    " Stra\u00dfe"
).split()
GAPS = [" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\r", "\t", "\u2028", "\u00a0", ""]


def prose(seed: int, size: int = 1200) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(size // 5))[:size]


def blank(seed: int, size: int = 1200) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices([" ", "\n", "\r\n", "\t", "a"], [30, 4, 2, 1, 1], k=size))


TEXTS = {
    "prose": prose(0),
    "more prose": prose(1),
    "blank lines": "One two three.\n\nFour, five.\n\n" * 40,
    "CRLF": "One two three.\r\nFour, five.\r\n\r\n" * 40,
    "CR": "One two three.\rFour, five.\r\r" * 40,
    "no newline": "The cat sat on the mat, and we'll see. " * 30,
    "Chinese": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u6587\u3002" * 100,
    "Chinese, no stops": "\u4f60\u597d\u4e16\u754c\u65e5\u672c\u8a9e" * 150,
    "letters": "".join(random.Random(2).choices("ACGT", k=1200)),
    "one letter": "a" * 1201,
    "digits": "".join(random.Random(3).choices("0123456789", k=1201)),
    "spaces": " " * 1200,
    "spaces, then a line": "word " * 20 + " " * 700 + "\n" + " word" * 100,
    "blank": blank(4),
    "newlines": "\n" * 1200,
    "tabs": "\ta\tbb\t\tccc" * 100,
    "separators": "one\u2028two\u2029three\u0085four\u3000" * 60,
    "marks": "e\u0301\u0323\u0300" * 300,
    "minified": "function(a,b){return a+b};var x=[1,2,3];if(x<y&&z)" * 25,
    "added": "a <think> b</think>c<think> </think>\n\n <tool>d <x>" * 25,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f1e9\U0001f1ea" * 60,
}


def train(model, trainer, normalizer=None, pre_tokenizer=None, extra=()) -> Engine:
    engine = Engine(model)
    if normalizer is not None:
        engine.normalizer = normalizer
    if pre_tokenizer is not None:
        engine.pre_tokenizer = pre_tokenizer
    engine.train_from_iterator([text[:600] for text in TEXTS.values()], trainer)
    engine.add_tokens(list(extra))
    return engine


def byte_level(pattern: str | None, extra=(), normalizer=None, prefix: bool = False) -> Engine:
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern == "own")]
    if pattern not in ("own", None):
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), *steps]
    engine = train(models.BPE(), trainer, normalizer, pre_tokenizers.Sequence(steps), extra)
    engine.post_processor = processors.ByteLevel(trim_offsets=True)  # as in GPT-2's and Llama 3's
    return engine


def sentencepiece(pre_tokenizer=None, fallback: bool = True) -> Engine:
    """As of Llama 2: a mark for spaces and the start, no words, bytes for what is unknown."""
    alphabet = "abcdefghijklmnopqrstuvwxyz.,\n\u2581"
    codes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<unk>", "<s>", *codes],
        limit_alphabet=len(alphabet),
        initial_alphabet=list(alphabet),
    )
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    engine = train(models.BPE(), trainer, pre_tokenizer=words)
    facts = json.loads(engine.to_str())
    facts["model"] |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": fallback}
    engine = Engine.from_str(json.dumps(facts))
    if pre_tokenizer is None:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        engine.normalizer = normalizers.Sequence(steps)
    engine.pre_tokenizer = pre_tokenizer
    return engine


def wordpiece() -> Engine:
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, show_progress=False, special_tokens=["[UNK]"]
    )
    words = pre_tokenizers.BertPreTokenizer()
    return train(models.WordPiece(unk_token="[UNK]"), trainer, normalizers.BertNormalizer(), words)


def unigram(pre_tokenizer) -> Engine:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )
    return train(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizer)


def word_level(pre_tokenizer, strip: bool = True) -> Engine:
    trainer = trainers.WordLevelTrainer(
        vocab_size=100, special_tokens=["[UNK]"], show_progress=False
    )
    steps = [*[normalizers.Strip()] * strip, normalizers.Lowercase(), normalizers.NFC()]
    model = models.WordLevel(unk_token="[UNK]")
    return train(model, trainer, normalizers.Sequence(steps), pre_tokenizer)


ADDED = [
    AddedToken("<think>", lstrip=True, rstrip=True),
    AddedToken("</think>", normalized=False),
    AddedToken("<tool>", rstrip=True, normalized=False),
    AddedToken("cat", single_word=True),
    "\n\n",
]
TOKENIZERS = {
    "gpt2": lambda: byte_level("own"),
    "gpt2 with prefix": lambda: byte_level("own", prefix=True),
    "gpt2 pattern": lambda: byte_level(GPT2, ADDED),
    "llama3": lambda: byte_level(LLAMA3),
    "qwen": lambda: byte_level(LLAMA3.replace("{1,3}", ""), ADDED, normalizers.NFC()),
    "threes": lambda: byte_level(THREES),
    "no words": lambda: byte_level(None),
    "llama2": lambda: sentencepiece(),
    "llama2, no bytes": lambda: sentencepiece(fallback=False),
    "metaspace": lambda: sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace always": lambda: sentencepiece(pre_tokenizers.Metaspace(), fallback=False),
    "wordpiece": wordpiece,
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "unigram, no words": lambda: unigram(None),
    "word level": lambda: word_level(pre_tokenizers.Whitespace()),
    "white space": lambda: word_level(pre_tokenizers.WhitespaceSplit()),
    "lines": lambda: word_level(pre_tokenizers.Split("\n", "merged_with_previous")),
    "blocks": lambda: word_level(pre_tokenizers.FixedLength(length=7), strip=False),
    "bytes": lambda: Engine.from_str(make_bytes().data.decode()),
    "characters": lambda: Engine.from_str(make_characters(TEXTS.values()).data.decode()),
}


@pytest.mark.parametrize("sizes", [(50, (20, 60)), (200, (64, 256))])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(name, sizes, monkeypatch):
    engine = TOKENIZERS[name]()
    tokenizer = tokenize._tokenizer(engine, engine.to_str().encode(), Separators(None, None))
    monkeypatch.setattr(text_cuts, "PIECE", sizes[0])
    monkeypatch.setattr(text_cuts, "REACHES", sizes[1])
    pieces = {}
    for what, text in TEXTS.items():
        pieces[what] = len(list(tokenize._pieces(tokenizer, text)))
        whole = engine.encode(text, add_special_tokens=False).ids
        assert encode(tokenizer, text).tolist() == whole, what
    # Each is cut where it can be: all but words without spaces, and lines of many characters.
    if name not in ("unigram, no words", "lines"):
        assert min(pieces[what] for what in ("prose", "blank lines", "CRLF", "minified")) > 1
        assert 1200 / pieces["added"] < 1.4 * sizes[0]


def test_random_texts_and_patterns(monkeypatch):
    monkeypatch.setattr(text_cuts, "PIECE", 60)
    monkeypatch.setattr(text_cuts, "REACHES", (24, 80))
    names = ("gpt2 pattern", "llama3", "qwen", "llama2", "wordpiece", "unigram", "white space")
    for name in names:
        engine = TOKENIZERS[name]()
        tokenizer = tokenize._tokenizer(engine, engine.to_str().encode(), Separators(None, None))
        for seed in range(20):
            text = prose(seed, 900) + blank(seed, 300) + prose(seed + 1, 300)
            whole = engine.encode(text, add_special_tokens=False).ids
            assert encode(tokenizer, text).tolist() == whole, (name, seed)


def test_merges_that_depend_on_where_a_word_begins(monkeypatch, caplog):
    """Windows agree by chance on pairs of "ab", which only the start of the text decides."""
    monkeypatch.setattr(text_cuts, "PIECE", 53)
    monkeypatch.setattr(text_cuts, "REACHES", (20, 40))
    vocab = {"a": 0, "b": 1, "ab": 2, "abab": 3}
    engine = Engine(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "ab")]))
    tokenizer = tokenize._tokenizer(engine, engine.to_str().encode(), Separators(None, None))
    text = "ab" * 601
    whole = engine.encode(text, add_special_tokens=False).ids
    assert len(list(tokenize._pieces(tokenizer, text))) == 1
    monkeypatch.setattr(tokenize, "_joined", lambda _: frozenset())  # a wrong belief is noticed
    assert len(list(tokenize._pieces(tokenizer, text))) > 10
    assert encode(tokenizer, text).tolist() == whole
    assert "is encoded whole" in caplog.text


def test_training_and_characters_see_every_word(monkeypatch):
    texts = list(TEXTS.values())
    whole = train_bpe(texts, 400).data
    monkeypatch.setattr(text_cuts, "PIECE", 60)
    monkeypatch.setattr(text_cuts, "REACHES", (24, 80))
    assert len(list(tokenize._words(texts))) > 200
    assert train_bpe(texts, 400).data == whole


def test_a_missing_word_is_named_and_short_texts_are_encoded_together(monkeypatch):
    monkeypatch.setattr(text_cuts, "PIECE", 50)
    tokenizer = make_characters(["abc \n"])
    texts = ["a", "abc \n" * 40, "", "bc"]
    assert [len(ids) for ids in encode_batch(tokenizer, texts)] == [1, 200, 0, 2]
    with pytest.raises(UserError, match="'z' is not among"):
        encode(tokenizer, "abc " * 40 + "z")


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_long_text_at_the_real_size(name):
    engine = TOKENIZERS[name]()
    tokenizer = tokenize._tokenizer(engine, engine.to_str().encode(), Separators(None, None))
    text = (prose(5) + blank(6)) * 400
    longest = max(end.right - begin.left for begin, end in tokenize._pieces(tokenizer, text))
    assert longest < 1.1 * text_cuts.PIECE < len(text) / 3
    assert encode(tokenizer, text).tolist() == engine.encode(text, add_special_tokens=False).ids
