"""Runs with bf16=True: the network computes in half precision, weights and losses stay in float32."""

from __future__ import annotations

import math

import pytest
import torch

from ccssl_hf import CCSSLTrainer
from tiny_runs import logs_of_steps, trainer_of


@pytest.mark.parametrize("weak_forward", ["joint", "separate"])
def test_a_run_in_bf16(weak_forward, tmp_path, monkeypatch):
    losses, logits = [], []
    compute_loss = CCSSLTrainer.compute_loss

    def keep(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        losses.append(loss)
        return loss

    monkeypatch.setattr(CCSSLTrainer, "compute_loss", keep)
    trainer = trainer_of(tmp_path, bf16=True, weak_forward=weak_forward, max_steps=3, lambda_u=2.0)
    trainer.model.backbone.fc.register_forward_hook(lambda module, inputs, output: logits.append(output.dtype))
    before = trainer.model.backbone.conv1.weight.clone()
    trainer.train()
    assert set(logits) == {torch.bfloat16}
    assert len(losses) == 3 and all(loss.dtype == torch.float32 for loss in losses)
    for tensor in [*trainer.model.state_dict().values(), *trainer.ema.module.state_dict().values()]:
        assert tensor.dtype in (torch.float32, torch.int64)
    assert not torch.equal(before, trainer.model.backbone.conv1.weight)
    terms = [log[name] for log in logs_of_steps(trainer) for name in ("loss_x", "loss_u", "loss_contrast")]
    assert len(terms) == 9 and all(map(math.isfinite, terms))
    assert 0 <= trainer.evaluate()["eval_top1"] <= 1
