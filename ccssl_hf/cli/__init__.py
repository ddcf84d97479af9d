"""The `ccssl-hf` command. Its verbs import torch and transformers only when they run."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .check import DATA_FLAGS, check
from .convert import convert
from .evaluate import evaluate
from .export import export
from .predict import predict
from .push import push
from .report import report
from .serve import serve
from .space import space
from .train import ANY_FLAG, train


def _spell_as_in_python(command: Any) -> None:
    """Spell options like the fields of dataclasses, `--batch_size`. typer turns underscores into hyphens."""
    for each in command.params:
        for names in (each.opts, each.secondary_opts):
            names[:] = [re.sub(r"(?<=\w)-", "_", name) for name in names]
    for each in getattr(command, "commands", {}).values():
        _spell_as_in_python(each)


class Commands(TyperGroup):
    """Shows a wrong argument in one line instead of a box. `click.UsageError` has moved between typer's releases."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for each in self.commands.values():
            _spell_as_in_python(each)

    def main(self, args: Any = None, *others: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        settings["standalone_mode"] = False
        try:
            code = super().main(args, *others, **settings)
        except Exception as error:
            if not (standalone_mode and hasattr(error, "format_message")):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is its message
                error.show()  # type: ignore[attr-defined]
            else:
                command = getattr(getattr(error, "ctx", None), "command_path", "ccssl-hf")
                text = " ".join(error.format_message().split())
                print(f"error: {text.rstrip('.')}. See `{command} --help`.", file=sys.stderr)
            code = getattr(error, "exit_code", 2)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=Commands,
    name="ccssl-hf",
    no_args_is_help=True,
    help="Semi-supervised image classification for the Hugging Face ecosystem.",
    epilog="Flags may be written with underscores or hyphens.",
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
)
RUNS, PUBLISHING = "Train and evaluate", "Publish and serve"

app.command(rich_help_panel=RUNS, **DATA_FLAGS)(check)
app.command(rich_help_panel=RUNS, **ANY_FLAG)(train)
app.command(rich_help_panel=RUNS)(evaluate)
app.command(rich_help_panel=RUNS)(predict)
app.command(rich_help_panel=RUNS)(report)
app.command(rich_help_panel=PUBLISHING)(push)
app.command(rich_help_panel=PUBLISHING)(serve)
app.command(rich_help_panel=PUBLISHING)(space)
app.add_typer(export, name="export", rich_help_panel=PUBLISHING)
app.command(rich_help_panel=PUBLISHING)(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ccssl-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
