"""A training run: load the splits, build model and trainer, then train, evaluate and save."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from timm.models import get_pretrained_cfg
from transformers import set_seed

from .algorithms import build_algorithm
from .backbones import check_backbone
from .data import read_class_names
from .errors import errors_in_one_line
from .modeling import CCSSLForImageClassification
from .sources import load_split
from .survey import Finding, Survey, size_errors, survey
from .trainer import CCSSLTrainer
from .training_args import CONFIGS, CCSSLTrainingArguments, argument

ROLES = ("labeled", "unlabeled", "validation", "test")
OWN_IMAGES = CONFIGS / "imagefolder.yaml"  # the settings of `ccssl-hf train`


@dataclass
class RecipeArguments:
    """The data and the model of a run. A split is an image folder (`<class>/<image>`; an unlabeled one may be nested in
    any way), parquet files (a folder, a file or a glob), or a dataset on the Hub (`user/name` or `user/name:split`).
    """

    labeled: str | None = argument(None, "Labeled training images.")
    unlabeled: str | None = argument(None, "Unlabeled training images. Some may be out-of-distribution (OOD).")
    validation: str | None = argument(None, "Labeled images for evaluation during training.")
    test: str | None = argument(None, "Labeled images that are only evaluated at the end.")
    backbone: str = argument("resnet50", "Name of a timm model.")
    pretrained: bool = argument(False, "Start from timm's pretrained weights.")
    model: str | None = argument(None, "Published model to start from, instead of a backbone: a folder or Hub id.")
    image_size: int | None = argument(None, "Side of the images in pixels; default: the backbone's.")


@dataclass
class FolderArguments(RecipeArguments):
    """One folder that contains the splits: `labeled/<class>/*`, and optionally `unlabeled/**`, `validation/<class>/*`
    and `test/<class>/*`. A split that is given by its own argument replaces the one in this folder.
    """

    data_dir: str | None = argument(None, "Folder with labeled/, unlabeled/, validation/ and test/.")

    def __post_init__(self) -> None:
        if self.data_dir is None:
            return
        for role in ROLES:
            folder = Path(self.data_dir) / role
            if getattr(self, role) is None and folder.is_dir():
                setattr(self, role, str(folder))
        if self.labeled is None:
            raise ValueError(f"data_dir {self.data_dir!r} has no folder labeled/: put images into labeled/<class>/.")


def load_splits(recipe: RecipeArguments) -> dict[str, datasets.Dataset]:
    """The splits of a run, by role. Raises a ValueError if there is no labeled split, or a split cannot be read."""
    if recipe.labeled is None:
        raise ValueError("There is no labeled split: set labeled to an image folder, parquet files or a Hub dataset.")
    sources = {role: getattr(recipe, role) for role in ROLES}
    splits, errors = {}, []
    for role, source in sources.items():
        if source is not None:
            try:
                splits[role] = load_split(source, role=role)
            except ValueError as error:  # the other splits may have errors, too
                errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return splits


def build_trainer(
    recipe: RecipeArguments, args: CCSSLTrainingArguments
) -> tuple[CCSSLTrainer, dict[str, datasets.Dataset]]:
    """Load the data and build the trainer; also returns the splits by role. Wrong input raises a ValueError here."""
    splits = load_splits(recipe)
    if "validation" not in splits:
        args = dataclasses.replace(args, eval_strategy="no")  # type: ignore[call-arg]  # a field of transformers
    set_seed(args.seed)  # the trainer does so only after the model has its initial weights
    if recipe.model is None:
        names = read_class_names(splits["labeled"], args.label_column)
        model = CCSSLForImageClassification.from_timm(
            recipe.backbone, labels=names, pretrained=recipe.pretrained, image_size=recipe.image_size
        )
    elif recipe.pretrained or recipe.image_size is not None:
        raise ValueError(
            f"model {recipe.model!r} has its own weights and image size: leave out pretrained and image_size."
        )
    else:
        model = CCSSLForImageClassification.from_pretrained(recipe.model)
    trainer = CCSSLTrainer(
        model,
        args,
        train_dataset=splits["labeled"],
        unlabeled_dataset=splits.get("unlabeled"),
        eval_dataset=splits.get("validation"),
    )
    trainer.dataset_names = {role: getattr(recipe, role).split(":")[0] for role in splits}  # for the card
    pretrained = recipe.pretrained and (get_pretrained_cfg(recipe.backbone).hf_hub_id or recipe.backbone)
    trainer.base_model = pretrained or recipe.model
    return trainer, splits


def check(recipe: RecipeArguments, args: CCSSLTrainingArguments) -> Survey:
    """What the splits of a run hold, and all reasons why it could not start. It builds no model."""
    problems, splits = [], dict[str, datasets.Dataset]()
    names: list[str] | None = None
    size = recipe.image_size
    try:
        splits = load_splits(recipe)
    except ValueError as error:
        problems.append(str(error))
        for role in ROLES:
            with suppress(ValueError):
                splits |= {role: load_split(getattr(recipe, role), role=role)} if getattr(recipe, role) else {}
    try:
        if recipe.model is not None:
            model = CCSSLForImageClassification.from_pretrained(recipe.model)
            names, size = model.config.labels, model.backbone.pretrained_cfg["input_size"][-1]
        else:
            check_backbone(recipe.backbone)
            size = size or get_pretrained_cfg(recipe.backbone).input_size[-1]
            names = read_class_names(splits["labeled"], args.label_column) if "labeled" in splits else None
    except (OSError, ValueError) as error:
        problems.append(str(error))
    columns = {key: getattr(args, key) for key in ("image_column", "label_column", "hidden_label_column")}
    found = survey(splits, names, image_size=size, **columns)
    batch, sizes = args.per_device_train_batch_size * args.world_size, {each: len(splits[each]) for each in splits}
    limits = {"batch": batch, "mu": args.mu, "repeat_labeled": args.repeat_labeled}
    problems += size_errors(sizes.get("labeled", batch), sizes.get("unlabeled"), **limits)
    known: dict[str, Any] = dict(
        num_unlabeled=sizes.get("unlabeled", 1), embedding_dim=64, batch_size=batch, mu=args.mu
    )
    try:
        uses = build_algorithm(args.algorithm, num_classes=len(names or "ab"), **known, **args.hyperparameters()).views
        if uses and recipe.unlabeled is None:
            fix = "set unlabeled, or algorithm to supervised and lambda_contrast to 0"
            problems.append(f"Algorithm {args.algorithm!r} needs unlabeled images, and there are none: {fix}.")
    except ValueError as error:
        problems.append(str(error))
    found.findings += [Finding("error", "", problem) for problem in problems]
    return found


def train(trainer: CCSSLTrainer, splits: dict[str, datasets.Dataset]) -> None:
    """Train, or resume from `args.resume_from_checkpoint`, evaluate on validation and test splits, save and push."""
    with errors_in_one_line():
        trainer.check_data({role: splits[role] for role in splits if role == "test"})
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_metrics("train", {**result.metrics, "train_steps": result.global_step})
    for role in ("validation", "test"):
        if role in splits:
            metrics = trainer.evaluate(splits[role], metric_key_prefix=role)
            trainer.log_metrics(role, metrics)
            trainer.save_metrics(role, metrics)
    trainer.save_model()  # with its card; push_to_hub=True also uploads it
    if trainer.is_world_process_zero():
        print(f"Step {trainer.state.global_step}: model, card and metrics are in {trainer.args.output_dir}.")
