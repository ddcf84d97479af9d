"""Short runs on one global batch, in any number of processes, for `test_training_distributed.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from ccssl_hf.distributed import all_gather, all_reduce_mean, world_size
from tiny_runs import copy_of, model_of, trainer_of

BATCH, STEPS = 8, 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fixmatch": ("test_resnet", {"sync_batchnorm": True, "distribution_alignment_window": 2}),
    "separate": ("test_resnet", {"sync_batchnorm": True, "weak_forward": "separate"}),
    "comatch": (
        "test_resnet",
        {"sync_batchnorm": True, "algorithm": "comatch", "confidence_threshold": None, "push_threshold": None},
    ),
    "freematch": (
        "test_resnet",
        {"sync_batchnorm": True, "algorithm": "freematch", "confidence_threshold": None},
    ),
    "without BatchNorm": ("test_vit", {}),
}


class Gradients(TrainerCallback):
    """The gradients of each step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def run(folder: Path, name: str) -> dict[str, Any]:
    backbone, changes = CASES[name]
    gradients, rows = Gradients(), []
    trainer = trainer_of(
        folder / name,
        model_of(backbone),
        callbacks=[gradients],
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=STEPS,
        learning_rate=0.003,
        save_strategy="steps",
        save_steps=STEPS,
        **changes,
    )
    for batch in trainer.get_train_dataloader():
        own = np.concatenate([np.asarray(batch[key]) for key in ("labeled_draws", "unlabeled_index")])
        rows.append(all_gather(torch.from_numpy(own)))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    mean = all_reduce_mean(torch.tensor(losses, dtype=torch.float64))
    return {"rows": rows, "losses": mean, "gradients": gradients.steps, "weights": copy_of(trainer.model)}


def main(folder: Path) -> None:
    notes = {name: run(folder, name) for name in CASES}
    notes["world"] = {"size": world_size()}
    rank = torch.distributed.get_rank() if world_size() > 1 else 0
    torch.save(notes, folder / f"notes_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
