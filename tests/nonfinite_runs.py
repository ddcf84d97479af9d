"""What each of two processes does for `test_nonfinite.py`: a loss term of one of them becomes NaN."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ccssl_hf import CCSSLTrainer
from tiny_runs import copy_of, everything, trainer_of

STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}


def break_term(trainer: CCSSLTrainer, step: int, *, value: float = float("nan")) -> None:
    """The loss on unlabeled images is not finite in one forward pass."""
    compute, calls = trainer.algorithm.compute, [0]

    def broken(batch: Any) -> Any:
        calls[0] += 1
        pseudo, terms = compute(batch)
        if calls[0] == step:
            terms["loss_u"] = terms["loss_u"] * value
        return pseudo, terms

    trainer.algorithm.compute = broken  # type: ignore[method-assign]


def break_gradient(trainer: CCSSLTrainer, step: int, name: str = "backbone.conv1.weight") -> None:
    """The gradient of one parameter is NaN in one backward pass."""
    calls = [0]

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return gradient * float("nan") if calls[0] == step else gradient

    dict(trainer.model.named_parameters())[name].register_hook(broken)


def main(folder: Path) -> None:
    notes: dict[str, Any] = {}
    for what in ("stop", "skip"):
        trainer = trainer_of(folder / what, on_nonfinite=what, max_steps=4, **STEPS)
        rank = trainer.args.process_index
        if rank == 1:
            break_term(trainer, 3)
        before = copy_of(trainer.model)
        try:
            trainer.train()
            notes[what] = {"error": None}
        except ValueError as error:
            notes[what] = {"error": str(error).replace(str(folder), "")}
        notes[what] |= {"step": trainer.state.global_step, "weights": everything(trainer), "before": before}
        notes[what]["skipped"] = [entry for entry in trainer.state.log_history if "skipped" in entry]
    notes["world"] = dist.get_world_size()
    torch.save(notes, folder / f"notes_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
