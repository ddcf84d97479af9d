"""The baseline for views: one image at a time with PIL and torchvision's transforms.

Written from the definitions: RandAugment as in FixMatch, a gray square, SimCLR's color jitter. It draws other random
numbers than `ccssl_hf.transforms`, so it makes the same kind of views, not the same views.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms

from ccssl_hf.transforms import View, ViewSettings

Transform = Callable[[Image.Image], Tensor]

OPS = (
    "autocontrast", "equalize", "identity", "brightness", "color", "contrast", "sharpness", "posterize", "solarize",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip


def _randaugment_op(image: Image.Image, op: str, v: int, direction: int) -> Image.Image:
    share = direction * 0.3 * v / 10
    if op in ("autocontrast", "equalize"):
        return getattr(ImageOps, op)(image)
    if op in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, op.capitalize())(image).enhance(0.05 + 0.9 * v / 10)
    if op == "posterize":
        return ImageOps.posterize(image, 4 + int(4 * v / 10))
    if op == "solarize":
        return ImageOps.solarize(image, 256 - int(256 * v / 10))
    if op == "rotate":
        return image.rotate(direction * int(30 * v / 10))
    matrices = {
        "shear_x": (1, share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, share, 1, 0),
        "translate_x": (1, 0, int(share * image.width), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, int(share * image.height)),
    }
    return image.transform(image.size, Image.Transform.AFFINE, matrices[op]) if op in matrices else image


class RandAugment:
    """Ops drawn with replacement, each applied with probability 0.5, then a gray square."""

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings

    def __call__(self, image: Image.Image) -> Image.Image:
        settings, side = self.settings, image.width
        for op in random.choices(OPS, k=settings.randaugment_ops):
            v = random.randrange(1, settings.randaugment_magnitude)
            if random.random() < 0.5:
                image = _randaugment_op(image, op, v, random.choice((-1, 1)))
        size = settings.cutout_size
        top, left = (int(random.random() * side - size / 2) for _ in range(2))
        box = (max(0, left), max(0, top), min(side, left + size), min(side, top + size))
        image.paste((127, 127, 127), box)
        return image


def pil_transform(view: View, settings: ViewSettings) -> Transform:
    """One view of a PIL image as a normalised tensor `[3, S, S]`."""
    size = settings.image_size
    simclr = view == View.CONTRASTIVE
    crop: list[Transform] = [
        transforms.RandomResizedCrop(
            size, settings.contrastive_crop_scale if simclr else settings.crop_scale, settings.crop_ratio
        )
    ]
    if settings.weak_crop == "pad" and not simclr:
        crop = [transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
    colors: dict[View, list[Transform]] = {
        View.WEAK: [],
        View.STRONG: [RandAugment(settings)],
        View.CONTRASTIVE: [
            transforms.RandomApply([transforms.ColorJitter(*settings.jitter)], settings.jitter_probability),
            transforms.RandomGrayscale(settings.grayscale_probability),
        ],
    }
    end = [transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)]
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip(), *colors[view], *end])
