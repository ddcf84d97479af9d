"""Every batched operation equals PIL's byte for byte, on real and degenerate images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import functional as tvf

from ccssl_hf.transforms import ops


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@lru_cache
def patches(height: int, width: int, number: int = 24) -> Tensor:
    """Patches of two photographs at two scales, and flat, two-tone, black, white and noise images."""
    generator = np.random.default_rng(0)
    cut = []
    for index in range(number):
        photo = Image.fromarray(load_sample_photos()[index % 2])
        scale = (1, 2, 4)[index % 3]
        left = int(generator.integers(photo.width - scale * width + 1))
        top = int(generator.integers(photo.height - scale * height + 1))
        box = (left, top, left + scale * width, top + scale * height)
        cut.append(from_pil(photo.crop(box).resize((width, height), Image.Resampling.BICUBIC)))
    two_tone = torch.full((3, height, width), 40)
    two_tone[:, : height // 2, 1:] = torch.tensor([200, 40, 41])[:, None, None]
    noise = torch.from_numpy(generator.integers(0, 256, (3, height, width)))
    flat = torch.tensor([10, 130, 77])[:, None, None].expand_as(noise)
    extra = [flat, two_tone, torch.zeros_like(noise), torch.full_like(noise, 255), noise]
    return torch.stack([*cut, *(image.to(torch.uint8) for image in extra)])


@lru_cache
def load_sample_photos() -> list[np.ndarray]:
    return load_sample_images().images


def assert_equals_pil(
    images: Tensor, result: Tensor, reference: Callable[..., Image.Image], *parameters: Tensor
) -> None:
    """Compares with PIL image by image, with parameters as Python numbers."""
    rows = zip(*(parameter.tolist() for parameter in parameters), strict=True) if parameters else [()] * len(images)
    expected = torch.stack([from_pil(reference(to_pil(image), *row)) for image, row in zip(images, rows, strict=True)])
    assert result.dtype == torch.uint8
    assert torch.equal(result, expected)


SIZES = [(32, 32), (64, 64), (40, 57)]
MAGNITUDES = torch.arange(1, 11, dtype=torch.float64)
FACTORS = torch.cat([0.05 + 0.9 * MAGNITUDES / 10, torch.tensor([0.0, 0.6, 1.0, 1.123456789, 1.4, 2.7])])
ANGLES = torch.cat([3 * MAGNITUDES, -3 * MAGNITUDES])
SHEARS = torch.cat([0.3 * MAGNITUDES / 10, -0.3 * MAGNITUDES / 10])


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    return ops.affine(images, ops.rotation_matrices(degrees, *images.shape[2:]))


def shear_matrices(entry: int, values: Tensor) -> Tensor:
    matrices = ops.rotation_matrices(torch.zeros(len(values)), 1, 1)
    matrices[:, entry] += values
    return matrices


OPS = {
    "brightness": (ops.brightness, lambda image, f: ImageEnhance.Brightness(image).enhance(f), FACTORS),
    "color": (ops.color, lambda image, f: ImageEnhance.Color(image).enhance(f), FACTORS),
    "contrast": (ops.contrast, lambda image, f: ImageEnhance.Contrast(image).enhance(f), FACTORS),
    "sharpness": (ops.sharpness, lambda image, f: ImageEnhance.Sharpness(image).enhance(f), FACTORS),
    "posterize": (ops.posterize, ImageOps.posterize, torch.arange(1, 9)),
    "solarize": (
        ops.solarize,
        ImageOps.solarize,
        torch.cat([256 - 256 * torch.arange(1, 11) // 10, torch.tensor([256])]),
    ),
    "hue": (
        ops.hue,
        lambda image, shift: tvf.adjust_hue(image, (shift + 0.5 * np.sign(shift)) / 255),
        torch.arange(-26, 27, 2),
    ),
    "rotate": (rotate, lambda image, degrees: image.rotate(degrees), ANGLES),
    "shear_x": (
        lambda images, v: ops.affine(images, shear_matrices(1, v)),
        lambda image, v: affine(image, 1, v, 0, 0, 1, 0),
        SHEARS,
    ),
    "shear_y": (
        lambda images, v: ops.affine(images, shear_matrices(3, v)),
        lambda image, v: affine(image, 1, 0, 0, v, 1, 0),
        SHEARS,
    ),
    "translate_x": (
        lambda images, v: ops.affine(images, shear_matrices(2, v)),
        lambda image, v: affine(image, 1, 0, v, 0, 1, 0),
        torch.arange(-10, 11),
    ),
    "translate_y": (
        lambda images, v: ops.affine(images, shear_matrices(5, v)),
        lambda image, v: affine(image, 1, 0, 0, 0, 1, v),
        torch.arange(-10, 11),
    ),
}


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", OPS)
def test_an_op_with_a_parameter_equals_pil_at_every_magnitude(name: str, height: int, width: int) -> None:
    op, reference, values = OPS[name]
    images = patches(height, width)
    # Every image with every value.
    images, values = images.repeat_interleave(len(values), 0), values.repeat(len(images))
    assert_equals_pil(images, op(images, values), reference, values)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (16, 16)])
@pytest.mark.parametrize(
    ("op", "reference"),
    [
        (ops.autocontrast, ImageOps.autocontrast),
        (ops.equalize, ImageOps.equalize),
        (ops.grayscale, lambda image: image.convert("L").convert("RGB")),
    ],
)
def test_an_op_without_parameter_equals_pil(op: Callable, reference: Callable, height: int, width: int) -> None:
    images = patches(height, width)
    # Also with compressed values, which autocontrast and equalize stretch.
    images = torch.cat([images, images // 3 + 50, images // 16, images // 64 + 100])
    assert_equals_pil(images, op(images), reference)


def test_autocontrast_equals_pil_for_every_range_of_values() -> None:
    low, high = torch.triu_indices(256, 256, offset=1)[:, ::5].to(torch.uint8)
    share = torch.linspace(0, 1, 256)
    ramps = (low[:, None] + share * (high - low)[:, None]).to(torch.uint8)
    images = ramps[: len(ramps) // 3 * 3].view(-1, 3, 16, 16)
    assert_equals_pil(images, ops.autocontrast(images), ImageOps.autocontrast)


@pytest.mark.parametrize("shift", [-25, -1, 0, 14, 25])
def test_hue_equals_pil_all_over_the_colour_cube(shift: int) -> None:
    steps = torch.arange(0, 256, 5, dtype=torch.uint8)
    near = torch.tensor([0, 1, 2, 84, 85, 86, 127, 128, 169, 170, 171, 253, 254, 255], dtype=torch.uint8)
    for values in (steps, near):
        cube = torch.cartesian_prod(values, values, values).T.reshape(1, 3, -1, len(values)).contiguous()
        shifts = torch.tensor([shift])
        reference = OPS["hue"][1]
        assert_equals_pil(cube, ops.hue(cube, shifts), reference, shifts)


def test_smoothing_leaves_images_without_an_inside_alone() -> None:
    images = patches(32, 32)[:, :, :2]
    zeros = torch.zeros(len(images))
    assert_equals_pil(images, ops.sharpness(images, zeros), lambda image: image.filter(ImageFilter.SMOOTH))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (64, 64, 32), (40, 57, 32), (40, 57, 48), (100, 90, 12)]
)
def test_a_resized_crop_equals_pil_for_larger_and_smaller_crops(height: int, width: int, size: int) -> None:
    images = patches(height, width).repeat(5, 1, 1, 1)
    generator = torch.Generator().manual_seed(height + width)
    corners = torch.rand(len(images), 4, generator=generator, dtype=torch.float64)
    box_height = 1 + (corners[:, 0] * height).long()
    box_width = 1 + (corners[:, 1] * width).long()
    box_height[:2], box_width[:2] = torch.tensor([height, min(size, height)]), torch.tensor([width, min(size, width)])
    top, left = (corners[:, 2] * (height - box_height + 1)).long(), (corners[:, 3] * (width - box_width + 1)).long()
    boxes = torch.stack([top, left, box_height, box_width], 1)
    mirror = corners[:, 0] * 100 % 1 < 0.5

    def reference(image: Image.Image, box: list[int], mirrored: bool) -> Image.Image:
        top, left, box_height, box_width = box
        crop = image.crop((left, top, left + box_width, top + box_height))
        crop = crop.resize((size, size), Image.Resampling.BILINEAR)
        return ImageOps.mirror(crop) if mirrored else crop

    result = ops.resized_crop(images, boxes, size=size, mirror=mirror)
    assert_equals_pil(images, result, reference, boxes, mirror)


def test_a_reflected_crop_equals_padding_and_cropping_for_every_offset() -> None:
    offsets = torch.tensor(list(itertools.product(range(9), range(9), (False, True))))
    images = patches(32, 32)[:1].repeat(len(offsets), 1, 1, 1)

    def reference(image: Image.Image, top: int, left: int, mirrored: int) -> Image.Image:
        padded = tvf.pad(image, [4], padding_mode="reflect").crop((left, top, left + 32, top + 32))
        return ImageOps.mirror(padded) if mirrored else padded

    top, left, mirror = offsets.unbind(1)
    result = ops.reflect_crop(images, top, left, pad=4, mirror=mirror.bool())
    assert_equals_pil(images, result, reference, top, left, mirror)


def test_a_flip_mirrors_the_marked_images_only() -> None:
    images = patches(32, 32)
    mirror = torch.arange(len(images)) % 3 == 0
    result = images.clone()
    ops.apply(result, mirror, lambda marked: marked.flip(3))
    assert_equals_pil(images, result, lambda image, marked: ImageOps.mirror(image) if marked else image, mirror)


def test_a_cutout_is_a_square_clipped_at_the_borders() -> None:
    images = patches(32, 32)[:4]
    top, left = torch.tensor([-8, 0, 10, 24]), torch.tensor([5, -3, 30, 24])
    result, expected = images.clone(), images.clone()
    ops.cutout(result, top, left, size=16)
    for image, rows, columns in zip(
        expected,
        [slice(0, 8), slice(0, 16), slice(10, 26), slice(24, 32)],
        [slice(5, 21), slice(0, 13), slice(30, 32), slice(24, 32)],
        strict=True,
    ):
        image[:, rows, columns] = 127
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", OPS)
def test_an_op_leaves_its_input_alone_and_does_not_see_the_batch(name: str) -> None:
    op, _, values = OPS[name]
    images = patches(32, 32)
    before = images.clone()
    values = values.repeat(len(images))[: len(images)]
    result = op(images, values)
    assert torch.equal(images, before)
    alone = torch.cat([op(image[None], value[None]) for image, value in zip(images, values, strict=True)])
    assert torch.equal(result, alone)
