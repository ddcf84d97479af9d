"""Helpers for error messages."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .escape import printable


def near_misses(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'this' or 'that'?`, with the leading space, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def listed(names: Iterable[object], limit: int = 10, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return separator.join(map(str, names[:limit])) + more


def summary(error: BaseException) -> str:
    """The message of an error in one line. Messages of the Hub have several lines or are JSON."""
    try:
        text = " ".join(problem["message"] for problem in json.loads(str(error))["errors"])
    except ValueError:
        text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return re.sub(r"\s+", " ", text).strip().rstrip(".:")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns an error in the user's input into one line on stderr and exit code 2. Training itself needs tracebacks."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if os.environ.get("RANK", "0") == "0":  # one line, not one per process
            print(f"error: {printable(str(error), lines=True)}", file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Names the extra to install if an import in this block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"The package {error.name} is missing: pip install 'ccssl_hf[{name}]'.") from error
