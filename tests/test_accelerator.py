"""Tests that need an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tiny_runs import model_of, trainer_of

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class NeverWait(TrainerCallback):
    """From the third step on, when tables are cached, any synchronization with the device raises."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize(
    "changes",
    [{}, {"weak_forward": "separate", "bf16": True}, {"algorithm": "freematch", "confidence_threshold": None}],
)
def test_no_step_waits_for_the_device(changes: dict[str, Any], tmp_path: Any) -> None:
    trainer = trainer_of(
        tmp_path, model_of(), callbacks=[NeverWait()], use_cpu=False, max_steps=8, logging_strategy="no", **changes
    )
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 8


@needs_cuda
def test_a_compiled_step_in_bf16_learns(tmp_path: Any) -> None:
    trainer = trainer_of(
        tmp_path, model_of(), use_cpu=False, max_steps=30, bf16=True, torch_compile=True, weak_forward="separate"
    )
    trainer.train()
    losses = [entry["loss_x"] for entry in trainer.state.log_history if "loss_x" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
