"""`ccssl-hf train`: a run on one's own images, every setting a flag."""

from __future__ import annotations

from inspect import getdoc
from typing import Any

import typer

from ..errors import errors_in_one_line

ANY_FLAG: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
    "options_metavar": "[--config FILE] [--FLAG VALUE ...]",
}
"""How the verb is registered: its flags, `--help` too, are the recipes', which transformers' parser reads."""


def train(context: typer.Context) -> None:
    """Train on one's own images, with any timm backbone.

        ccssl-hf train --data_dir my_images --backbone resnet50 --pretrained [any flag]
        accelerate launch -m ccssl_hf.cli train --data_dir my_images [any flag]

    The second form starts as many processes as `accelerate` is told to. A flag overrides the file of `--config`, which
    overrides the defaults; `--flag none` unsets what the file sets.
    """
    with errors_in_one_line():
        from ..recipe import OWN_IMAGES, FolderArguments, build_trainer
        from ..recipe import train as run
        from ..training_args import CCSSLTrainingArguments
        from .flags import parse_recipe

        recipe, args = parse_recipe(
            FolderArguments,
            CCSSLTrainingArguments,
            config=OWN_IMAGES,
            arguments=context.args,
            description=getdoc(train),
            prog=context.command_path,
        )
        trainer, splits = build_trainer(recipe, args)
    run(trainer, splits)
