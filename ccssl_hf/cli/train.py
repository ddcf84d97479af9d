"""`ccssl-hf train`: a training run on image folders, with every setting as a flag."""

from __future__ import annotations

from inspect import getdoc
from typing import Any

import typer

from ..errors import errors_in_one_line
from .help import answer_at_once

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
    then from defaults for image folders. Without an accelerator and --backbone, the defaults are smaller: resnet18 at
    64 px, mu 3, 5,000 steps.
    """
    page: dict[str, Any] = dict(description=getdoc(train), prog=context.command_path)
    with errors_in_one_line():
        answer_at_once(context.args, **page)

        from ..recipe import build_trainer
        from ..recipe import train as run
        from .flags import parse_own_images

        trainer, splits = build_trainer(*parse_own_images(context.args, **page))
    run(trainer, splits)
