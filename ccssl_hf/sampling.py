"""The images of each step, and all random numbers, as pure functions: the same after a resume and on more processes.

A *draw* is the position of an image in the endless sequence of images of one stream, labeled or unlabeled.
It determines the image and, through `uniform`, its augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

LABELED, UNLABELED = 0, 1  # the streams of images
_SHUFFLE = 1 << 8  # plus the stream: the stream of its shuffles; those of augmentations are small numbers
_REPLACEMENT = 1 << 9  # plus the stream: the stream of the images that replace unreadable ones
_AT_ONCE = 1 << 16  # draws per chunk when shuffling, which bounds temporaries

# 64-bit patterns as signed integers, for torch's int64 arithmetic, which wraps.
_GOLDEN, _MIX1, _MIX2 = (
    np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64).view(np.int64).tolist()
)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014). Masks, because int64 shifts keep the sign."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=64)
def _key(seed: int, stream: int) -> int:
    return int(_mix(torch.tensor(seed, dtype=torch.int64) * _GOLDEN + stream + _GOLDEN))


def counter_bits(seed: int, stream: int, draws: Tensor, columns: int) -> Tensor:
    """Returns 64 random bits for each (seed, stream, draw, column), int64 `[N, columns]`, the same on every device.

    `stream` numbers the purpose; two purposes never share random numbers. `draws` are int64 `[N]`.
    """
    rows = _mix(draws.to(torch.int64) * _GOLDEN + _key(seed, stream))
    column = torch.arange(1, columns + 1, device=draws.device, dtype=torch.int64) * _GOLDEN
    return _mix(rows[:, None] + column)


def uniform(seed: int, stream: int, draws: Tensor, columns: int) -> Tensor:
    """Returns uniform numbers in [0, 1), float32 `[N, columns]`: multiples of 2**-24 from `counter_bits`."""
    bits = (counter_bits(seed, stream, draws, columns) >> 40) & ((1 << 24) - 1)
    return bits.to(torch.float32) * 2.0**-24


def replacements(seed: int, stream: int, draw: int, num_images: int) -> list[int]:
    """Row numbers of the images that replace the image of this draw, in the order in which they are tried."""
    bits = counter_bits(seed, _REPLACEMENT + stream, torch.tensor([draw]), 64)[0]
    return ((bits & ((1 << 62) - 1)) % num_images).tolist()


@dataclass(frozen=True)
class PairedIndices:
    """Row numbers and draws of one batch of one process, int64 `[B]` (labeled) and `[mu * B]` (unlabeled)."""

    labeled_index: np.ndarray
    labeled_draw: np.ndarray
    unlabeled_index: np.ndarray
    unlabeled_draw: np.ndarray

    def __len__(self) -> int:
        return len(self.labeled_index) + len(self.unlabeled_index)


class _Stream:
    """The endless sequence of images of one split: a new permutation for each epoch."""

    def __init__(self, number: int, num_images: int, seed: int) -> None:
        self.number, self.num_images, self.seed = number, num_images, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            bits = torch.empty(self.num_images, dtype=torch.int64)
            for start, part in zip(range(0, self.num_images, _AT_ONCE), bits.split(_AT_ONCE), strict=True):
                draws = torch.arange(len(part)) + (epoch * self.num_images + start)
                part[:] = counter_bits(self.seed, _SHUFFLE + self.number, draws, 1)[:, 0]
            self._epoch, self._order = epoch, np.argsort(bits.numpy(), kind="stable")
        return self._order

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        draws = np.arange(start, start + count, dtype=np.int64)
        index = np.empty_like(draws)
        epochs, places = np.divmod(draws, max(1, self.num_images))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = self._permutation(int(epoch))[places[here]]
        return index, draws


class PairedBatchSampler:
    """Batches of `batch_size` labeled and `mu * batch_size` unlabeled images, drawn without replacement in each epoch.

    Batch `b` starts at draw `b * batch_size` of the labeled stream and `b * mu * batch_size` of the unlabeled stream.
    Process `r` of `W` gets batches `r, W + r, ...` (accelerate's rule), so `W` consecutive batches form the same global
    batch that one process gets with `W * batch_size`. `num_batches` is the length of the run over all processes, and
    `num_unlabeled` is 0 if the algorithm reads no unlabeled images.
    """

    drop_last = True  # otherwise accelerate pads the last batches

    def __init__(
        self, *, num_labeled: int, num_unlabeled: int, batch_size: int, mu: int, num_batches: int, seed: int
    ) -> None:
        self.labeled = _Stream(LABELED, num_labeled, seed)
        self.unlabeled = _Stream(UNLABELED, num_unlabeled, seed)
        self.num_batches = num_batches
        self._per_batch = batch_size, mu * batch_size if num_unlabeled else 0
        self.batch_size = sum(self._per_batch)  # accelerate compares it with len(batch)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[PairedIndices]:
        labeled, unlabeled = self._per_batch
        for number in range(self.num_batches):
            yield PairedIndices(
                *self.labeled.take(number * labeled, labeled), *self.unlabeled.take(number * unlabeled, unlabeled)
            )
