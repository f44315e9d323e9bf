"""`jaxlm data prepare | info | show`: argument parsing and printing only."""

from __future__ import annotations

import argparse
from typing import Any

from jaxlm.config import UserError
from jaxlm.data import pack, prepare, shards
from jaxlm.data.tokenize import decode, load_tokenizer

EXAMPLES = """examples:
  jaxlm data prepare --out data/books --validation-fraction 0.02 'books/*.jsonl.zst'
  jaxlm data prepare --out data/shakespeare --tokenizer characters --split-within \\
      --validation-fraction 0.1 input.txt
  jaxlm data prepare --out data/llama --tokenizer Llama-3.2-1B --text-field content shards/
  jaxlm data prepare --out data/wiki --on-bad skip --text-field content.text 'dump/**/*.json'
  jaxlm data prepare --out data/python-stdlib --corpus python-stdlib
"""


def add_parser(subparsers: Any) -> None:
    """Add `data` and its subcommands; each sets `run`, a function of the arguments."""
    parser = subparsers.add_parser(
        "data", help="prepare and inspect datasets", description="Prepare and inspect datasets."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prepare(commands)
    info = commands.add_parser(
        "info", help="what a dataset holds", description="Print what a dataset holds."
    )
    info.add_argument("path", metavar="PATH", help="directory that `jaxlm data prepare` wrote")
    info.add_argument("--verify", action="store_true", help="read all files, compare checksums")
    info.set_defaults(run=_run_info)
    _add_show(commands)


def _add_prepare(commands: Any) -> None:
    """Declare the flags of `jaxlm data prepare`."""
    parser = commands.add_parser(
        "prepare",
        help="tokenize files into a dataset",
        description="Tokenize text, JSON (lines or an array) or Parquet files into a dataset; text"
        " and JSON may be compressed (gzip, zstd, bzip2, xz). A directory gives its files of known"
        " suffix at any depth, through links too; a glob gives what matches it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="*", help="files, directories, globs")
    add("--out", required=True, metavar="DIR", help="directory to write; must not exist (required)")
    corpora = ("none", *prepare.CORPORA)
    add("--corpus", default="none", choices=corpora, help="instead of INPUT (%(default)s)")
    tokenizer = "bpe, bytes, characters, or a tokenizer.json or its directory (%(default)s)"
    add("--tokenizer", default="bpe", metavar="NAME|PATH", help=tokenizer)
    size = "size of a new bpe vocabulary, tokens (%(default)s)"
    add("--vocab-size", type=int, default=8192, metavar="N", help=size)
    fraction = "part held out, as a fraction of the documents (%(default)s)"
    add("--validation-fraction", type=float, default=0.01, metavar="F", help=fraction)
    held_out = "files to hold out instead of a fraction (none); repeatable"
    add("--validation", action="append", default=[], metavar="FILE", help=held_out)
    within = "hold out the last characters of each document, not whole documents (off)"
    add("--split-within", action="store_true", help=within)
    field = "field of JSON, column of Parquet; content.text is field text of content (%(default)s)"
    add("--text-field", default="text", metavar="NAME", help=field)
    bad = "a record that is no text: stop, or skip, count and name it in the manifest (%(default)s)"
    add("--on-bad", default="fail", choices=prepare.ON_BAD, help=bad)
    add("--seed", type=int, default=0, help="chooses the documents held out (%(default)s)")
    size = "most tokens in a file; a longer document has its own (%(default)s)"
    add("--shard-tokens", type=int, default=prepare.SHARD_TOKENS, metavar="N", help=size)
    separator = "token that {} a document, for a loaded tokenizer: its text, none or auto (auto)"
    add("--bos", default="auto", metavar="TOKEN", help=separator.format("starts"))
    add("--eos", default="auto", metavar="TOKEN", help=separator.format("ends"))
    add("--overwrite", action="store_true", help="replace a dataset in --out (off)")
    parser.set_defaults(
        run=_run_prepare,
        interrupted="nothing half-made is left, and the same command starts from the beginning",
    )


def _add_show(commands: Any) -> None:
    """Declare the flags of `jaxlm data show`."""
    parser = commands.add_parser(
        "show",
        help="the text of one packed sequence",
        description="Print one packed sequence as text, a line before each segment.",
    )
    parser.add_argument("path", metavar="PATH", help="directory that `jaxlm data prepare` wrote")
    parser.add_argument("--split", default="train", choices=prepare.SPLITS, help="(%(default)s)")
    parser.add_argument("--item", type=int, default=0, metavar="N", help="which one (0)")
    length = "tokens per sequence (%(default)s)"
    parser.add_argument("--sequence-length", type=int, default=256, metavar="TOKENS", help=length)
    parser.add_argument("--seed", type=int, default=0, help="order of training documents (0)")
    parser.set_defaults(run=_run_show)


def _run_prepare(args: argparse.Namespace) -> int:
    """Run `jaxlm data prepare`."""
    if args.corpus != "none":
        if args.inputs:
            raise UserError(f"--corpus={args.corpus} and INPUT exclude each other; use one")
        prepare.prepare_corpus(args.corpus, args.out, overwrite=args.overwrite)
        return 0
    prepare.prepare(
        args.out,
        args.inputs,
        args.tokenizer,
        vocab_size=args.vocab_size,
        validation_fraction=args.validation_fraction,
        validation_inputs=args.validation,
        split_within=args.split_within,
        text_field=args.text_field,
        on_bad=args.on_bad,
        shard_tokens=args.shard_tokens,
        seed=args.seed,
        bos=args.bos,
        eos=args.eos,
        overwrite=args.overwrite,
    )
    return 0


def _run_info(args: argparse.Namespace) -> int:
    """Run `jaxlm data info`."""
    manifest = shards.read_manifest(args.path)
    tokenizer = load_tokenizer(args.path)
    print(f"vocabulary: {manifest['vocab_size']} tokens, {manifest['dtype']}")
    for role in ("bos", "eos"):
        token = manifest[role]
        name = "absent" if token is None else f"{token} {tokenizer.engine.id_to_token(token)}"
        print(f"{role}: {name}")
    for name, part in manifest["splits"].items():
        print(
            f"{name}: {part['tokens']:,} tokens, {part['documents']:,} documents,"
            f" {part['bytes']:,} bytes of text, {len(part['shards'])} files"
        )
        if part["tokens"]:
            shards.open_split(args.path, name)
    if args.verify:
        shards.verify(args.path)
        print("all files are as they were written")
    return 0


def _run_show(args: argparse.Namespace) -> int:
    """Run `jaxlm data show`."""
    for flag, least in (("sequence_length", 1), ("seed", 0)):
        if getattr(args, flag) < least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}={getattr(args, flag)} is below {least}")
    opened = shards.open_split(args.path, args.split)
    if args.split == "train":
        if opened.tokens <= args.sequence_length:
            raise UserError(
                f"--sequence-length={args.sequence_length} is not below the {opened.tokens} tokens"
                f" of split train of {args.path}; use a smaller one"
            )
        packed = pack.pack(opened, args.sequence_length, args.seed)
    else:
        packed = pack.evaluation_items(opened, args.sequence_length)
    if not 0 <= args.item < packed.num_items:
        raise UserError(f"--item={args.item} is not in 0..{packed.num_items - 1}")
    tokenizer = load_tokenizer(args.path)
    made = pack.item(packed, args.item)
    for segment in range(1, int(made["segments"].max()) + 1):
        tokens = made["tokens"][made["segments"] == segment]
        print(f"--- segment {segment}: {len(tokens)} tokens")
        print(decode(tokenizer, tokens))
    return 0
