"""`ccssl-hf train`: a training run on image folders, with every setting as a flag."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path
from typing import Any

import typer

from ..errors import errors_in_one_line
from .help import answer_at_once

OWN_IMAGES = (
    Path(__file__).parents[1] / "configs" / "imagefolder.yaml"
)  # recipe.OWN_IMAGES, which takes seconds to import

# The options of the command in typer, which leaves all flags and `--help` to `parse_recipe`.
ANY_FLAG: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
    "options_metavar": "[--config FILE] [--FLAG VALUE ...]",
}


def train(context: typer.Context) -> None:
    """Train a model on your own images, with any timm backbone.

        ccssl-hf train --data_dir photos --backbone resnet50 --pretrained
        accelerate launch -m ccssl_hf.cli train --data_dir photos --backbone resnet50 --pretrained

    The second command trains with several processes. Settings come from flags, then from the YAML file of --config,
    then from defaults for image folders.
    """
    call: dict[str, Any] = dict(config=OWN_IMAGES, description=getdoc(train), prog=context.command_path)
    with errors_in_one_line():
        answer_at_once(["FolderArguments", "CCSSLTrainingArguments"], context.args, **call)

        from .. import recipe
        from ..training_args import CCSSLTrainingArguments
        from .flags import parse_recipe

        parsed = parse_recipe(recipe.FolderArguments, CCSSLTrainingArguments, arguments=context.args, **call)
        trainer, splits = recipe.build_trainer(*parsed)
    recipe.train(trainer, splits)
