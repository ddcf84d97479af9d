"""A training run: load the splits, build model and trainer, then train, evaluate and save."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from timm.models import get_pretrained_cfg
from transformers import set_seed

from .data import read_class_names
from .distributed import launcher
from .errors import errors_of_a_run
from .modeling import CCSSLForImageClassification
from .resume import last_checkpoint
from .sources import load_split
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
    return {role: load_split(source, role=role) for role, source in sources.items() if source is not None}


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


def train(trainer: CCSSLTrainer, splits: dict[str, datasets.Dataset]) -> None:
    """Train, or resume from `args.resume_from_checkpoint`, evaluate on validation and test splits, save and push."""
    trainer.stop.command = continuing_command()
    with errors_of_a_run(partial(last_checkpoint, str(trainer.args.output_dir))):
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
