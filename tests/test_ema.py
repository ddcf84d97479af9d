from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3

from ccssl_hf.ema import WeightAverage, published_weights
from tiny_runs import copy_of, different, model_of


def nudge(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            else:
                tensor += 1


def test_parameters_are_averaged_and_buffers_copied():
    model, decay = model_of(), 0.9
    ema = WeightAverage(model, decay)
    expected = copy_of(model)
    parameters = {name for name, _ in model.named_parameters()}
    for step in range(4):
        nudge(model, step)
        ema.update()
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if name in parameters else tensor.clone()
    found = ema.module.state_dict()
    assert found.keys() == expected.keys() > parameters
    for name, tensor in expected.items():
        exact = {} if name in parameters else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name], tensor, **exact)


@pytest.mark.parametrize("backbone", ["wide_resnet10_1_cifar", "test_vit"])
def test_the_average_is_timms_to_the_bit(backbone):
    model = model_of(backbone)
    ema, timms = WeightAverage(model, 0.99), ModelEmaV3(model, decay=0.99, exclude_buffers=True)
    for step in range(4):
        model.to(torch.bfloat16).to(torch.float32)  # gives the model new buffers, as an evaluation in half precision
        nudge(model, step)
        ema.update()
        timms.update(model)
    assert not different(copy_of(ema.module), copy_of(timms.module))


def test_weights_in_half_precision_are_refused():
    with pytest.raises(ValueError, match="keep them in float32, and set bf16=True"):
        WeightAverage(model_of().to(torch.bfloat16), 0.999)


def test_the_average_takes_no_gradient_and_stays_in_eval_mode():
    model = model_of("test_vit").train()
    ema = WeightAverage(model, 0.9)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_published_weights_are_the_average_and_go_away_again_to_the_bit():
    model = model_of()
    ema = WeightAverage(model, 0.5)
    nudge(model, 0)
    ema.update()
    raw, average = copy_of(model), copy_of(ema.module)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), published_weights(model, ema):
        assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    # The optimizer and DDP hold references to these tensors.
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_without_an_average_the_model_publishes_its_own_weights():
    model = model_of()
    raw = copy_of(model)
    with published_weights(model, None):
        assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())


def test_weights_survive_an_evaluation_in_half_precision():
    model = model_of()
    raw = copy_of(model)
    with published_weights(model, WeightAverage(model, 0.9)):
        model.to(torch.bfloat16)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
