"""Train on CIFAR-10 with few labels, as in the paper: all training images are also used as unlabeled images.

    accelerate launch recipes/train_cifar10.py --data uoft-cs/cifar10 --num_labels 250 --split_seed 0

`--data` is a dataset on the Hub, or a folder with train.parquet and test.parquet. Settings are in
recipes/configs/cifar10.yaml, and those of a ten-minute run on one GPU in recipes/configs/cifar10_speed.yaml. A flag
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
from ccssl_hf.data import read_class_names, read_labels
from ccssl_hf.data.sources import load_split
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import train

CONFIG = Path(__file__).parent / "configs" / "cifar10.yaml"


@dataclass
class Cifar10Arguments:
    """The data, the labeled images and the model of a run on CIFAR-10."""

    data: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "Dataset on the Hub, or folder with train.parquet and test.parquet."},
    )
    num_labels: int = field(default=250, metadata={"help": "Number of labeled images, the same for each class."})
    split_seed: int = field(default=0, metadata={"help": "Seed that selects the labeled images; seed is for the rest."})
    backbone: str = field(default="wide_resnet28_2_cifar", metadata={"help": "Name of a timm model."})
    bn_momentum: float | None = field(
        default=None, metadata={"help": "BatchNorm momentum of the Wide ResNets: weight of a new batch."}
    )
    time_limit: float | None = field(
        default=None, metadata={"help": "Minutes after which training saves a checkpoint and ends."}
    )


def load(recipe: Cifar10Arguments) -> dict[str, datasets.Dataset]:
    """The train and test splits, from the Hub or a folder, with the columns `image` and `label`."""
    folder = Path(recipe.data)
    splits = {
        split: load_split(folder / f"{split}.parquet" if folder.is_dir() else f"{recipe.data}:{split}", role=split)
        for split in ("train", "test")
    }
    if "img" in splits["train"].column_names:  # as in uoft-cs/cifar10
        splits = {split: dataset.rename_column("img", "image") for split, dataset in splits.items()}
    return splits


def labeled_rows(recipe: Cifar10Arguments, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows of the labeled images: listed in ssl_splits.npz of the folder, or drawn by `split_seed`.

    Raises:
        ValueError: The list has no such split, or the classes cannot have equally many labeled images.
    """
    lists = Path(recipe.data) / "ssl_splits.npz"
    if lists.is_file():
        with np.load(lists) as listed:
            name = f"labeled_{recipe.num_labels}_seed{recipe.split_seed}"
            if name not in listed:
                raise ValueError(f"{lists} has no {name}: choose num_labels and split_seed of {', '.join(listed)}.")
            return listed[name].astype(np.int64)
    each, rest = divmod(recipe.num_labels, num_classes)
    if rest or not 0 < each <= np.bincount(labels, minlength=num_classes).min():
        raise ValueError(
            f"num_labels is {recipe.num_labels}: choose a multiple of the {num_classes} classes, and no more per class "
            "than there are images."
        )
    order = np.random.RandomState(recipe.split_seed).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == number][:each] for number in range(num_classes)]))


if __name__ == "__main__":
    with errors_in_one_line():
        recipe, args = parse_recipe(Cifar10Arguments, CCSSLTrainingArguments, config=CONFIG, description=__doc__)
        callbacks = [] if recipe.time_limit is None else [TimeLimit(recipe.time_limit)]

        # The data: a few labeled images, and all images as unlabeled ones.
        splits = load(recipe)
        classes = read_class_names(splits["train"], args.label_column)
        labels = read_labels(splits["train"], args.label_column, classes, role="train", allow_ood=False)
        labeled = splits["train"].select(labeled_rows(recipe, labels, len(classes)))

        # The model, with random weights.
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

    # Train, evaluate the averaged weights (EMA) of the last step on the test split, and save them with a card.
    train(trainer, {"test": splits["test"]})
