"""The command line of a run: every field of its dataclasses is a flag, with a YAML file behind them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..errors import near_misses


def flags_by_class(*types: type) -> dict[type, list[dataclasses.Field[Any]]]:
    """The fields of dataclasses that become flags, under the class that defines each: special ones before general."""
    return {
        cls: [f for f in fields(t) if f.init and _owner(t, f.name) is cls]
        for t in types
        for cls in t.__mro__
        if dataclasses.is_dataclass(cls)
    }


def _owner(cls: type, name: str) -> type:
    return next(each for each in cls.__mro__ if name in inspect.get_annotations(each))


def first_paragraph(cls: type) -> str:
    """What a class says of itself, in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the lines of the description stay as they are."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The flag once, though `--with-hyphens` will do, too."""
        flag = next(option for option in action.option_strings if option.startswith("--"))
        return f"{flag} {self._format_args(action, 'VALUE')}".rstrip()


class _Parser(HfArgumentParser):
    """Raises a ValueError instead of printing every flag there is, and reads `none` where a value is optional."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        if settings.get("default") is None and settings.get("type", str) is not str:
            settings["type"] = _or_none(settings["type"])
            if "choices" in settings:
                settings["choices"] = [*settings["choices"], None]
        return super().add_argument(*flags, **settings)

    def format_help(self) -> str:
        """Every flag beside those of its class; in upstream's list 200 of them follow one another."""
        formatter = self._get_formatter()
        actions = {
            action.dest: action for action in reversed(self._actions)
        }  # of --nesterov and --no_nesterov the first
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.add_arguments([actions["help"], actions["config"]])
        for cls, members in flags_by_class(*self.dataclass_types).items():
            formatter.start_section(cls.__name__)
            formatter.add_text(textwrap.fill(first_paragraph(cls), 100))
            formatter.add_arguments([actions[f.name] for f in members])
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}.")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # argparse names it in errors
    return read


def parse_recipe(
    *types: type,
    config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file and the command line; a flag overrides the file.

    Args:
        types: Dataclasses whose fields become flags. `--name none` unsets what the file sets.
        config: The YAML file to read where `--config` names none: one `name: value` a line, as on the command line.
        arguments: The command line; default `sys.argv[1:]`.
        description: What `--help` says first.
        prog: What it calls the command; default: the script.

    Raises:
        ValueError: The file can't be read, a key or flag is unknown, or a value is none of its type.
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
    known = [f.name for t in types for f in fields(t) if f.init]
    if chosen.config is not None:
        plain, structured = _read_yaml(Path(chosen.config), known)
        parser.set_defaults(**plain, **structured)
        flags = [*(f"--{name}={word}" for name, word in plain.items()), *flags]  # read and checked as flags are
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        args=flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(f"Unknown argument {unknown[0]}.{near_misses(name, known)} --help lists all.")
    return tuple(parsed)


def _read_yaml(path: Path, known: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The settings of a file: plain ones as the words of a flag; lists and dictionaries as such."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        words = yaml.load(text, yaml.BaseLoader)  # every value as it is written: `no` is no boolean, 1e-3 is a number
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} can't be read ({error}): check the path and the file.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: write one `name: value` a line.")
    for key in values:
        if key not in known:
            raise ValueError(f"--config {path}: unknown key {key!r}.{near_misses(str(key), known)}")
    structured = {key: value for key, value in values.items() if isinstance(value, (list, dict))}
    plain = {key: words[key] for key, value in values.items() if value is not None and key not in structured}
    return plain, structured
