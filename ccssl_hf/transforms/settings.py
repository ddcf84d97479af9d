"""What a view is made of: its names, its settings, and which random number decides what."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

MAX_SIDE_HELD = 64
"""Image side in pixels up to which `auto` decodes the images once, holds them, and crops with padding, as for CIFAR."""

MAX_SIDE_UNCROPPED = 96
"""Image side in pixels up to which evaluation does not crop, as for CIFAR and STL-10; above it, timm's crop applies."""


class View(IntEnum):
    """The views of one image. A view has random numbers of its own: stream number `16 * stream + view`."""

    WEAK = 0
    STRONG = 1
    CONTRASTIVE = 2


class Column(IntEnum):
    """Which of a view's random numbers decides what. Numbers are independent, so unused ones cost nothing else.

    The two numbers of try `t` of a resized crop are `CROP_TRIES + 2 * t` (area) and the next (ratio). The four of
    RandAugment's op `k` are `RANDAUGMENT + 4 * k` (which op), then magnitude, whether it is applied, sign.
    """

    FLIP = 0
    TOP = 1
    LEFT = 2
    CUTOUT_TOP = 3
    CUTOUT_LEFT = 4
    JITTER = 5
    JITTER_ORDER = 6
    BRIGHTNESS = 7
    CONTRAST = 8
    SATURATION = 9
    HUE = 10
    GRAYSCALE = 11
    CROP_TRIES = 12
    RANDAUGMENT = 32


CROP_TRIES = 10
"""Boxes tried before the central crop is taken, as in torchvision."""


@dataclass(frozen=True)
class ViewSettings:
    """How the weak, strong and contrastive views are made.

    Args:
        image_size: Side of every view in pixels, `S`.
        mean: Mean of each channel, for values in 0..1.
        std: Standard deviation of each channel, likewise.
        weak_crop: Geometry of the weak and strong view. "pad" reflects 12.5 % of the side around an image that has the
            output size and crops it back; "resized" is a random resized crop.
        crop_scale: Share of the image's area that a "resized" weak or strong crop covers, lowest and highest.
        crop_ratio: Width over height of any resized crop, lowest and highest.
        horizontal_flip: Whether half of the views are mirrored.
        randaugment_ops: Ops drawn for each strong view.
        randaugment_magnitude: Magnitudes are drawn from 1 to one below it, on RandAugment's scale of 10.
        cutout_size: Side of the grey square in pixels; 0 for none.
        contrastive_view: "simclr" (resized crop, colour jitter, grey) or "randaugment" (another strong view).
        contrastive_crop_scale: As `crop_scale`, for "simclr".
        jitter: Strength of brightness, contrast, saturation (factors in 1 ± strength) and hue (share of the circle).
        jitter_probability: How often colours are jittered.
        grayscale_probability: How often a contrastive view is grey.
        normalize_contrastive: False leaves the contrastive view in 0..1, as the authors' configs do.

    Raises:
        ValueError: If a value is out of its range.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weak_crop: Literal["pad", "resized"] = "pad"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: bool = True
    randaugment_ops: int = 2
    randaugment_magnitude: int = 10
    cutout_size: int = 16
    contrastive_view: Literal["simclr", "randaugment"] = "simclr"
    contrastive_crop_scale: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    normalize_contrastive: bool = True

    def __post_init__(self) -> None:
        for name in ("mean", "std", "crop_scale", "crop_ratio", "contrastive_crop_scale", "jitter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # YAML gives lists
        strengths = all(strength >= 0 for strength in self.jitter)
        checks = {
            "image_size": (self.image_size >= 8, "at least 8 pixels"),
            "mean": (len(self.mean) == 3, "three numbers, one for each channel"),
            "std": (len(self.std) == 3 and min(self.std) > 0, "three positive numbers, one for each channel"),
            "weak_crop": (self.weak_crop in ("pad", "resized"), "'pad' or 'resized'"),
            "contrastive_view": (self.contrastive_view in ("simclr", "randaugment"), "'simclr' or 'randaugment'"),
            "randaugment_ops": (self.randaugment_ops >= 0, "0 or more"),
            "randaugment_magnitude": (2 <= self.randaugment_magnitude <= 11, "between 2 and 11"),
            "cutout_size": (self.cutout_size >= 0, "0 (none) or a side in pixels"),
            "jitter": (
                len(self.jitter) == 4 and strengths and self.jitter[3] <= 0.5,
                "four strengths from 0 on, the last (hue) up to 0.5",
            ),
        }
        for name in ("crop_scale", "contrastive_crop_scale"):
            scale = getattr(self, name)
            checks[name] = (
                len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
                "(lowest, highest) share of the area, in (0, 1]",
            )
        checks["crop_ratio"] = (
            len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1],
            "(lowest, highest), positive",
        )
        for name in ("jitter_probability", "grayscale_probability"):
            checks[name] = (0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {wanted}.")
