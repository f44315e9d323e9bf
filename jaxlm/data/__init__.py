"""Data: documents -> tokens -> shards on disk -> packed sequences -> global batches.

sources.py -> tokenize.py -> prepare.py write a dataset; shards.py -> pack.py -> load.py read it.
Only load.py needs jax, and it is not imported here so that `jaxlm data` starts fast.
"""

from jaxlm.data.prepare import corpus_path, prepare_corpus
from jaxlm.data.shards import Split, check_vocab, open_split, read_manifest
from jaxlm.data.tokenize import Tokenizer, decode, encode, encode_prompt, load_tokenizer

__all__ = [
    "Split",
    "Tokenizer",
    "check_vocab",
    "corpus_path",
    "decode",
    "encode",
    "encode_prompt",
    "load_tokenizer",
    "open_split",
    "prepare_corpus",
    "read_manifest",
]
