"""`ccssl-hf check`: what the splits of a run hold, and whether training could start."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from .help import answer_at_once

DATA_FLAGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "[--data_dir FOLDER] [--FLAG VALUE ...]",
}


def check(
    context: typer.Context,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the findings to this file.")
    ] = None,
) -> None:
    """Check the images of a run before training: classes, duplicates, OOD names and unreadable files.

        ccssl-hf check --data_dir photos

    It takes the flags of `ccssl-hf train`: replace `train` by `check` in a command. It decodes the labeled, validation
    and test images. The exit code is 0 if training can start; otherwise it is 2, and all errors are printed.
    """
    with errors_in_one_line():
        answer_at_once(context.args, description=None, prog=context.command_path)

        from .. import recipe
        from ..data.survey import announce
        from ..training_args import CCSSLTrainingArguments
        from .flags import parse_recipe

        call: dict[str, Any] = {"arguments": context.args, "config": recipe.OWN_IMAGES, "prog": context.command_path}
        found = recipe.check(*parse_recipe(recipe.FolderArguments, CCSSLTrainingArguments, **call))
        if json_out is not None:
            json_out.parent.mkdir(parents=True, exist_ok=True)
            facts = {name: asdict(split) for name, split in found.splits.items()}
            findings = {f"{kind}s": found.texts(kind) for kind in ("error", "warning", "note")}
            text = json.dumps({"splits": facts, **findings}, indent=2, ensure_ascii=False)
            json_out.write_text(text + "\n", encoding="utf-8")
        announce(found)
    typer.echo("Training can start.")
