"""A training run: load the splits, build model and trainer, then train, evaluate and save."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from timm.models import get_pretrained_cfg
from transformers import set_seed

from .algorithms import build_algorithm
from .backbones import check_backbone
from .data import read_class_names, split_validation
from .data.sources import load_split
from .data.survey import Finding, Survey, size_errors, survey
from .distributed import launcher
from .errors import errors_of_a_run, warn
from .modeling import CCSSLForImageClassification
from .resume import last_checkpoint
from .trainer import CCSSLTrainer
from .training_args import CONFIGS, CCSSLTrainingArguments, argument

logger = logging.getLogger(__name__)

ROLES = ("labeled", "unlabeled", "validation", "test")
_OTHER_NAMES = {
    **dict.fromkeys(("train", "training", "labelled"), "labeled"),
    **dict.fromkeys(("val", "valid", "dev", "eval"), "validation"),
    "unlabelled": "unlabeled",
    "testing": "test",
}
OWN_IMAGES = CONFIGS / "imagefolder.yaml"  # the settings of `ccssl-hf train`
DEFAULT_BACKBONE = "resnet50"
# What it takes instead on a CPU if no backbone is given: hours, where ResNet-50 at 224 px would take weeks.
CPU_DEFAULTS = {"backbone": "resnet18", "image_size": 64, "mu": 3, "max_steps": 5000}


@dataclass
class RecipeArguments:
    """The data and the model of a run. A split is an image folder (`<class>/**/<image>`, or with `metadata.csv`; an
    unlabeled one may be nested in any way), a csv or jsonl file (`file_name,label`), parquet files (a folder, a file or
    a glob), or a dataset on the Hub (`user/name` or `user/name:split`).
    """

    labeled: str | None = argument(None, "Labeled training images.")
    unlabeled: str | None = argument(None, "Unlabeled training images. Some may be out-of-distribution (OOD).")
    validation: str | None = argument(None, "Labeled images for evaluation during training.")
    test: str | None = argument(None, "Labeled images that are only evaluated at the end.")
    validation_fraction: float | None = argument(
        None, "Without a validation split: share of the labeled images to take for it, by class and seed."
    )
    image_root: str | None = argument(
        None, "Folder in which csv, jsonl and parquet files may name images, next to their own folder."
    )
    backbone: str | None = argument(
        None, "Name of a timm model; default: resnet50. `ccssl-hf train` on a CPU: resnet18."
    )
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
        root = Path(self.data_dir).expanduser()
        for role in ROLES:
            if getattr(self, role) is None and (root / role).is_dir():
                setattr(self, role, str(root / role))
        unused = [name for name, role in _OTHER_NAMES.items() if getattr(self, role) is None and (root / name).is_dir()]
        if unused:
            fix = ", ".join(f"{name}/ to {_OTHER_NAMES[name]}/" for name in unused)
            raise ValueError(f"data_dir {self.data_dir!r} has folders of other names than the splits: rename {fix}.")
        if self.labeled is None:
            raise ValueError(f"data_dir {self.data_dir!r} has no folder labeled/: put images into labeled/<class>/.")


def load_splits(recipe: RecipeArguments, *, label_column: str = "label", seed: int = 42) -> dict[str, datasets.Dataset]:
    """The splits of a run, by role. With `validation_fraction`, the validation split comes from the labeled images.

    Raises:
        ValueError: There is no labeled split, or a split cannot be read.
    """
    if recipe.labeled is None:
        raise ValueError("There is no labeled split: set labeled to an image folder, parquet files or a Hub dataset.")
    fraction = recipe.validation_fraction
    if fraction is not None and recipe.validation is not None:
        raise ValueError(f"validation is {recipe.validation!r} and validation_fraction is {fraction}: leave one out.")
    splits, errors = {}, []
    for role in ROLES:
        if (source := getattr(recipe, role)) is not None:
            try:
                splits[role] = load_split(source, role=role, image_root=recipe.image_root)
            except ValueError as error:  # the other splits may have errors, too
                errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    if fraction is not None:
        labeled, validation = split_validation(splits["labeled"], fraction, label_column=label_column, seed=seed)
        splits |= {"labeled": labeled, "validation": validation}
    elif "validation" not in splits:
        warn(
            logger,
            "There is no validation split, so training evaluates nothing: set validation or validation_fraction.",
        )
    return splits


def build_trainer(
    recipe: RecipeArguments, args: CCSSLTrainingArguments
) -> tuple[CCSSLTrainer, dict[str, datasets.Dataset]]:
    """Load the data and build the trainer; also returns the splits by role. Wrong input raises a ValueError here."""
    splits = load_splits(recipe, label_column=args.label_column, seed=args.seed)
    if "validation" not in splits:
        args = dataclasses.replace(args, eval_strategy="no")  # type: ignore[call-arg]  # a field of transformers
    set_seed(args.seed)  # the trainer does so only after the model has its initial weights
    backbone = recipe.backbone or DEFAULT_BACKBONE
    if recipe.model is None:
        names = read_class_names(splits["labeled"], args.label_column)
        model = CCSSLForImageClassification.from_timm(
            backbone, labels=names, pretrained=recipe.pretrained, image_size=recipe.image_size
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
    trainer.dataset_names = {role: _name_for_card(recipe, role, args.seed) for role in splits}
    pretrained = recipe.pretrained and (get_pretrained_cfg(backbone).hf_hub_id or backbone)
    trainer.base_model = pretrained or recipe.model
    return trainer, splits


def _name_for_card(recipe: RecipeArguments, role: str, seed: int) -> str:
    if (source := getattr(recipe, role)) is not None:
        return str(source).split(":")[0]
    return f"{recipe.labeled}, a fraction of {recipe.validation_fraction:g} by class with seed {seed}"


def check(recipe: RecipeArguments, args: CCSSLTrainingArguments) -> Survey:
    """What the splits of a run hold, and all reasons why it could not start. It builds no model."""
    problems, splits = [], dict[str, datasets.Dataset]()
    names: list[str] | None = None
    size = recipe.image_size
    try:
        splits = load_splits(recipe, label_column=args.label_column, seed=args.seed)
    except ValueError as error:
        problems.append(str(error))
        for role, source in ((role, getattr(recipe, role)) for role in ROLES if getattr(recipe, role)):
            with suppress(ValueError):
                splits |= {role: load_split(source, role=role, image_root=recipe.image_root)}
    try:
        if recipe.model is not None:
            model = CCSSLForImageClassification.from_pretrained(recipe.model)
            names, size = model.config.labels, model.backbone.pretrained_cfg["input_size"][-1]
        else:
            check_backbone(backbone := recipe.backbone or DEFAULT_BACKBONE)
            size = size or get_pretrained_cfg(backbone).input_size[-1]
            names = read_class_names(splits["labeled"], args.label_column) if "labeled" in splits else None
    except (OSError, ValueError) as error:
        problems.append(str(error))
    columns = {key: getattr(args, key) for key in ("image_column", "label_column", "hidden_label_column")}
    skips = args.on_bad_image == "skip"
    found = survey(splits, names, image_size=size, max_pixels=args.max_image_pixels, skip_bad=skips, **columns)
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
    trainer.stop.command = continuing_command()
    with errors_of_a_run(partial(last_checkpoint, str(trainer.args.output_dir))):
        trainer.check_data({role: splits[role] for role in splits if role == "test"})
        result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # before anything else can fail
        done = f"model, card and metrics are in {trainer.args.output_dir}"
        with trainer.stop.listening(f"Stopped during evaluation: the trained model is in {trainer.args.output_dir}."):
            trainer.save_metrics("train", {**result.metrics, "train_steps": result.global_step})
            for role in ("validation", "test"):
                if role in splits:
                    metrics = trainer.evaluate(splits[role], metric_key_prefix=role)
                    trainer.log_metrics(role, metrics)
                    trainer.save_metrics(role, metrics)
            trainer.save_model()  # with its card; push_to_hub=True also uploads it
        if trainer.is_world_process_zero():
            print(f"Step {trainer.state.global_step}: {done}.")


def continuing_command() -> str:
    """The command line of this process, or of its launcher, with `--resume_from_checkpoint true`."""
    started_by = launcher()
    words = started_by.cmdline() if started_by else list(sys.orig_argv)
    script = Path(words[1]).name if len(words) > 1 else ""
    if Path(words[0]).name.startswith("python") and shutil.which(script):  # an installed command
        words = [script, *words[2:]]
    flag, kept = "--resume_from_checkpoint", iter(words)
    words = []
    for word in kept:
        name, _, value = word.replace("-", "_").partition("=")
        if name != flag.replace("-", "_"):
            words.append(word)
        elif not value:
            next(kept, None)
    return re.sub(r"\bhf_\w{20,}", "hf_...", shlex.join([*words, flag, "true"]))
