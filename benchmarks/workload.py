"""Images, training runs and the bare network step that several benchmarks share."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import TrainerCallback, set_seed

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments

LABELS = [f"class {number}" for number in range(10)]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})


def photo_cuts(number: int, widths: tuple[int, int], heights: tuple[int, int]) -> list[Image.Image]:
    """Random cuts of scikit-learn's two photographs (640 x 427 px), with sizes in these ranges (pixels, inclusive)."""
    random, photographs, cuts = np.random.default_rng(0), load_sample_images().images, []
    for index in range(number):
        photograph = photographs[index % len(photographs)]
        size = [int(random.integers(low, high + 1)) for low, high in (heights, widths)]
        top, left = (
            int(random.integers(side - length + 1)) for side, length in zip(photograph.shape[:2], size, strict=True)
        )
        cuts.append(Image.fromarray(photograph[top : top + size[0], left : left + size[1]]))
    return cuts


def jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG file of quality 90."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_jpegs(folder: Path, images: Sequence[Image.Image]) -> list[str]:
    """Write the images as JPEG files, and return their paths."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:05}.jpg" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(jpeg(image))
    return list(map(str, files))


def as_dataset(files: Sequence[bytes]) -> datasets.Dataset:
    """Encoded images as a dataset; labels are in turn."""
    labels = [number % len(LABELS) for number in range(len(files))]
    images = [{"bytes": file, "path": None} for file in files]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=FEATURES)


def make_trainer(
    folder: str,
    backbone: str,
    labeled: datasets.Dataset,
    unlabeled: datasets.Dataset,
    *,
    image_size: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **args: Any,
) -> CCSSLTrainer:
    """A trainer of FixMatch and CCSSL with the defaults of the package, except `args`, that saves nothing."""
    set_seed(0)
    model = CCSSLForImageClassification.from_timm(backbone, labels=LABELS, image_size=image_size)
    arguments = CCSSLTrainingArguments(folder, save_strategy="no", report_to="none", disable_tqdm=True, **args)
    return CCSSLTrainer(model, arguments, labeled, unlabeled, callbacks=list(callbacks))


class StepEnds(TrainerCallback):
    """Notes the time when training begins and when each step ends, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.times = clock, [0.0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times = [self.clock()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(self.clock())


def bare_step(
    backbone: str, num_images: int, *, device: str = "cpu", compiler: str | None = None
) -> Callable[[Tensor], None]:
    """The least that training must do: forward, cross-entropy, backward and an SGD step of the plain timm network.

    Args:
        backbone: timm name.
        num_images: Images of each step.
        device: `cpu` or `cuda`.
        compiler: Backend of `torch.compile`, together with bf16, channels_last and fused SGD. None: torch's defaults.

    Returns:
        A function of the images of a step, `[num_images, 3, S, S]`.
    """
    set_seed(0)
    fast = compiler is not None
    network = timm.create_model(backbone, num_classes=len(LABELS)).train().to(device)
    if fast:
        network = network.to(memory_format=torch.channels_last)
    sgd = {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "fused": fast or None}
    optimizer = torch.optim.SGD(network.parameters(), **sgd)
    forward = torch.compile(network, backend=compiler, dynamic=False) if fast else network
    labels = torch.randint(len(LABELS), (num_images,)).to(device)

    def step(images: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step
