"""A command line from dataclasses: every field is a flag, and a YAML file sets defaults."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..recipe import CPU_DEFAULTS, OWN_IMAGES, FolderArguments
from ..training_args import CCSSLTrainingArguments, StrictParser, read_config
from .help import Flag, Section, answer, config_of, unknown_flag


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


def sections_of(*types: type) -> dict[str, Section]:
    """The flags of dataclasses for a page of help, by the class that defines each."""
    hints = {name: hint for t in reversed(types) for name, hint in get_type_hints(t).items()}
    found = {}
    for cls, members in flags_by_class(*types).items():
        flags = {}
        for f in members:
            default = None if f.default is dataclasses.MISSING else getattr(f.default, "value", f.default)
            flags[f.name] = Flag(_value(hints[f.name]), " ".join(f.metadata.get("help", "").split()), default)
        theirs = cls.__module__.startswith("transformers.")
        found[cls.__name__] = Section("Arguments of transformers." if theirs else first_paragraph(cls), flags)
    return found


def _value(hint: Any) -> str:
    kinds = [each for each in get_args(hint) if each is not type(None)] or [hint]
    if get_origin(hint) is Literal or get_origin(kinds[0]) is Literal:
        return f"{{{','.join(map(str, get_args(hint if get_origin(hint) is Literal else kinds[0])))}}}"
    return "" if kinds[0] is bool else "VALUE"


def _names(*types: type) -> list[str]:
    return [f.name for t in types for f in dataclasses.fields(t) if f.init]


def parse_recipe(
    *types: type,
    config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file and the command line. A flag overrides the file; `--name none` unsets a value.

    `config` is read if `--config` names no file. `arguments`, `description` and `prog` are as in `argparse`. `--help`
    shows the settings that people change, and `--help_all` shows all. Raises a ValueError if the file cannot be read, a
    key or flag is unknown, or a value has the wrong type.
    """
    chosen, flags = config_of(sys.argv[1:] if arguments is None else arguments, config)
    prog = prog or Path(sys.argv[0]).name
    answer(sections_of(*types), flags, config=chosen, description=description, prog=prog)
    parser = StrictParser(types, prog=prog, add_help=False, allow_abbrev=False)
    known = _names(*types)
    if chosen is not None:
        plain, structured = read_config(chosen, known)
        parser.set_defaults(**structured)
        flags = [*(f"--{name}={word}" for name, word in plain.items()), *flags]  # read and checked like flags
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise unknown_flag(unknown[0], known)
    return tuple(parsed)


def parse_own_images(
    arguments: Sequence[str] | None = None, **page: Any
) -> tuple[FolderArguments, CCSSLTrainingArguments]:
    """The settings of `ccssl-hf train`. If there is no backbone and no accelerator, `CPU_DEFAULTS` replace defaults."""
    types, given = (FolderArguments, CCSSLTrainingArguments), sys.argv[1:] if arguments is None else list(arguments)
    recipe, args = parse_recipe(*types, config=OWN_IMAGES, arguments=given, **page)
    if recipe.backbone is not None or recipe.model is not None or args.device.type != "cpu":
        return recipe, args
    file = config_of(given, None)[0]
    own = [name for part in read_config(file, _names(*types)) for name in part] if file else []
    smaller = [f"--{name}={value}" for name, value in CPU_DEFAULTS.items() if name not in own]
    recipe, args = parse_recipe(*types, config=OWN_IMAGES, arguments=[*smaller, *given], **page)
    if recipe.labeled is not None and os.environ.get("RANK", "0") == "0":
        print(
            f"There is no accelerator, and no backbone was given: this run trains {recipe.backbone} at "
            f"{recipe.image_size} px, with mu {args.mu}, for {args.max_steps:,} steps. --backbone, --image_size, --mu "
            "and --max_steps choose others.",
            file=sys.stderr,
        )
    return recipe, args
