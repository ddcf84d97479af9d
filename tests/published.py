"""What a published model must say again wherever it is loaded."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from ccssl_hf.checkpoint import save_tensors

SCRIPT = Path(__file__).with_name("load_elsewhere.py")


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))


@torch.no_grad()
def write_expected(root: Path, name: str, backbone: Any) -> dict[str, Tensor]:
    """Writes beside `picture.png` what the timm model makes of it."""
    picture().save(root / "picture.png")
    # A trainer's network is channels_last, and that rounds otherwise.
    backbone = copy.deepcopy(backbone).to(memory_format=torch.contiguous_format).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    pixels = transform(picture())[None]
    features = backbone.forward_head(backbone.forward_features(pixels), pre_logits=True)
    expected = {"pixels": pixels, "logits": backbone(pixels), "features": features}
    save_tensors(root / f"{name}.safetensors", expected)
    return expected


def found_elsewhere(root: Path, sources: Mapping[str, str | Path], environment: Mapping[str, str]) -> dict[str, Any]:
    """What a process finds that can't import this package; one for all sources, for its imports are slow."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(root), *(f"{name}={source}" for name, source in sources.items())],
        cwd=root,
        env={**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.split("FOUND ")[-1])
