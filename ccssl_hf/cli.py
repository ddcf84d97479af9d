"""What the recipes share: a command line with every setting, a YAML file behind it, and the run itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import yaml
from transformers import HfArgumentParser

from .data import load_split, near_misses, read_class_names
from .modeling import CCSSLForImageClassification
from .trainer import CCSSLTrainer
from .training_args import CCSSLTrainingArguments


@dataclass
class RecipeArguments:
    """What a recipe reads and which network it trains.

    Each split is an image folder (`<class>/<image>`, or any depth for the unlabeled one), a folder, file or glob of
    parquet, or a data set on the Hub, as `user/name` or `user/name:split`.
    """

    labeled: str | None = field(default=None, metadata={"help": "Labeled training images."})
    unlabeled: str | None = field(
        default=None, metadata={"help": "Unlabeled training images, of known classes or not."}
    )
    validation: str | None = field(default=None, metadata={"help": "Labeled images to choose hyperparameters on."})
    test: str | None = field(default=None, metadata={"help": "Labeled images that the last evaluation is made on."})
    backbone: str = field(default="resnet50", metadata={"help": "Name of a timm model."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; default: the backbone's."}
    )


def parse_recipe(
    *types: type,
    config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file and the command line; a flag overrides the file.

    Args:
        types: Dataclasses whose fields become flags.
        config: The YAML file to read where `--config` names none.
        arguments: The command line; default `sys.argv[1:]`.
        description: What `--help` says first.

    Raises:
        ValueError: The file can't be read, or a key or flag is unknown.
    """
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config", default=config, help="YAML file with defaults for all flags.")
    chosen, rest = early.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    parser = HfArgumentParser(types, parents=[early], description=description)
    known = [f.name for t in types for f in fields(t) if f.init]
    if chosen.config is not None:
        values = _read_yaml(Path(chosen.config))
        for key in values:
            if key not in known:
                raise ValueError(f"{chosen.config}: unknown key {key!r}.{near_misses(key, known)}")
        parser.set_defaults(**values)
    *parsed, _, unknown = parser.parse_args_into_dataclasses(args=rest, return_remaining_strings=True)
    if unknown:
        flag = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(f"Unknown argument {unknown[0]}.{near_misses(flag, known)}")
    return tuple(parsed)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file; check the path.")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: write one `name: value` a line.")
    return values


def load_splits(recipe: RecipeArguments) -> dict[str, datasets.Dataset]:
    """The splits that the command line names, by role.

    Raises:
        ValueError: No labeled split is given, or one can't be read.
    """
    if recipe.labeled is None:
        raise ValueError("--labeled is missing: name the labeled images, a folder, parquet files or a Hub data set.")
    sources = {role: getattr(recipe, role) for role in ("labeled", "unlabeled", "validation", "test")}
    return {role: load_split(source, role=role) for role, source in sources.items() if source is not None}


def train(recipe: RecipeArguments, args: CCSSLTrainingArguments) -> CCSSLTrainer:
    """Load, build, train, evaluate, save, and publish where asked to: what every recipe does after its settings are
    read.

    Args:
        recipe: The data and the backbone. Without a validation split nothing is evaluated during training.
        args: The run. `resume_from_checkpoint` goes on from a checkpoint folder.

    Returns:
        The trainer, after training.
    """
    splits = load_splits(recipe)
    if "validation" not in splits:
        args.eval_strategy = "no"

    # A timm backbone, its classifier and a projection head.
    model = CCSSLForImageClassification.from_timm(
        recipe.backbone,
        labels=read_class_names(splits["labeled"], args.label_column),
        pretrained=recipe.pretrained,
        image_size=recipe.image_size,
    )

    # Train, from a checkpoint if one is named.
    trainer = CCSSLTrainer(
        model,
        args,
        train_dataset=splits["labeled"],
        unlabeled_dataset=splits.get("unlabeled"),
        eval_dataset=splits.get("validation"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # Evaluate the published weights on what there is.
    for role in ("validation", "test"):
        if role in splits:
            metrics = trainer.evaluate(splits[role], metric_key_prefix=role)
            trainer.log_metrics(role, metrics)
            trainer.save_metrics(role, metrics)

    # Save the plain folder with its card, and publish it.
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer
