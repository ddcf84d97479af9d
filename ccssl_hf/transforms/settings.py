"""The three views of an image, their settings, and the random numbers that each view uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from math import inf
from typing import Any, Literal

MAX_SIDE_HELD = 64
"""Image side in pixels up to which `auto` decodes images once, keeps them in memory and crops with padding."""

MAX_SIDE_UNCROPPED = 96
"""Image side in pixels up to which evaluation does not crop (CIFAR, STL-10). Larger images get timm's crop."""


class View(IntEnum):
    """The views of one image. Each view has its own random numbers: stream number `16 * stream + view`."""

    WEAK = 0
    STRONG = 1
    CONTRASTIVE = 2


class Column(IntEnum):
    """Columns of a view's random numbers. The numbers are independent, so a view may leave some unused.

    Try `t` of a resized crop uses `CROP_TRIES + 2 * t` (area) and the next column (ratio). RandAugment's op `k` uses
    `RANDAUGMENT + 4 * k` (which op) and the next three (magnitude, whether it is applied, sign).
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
"""Number of boxes that are tried before the central crop is used, as in torchvision."""


@dataclass(frozen=True)
class ViewSettings:
    """Settings of the views. `ViewArguments` describes those that are not listed here.

    Args:
        image_size: Side of every view in pixels, `S`.
        mean, std: Mean and standard deviation of each channel, for values in 0..1.
        crop_scale: Lowest and highest share of the image area for a "resized" crop.
        crop_ratio: Lowest and highest width over height of every resized crop.
        contrastive_crop_scale: `crop_scale` of the "simclr" view.
        jitter: Strength of brightness, contrast, saturation (factors in 1 ± strength) and hue (share of the circle).
        jitter_probability, grayscale_probability: Share of "simclr" views with colour jitter, and in grey.

    Raises:
        ValueError: A value is out of range.
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

        def in_order(pair: tuple[float, ...], most: float) -> bool:
            return len(pair) == 2 and 0 < pair[0] <= pair[1] <= most

        scales, share = "(lowest, highest) share of the area, in (0, 1]", "between 0 and 1"
        has_jitter = len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5
        checks = {
            "image_size": (self.image_size >= 8, "at least 8 pixels"),
            "mean": (len(self.mean) == 3, "three numbers, one for each channel"),
            "std": (len(self.std) == 3 and min(self.std) > 0, "three positive numbers, one for each channel"),
            "weak_crop": (self.weak_crop in ("pad", "resized"), "'pad' or 'resized'"),
            "crop_scale": (in_order(self.crop_scale, 1), scales),
            "crop_ratio": (in_order(self.crop_ratio, inf), "(lowest, highest), positive"),
            "randaugment_ops": (self.randaugment_ops >= 0, "0 or more"),
            "randaugment_magnitude": (2 <= self.randaugment_magnitude <= 11, "between 2 and 11"),
            "cutout_size": (self.cutout_size >= 0, "0 (none) or a side in pixels"),
            "contrastive_view": (self.contrastive_view in ("simclr", "randaugment"), "'simclr' or 'randaugment'"),
            "contrastive_crop_scale": (in_order(self.contrastive_crop_scale, 1), scales),
            "jitter": (has_jitter, "four strengths of at least 0, the last one (hue) at most 0.5"),
            "jitter_probability": (0 <= self.jitter_probability <= 1, share),
            "grayscale_probability": (0 <= self.grayscale_probability <= 1, share),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {wanted}.")

    def in_effect(self, views: Sequence[View]) -> dict[str, Any]:
        """The settings that affect a run with these views of its unlabeled images, by name."""
        simclr = {"contrastive_crop_scale", "jitter", "jitter_probability", "grayscale_probability"}
        unused = {"crop_scale", "crop_ratio"} if self.weak_crop == "pad" else set()
        if View.STRONG not in views:
            unused |= {"randaugment_ops", "randaugment_magnitude", "cutout_size"}
        if View.CONTRASTIVE not in views:
            unused |= {"contrastive_view", "normalize_contrastive", *simclr}
        elif self.contrastive_view == "randaugment":
            unused |= simclr
        return {name: value for name, value in asdict(self).items() if name not in unused}
