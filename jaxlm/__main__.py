"""`python -m jaxlm` is the `jaxlm` command."""

from jaxlm.cli import main

raise SystemExit(main())
