"""What a run knows of itself, for its card."""

from __future__ import annotations

from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from ..checkpoint import is_own_backbone
from ..data import fingerprint, name_of, read_labels
from ..record import Provenance, Result
from ..training_args import CCSSLTrainingArguments, HyperparameterArguments
from ..transforms import View
from .model_card import CardFacts, library_versions

if TYPE_CHECKING:
    from ..trainer import CCSSLTrainer

IN_EFFECT = (
    "gradient_accumulation_steps",
    "optim",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "eval_weights",
    "weak_forward",
    "repeat_labeled",
)
"""Settings of the optimization that a card names in any case."""

VIEW_ARGUMENTS = (
    *("weak_crop", "horizontal_flip", "randaugment_ops", "randaugment_magnitude", "cutout_size"),
    *("contrastive_view", "normalize_contrastive", "decode"),
)
"""Of these a card names what came of them."""

NOT_IN_WEIGHTS = (
    *("output_dir", "run_name", "project", "trackio", "report_to", "log", "disable_tqdm", "save", "hub", "push"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval", "prediction_loss", "do_"),
    *("dataloader", "ddp", "use_cpu", "accelerator_config", "skip_memory", "debug", "resume", "restore", "local_rank"),
    *("label_names", "label_column", "image_column", "hidden_label", "remove_unused", "include_"),
)
"""How names of arguments begin that do not reach the weights: a card leaves them out."""


def run_facts(trainer: CCSSLTrainer, model_name: str) -> CardFacts:
    """What a card can say of the run of `trainer`.

    Args:
        trainer: Before, during or after training.
        model_name: Hub id, or a title.
    """
    args, config = trainer.args, trainer.model.config
    splits = {"labeled": trainer.train_dataset, "unlabeled": trainer.unlabeled_dataset} | trainer.evaluated
    splits.setdefault("validation", trainer.eval_dataset)
    splits = {split: data for split, data in splits.items() if isinstance(data, datasets.Dataset)}
    counts = np.bincount(trainer.labels, minlength=len(trainer.class_names)).tolist()
    return CardFacts(
        model_name=model_name,
        backbone=config.architecture,
        labels=trainer.class_names,
        algorithm=args.algorithm,
        hyperparameters=trainer.algorithm.hyperparameters,
        optimization=_optimization(args),
        views=_views(trainer),
        datasets={split: name_of(data) for split, data in splits.items()} | trainer.dataset_names,
        base_model=trainer.base_model,
        steps=trainer.state.global_step,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        mu=args.mu if trainer.algorithm.views else None,
        seed=args.seed,
        labeled_per_class=dict(zip(trainer.class_names, counts, strict=True)),
        num_unlabeled=None if trainer.unlabeled_dataset is None else len(trainer.unlabeled_dataset),
        split_fingerprints={split: _fingerprint(trainer, split, data) for split, data in splits.items()},
        versions=library_versions(),
        device=args.device.type,
        num_processes=args.world_size,
        run_time=next((h["train_runtime"] for h in trainer.state.log_history if "train_runtime" in h), None),
        published=trainer.provenance,
        results=[*(result for results in trainer.results.values() for result in results), *_logged(trainer)],
        remote_code=is_own_backbone(config.architecture),
    )


def run_pictures(trainer: CCSSLTrainer, folder: Path) -> dict[str, str]:
    """Draws the pictures of the run into the folder of its card; see `card_pictures.draw_pictures`."""
    from .pictures import draw_pictures  # matplotlib takes a while, and training does without

    history, predictions = trainer.state.log_history, list(trainer.predictions.values())
    return draw_pictures(
        folder, predictions, trainer.class_names, history=history, provenance=trainer.provenance, only_these=True
    )


def _fingerprint(trainer: CCSSLTrainer, split: str, data: datasets.Dataset) -> str:
    args, names = trainer.args, [*trainer.class_names, ""]  # the last one: of -1
    if split == "unlabeled" or args.label_column not in data.column_names:
        return fingerprint(data, args.image_column)
    labels = read_labels(data, args.label_column, trainer.class_names, role=split, allow_ood=True)
    return fingerprint(data, args.image_column, [names[label] for label in labels.tolist()])


def _optimization(args: CCSSLTrainingArguments) -> dict[str, Any]:
    """All that is in effect, and all else that was set, but the algorithm's hyperparameters and the views."""
    names = list(IN_EFFECT)
    position = names.index("learning_rate") + 1
    names[position:position] = ["sgd_momentum", "nesterov"] if args.optim == "sgd" else []
    names += ["lr_scheduler_type"] if args.schedule == "lr_scheduler_type" else []
    elsewhere = {f.name for f in fields(HyperparameterArguments)} | set(VIEW_ARGUMENTS) | set(names)
    elsewhere |= {"algorithm", "mu", "max_steps", "per_device_train_batch_size", "seed"}
    for f in fields(args):
        value = getattr(args, f.name)
        is_set = value != f.default and not (f.default is None and not value)
        if is_set and f.name not in elsewhere and not f.name.startswith(NOT_IN_WEIGHTS):
            names.append(f.name)
    return {name: _plain(getattr(args, name)) for name in names}


def _views(trainer: CCSSLTrainer) -> dict[str, Any]:
    """The settings of the views that are made."""
    settings = asdict(trainer.settings)
    made = trainer.algorithm.views
    names = ["image_size", "mean", "std", "weak_crop", "horizontal_flip"]
    if settings["weak_crop"] == "resized":
        names += ["crop_scale", "crop_ratio"]
    if View.STRONG in made:
        names += ["randaugment_ops", "randaugment_magnitude", "cutout_size"]
    if View.CONTRASTIVE in made:
        names += ["contrastive_view", "normalize_contrastive"]
        if settings["contrastive_view"] == "simclr":
            names += ["contrastive_crop_scale", "jitter", "jitter_probability", "grayscale_probability"]
    return {**{name: settings[name] for name in names}, "decode": "stream" if trainer._cropped else "memory"}


def _logged(trainer: CCSSLTrainer) -> list[Result]:
    """What the log said last of the pseudo labels: of raw weights in training, and of the steps up to that log."""
    names = {"mask_rate": "mask_rate", "pseudo_label_precision": "training_precision"}
    entry: dict[str, Any] = next((entry for entry in reversed(trainer.state.log_history) if "mask_rate" in entry), {})
    provenance = Provenance("raw", entry.get("step", 0), "last", trainer.args.seed)
    return [Result(metric, entry[key], "unlabeled", provenance) for key, metric in names.items() if key in entry]


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
