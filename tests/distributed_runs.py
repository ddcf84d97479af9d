"""What each of two processes does for `test_training_distributed.py`: several short runs, and notes on each."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ccssl_hf import CCSSLTrainer
from tiny_runs import (
    UNLABELED,
    VALIDATION,
    StopAt,
    copy_of,
    damaged,
    everything,
    logs_of_steps,
    model_of,
    trainer_of,
)

WITHOUT_BATCHNORM: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "distribution_alignment_window": 3,
    "learning_rate": 0.01,
    "hidden_label_column": "true",
}
"""One run on two processes; with twice the batch the same on one."""

BAD_IMAGES: dict[str, Any] = {
    "unlabeled": damaged(UNLABELED, (3, 50, 70)),
    "decode": "stream",
    "weak_crop": "resized",
    "logging_steps": 3,
}
"""Unreadable unlabeled images, which each process replaces; both list all."""

STOPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "batchnorm": ({}, {"distribution_alignment_window": 3}),
    "dropout": ({"backbone": "test_vit", "drop_rate": 0.3, "drop_path_rate": 0.3}, {"gradient_accumulation_steps": 2}),
    "comatch": ({}, {"algorithm": "comatch", "confidence_threshold": None, "push_threshold": None}),
}
"""Name: model and arguments of runs that stop after three of six steps."""


def batches(trainer: CCSSLTrainer) -> list[dict[str, np.ndarray]]:
    """Which images each step takes, and under which draws."""
    names = ("labeled_draws", "unlabeled_draws", "unlabeled_index", "labels")
    return [{name: np.asarray(batch[name]) for name in names} for batch in trainer.get_train_dataloader()]


SCORES = ("test_top1", "test_top5", "test_macro_f1", "test_ece")


class KeepOwnBatchNorm(TrainerCallback):
    """What each process has tracked by itself when a checkpoint is written."""

    own: dict[str, Tensor]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            self.own = {name: tensor for name, tensor in copy_of(model.backbone).items() if "running" in name}


class SignalToOne(TrainerCallback):
    """The second process alone gets a signal."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    notes: dict[str, Any] = {}

    trainer = trainer_of(folder / "plain", model_of("test_vit"), **WITHOUT_BATCHNORM)
    rank = trainer.args.process_index
    notes["world_size"], notes["batches"] = dist.get_world_size(), batches(trainer)
    trainer.train()
    notes["plain"] = {"logs": logs_of_steps(trainer), "weights": everything(trainer)}

    trainer = trainer_of(folder / "bad_images", model_of("test_vit"), **BAD_IMAGES, **WITHOUT_BATCHNORM)
    notes["bad_images"] = {"batches": batches(trainer)}
    trainer.train()
    notes["bad_images"] |= {"weights": everything(trainer), "known": trainer.unreadable.known(trainer.state)}

    for name, (model, changes) in STOPPED.items():
        whole = trainer_of(folder / name / "whole", model_of(**model), eval_strategy="steps", eval_steps=2, **changes)
        whole.train()
        keep = KeepOwnBatchNorm()
        parts = folder / name / "parts"
        trainer_of(parts, model_of(**model), callbacks=[StopAt(3), keep], **changes).train()
        resumed = trainer_of(parts, model_of(**model, seed=1), **changes)
        resumed.train(resume_from_checkpoint=True)
        notes[name] = {
            "whole": (everything(whole), logs_of_steps(whole)),
            "resumed": (everything(resumed), logs_of_steps(resumed)),
            "own_batchnorm": keep.own,
        }

    model, changes = STOPPED["batchnorm"]
    trainer = trainer_of(folder / "signal", model_of(**model), callbacks=[SignalToOne()], **changes)
    try:
        trainer.train()
    except SystemExit as end:
        notes["signal"] = {"code": end.code, "step": trainer.state.global_step}
    resumed = trainer_of(folder / "signal", model_of(**model, seed=1), **changes)
    resumed.train(resume_from_checkpoint=True)
    notes["signal"]["resumed"] = (everything(resumed), logs_of_steps(resumed))

    # Each process starts from weights of its own and has a folder of its own: one to write to, one to stay empty.
    trainer = trainer_of(
        folder / f"of_process_{rank}",
        model_of(seed=rank),
        lambda_contrast=0,
        weak_forward="separate",
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        per_device_eval_batch_size=4,
    )
    notes["average_at_the_start"] = copy_of(trainer.ema.module)
    trainer.train()
    trainer.save_model()
    predicted = trainer.predict(VALIDATION)
    notes["separate"] = {
        "weights": everything(trainer),
        "metrics": {name: value for name, value in predicted.metrics.items() if "loss" in name or name in SCORES},
        "predictions": predicted.predictions,
        "top1": trainer.evaluate()["eval_top1"],
    }
    torch.save(notes, folder / f"notes_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
