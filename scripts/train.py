"""`jaxlm train` as a file, for hosts where one runs files: scripts/train.py CONFIG.yaml a.b=c."""

import sys

from jaxlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
