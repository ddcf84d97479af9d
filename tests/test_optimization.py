from __future__ import annotations

import math

import numpy as np
import pytest
import timm.layers
import torch
from torch import nn

from ccssl_hf.optimization import cosine_7_16_schedule, decayed_parameter_names
from conftest import SHARED, needs_shared


def rates(warmup_steps: int, total_steps: int, rate: float = 0.03) -> np.ndarray:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = cosine_7_16_schedule(optimizer, warmup_steps=warmup_steps, total_steps=total_steps)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return np.array(found)


@needs_shared
def test_rates_with_warm_up_are_the_reference_ones():
    golden = np.load(SHARED / "golden" / "lr_schedule.npz")
    ours = rates(int(golden["warmup_steps"]), int(golden["total_steps"]), float(golden["base_lr"]))
    np.testing.assert_allclose(ours, golden["lr"], rtol=1e-9)


def test_without_warm_up_the_first_rate_is_the_peak_and_the_last_nearly_cos_7_16_pi():
    found = rates(0, 1000)
    assert found[0] == 0.03
    np.testing.assert_allclose(found[-1], 0.03 * math.cos(math.pi * 7 / 16 * 0.999))
    assert (np.diff(found) < 0).all()


def test_a_rate_never_falls_below_zero_when_a_run_goes_on_past_its_end():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine_7_16_schedule(optimizer, warmup_steps=0, total_steps=4)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.RMSNorm(4),
        timm.layers.BatchNormAct2d(4),
        timm.layers.GroupNormAct(4, num_groups=2),
        timm.layers.LayerNorm2d(4),
        timm.layers.RmsNorm(4),
        timm.layers.RmsNorm2d(4),
        timm.layers.SimpleNorm2d(4),
        timm.layers.EvoNorm2dS0(4, groups=2),
        timm.layers.FilterResponseNormAct2d(4),
        timm.layers.grn.GlobalResponseNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_are_not_decayed_whatever_their_name(norm):
    assert list(norm.parameters())
    model = nn.ModuleDict({"layer": nn.Sequential(nn.Conv2d(3, 4, 1), norm)})
    assert decayed_parameter_names(model) == ["layer.0.weight"]


def test_biases_of_every_name_are_not_decayed():
    assert set(decayed_parameter_names(nn.MultiheadAttention(8, 2))) == {"in_proj_weight", "out_proj.weight"}
    assert decayed_parameter_names(nn.Linear(2, 2)) == ["weight"]


def test_positions_and_scales_that_are_no_norm_are_decayed():
    vit = timm.create_model("test_vit", pretrained=False, img_size=32, patch_size=16)
    names = decayed_parameter_names(vit)
    assert "pos_embed" in names
    assert not any(name.endswith("bias") or ".norm" in name for name in names)
