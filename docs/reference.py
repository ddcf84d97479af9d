"""Generates the reference pages from the code: `python docs/reference.py`.

It writes a page for each command of `ccssl-hf` into docs/cli/, the table in docs/algorithms.md, and
ccssl_hf/cli/flags.json, from which `ccssl-hf train --help` is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.algorithms import ALGORITHMS
from ccssl_hf.cli import app
from ccssl_hf.cli.flags import first_paragraph, flags_by_class, sections_of
from ccssl_hf.cli.help import FLAGS_FILE
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments

DOCS = Path(__file__).resolve().parent

# -------------------------------------------------------------------------------------------------- table of algorithms

_SECTION = re.compile(r"(<!-- algorithms.*?-->\n).*?(<!-- /algorithms -->)", re.DOTALL)


def algorithms_table() -> str:
    """A Markdown table with a row for each registered algorithm, without the hyperparameters of CCSSL."""
    shared = ALGORITHMS["supervised"].hyperparameters_class.table()
    head = ("`algorithm`", "paper", "loss terms", "hyperparameters", "views of an unlabeled image")
    rows = []
    for name, algorithm in ALGORITHMS.items():
        paper, settings = algorithm.paper, algorithm.hyperparameters_class.table()
        rows.append(
            (
                f"`{name}`",
                f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper else "labels only",
                ", ".join(f"`{term}`" for term in algorithm.terms),
                ", ".join(f"`{k}` {v.default}" for k, v in settings.items() if k not in shared),
                ", ".join(view.name.lower() for view in algorithm.views) or "none",
            )
        )
    return _table(head, rows)


def with_table(text: str) -> str:
    """`text` with the current table between its two `algorithms` comments."""
    return _SECTION.sub(lambda match: f"{match[1]}\n{algorithms_table()}\n\n{match[2]}", text)


# ------------------------------------------------------------------------------------------------ pages of the commands
# Commands are typed `Any`, and types are read from the functions' annotations: both have moved between typer releases.


def pages() -> dict[str, str]:
    """File name to text: `index.md`, and one page for each command."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="ccssl-hf")
    commands: dict[str, Any] = {name: root.get_command(context, name) for name in root.list_commands(context)}
    panels: dict[str, list[str]] = {}
    for name, command in commands.items():
        row = f"| [`{name}`]({name}.md) | {_text(command).splitlines()[0]} |"
        panels.setdefault(command.rich_help_panel, []).append(row)
    index = ["# The `ccssl-hf` command", "One command for each step from a folder of images to a hosted model."]
    for panel, rows in panels.items():
        index += [f"## {panel}", "\n".join(["| command | what it does |", "| --- | --- |", *rows])]
    index.append(
        "These pages are generated from `ccssl-hf COMMAND --help`. Flags are spelled as in Python and YAML, with "
        "underscores (`--image_root`); hyphens (`--image-root`) are accepted, too. `ccssl-hf --install-completion` "
        "enables completion of commands and flags in the shell."
    )
    texts = {"index": index, **{name: list(_page(context, name, command)) for name, command in commands.items()}}
    return {f"{name}.md": "\n\n".join(paragraphs) + "\n" for name, paragraphs in texts.items()}


def _page(parent: Any, name: str, command: Any, level: int = 1) -> Iterator[str]:
    """The paragraphs of a command, followed by those of its subcommands."""
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
        yield _table(("argument", "description"), [(f"`{each.metavar}`", each.help) for each in arguments])
    options = [each for each in shown if each.param_type_name == "option" and each.name in types]
    if options:
        rows = [(_flag(each, types[each.name]), each.help, _default(each)) for each in options]
        yield _table(("option", "description", "default"), rows)
    if name == "train":
        yield from _flags_of_train(level + 1)


def _flags_of_train(level: int) -> Iterator[str]:
    """The flags that this package defines. Those of transformers differ between its releases, which document them."""
    settings = yaml.safe_load(OWN_IMAGES.read_text(encoding="utf-8"))
    for cls, members in flags_by_class(FolderArguments, CCSSLTrainingArguments).items():
        if cls.__module__.startswith("ccssl_hf."):
            yield f"{'#' * level} {cls.__name__}"
            yield first_paragraph(cls)
            rows = [
                (f"`--{each.name}`", each.metadata["help"], _default(each), _code(settings.pop(each.name, None)))
                for each in members
            ]
            yield _table(("flag", "description", "default", OWN_IMAGES.name), rows)
    yield f"{'#' * level} TrainingArguments"
    theirs = ", ".join(f"`{name}` to {_code(value)}" for name, value in settings.items())
    yield (
        "Every field of [`transformers.TrainingArguments`]"
        "(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) is a flag, "
        f"too. {OWN_IMAGES.name} sets {theirs}."
    )


def flags_file() -> str:
    """The flags of this package's dataclasses as JSON, from which the command shows its help at once."""
    parts = []
    for name, section in sections_of(FolderArguments, CCSSLTrainingArguments).items():
        if name != "TrainingArguments":
            flags = ",\n".join(f"  {json.dumps(key)}: {json.dumps(flag)}" for key, flag in section.flags.items())
            parts.append(f'{json.dumps(name)}: {{"text": {json.dumps(section.text)}, "flags": {{\n{flags}\n}}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _text(command: Any) -> str:
    return str(command.help or "").strip()


def _flag(option: Any, kind: Any) -> str:
    """`--name VALUE`, from the spellings and the type of an option."""
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
    """The default of an option or of a dataclass field."""
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
    for stale in (DOCS / "cli").glob("*.md"):
        stale.unlink()
    for file_name, page in pages().items():
        (DOCS / "cli" / file_name).write_text(page, encoding="utf-8")
    algorithms = DOCS / "algorithms.md"
    algorithms.write_text(with_table(algorithms.read_text(encoding="utf-8")), encoding="utf-8")
    FLAGS_FILE.write_text(flags_file(), encoding="utf-8")
