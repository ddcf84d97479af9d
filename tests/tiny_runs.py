"""Training runs of a second or two: digits 0 to 3 at 16 px, small networks, a few steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import TrainerCallback, set_seed

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments

LABELS = ["zero", "one", "two", "three"]


def digits(start: int, stop: int, *, size: int = 16) -> datasets.Dataset:
    """Some of the 720 images of the first four digits; `label` is named, `true` is a number."""
    images, numbers = load_digits(return_X_y=True)
    rows = np.flatnonzero(numbers < len(LABELS))[start:stop]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=LABELS),
            "true": datasets.Value("int64"),
        }
    )
    pictures = [Image.fromarray((images[row].reshape(8, 8) * 15.9).astype(np.uint8)).convert("RGB") for row in rows]
    columns = {
        "image": [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures],
        "label": numbers[rows].tolist(),
        "true": numbers[rows].tolist(),
    }
    return datasets.Dataset.from_dict(columns, features=features)


def damaged(dataset: datasets.Dataset, rows: Iterable[int]) -> datasets.Dataset:
    """The dataset with files that are no images in these rows."""
    columns = dataset.cast_column("image", datasets.Image(decode=False)).to_dict()
    for row in rows:
        columns["image"][row] = {"bytes": b"no image", "path": f"/home/anna/photos/{row}.png"}
    return datasets.Dataset.from_dict(columns, features=dataset.features)


LABELED, UNLABELED, VALIDATION = digits(0, 24), digits(24, 120), digits(120, 157)


def model_of(backbone: str = "wide_resnet10_1_cifar", *, seed: int = 0, **kwargs: Any) -> CCSSLForImageClassification:
    set_seed(seed)
    return CCSSLForImageClassification.from_timm(backbone, labels=LABELS, image_size=16, **kwargs)


def arguments(output_dir: Path, **changes: Any) -> CCSSLTrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "mu": 2,
        "confidence_threshold": 0.3,
        "push_threshold": None if changes.get("lambda_contrast") == 0 else 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return CCSSLTrainingArguments(**{**settings, **changes})


def trainer_of(
    output_dir: Path,
    model: CCSSLForImageClassification | None = None,
    *,
    callbacks: list[TrainerCallback] | None = None,
    labeled: datasets.Dataset = LABELED,
    unlabeled: datasets.Dataset | None = UNLABELED,
    validation: datasets.Dataset | dict[str, datasets.Dataset] | None = VALIDATION,
    **changes: Any,
) -> CCSSLTrainer:
    return CCSSLTrainer(
        model or model_of(),
        arguments(output_dir, **changes),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        eval_dataset=validation,
        callbacks=callbacks,
    )


class StopAt(TrainerCallback):
    """Saves a checkpoint after `step` steps and stops, like a run at its time limit."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def everything(trainer: CCSSLTrainer) -> dict[str, Tensor]:
    """All that training changes: raw and averaged weights, the state of the algorithm and the optimizer."""
    state = {f"model.{name}": tensor for name, tensor in copy_of(trainer.model).items()}
    state |= {f"algorithm.{name}": tensor for name, tensor in copy_of(trainer.algorithm).items()}
    if trainer.ema is not None:
        state |= {f"ema.{name}": tensor for name, tensor in copy_of(trainer.ema.module).items()}
    for number, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return state


def different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """The names whose bits differ, or the names that only one of the two has."""
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())
    return [name for name in left if not torch.equal(left[name], right[name])]


def logs_of_steps(trainer: CCSSLTrainer) -> list[dict[str, float]]:
    """What was logged about training, without evaluations and times."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
