"""Published folders of tiny networks that tell images apart without training, and images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ccssl_hf import CCSSLForImageClassification

LABELS = ["moth", "butterfly", "beetle", "fly"]
DATA = np.random.default_rng(0)


def published(folder: Path, backbone: str, size: int, *, with_head: bool = True) -> Path:
    """A folder whose model tells images apart: BatchNorms as after training, and a classifier that is sure."""
    torch.manual_seed(0)
    model = CCSSLForImageClassification.from_timm(backbone, labels=LABELS, image_size=size).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    classifier = model.backbone.get_classifier()
    with torch.no_grad():
        logits = model(torch.randn(32, 3, 1, 1) + 0.3 * torch.randn(32, 3, size, size)).logits - classifier.bias
        scale = 2 / logits.std(dim=0)
        classifier.weight *= scale[:, None]
        classifier.bias.copy_(-scale * logits.mean(dim=0))
    model.save_pretrained(folder, with_head=with_head)
    return folder


def picture(width: int, height: int) -> Image.Image:
    small = Image.fromarray(DATA.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)
