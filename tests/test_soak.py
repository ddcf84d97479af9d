"""A long run: memory, handles, threads, shared memory and logs stay flat."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainerCallback

from tiny_runs import model_of, trainer_of

STEPS = 18_000
"""An hour of steps at 5 steps per second, which is the pace of a ResNet-50 at 224 px on one GPU."""
FIRST = STEPS // 6
"""The step of the first measurement: allocators, caches and buffers have their size by then."""
REST = 50
"""Steps from an evaluation and checkpoint to a measurement, and from the last measurement to the end of the workers."""


class Resources(TrainerCallback):
    """Measures what this process and its workers hold after some steps."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (FIRST + REST, state.max_steps - REST):
            self.found[state.global_step] = self.measure(Path(args.output_dir))

    @staticmethod
    def measure(folder: Path) -> dict[str, float]:
        gc.collect()
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        shared = Path("/dev/shm")
        return {
            "memory in MB": sum(each.memory_info().rss - each.memory_info().shared for each in family) / 1e6,
            "processes": len(family),
            "open files": sum(each.num_fds() for each in family),
            "threads": sum(each.num_threads() for each in family),
            "shared memory in MB": sum(f.stat().st_size for f in shared.glob("torch_*")) / 1e6
            if shared.is_dir()
            else 0,
            "tensors": sum(type(each) is torch.Tensor for each in gc.get_objects()),
            "files of the run": sum(path.is_file() for path in folder.rglob("*")),
        }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="private and shared memory are told apart on Linux only")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_hour_of_steps_leaves_resources_flat(
    workers: int, tmp_path: Path, fault_record: Callable[[str, str, str], None]
) -> None:
    steps = STEPS if workers == 0 else STEPS // 3
    resources = Resources()
    trainer = trainer_of(
        tmp_path,
        model_of("test_resnet"),
        callbacks=[resources],
        max_steps=steps,
        per_device_train_batch_size=2,
        mu=1,
        decode="stream",
        weak_crop="resized",
        dataloader_num_workers=workers,
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=FIRST,
        save_strategy="steps",
        save_steps=FIRST,
        save_total_limit=1,
        hidden_label_column="true",
    )
    trainer.train()
    early, late = resources.found[FIRST + REST], resources.found[steps - REST]
    assert late["memory in MB"] < early["memory in MB"] + 40, (early, late)
    for name in ("processes", "open files", "threads", "shared memory in MB", "tensors", "files of the run"):
        assert late[name] <= early[name] + (50 if name == "tensors" else 0), (name, early, late)
    entries = [len(str(entry)) for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == steps // 100
    assert max(entries[-10:]) <= max(entries[:10]) + 40  # characters
    assert multiprocessing.active_children() == []
    assert os.listdir("/dev/shm") == [] or not list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))
    where = f"{workers} workers" if workers else "no workers"
    fault_record(f"{steps:,} steps in one run, {where}", "memory, open files, threads and logs stay flat", "nothing")
