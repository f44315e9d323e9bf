"""`jaxlm outer serve | status`: argument parsing and printing only."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

EXAMPLES = """examples:
  jaxlm outer serve /shared/islands
  jaxlm outer serve s3://bucket/run --key merger.key --keys paris:... tokyo:... merger:...
  jaxlm outer status s3://bucket/run --json
"""
KEYS = (
    "NAME:PUBLIC_KEY of each island and of the merger, as in outer.keys (none: nothing is signed)"
)


def add_parser(subparsers: Any) -> None:
    """Add `outer` and its subcommands; each sets `run`, a function of the arguments."""
    parser = subparsers.add_parser(
        "outer",
        help="merge islands that are separate jobs",
        description="Merge what islands contribute to a store (outer.store), and look at them.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="merge, for ever",
        description="Merge what the islands of a store contribute, on the CPU of this machine, "
        "until interrupted. It may be killed and started again at any moment; a second one takes "
        "over where the first is gone.",
    )
    serve.add_argument("store", metavar="STORE", help="directory or URL, as in outer.store")
    serve.add_argument("--key", default="", metavar="FILE", help="private key; made if absent")
    serve.add_argument("--keys", nargs="*", default=[], metavar="NAME:KEY", help=KEYS)
    serve.set_defaults(
        run=run_serve, interrupted="nothing is lost; the same command merges on from the store"
    )
    status = commands.add_parser(
        "status",
        help="islands, merges, staleness, tokens, bytes, who is late",
        description="Print a table of the islands of a store. It watches their beats for some "
        "seconds to tell who is there.",
    )
    status.add_argument("store", metavar="STORE", help="directory or URL, as in outer.store")
    status.add_argument("--keys", nargs="*", default=[], metavar="NAME:KEY", help=KEYS)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(run=run_status, interrupted="nothing was changed")


def run_serve(args: Any) -> None:
    """Merge on the CPU, and say so in the log; an accelerator is left to the islands."""
    import jax

    from jaxlm.outer import serve

    jax.config.update("jax_platforms", "cpu")
    logger = logging.getLogger("jaxlm")
    logger.setLevel(logging.INFO)
    serve.serve(args.store, args.key, args.keys)


def run_status(args: Any) -> None:
    """Print the islands of a store, as a table or as JSON."""
    from jaxlm.outer import status

    found = status.read_status(args.store, args.keys)
    print(json.dumps(found) if args.json else status.table(found), file=sys.stdout)
