"""The contrastive loss, forward and backward, against its definition on matrices of all pairs.

Memory is what a call adds to the resident memory of a fresh process, after one call on 64 images.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import FASTER, SHARE, Bar, Row, compared, in_child, in_turn, main, median, rise_of_memory
from torch import Tensor

from ccssl_hf.losses import class_aware_contrastive_loss

DIMENSION = 64
CLASSES = 10
TEMPERATURE = 0.07
WARMUP = 64
"""Images of the first call in a fresh process."""


def make(num_images: int) -> dict[str, Tensor]:
    """Random arguments of the loss."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(num_images, 2, DIMENSION, generator=generator)
    return {
        "embeddings": F.normalize(views, dim=-1).requires_grad_(),
        "pseudo_labels": torch.randint(CLASSES, (num_images,), generator=generator),
        "confidences": torch.rand(num_images, generator=generator),
    }


def dense(*, embeddings: Tensor, pseudo_labels: Tensor, confidences: Tensor) -> Tensor:
    """The definition on matrices `[2N, 2N]`, differentiated by autograd."""
    views = embeddings.flatten(0, 1)
    labels, confidences = pseudo_labels.repeat_interleave(2), confidences.repeat_interleave(2)
    image = torch.arange(len(views)) // 2
    itself = torch.eye(len(views), dtype=torch.bool)
    weights = (labels[:, None] == labels) * confidences[:, None] * confidences
    weights = weights.masked_fill(image[:, None] == image, 1).masked_fill(itself, 0)
    similarities = views @ views.T / TEMPERATURE
    log_softmax = similarities.masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    # The loss's factor τ / 0.07 is 1 at this temperature.
    return -((weights * log_softmax).sum(1) / weights.sum(1)).mean()


def ours(*, embeddings: Tensor, pseudo_labels: Tensor, confidences: Tensor) -> Tensor:
    """The package's loss at the same temperature."""
    return class_aware_contrastive_loss(
        embeddings=embeddings, pseudo_labels=pseudo_labels, confidences=confidences, temperature=TEMPERATURE
    )


def step(loss: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    """Forward and backward."""
    inputs["embeddings"].grad = None
    loss(**inputs).backward()


def memory_and_seconds(loss: Callable[..., Tensor], num_images: int) -> tuple[float, float]:
    """MiB that a step adds, and its seconds. To be called in a fresh process."""
    step(loss, make(WARMUP))
    inputs = make(num_images)
    seconds: list[float] = []

    def call() -> None:
        started = time.perf_counter()
        step(loss, inputs)
        seconds.append(time.perf_counter() - started)

    return rise_of_memory(call), seconds[0]


def time_row(num_images: int, rounds: int, unit: str, bar: Bar) -> Row:
    """Times of both, called in turn."""
    inputs = make(num_images)
    times = in_turn(lambda: step(dense, inputs), lambda: step(ours, inputs), rounds=rounds)
    return compared(f"contrastive loss, N = {num_images:,}, D = {DIMENSION}", *times, unit, bar)


def measure(quick: bool) -> list[Row]:
    large, small, huge = (96, 32, 128) if quick else (8192, 448, 65536)
    baseline_memory, _ = in_child(memory_and_seconds, dense, large)
    memory, _ = in_child(memory_and_seconds, ours, large)
    huge_memory, huge_seconds = in_child(memory_and_seconds, ours, huge)
    return [
        time_row(large, 1 if quick else 3, FASTER, Bar("≥", 5)),
        time_row(small, 1 if quick else 50, SHARE, Bar("≤", 1)),
        Row(
            what=f"contrastive loss, N = {large:,}, memory",
            baseline=f"{baseline_memory:,.0f} MiB",
            ours=f"{memory:,.0f} MiB",
            figure=memory,
            unit="MiB",
            bar=Bar("≤", 200),
        ),
        Row(
            what=f"contrastive loss, N = {huge:,}, memory",
            baseline="",
            ours=median([huge_seconds]),
            figure=huge_memory,
            unit="MiB",
            bar=Bar("≤", 1024),
        ),
    ]


if __name__ == "__main__":
    main(__file__, measure)
