"""Runs with torch_compile=True and a C++ compiler."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tiny_runs import StopAt, different, everything, logs_of_steps, model_of, trainer_of


@pytest.fixture(autouse=True)
def _compiled_runs_only_here(monkeypatch):
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")  # the arguments set it for good
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")


@pytest.mark.slow
@pytest.mark.parametrize("weak_forward", ["joint", "separate"])
def test_a_compiled_run_goes_on_bit_for_bit(weak_forward, tmp_path):
    settings = {"torch_compile": True, "weak_forward": weak_forward}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # The last batch of 37 images in batches of 8 is smaller.
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    whole = trainer_of(tmp_path / "whole", **settings, **evaluated)
    whole.train()
    # One graph for each kind of forward pass; evaluation is not compiled.
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == (1 if weak_forward == "joint" else 2)
    assert not counters["graph_break"]

    trainer_of(tmp_path / "parts", callbacks=[StopAt(3)], **settings).train()
    resumed = trainer_of(tmp_path / "parts", model_of(seed=1), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not different(everything(resumed), everything(whole))
    strip = [{**log, "epoch": None} for log in logs_of_steps(resumed)]
    assert strip == [{**log, "epoch": None} for log in logs_of_steps(whole)]

    metrics = whole.evaluate()
    whole.save_model()
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert saved.keys() == model_of().backbone.state_dict().keys()
    averaged = {name: tensor.contiguous() for name, tensor in whole.ema.module.backbone.state_dict().items()}
    assert not different(saved, averaged)
    assert whole.evaluate() != {} and metrics["eval_top1"] == whole.evaluate()["eval_top1"]


@pytest.mark.slow
def test_an_evaluation_before_training(tmp_path):
    plain = trainer_of(tmp_path / "plain", per_device_eval_batch_size=8).evaluate()
    compiled = trainer_of(tmp_path / "compiled", torch_compile=True, per_device_eval_batch_size=8).evaluate()
    assert compiled["eval_top1"] == plain["eval_top1"]
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
