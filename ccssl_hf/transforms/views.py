"""Weak, strong and contrastive views of a batch, with the same results as PIL.

As in a PIL pipeline, images are uint8 between operations. All random numbers come from `sampling.uniform`, one row for
each draw and view. They are drawn on the CPU, so that selecting images for an operation does not wait for the
accelerator. A view depends on its image, seed, stream and draw, not on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import permutations
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..sampling import uniform
from . import ops

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

    Try `t` (of ten) of a resized crop uses `CROP_TRIES + 2 * t` (area) and the next column (ratio). RandAugment's op
    `k` uses `RANDAUGMENT + 4 * k` (which op) and the next three (magnitude, whether it is applied, sign).
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


@dataclass(frozen=True)
class ViewSettings:
    """Settings of the views. `ccssl_hf.training_args.ViewArguments` describes those that are not listed here.

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
        wrong = {name: wanted for name, (holds, wanted) in checks.items() if not holds}
        if wrong:
            raise ValueError("\n".join(f"{name}={getattr(self, name)!r}: use {fix}." for name, fix in wrong.items()))

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


_ENHANCEMENTS = {"brightness": ops.brightness, "color": ops.color, "contrast": ops.contrast, "sharpness": ops.sharpness}
RANDAUGMENT_OPS = (
    *("autocontrast", "equalize", "identity", *_ENHANCEMENTS, "posterize", "solarize"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
"""RandAugment's ops. The random number for the op selects one by position."""

_JITTER_ORDERS = torch.tensor(list(permutations(range(4))))


def _random(view: View, settings: ViewSettings, seed: int, stream: int, draws: Tensor) -> Tensor:
    """The numbers of `Column`, `[N, columns]` on the CPU; in float64 a product with a small integer is exact."""
    columns = Column.RANDAUGMENT + 4 * settings.randaugment_ops
    return uniform(seed, 16 * stream + view, draws.cpu(), columns).to(torch.float64)


def _is_simclr(view: View, settings: ViewSettings) -> bool:
    return view == View.CONTRASTIVE and settings.contrastive_view == "simclr"


def crop_boxes(
    view: View, settings: ViewSettings, *, seed: int, stream: int, draws: Tensor, heights: Tensor, widths: Tensor
) -> Tensor:
    """The boxes of random resized crops, as in torchvision's `RandomResizedCrop`: ten tries, then a central crop.

    A data loading worker can crop a large image itself: take the box from here, call
    `image.crop((left, top, left + width, top + height)).resize((size, size), BILINEAR)`, and pass the result to
    `make_view` with `cropped=True`. The view equals the one made from the whole image.

    Heights and widths of the images are int64 `[N]` in pixels; for the other arguments see `make_view`. Returns top,
    left, height, width in pixels, int64 `[N, 4]` on the CPU. Raises ValueError if the view uses no resized crop.
    """
    simclr = _is_simclr(view, settings)
    if settings.weak_crop == "pad" and not simclr:
        name = View(view).name.lower()
        raise ValueError(f"The {name} view has no crop box with weak_crop='pad': use weak_crop='resized'.")
    # In numpy, which is faster than torch for the few numbers of one batch.
    random = _random(view, settings, seed, stream, draws).numpy()
    limits = torch.stack([heights, widths], dim=1).cpu().long().numpy()
    tries = random[:, Column.CROP_TRIES : Column.RANDAUGMENT]
    low, high = settings.contrastive_crop_scale if simclr else settings.crop_scale
    area = limits.prod(axis=1, keepdims=True) * (low + (high - low) * tries[:, 0::2])
    least, most = settings.crop_ratio
    ratio = np.exp(np.log(least) + (np.log(most) - np.log(least)) * tries[:, 1::2])
    tried = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=2).round().astype(np.int64)
    fits = np.all((tried > 0) & (tried <= limits[:, None]), axis=2)
    # The central crop keeps the shorter side of an image whose aspect ratio is out of range.
    central = np.stack([limits[:, 1] / least, limits[:, 0] * most], axis=1).round().astype(np.int64)
    found = np.any(fits, axis=1, keepdims=True)
    side = np.where(found, tried[np.arange(len(fits)), fits.argmax(axis=1)], np.minimum(central, limits))
    room = limits - side
    placed = (random[:, Column.TOP : Column.LEFT + 1] * (room + 1)).astype(np.int64)
    return torch.from_numpy(np.concatenate([np.where(found, placed, room // 2), side], axis=1))


def _randaugment_choices(random: Tensor, number: int, settings: ViewSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `number` of each image: position in `RANDAUGMENT_OPS`, magnitude, whether it is applied, sign; `[N]` each."""
    op, magnitude, applied, sign = random[:, Column.RANDAUGMENT + 4 * number :][:, :4].unbind(1)
    op = (op * len(RANDAUGMENT_OPS)).long()
    magnitude = 1 + (magnitude * (settings.randaugment_magnitude - 1)).long()
    return op, magnitude, applied < 0.5, torch.where(sign < 0.5, -1, 1)


def _randaugment(images: Tensor, random: Tensor, settings: ViewSettings) -> None:
    """FixMatch's RandAugment, in place: ops drawn with replacement, each applied with probability 0.5."""
    for number in range(settings.randaugment_ops):
        op, magnitude, applied, sign = _randaugment_choices(random, number, settings)
        chosen = {name: (op == code) & applied for code, name in enumerate(RANDAUGMENT_OPS)}
        factor = 0.05 + 0.9 * magnitude.to(torch.float64) / 10
        ops.apply(images, chosen["autocontrast"], ops.autocontrast)
        ops.apply(images, chosen["equalize"], ops.equalize)
        for name, enhance in _ENHANCEMENTS.items():
            ops.apply(images, chosen[name], enhance, factor)
        ops.apply(images, chosen["posterize"], ops.posterize, 4 + 4 * magnitude // 10)
        ops.apply(images, chosen["solarize"], ops.solarize, 256 - 256 * magnitude // 10)
        share = sign * (0.3 * magnitude.to(torch.float64) / 10)
        shift = (share * settings.image_size).trunc()
        degrees = sign * (30 * magnitude // 10) * chosen["rotate"]
        matrices = ops.rotation_matrices(degrees, settings.image_size, settings.image_size)
        entries = {"shear_x": (1, share), "shear_y": (3, share), "translate_x": (2, shift), "translate_y": (5, shift)}
        for name, (entry, value) in entries.items():
            matrices[:, entry] += value * chosen[name]
        ops.apply(images, applied & (op >= RANDAUGMENT_OPS.index("rotate")), ops.affine, matrices)


def _jitter(images: Tensor, random: Tensor, settings: ViewSettings) -> None:
    """torchvision's `ColorJitter`, with its four operations in random order, and `RandomGrayscale`, in place."""
    applied = random[:, Column.JITTER] < settings.jitter_probability
    order = _JITTER_ORDERS[(random[:, Column.JITTER_ORDER] * len(_JITTER_ORDERS)).long()]
    # Brightness, contrast and saturation: factors in 1 ± strength. Hue: truncated as in torchvision.
    strength = torch.tensor(settings.jitter[:3], dtype=torch.float64)
    low = (1 - strength).clamp(min=0)
    factors = low + (1 + strength - low) * random[:, Column.BRIGHTNESS : Column.SATURATION + 1]
    turn = (settings.jitter[3] * (2 * random[:, Column.HUE] - 1) * 255).long()
    steps = list(zip((ops.brightness, ops.contrast, ops.color, ops.hue), (*factors.unbind(1), turn), strict=True))
    for position in range(4):
        for number, (op, parameter) in enumerate(steps):
            ops.apply(images, applied & (order[:, position] == number), op, parameter)
    ops.apply(images, random[:, Column.GRAYSCALE] < settings.grayscale_probability, ops.grayscale)


def make_view(
    images: Tensor, view: View, settings: ViewSettings, *, seed: int, stream: int, draws: Tensor, cropped: bool = False
) -> Tensor:
    """Makes one view of each image.

    Weak: crop, flip. Strong: crop, flip, RandAugment, grey square. Contrastive: "simclr" is resized crop, flip, colour
    jitter, grey; "randaugment" is another strong view.

    Args:
        images: uint8 `[N, 3, H, W]` on any device, not changed.
        stream: `sampling.LABELED` or `sampling.UNLABELED`.
        draws: int64 `[N]`, fastest on the CPU.
        cropped: Whether the images are already crops of the boxes from `crop_boxes`.

    Returns:
        uint8 `[N, 3, S, S]` for `settings.image_size` `S`.

    Raises:
        ValueError: Images or draws have a wrong type or shape.
    """
    _check(images, view, settings, draws, cropped)
    random = _random(view, settings, seed, stream, draws)
    simclr = _is_simclr(view, settings)
    mirror = (random[:, Column.FLIP] < 0.5) & settings.horizontal_flip
    if cropped:
        result = images.clone(memory_format=torch.contiguous_format)
        ops.apply(result, mirror, lambda crops: crops.flip(3))
    elif simclr or settings.weak_crop == "resized":
        height, width = (torch.full((len(images),), side) for side in images.shape[2:])
        boxes = crop_boxes(view, settings, seed=seed, stream=stream, draws=draws, heights=height, widths=width)
        result = ops.resized_crop(images, boxes, size=settings.image_size, mirror=mirror)
    else:
        pad = settings.image_size // 8
        top, left = (random[:, Column.TOP : Column.LEFT + 1] * (2 * pad + 1)).long().unbind(1)
        result = ops.reflect_crop(images, top, left, pad=pad, mirror=mirror)
    if simclr:
        _jitter(result, random, settings)
    elif view != View.WEAK:
        _randaugment(result, random, settings)
        if settings.cutout_size:
            # The authors' square is one pixel wider, and is moved, not clipped, at the top and left border.
            centre = random[:, Column.CUTOUT_TOP : Column.CUTOUT_LEFT + 1] * settings.image_size
            top, left = (centre - settings.cutout_size / 2).floor().long().unbind(1)
            ops.cutout(result, top, left, size=settings.cutout_size)
    return result


def _check(images: Tensor, view: View, settings: ViewSettings, draws: Tensor, cropped: bool) -> None:
    side, shape = settings.image_size, tuple(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] != 3:
        raise ValueError(f"Images are {images.dtype} {list(shape)}: give uint8 [N, 3, H, W].")
    if draws.shape != shape[:1] or draws.dtype != torch.int64:
        raise ValueError(f"Draws are {draws.dtype} {list(draws.shape)} for {shape[0]} images: give int64 [{shape[0]}].")
    if view not in tuple(View):
        raise ValueError(f"There is no view {view!r}: use View.WEAK, View.STRONG or View.CONTRASTIVE.")
    padded = settings.weak_crop == "pad" and not _is_simclr(view, settings)
    if shape[2:] != (side, side) and (cropped or padded):
        kind, fix = ("Crops", "") if cropped else ("Images", ", or use weak_crop='resized'")
        raise ValueError(f"{kind} are {shape[2]}x{shape[3]} pixels: resize them to {side}x{side}{fix}.")


@lru_cache(maxsize=16)
def _scale_and_shift(settings: ViewSettings, standard: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(settings.mean if standard else (0.0,) * 3, dtype=torch.float64)
    std = torch.tensor(settings.std if standard else (1.0,) * 3, dtype=torch.float64)
    scale, shift = (value.float().view(1, 3, 1, 1).to(device) for value in (1 / (255 * std), -mean / std))
    return scale, shift


def normalize(images: Tensor, settings: ViewSettings, *, view: View, dtype: torch.dtype = torch.float32) -> Tensor:
    """Computes (value / 255 - mean) / std in float32, as `dtype` in channels_last memory format.

    With `normalize_contrastive=False` the contrastive view is only scaled to 0..1.
    """
    standard = view != View.CONTRASTIVE or settings.normalize_contrastive
    scale, shift = _scale_and_shift(settings, standard, images.device)
    result = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    for part in ops.chunks(len(images), images[:1].numel(), images.device):
        result[part] = images[part].to(torch.float32).mul_(scale).add_(shift)
    return result
