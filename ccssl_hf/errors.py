"""What error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_misses(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'this' or 'that'?` for a misspelt name, with the leading space; nothing where none is like it."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
