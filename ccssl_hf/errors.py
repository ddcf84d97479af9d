"""Helpers for error messages."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from .escape import printable


def near_misses(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'this' or 'that'?`, with the leading space, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def listed(names: Iterable[object], limit: int = 10, separator: str = ", ") -> str:
    """The first names, and how many more there are, without control characters."""
    found = [printable(str(name)) for name in names]
    more = f" and {len(found) - limit:,} more" if len(found) > limit else ""
    return separator.join(found[:limit]) + more


def warn(logger: logging.Logger, message: str, *values: object) -> None:
    """Log a warning in the main process alone, also before the processes are connected."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message, *values)


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
    except BrokenPipeError:  # the reader of the output has enough, as in `| head`
        raise
    except (OSError, TypeError, ValueError) as error:
        _end(f"error: {error}", 2, error)
    except KeyboardInterrupt as error:
        _end("Stopped.", 130, error)


@contextmanager
def errors_of_a_run(saved: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Turns what ends a run and is not a mistake of the code into one line on stderr and an exit code.

    That is 2 for an error that settings or data explain, 1 for the disk, 130 for Ctrl-C, and 143 for SIGTERM. `saved`
    returns the last complete checkpoint, which the line about the disk names.
    """
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", 2, error)
    except OSError as error:
        last = None if "complete checkpoint" in str(error) else saved()
        _end(f"error: {error}" + (f". The last complete checkpoint is {last}." if last else ""), 1, error)
    except KeyboardInterrupt as error:
        if not str(error):  # else the trainer has said it
            _end("Stopped.", 130, error)
        raise SystemExit(130) from error


def _end(line: str, code: int, error: BaseException) -> NoReturn:
    # One line, not one per process.
    if os.environ.get("RANK", "0") == "0" or getattr(error, "of_one_process", False):
        print(printable(line, lines=True), file=sys.stderr)
    raise SystemExit(code) from error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Names the extra to install if an import in this block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"The package {error.name} is missing: pip install 'ccssl_hf[{name}]'.") from error


class UserError(ValueError):
    """An error of a run that its message explains. The command line prints it without a traceback."""

    of_one_process = False  # whether other processes may not have the error, so that each prints its own

    def __init__(self, message: str) -> None:
        # A DataLoader raises an error of its worker again, with the worker's traceback before the message.
        name = f"\n{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(name)[2].strip())


def in_lines(items: Iterable[str], most: int | None = 10) -> str:
    """The items, each on a line of its own after a line break; of many the first ones and how many more there are."""
    found = list(items)
    more = [f"and {len(found) - most:,} more"] if most is not None and len(found) > most else []
    return "".join(f"\n  {item}" for item in [*found[:most], *more])
