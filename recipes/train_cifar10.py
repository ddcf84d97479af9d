"""Train on CIFAR-10 with a few labels, as the paper does: all training images are unlabeled ones, too.

    accelerate launch recipes/train_cifar10.py --data uoft-cs/cifar10 --num_labels 250 --split_seed 0 [any flag]

`--data` is a data set on the Hub, or a folder with train.parquet and test.parquet. Settings are in
recipes/configs/cifar10.yaml, those of a run of ten minutes on one GPU in recipes/configs/cifar10_speed.yaml; a flag
overrides the file. The test split is evaluated once, at the end.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from transformers import set_seed

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.callbacks import TimeLimit
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.data import load_split, read_class_names, read_labels
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import train

CONFIG = Path(__file__).parent / "configs" / "cifar10.yaml"


@dataclass
class Cifar10Arguments:
    """What the recipe adds to a run's arguments."""

    data: str = field(
        default="uoft-cs/cifar10", metadata={"help": "Hub data set, or folder with train.parquet and test.parquet."}
    )
    num_labels: int = field(default=250, metadata={"help": "Labeled images, the same number of each class."})
    split_seed: int = field(default=0, metadata={"help": "Which images are labeled; seed is the rest of the run's."})
    backbone: str = field(default="wide_resnet28_2_cifar", metadata={"help": "Name of a timm model."})
    bn_momentum: float | None = field(
        default=None, metadata={"help": "Share of a batch in BatchNorm's running statistics (Wide ResNets for CIFAR)."}
    )
    time_limit: float | None = field(
        default=None, metadata={"help": "Minutes after which training ends with a checkpoint, from loading data on."}
    )


def load(recipe: Cifar10Arguments) -> dict[str, datasets.Dataset]:
    """Both splits, from the Hub or from a folder, with the columns `image` and `label`."""
    folder = Path(recipe.data)
    splits = {
        split: load_split(folder / f"{split}.parquet" if folder.is_dir() else f"{recipe.data}:{split}", role=split)
        for split in ("train", "test")
    }
    if "img" in splits["train"].column_names:  # what the Hub's CIFAR-10 calls it
        splits = {split: dataset.rename_column("img", "image") for split, dataset in splits.items()}
    return splits


def labeled_rows(recipe: Cifar10Arguments, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows of the labeled images: from a list beside the data, otherwise drawn by `split_seed`, equal in each class."""
    lists = Path(recipe.data) / "ssl_splits.npz"
    if lists.is_file():
        with np.load(lists) as listed:
            name = f"labeled_{recipe.num_labels}_seed{recipe.split_seed}"
            if name not in listed:
                raise ValueError(f"{lists} has no {name}: choose --num_labels and --split_seed of {', '.join(listed)}.")
            return listed[name].astype(np.int64)
    each, rest = divmod(recipe.num_labels, num_classes)
    if rest or not 0 < each <= np.bincount(labels, minlength=num_classes).min():
        raise ValueError(
            f"--num_labels {recipe.num_labels}: choose a multiple of the {num_classes} classes, and no more of each "
            "than there are."
        )
    order = np.random.RandomState(recipe.split_seed).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == number][:each] for number in range(num_classes)]))


if __name__ == "__main__":
    with errors_in_one_line():
        recipe, args = parse_recipe(Cifar10Arguments, CCSSLTrainingArguments, config=CONFIG, description=__doc__)
        callbacks = [] if recipe.time_limit is None else [TimeLimit(recipe.time_limit)]

        # The data: a few labeled images, all of them as unlabeled ones.
        splits = load(recipe)
        classes = read_class_names(splits["train"], args.label_column)
        labels = read_labels(splits["train"], args.label_column, classes, role="train", allow_ood=False)
        labeled = splits["train"].select(labeled_rows(recipe, labels, len(classes)))

        # The network, from random weights.
        set_seed(args.seed)
        own = {} if recipe.bn_momentum is None else {"bn_momentum": recipe.bn_momentum}
        model = CCSSLForImageClassification.from_timm(recipe.backbone, labels=classes, image_size=32, **own)
        trainer = CCSSLTrainer(
            model,
            args,
            train_dataset=labeled,
            unlabeled_dataset=splits["train"],
            callbacks=callbacks,
        )
        trainer.dataset_names = dict.fromkeys(("labeled", "unlabeled", "test"), recipe.data)

    # Trains, evaluates the averaged weights of the last step on the test split, and saves them with a card.
    train(trainer, {"test": splits["test"]})
