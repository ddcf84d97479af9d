"""What the recipes share: a command line with every setting, a YAML file behind it, and the run itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from timm.models import get_pretrained_cfg
from transformers import set_seed

from .data import load_split, read_class_names
from .modeling import CCSSLForImageClassification
from .trainer import CCSSLTrainer
from .training_args import CCSSLTrainingArguments

ROLES = ("labeled", "unlabeled", "validation", "test")
OWN_IMAGES = Path(__file__).parent / "configs" / "imagefolder.yaml"
"""Settings to start from with images of one's own."""


@dataclass
class RecipeArguments:
    """What a recipe reads and which network it trains. Each split is an image folder (`<class>/<image>`, or any depth
    for the unlabeled one), a folder, file or glob of parquet, or a data set on the Hub, as `user/name` or
    `user/name:split`.
    """

    labeled: str | None = field(default=None, metadata={"help": "Labeled training images."})
    unlabeled: str | None = field(
        default=None, metadata={"help": "Unlabeled training images, of known classes or not."}
    )
    validation: str | None = field(default=None, metadata={"help": "Labeled images to choose hyperparameters on."})
    test: str | None = field(default=None, metadata={"help": "Labeled images that the last evaluation is made on."})
    backbone: str = field(default="resnet50", metadata={"help": "Name of a timm model."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights."})
    model: str | None = field(
        default=None, metadata={"help": "Published folder or Hub id to train on from, in place of a backbone."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; default: the backbone's."}
    )


@dataclass
class FolderArguments(RecipeArguments):
    """A root folder stands for the splits in it: `labeled/<class>/*`, `unlabeled/**`, `validation/<class>/*` and
    `test/<class>/*`, of which only the first must be there. A split elsewhere is named by its own flag.
    """

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with labeled/, unlabeled/, validation/ and test/."}
    )

    def __post_init__(self) -> None:
        if self.data_dir is None:
            return
        for role in ROLES:
            folder = Path(self.data_dir) / role
            if getattr(self, role) is None and folder.is_dir():
                setattr(self, role, str(folder))
        if self.labeled is None:
            raise ValueError(
                f"--data_dir {self.data_dir}: no folder labeled/ in it; make labeled/<class>/ with some images."
            )


def load_splits(recipe: RecipeArguments) -> dict[str, datasets.Dataset]:
    """The splits that the command line names, by role.

    Raises:
        ValueError: No labeled split is given, or one can't be read.
    """
    if recipe.labeled is None:
        raise ValueError("--labeled is missing: name the labeled images, a folder, parquet files or a Hub data set.")
    sources = {role: getattr(recipe, role) for role in ROLES}
    return {role: load_split(source, role=role) for role, source in sources.items() if source is not None}


def build_trainer(
    recipe: RecipeArguments, args: CCSSLTrainingArguments
) -> tuple[CCSSLTrainer, dict[str, datasets.Dataset]]:
    """Loads the data and builds the network: all that can go wrong before training does so here.

    Args:
        recipe: The data and the backbone. Without a validation split nothing is evaluated during training.
        args: The run.

    Returns:
        The trainer, and the splits by role.

    Raises:
        ValueError: What was given can't be trained on; the sentence names the fix.
    """
    splits = load_splits(recipe)
    if "validation" not in splits:
        args = dataclasses.replace(args, eval_strategy="no")  # type: ignore[call-arg]  # a field of transformers
    set_seed(args.seed)  # the trainer does so too late for the network's initial weights
    trainer = CCSSLTrainer(
        _build_model(recipe, splits["labeled"], args),
        args,
        train_dataset=splits["labeled"],
        unlabeled_dataset=splits.get("unlabeled"),
        eval_dataset=splits.get("validation"),
    )
    # What the card says of them: a Hub data set by its id, a folder by its name.
    trainer.dataset_names = {role: getattr(recipe, role).split(":")[0] for role in splits}
    if recipe.pretrained:
        trainer.base_model = get_pretrained_cfg(recipe.backbone).hf_hub_id or recipe.backbone
    elif recipe.model is not None:
        trainer.base_model = recipe.model
    return trainer, splits


def _build_model(
    recipe: RecipeArguments, labeled: datasets.Dataset, args: CCSSLTrainingArguments
) -> CCSSLForImageClassification:
    if recipe.model is None:
        return CCSSLForImageClassification.from_timm(
            recipe.backbone,
            labels=read_class_names(labeled, args.label_column),
            pretrained=recipe.pretrained,
            image_size=recipe.image_size,
        )
    if recipe.pretrained or recipe.image_size is not None:
        raise ValueError(
            f"--model {recipe.model} has weights and an image size of its own: leave out --pretrained and --image_size."
        )
    return CCSSLForImageClassification.from_pretrained(recipe.model)


def train(trainer: CCSSLTrainer, splits: dict[str, datasets.Dataset]) -> None:
    """Trains, from a checkpoint where `args.resume_from_checkpoint` names one, evaluates, saves and publishes.

    Args:
        trainer: From `build_trainer`.
        splits: Likewise; the published weights are evaluated on `validation` and `test`, where there are such.
    """
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_metrics("train", {**result.metrics, "train_steps": result.global_step})
    for role in ("validation", "test"):
        if role in splits:
            metrics = trainer.evaluate(splits[role], metric_key_prefix=role)
            trainer.log_metrics(role, metrics)
            trainer.save_metrics(role, metrics)
    trainer.save_model()  # with its card, and to the Hub with push_to_hub
    if trainer.is_world_process_zero():
        print(f"Step {trainer.state.global_step}: model, card and metrics are in {trainer.args.output_dir}.")
