"""A page of Markdown for each verb, from the commands themselves: `python -m ccssl_hf.cli.pages docs/cli`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from ..recipe import OWN_IMAGES, FolderArguments
from ..training_args import CCSSLTrainingArguments
from . import app
from .flags import first_paragraph, flags_by_class

# Commands are typed `Any`, and types are read from the functions' annotations: typer has moved both about.


def pages() -> dict[str, str]:
    """File name to text: `index.md`, and one page for each verb."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="ccssl-hf")
    verbs: dict[str, Any] = {name: root.get_command(context, name) for name in root.list_commands(context)}
    panels: dict[str, list[str]] = {}
    for name, verb in verbs.items():
        row = f"| [`{name}`]({name}.md) | {_text(verb).splitlines()[0]} |"
        panels.setdefault(verb.rich_help_panel, []).append(row)
    index = ["# The `ccssl-hf` command", "One verb for each step between a folder of images and a hosted model."]
    for panel, rows in panels.items():
        index += [f"## {panel}", "\n".join(["| verb | what it does |", "| --- | --- |", *rows])]
    index.append(
        "These pages are made of what `ccssl-hf VERB --help` says. `ccssl-hf --install-completion` lets the shell "
        "complete verbs and flags."
    )
    texts = {"index": index, **{name: list(_page(context, name, verb)) for name, verb in verbs.items()}}
    return {f"{name}.md": "\n\n".join(paragraphs) + "\n" for name, paragraphs in texts.items()}


def _page(parent: Any, name: str, command: Any, level: int = 1) -> Iterator[str]:
    """The paragraphs of a verb, with those of its own verbs below where it has such."""
    context = command.context_class(command, info_name=name, parent=parent)
    yield f"{'#' * level} `{context.command_path}`"
    yield _text(command)
    if hasattr(command, "list_commands"):
        for each in command.list_commands(context):
            yield from _page(context, each, command.get_command(context, each), level + 1)
        return
    types = get_type_hints(command.callback)
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    usage = [context.command_path, command.options_metavar, *(each.metavar for each in arguments)]
    yield f"```text\n{' '.join(usage)}\n```"
    if arguments:
        yield _table(("argument", "what it is"), [(f"`{each.metavar}`", each.help) for each in arguments])
    options = [each for each in shown if each.param_type_name == "option" and each.name in types]
    if options:
        rows = [(_flag(each, types[each.name]), each.help, _default(each)) for each in options]
        yield _table(("option", "what it does", "default"), rows)
    if name == "train":
        yield from _flags_of_train(level + 1)


def _flags_of_train(level: int) -> Iterator[str]:
    """The recipe's own flags; those of transformers change with its version, and have pages there."""
    settings = yaml.safe_load(OWN_IMAGES.read_text(encoding="utf-8"))
    for cls, members in flags_by_class(FolderArguments, CCSSLTrainingArguments).items():
        if cls.__module__.startswith("ccssl_hf."):
            yield f"{'#' * level} {cls.__name__}"
            yield first_paragraph(cls)
            rows = [
                (f"`--{each.name}`", each.metadata["help"], _default(each), _code(settings.pop(each.name, None)))
                for each in members
            ]
            yield _table(("flag", "what it does", "default", OWN_IMAGES.name), rows)
    yield f"{'#' * level} TrainingArguments"
    theirs = ", ".join(f"`{name}` to {_code(value)}" for name, value in settings.items())
    yield (
        "Every other field of [`transformers.TrainingArguments`]"
        "(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) is a flag, "
        f"too. Of these, {OWN_IMAGES.name} sets {theirs}."
    )


def _text(command: Any) -> str:
    return str(command.help or "").strip()


def _flag(option: Any, kind: Any) -> str:
    """`--name VALUE`, from all its spellings and its type."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    [kind] = [each for each in kinds if each is not NoneType]
    names = "` / `".join([*option.opts, *option.secondary_opts])
    return f"`{names}`" if kind is bool else f"`{names} {option.metavar or _value(kind)}`"


def _value(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return " ".join(map(_value, get_args(kind)))
    if get_origin(kind) is not None:  # list[str]: an option that may be repeated; Literal: its choices
        return "|".join(_value(each) for each in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(each.value) for each in kind)
    return kind.__name__.upper() if isinstance(kind, type) else str(kind)


def _default(setting: Any) -> str:
    """Of an option or a field."""
    if getattr(setting, "required", False):
        return "required"
    return _code(getattr(setting.default, "value", setting.default))


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"`{value}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    lines: list[Sequence[str | None]] = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join((cell or '').replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.md"):
        stale.unlink()
    for file_name, text in pages().items():
        (folder / file_name).write_text(text, encoding="utf-8")
