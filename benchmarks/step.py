"""A training step of `CCSSLTrainer` against its network alone: Wide ResNet 28-2, 8 labeled images, mu 7, 32 px.

The baseline is the least that training code must do with 8 + 3 * 56 images: forward, cross-entropy, backward and an SGD
step of the plain network on preloaded tensors. Ours is a real run: it draws images, makes three views, computes
FixMatch and CCSSL, averages the weights and logs the terms.

`--quick` uses Wide ResNet 10-1 and three steps, without the compiled run: compiling takes half a minute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from harness import SHARE, Bar, Row, compared, main
from torch import Tensor, nn
from transformers import TrainerCallback
from workload import LABELS, as_dataset, bare_step, jpeg, make_trainer, photo_cuts

from ccssl_hf import CCSSLTrainer
from ccssl_hf.step import forward_views, make_views

SIZE, BATCH, MU = 32, 8, 7
IMAGES = BATCH + 3 * MU * BATCH


def convolutions_alone(backbone: str) -> Callable[[], None]:
    """Only the convolutions of a step with `weak_forward="separate"`: a lower bound of its time."""
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
    """Call other functions between the steps of a trainer, and time them and the trainer.

    A step of the trainer lasts from the return of this callback to the end of the next step, so it includes everything
    in a run: drawing and loading images, views, loss, weights, average, logs and callbacks.

    Args:
        others: Timed in this order after each step of the trainer.
        warmup: Steps before those that count. The first includes compiling.
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
    """A run with the defaults of the package, except for its length, batch and files."""
    images = as_dataset([jpeg(cut) for cut in photo_cuts(1797, (SIZE, SIZE), (SIZE, SIZE))])
    labeled, unlabeled = images.select(range(40)), images.select(range(40, len(images)))
    args = {"max_steps": steps, "per_device_train_batch_size": BATCH, "mu": MU, "use_cpu": True, **flags}
    return make_trainer(folder, backbone, labeled, unlabeled, callbacks=turns, **args)


def loop_step(trainer: CCSSLTrainer) -> Callable[[], None]:
    """A step of the same parts in a plain loop without a Trainer. The parts are those of `trainer`."""
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
    """Run a trainer with the bare step, and optionally a plain loop or the convolutions, after each of its steps."""
    backbone = f"wide_resnet{'10_1' if quick else '28_2'}_cifar"
    warmup, steps = (1, 3) if quick else (4, 24)
    with tempfile.TemporaryDirectory() as folder:
        bare, images = bare_step(backbone, IMAGES), torch.randn(IMAGES, 3, SIZE, SIZE)
        others: list[Callable[[], None]] = [lambda: bare(images)]
        if with_loop:
            others.append(loop_step(trainer_of(backbone, f"{folder}/loop", steps, [])))
        if with_convolutions:
            others.append(convolutions_alone(backbone))
        turns = InTurn(*others, warmup=warmup)
        trainer_of(backbone, f"{folder}/run", steps, [turns], **flags).train()
    return turns


def measure(quick: bool) -> list[Row]:
    def row(what: str, turns: InTurn, bar: Bar) -> Row:
        ours, bare, *_ = turns.seconds
        return compared(f"{what}, {IMAGES} images", bare, ours, SHARE, bar, first_step_seconds=turns.first_step)

    defaults, separate = run(quick, with_loop=True), run(quick, weak_forward="separate")
    rows = [
        row("Step, defaults", defaults, Bar("≤", 1)),
        row("Step, weak_forward='separate'", separate, Bar("≤", 0.75)),
    ]
    if not quick:
        compiled = run(quick, with_convolutions=True, weak_forward="separate", torch_compile=True)
        rows.append(row("Step, weak_forward='separate', torch_compile", compiled, Bar("≤", 0.6)))
        _, bare, convolutions = compiled.seconds
        rows.append(compared("Step, weak_forward='separate': its convolutions alone", bare, convolutions, SHARE))
    ours, _, loop = defaults.seconds
    rows.append(compared("Step, defaults, against a loop of the same parts", loop, ours, SHARE, Bar("≤", 1.03)))
    return rows


if __name__ == "__main__":
    main(__file__, measure)
