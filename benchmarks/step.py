"""A training step of `CCSSLTrainer` against what its network costs: Wide ResNet 28-2, 8 labeled images, mu 7, 32 px.

The baseline is the least that any training code must do with 8 + 3 * 56 images: forward, cross-entropy, backward and an
SGD step of the plain network on tensors that are ready. Ours is a real run: images are drawn, three views made of them,
FixMatch and CCSSL computed, weights averaged, terms logged.

`--quick` takes Wide ResNet 10-1, three steps, and leaves out the compiled run, as compiling alone takes half a minute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from harness import Bar, Row, main, median, ratio
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.step import forward_views, make_views

LABELS = [str(digit) for digit in range(10)]
SIZE, BATCH, MU = 32, 8, 7
IMAGES = BATCH + 3 * MU * BATCH
RATE, MOMENTUM, DECAY = 0.03, 0.9, 1e-3


def digits() -> datasets.Dataset:
    """scikit-learn's 1,797 digits, enlarged from 8 px."""
    images, numbers = load_digits(return_X_y=True)
    pictures = [Image.fromarray((row.reshape(8, 8) * 15.9).astype(np.uint8)).convert("RGB") for row in images]
    columns = {"image": [picture.resize((SIZE, SIZE)) for picture in pictures], "label": numbers.tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    return datasets.Dataset.from_dict(columns, features=features)


def bare_step(backbone: str) -> Callable[[], None]:
    """The baseline: the network as it is made, in torch's own memory format, and SGD as torch has it by default."""
    set_seed(0)
    network = timm.create_model(backbone, num_classes=len(LABELS)).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    images, labels = torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(len(LABELS), (IMAGES,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def convolutions_alone(backbone: str) -> Callable[[], None]:
    """Only the convolutions of a step with `weak_forward="separate"`, as they are called there: its lower bound."""
    ran: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    network = timm.create_model(backbone, num_classes=len(LABELS))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: ran.append((module, inputs[0], output)))
    with torch.no_grad():
        network(torch.randn(IMAGES - MU * BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last))
    weak = [images[: MU * BATCH].contiguous(memory_format=torch.channels_last) for _, images, _ in ran]
    gradients = [torch.randn_like(output) for _, _, output in ran]

    def step() -> None:
        for number, (module, images, _) in enumerate(ran):
            how = (module.stride, module.padding, module.dilation, False, [0, 0], module.groups)
            torch.convolution(weak[number], module.weight.detach(), None, *how)
            torch.convolution(images, module.weight.detach(), None, *how)
            needed = [number > 0, True, False]  # images have no gradient
            torch.ops.aten.convolution_backward(gradients[number], images, module.weight.detach(), None, *how, needed)

    return step


class InTurn(TrainerCallback):
    """Runs other ways between the steps of a trainer, and times them and the trainer.

    A step of the trainer lasts from the moment when control goes back to it until the end of its next step. So all that
    happens in a run is in its time: drawing and loading images, views, loss, weights, average, logs and callbacks.

    Args:
        others: One step each, timed in this order after each step of the trainer.
        warmup: Steps before those that count. Compiling falls into the first.
    """

    def __init__(self, *others: Callable[[], None], warmup: int) -> None:
        self._others, self._warmup = others, warmup
        self.seconds: list[list[float]] = [[] for _ in (None, *others)]
        self.first_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = [time.perf_counter() - self._started]
        for other in self._others:
            started = time.perf_counter()
            other()
            taken.append(time.perf_counter() - started)
        self.first_step = self.first_step or taken[0]
        if state.global_step > self._warmup:
            for seconds, value in zip(self.seconds, taken, strict=True):
                seconds.append(value)
        self._started = time.perf_counter()


def trainer_of(backbone: str, folder: str, steps: int, turns: list[TrainerCallback], **flags: Any) -> CCSSLTrainer:
    """A run of FixMatch and CCSSL, with the defaults of the package but for its length, batch and files."""
    set_seed(0)
    images = digits()
    return CCSSLTrainer(
        CCSSLForImageClassification.from_timm(backbone, labels=LABELS),
        CCSSLTrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, mu=MU, save_strategy="no", use_cpu=True, **flags
        ),
        train_dataset=images.select(range(40)),
        unlabeled_dataset=images.select(range(40, len(images))),
        callbacks=turns,
    )


def loop_step(trainer: CCSSLTrainer) -> Callable[[], None]:
    """A step as one would write it without a Trainer, of the same parts; `trainer` is not trained, but lends them."""
    model, algorithm, average = trainer.model.train(), trainer.algorithm, trainer.ema
    optimizer, loader = trainer.create_optimizer(), iter(trainer.get_train_dataloader())
    views = algorithm.views

    def step() -> None:
        inputs = next(loader)
        made = make_views(inputs, views, trainer.settings, seed=trainer.args.seed, cropped=False)
        loss = algorithm(forward_views(model, made, inputs, with_embeddings=True)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update()

    return step


def run(quick: bool, *, with_loop: bool = False, with_convolutions: bool = False, **flags: Any) -> InTurn:
    """One trainer with the bare step after each of its steps, and a loop without a Trainer or convolutions if asked."""
    backbone = f"wide_resnet{'10_1' if quick else '28_2'}_cifar"
    warmup, steps = (1, 3) if quick else (4, 24)
    with tempfile.TemporaryDirectory() as folder:
        others = [bare_step(backbone)]
        if with_loop:
            others.append(loop_step(trainer_of(backbone, f"{folder}/loop", steps, [])))
        if with_convolutions:
            others.append(convolutions_alone(backbone))
        turns = InTurn(*others, warmup=warmup)
        trainer_of(backbone, f"{folder}/run", steps, [turns], **flags).train()
    return turns


def measure(quick: bool) -> list[Row]:
    defaults, separate = run(quick, with_loop=True), run(quick, weak_forward="separate")
    rows = [
        _row("Step, defaults", defaults, Bar("≤", 1)),
        _row("Step, weak_forward='separate'", separate, Bar("≤", 0.75)),
    ]
    if not quick:
        compiled = run(quick, with_convolutions=True, weak_forward="separate", torch_compile=True)
        rows.append(_row("Step, weak_forward='separate', torch_compile", compiled, Bar("≤", 0.6)))
        _, bare, convolutions = compiled.seconds
        rows.append(_ratio_row("Step, weak_forward='separate': its convolutions alone", bare, convolutions))
    ours, _, loop = defaults.seconds
    rows.append(_ratio_row("Step, defaults, against a loop of the same parts", loop, ours, Bar("≤", 1.03)))
    return rows


def _row(what: str, turns: InTurn, bar: Bar) -> Row:
    ours, bare, *_ = turns.seconds
    return _ratio_row(f"{what}, {IMAGES} images", bare, ours, bar, first_step_seconds=turns.first_step)


def _ratio_row(what: str, baseline: list[float], ours: list[float], bar: Bar | None = None, **details: Any) -> Row:
    details = {"baseline_seconds": baseline, "seconds": ours, **details}
    return Row(what, median(baseline), median(ours), ratio(ours, baseline), "x the baseline's time", bar, details)


if __name__ == "__main__":
    main(__file__, measure)
