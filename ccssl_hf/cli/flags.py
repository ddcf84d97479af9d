"""A command line from dataclasses: every field is a flag, and a YAML file sets defaults."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import near_misses
from ..training_args import StrictParser, read_config


def flags_by_class(*types: type) -> dict[type, list[dataclasses.Field[Any]]]:
    """The fields of dataclasses that are flags, by the class that defines each; a subclass comes before its bases."""

    found: dict[type, list[dataclasses.Field[Any]]] = {}
    for t in types:
        left = {f.name: f for f in dataclasses.fields(t) if f.init}
        for cls in filter(dataclasses.is_dataclass, t.__mro__):
            own = inspect.get_annotations(cls)
            found[cls] = [left.pop(name) for name in list(left) if name in own]
    return found


def first_paragraph(cls: type) -> str:
    """The first paragraph of the docstring of a class, in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the description."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = next(option for option in action.option_strings if option.startswith("--"))  # not also --with-hyphens
        return f"{flag} {self._format_args(action, 'VALUE')}".rstrip()


class _Parser(StrictParser):
    """Its help has one section per class."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        actions = {action.dest: action for action in reversed(self._actions)}  # --nesterov, not --no_nesterov
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.add_arguments([actions["help"], actions["config"]])
        for cls, members in flags_by_class(*self.dataclass_types).items():
            formatter.start_section(cls.__name__)
            formatter.add_text(textwrap.fill(first_paragraph(cls), 100))
            formatter.add_arguments([actions[f.name] for f in members])
            formatter.end_section()
        return formatter.format_help()


def parse_recipe(
    *types: type,
    config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file and the command line. A flag overrides the file; `--name none` unsets a value.

    `config` is read if `--config` names no file. `arguments`, `description` and `prog` are as in `argparse`. Raises a
    ValueError if the file cannot be read, a key or flag is unknown, or a value has the wrong type.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default=config, help="YAML file with defaults for all flags")
    chosen, flags = early.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    parser = _Parser(
        types,
        prog=prog,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description=description,
        parents=[early],
        formatter_class=_Help,
        allow_abbrev=False,
    )
    known = [f.name for t in types for f in dataclasses.fields(t) if f.init]
    if chosen.config is not None:
        plain, structured = read_config(Path(chosen.config), known)
        parser.set_defaults(**plain, **structured)  # for --help
        flags = [*(f"--{name}={word}" for name, word in plain.items()), *flags]  # read and checked like flags
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        args=flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(f"Unknown argument {unknown[0]}.{near_misses(name, known)} --help lists all.")
    return tuple(parsed)
