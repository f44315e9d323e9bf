"""Quantities as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes as people read them: 12.3 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def number(count: float) -> str:
    """A large count: 8.03 B."""
    for unit, scale in ((" P", 1e15), (" T", 1e12), (" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g}{unit}"
    return f"{count:.4g}"
