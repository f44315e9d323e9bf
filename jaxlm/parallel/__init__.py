"""Kinds of parallelism that are programs of their own, not only a table of axes."""
