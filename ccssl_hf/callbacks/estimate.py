"""Time and memory of a run: a forecast before the first step, and a measurement after it."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback

from ..errors import summary
from ..record import duration

logger = logging.getLogger(__name__)


class RunEstimate(TrainerCallback):
    """Says what a step computes before the first one, and what steps cost after the first ones. Silent below a minute.

    On a CPU it forecasts time and memory from a few images, and warns of a run that takes more than a day or more
    memory than the machine has. This changes no weights, statistics or random numbers. The device is synchronized twice
    in a run. `unlabeled_views` is the number of views of each unlabeled image.
    """

    MEASURED = 5  # steps after the first one, which is slower

    def __init__(self, unlabeled_views: int) -> None:
        self.unlabeled_views = unlabeled_views

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._marks: list[float] = []
        self._pause_from: float | None = None
        self._paused = 0.0
        self._active = state.is_world_process_zero
        self._first_step = state.global_step
        steps = state.max_steps - state.global_step
        if not self._active or steps <= 0:
            return
        channels, height, width = model.backbone.pretrained_cfg["input_size"]
        of_one = args.per_device_train_batch_size * args.gradient_accumulation_steps
        views = of_one * (1 + args.mu * self.unlabeled_views)
        # The weak view of a separate pass needs a third of the time of a view, and keeps no activations.
        no_gradient = of_one * args.mu if args.weak_forward == "separate" and self.unlabeled_views else 0
        parameters = sum(parameter.numel() for parameter in model.parameters())
        each = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        text = (
            f"Each step: {views:,} views of {width} x {height} px on {args.device.type}{each}, through "
            f"{model.config.architecture} with {parameters / 1e6:,.1f} million parameters. Steps to train: {steps:,}."
        )
        if args.device.type != "cpu":
            _say(text)
            return
        try:
            seconds_of_view, bytes_of_view = _cost_of_view(model, (channels, height, width))
        except Exception as error:  # an estimate must not end a run
            _say(f"{text} Their time cannot be estimated ({summary(error)}).")
            return
        seconds = seconds_of_view * (views - no_gradient * 2 / 3)
        held = (views - no_gradient) / args.gradient_accumulation_steps  # one pass at a time
        # Of each parameter: gradient, averaged weight, and up to two numbers of the optimizer.
        memory = _memory_used(args.device) + bytes_of_view * held + 16 * parameters
        if seconds * steps < 60:
            return
        text += f" About {_rounded(seconds)} s a step, {duration(seconds * steps)} in all, and {memory / 1e9:.1f} GB."
        available = psutil.virtual_memory().total
        if seconds * steps > 86400 or memory > 0.9 * available:
            has = f"This machine has {available / 1e9:.1f} GB. " if memory > 0.9 * available else ""
            mu = f"a lower mu (now {args.mu}), " if self.unlabeled_views else ""
            text += (
                f"\nThis is too much for most CPUs. {has}Use an accelerator, a smaller image_size (half the side costs "
                f"a quarter), a smaller backbone such as resnet18, {mu}a lower per_device_train_batch_size (now "
                f"{args.per_device_train_batch_size}), fewer max_steps, or weak_forward='separate'. Each of them "
                "changes the results."
            )
        _say(text)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pause_from is not None:  # an evaluation or a checkpoint came between
            self._paused += time.perf_counter() - self._pause_from
            self._pause_from = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._first_step
        if not self._active or done not in range(1, self.MEASURED + 2):
            return
        if done in (1, self.MEASURED + 1):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            self._marks.append(time.perf_counter())
        if done == 1:
            self._paused = 0.0
        if control.should_evaluate or control.should_save:
            self._pause_from = time.perf_counter()
        if done == self.MEASURED + 1:
            seconds = (self._marks[1] - self._marks[0] - self._paused) / self.MEASURED
            left = state.max_steps - state.global_step
            if seconds * (state.max_steps - self._first_step) >= 60:
                time_left = f"{duration(seconds * left)} for the {left:,} steps that are left, without evaluations."
                memory = f"Memory so far: {_memory_used(args.device) / 1e9:.1f} GB."
                _say(f"A step takes {_rounded(seconds)} s: {time_left} {memory}")


def _cost_of_view(model: Any, size: tuple[int, ...], images: int = 8) -> tuple[float, float]:
    """Seconds of forward and backward pass, and bytes of activations, of one view on a CPU."""
    held: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()  # keeps the statistics of BatchNorm
            pixels = torch.linspace(-1, 1, images * math.prod(size)).view(images, *size)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                kept = model(pixel_values=pixels[:2].clone(), return_embeddings=True)
            del kept
            started = time.perf_counter()
            with torch.no_grad():
                model(pixel_values=pixels, return_embeddings=True)
            seconds = time.perf_counter() - started
    finally:
        for module, training in modes.items():
            module.training = training
    return 3 * seconds / images, sum(held.values()) / 2  # a backward pass takes twice as long as a forward pass


def _memory_used(device: torch.device) -> int:
    """Most bytes that a CUDA device has held, or elsewhere the bytes that this process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _rounded(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _say(text: str) -> None:
    """Log for the user, also where no logging is set up, without breaking a progress bar."""
    with logging_redirect_tqdm():
        logger.warning(text)
