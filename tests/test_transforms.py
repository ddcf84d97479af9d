"""Views against a PIL pipeline with the same random numbers, and the distribution of these numbers."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare
from torch import Tensor
from torchvision.transforms import functional as tvf

from ccssl_hf.sampling import LABELED, UNLABELED, uniform
from ccssl_hf.transforms import (
    View,
    ViewSettings,
    crop_boxes,
    make_view,
    normalize,
    ops,
)
from ccssl_hf.transforms.views import Column, _randaugment_choices
from conftest import SHARED, needs_shared
from test_transforms_ops import affine, from_pil, patches, to_pil

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
SMALL = ViewSettings(32, CIFAR_MEAN, CIFAR_STD)
LARGE = ViewSettings(48, CIFAR_MEAN, CIFAR_STD, weak_crop="resized")
POINT_OPS = ["autocontrast", "equalize", "identity", "brightness", "color", "contrast", "sharpness", "posterize"]
OPS = [*POINT_OPS, "solarize", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"]


# The naive pipeline, written from the definitions with PIL's operations, one image at a time.


def naive_box(random: list[float], settings: ViewSettings, simclr: bool, height: int, width: int) -> tuple[int, ...]:
    scale = settings.contrastive_crop_scale if simclr else settings.crop_scale
    low, high = settings.crop_ratio
    for number in range(10):
        column = Column.CROP_TRIES + 2 * number
        area = height * width * (scale[0] + (scale[1] - scale[0]) * random[column])
        ratio = math.exp(math.log(low) + (math.log(high) - math.log(low)) * random[column + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random[Column.TOP] * (height - h + 1)), int(random[Column.LEFT] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w


def naive_randaugment(image: Image.Image, random: list[float], settings: ViewSettings) -> Image.Image:
    for number in range(settings.randaugment_ops):
        which, level, applied, sign = random[Column.RANDAUGMENT + 4 * number :][:4]
        if applied >= 0.5:
            continue
        op = OPS[int(which * 14)]
        v = 1 + int(level * (settings.randaugment_magnitude - 1))
        direction = -1 if sign < 0.5 else 1
        share = direction * (0.3 * v / 10)
        factor = 0.05 + 0.9 * v / 10
        if op == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif op == "equalize":
            image = ImageOps.equalize(image)
        elif op in ("brightness", "color", "contrast", "sharpness"):
            image = getattr(ImageEnhance, op.capitalize())(image).enhance(factor)
        elif op == "posterize":
            image = ImageOps.posterize(image, 4 + int(4 * v / 10))
        elif op == "solarize":
            image = ImageOps.solarize(image, 256 - int(256 * v / 10))
        elif op == "rotate":
            image = image.rotate(direction * int(30 * v / 10))
        elif op == "shear_x":
            image = affine(image, 1, share, 0, 0, 1, 0)
        elif op == "shear_y":
            image = affine(image, 1, 0, 0, share, 1, 0)
        elif op == "translate_x":
            image = affine(image, 1, 0, int(share * image.width), 0, 1, 0)
        elif op == "translate_y":
            image = affine(image, 1, 0, 0, 0, 1, int(share * image.height))
    side, size = image.width, settings.cutout_size
    if size:
        top = math.floor(random[Column.CUTOUT_TOP] * side - size / 2)
        left = math.floor(random[Column.CUTOUT_LEFT] * side - size / 2)
        image.paste((127, 127, 127), (max(0, left), max(0, top), min(side, left + size), min(side, top + size)))
    return image


def naive_jitter(image: Image.Image, random: list[float], settings: ViewSettings) -> Image.Image:
    if random[Column.JITTER] < settings.jitter_probability:
        factors = [
            max(0.0, 1 - strength) + (1 + strength - max(0.0, 1 - strength)) * random[column]
            for strength, column in zip(
                settings.jitter, (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION), strict=False
            )
        ]
        factors.append(settings.jitter[3] * (2 * random[Column.HUE] - 1))
        ops = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
        for number in list(itertools.permutations(range(4)))[int(random[Column.JITTER_ORDER] * 24)]:
            image = ops[number](image, factors[number])
    if random[Column.GRAYSCALE] < settings.grayscale_probability:
        image = image.convert("L").convert("RGB")
    return image


def naive_view(
    image: Image.Image, view: View, settings: ViewSettings, *, seed: int, stream: int, draw: int
) -> Image.Image:
    random = uniform(seed, 16 * stream + view, torch.tensor([draw]), 64)[0].tolist()
    side, simclr = settings.image_size, view == View.CONTRASTIVE and settings.contrastive_view == "simclr"
    if simclr or settings.weak_crop == "resized":
        top, left, height, width = naive_box(random, settings, simclr, image.height, image.width)
        image = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
    else:
        pad = int(side * 0.125)
        top, left = (int(random[column] * (2 * pad + 1)) for column in (Column.TOP, Column.LEFT))
        image = tvf.pad(image, [pad], padding_mode="reflect").crop((left, top, left + side, top + side))
    if settings.horizontal_flip and random[Column.FLIP] < 0.5:
        image = ImageOps.mirror(image)
    if simclr:
        return naive_jitter(image, random, settings)
    return image if view == View.WEAK else naive_randaugment(image, random, settings)


def assert_views_equal_pil(images: Tensor, settings: ViewSettings, *, seed: int, stream: int, first: int) -> None:
    draws = torch.arange(first, first + len(images))
    for view in View:
        result = make_view(images, view, settings, seed=seed, stream=stream, draws=draws)
        for image, draw, made in zip(images, draws.tolist(), result, strict=True):
            expected = naive_view(to_pil(image), view, settings, seed=seed, stream=stream, draw=draw)
            assert torch.equal(made, from_pil(expected)), (view, draw)


@pytest.mark.parametrize(
    ("settings", "height", "width"),
    [
        (SMALL, 32, 32),
        (
            replace(SMALL, contrastive_view="randaugment", randaugment_ops=5, randaugment_magnitude=11, cutout_size=0),
            32,
            32,
        ),
        (
            replace(SMALL, horizontal_flip=False, jitter=(1.5, 2.0, 1.0, 0.5), contrastive_crop_scale=(0.05, 0.5)),
            32,
            32,
        ),
        (LARGE, 48, 48),
        (replace(LARGE, cutout_size=15, contrastive_view="randaugment"), 40, 57),
        (replace(LARGE, image_size=20, crop_ratio=(0.9, 1.2)), 24, 100),
    ],
)
def test_every_view_equals_a_pil_pipeline_with_the_same_random_numbers(
    settings: ViewSettings, height: int, width: int
) -> None:
    images = patches(height, width).repeat(12, 1, 1, 1)
    assert_views_equal_pil(images, settings, seed=3, stream=UNLABELED, first=10**6)


@needs_shared
def test_every_view_of_cifar_images_equals_a_pil_pipeline() -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(SHARED / "data" / "cifar10_mini" / "train.parquet").slice(0, 300)
    column = next(name for name in table.column_names if name in ("image", "img"))
    images = [from_pil(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[column].to_pylist()]
    assert_views_equal_pil(torch.stack(images), SMALL, seed=0, stream=LABELED, first=0)


@pytest.mark.parametrize("view", View)
def test_crops_cut_by_a_worker_give_the_same_view(view: View) -> None:
    images, draws = patches(40, 57), torch.arange(29) + 5
    numbers = {"seed": 1, "stream": UNLABELED, "draws": draws}
    sizes = {"heights": torch.full((29,), 40), "widths": torch.full((29,), 57)}
    boxes = crop_boxes(view, LARGE, **numbers, **sizes)
    crops = torch.stack(
        [
            from_pil(to_pil(image).crop((left, top, left + w, top + h)).resize((48, 48), Image.Resampling.BILINEAR))
            for image, (top, left, h, w) in zip(images, boxes.tolist(), strict=True)
        ]
    )
    before = crops.clone()
    result = make_view(crops, view, LARGE, **numbers, cropped=True)
    assert torch.equal(result, make_view(images, view, LARGE, **numbers))
    assert torch.equal(crops, before)


@pytest.mark.parametrize("view", View)
def test_a_view_depends_on_its_draw_and_not_on_the_batch(view: View) -> None:
    images, draws = patches(32, 32).repeat(16, 1, 1, 1)[:448], torch.arange(448) + 10**9
    before = images.clone()
    together = make_view(images, view, SMALL, seed=1, stream=LABELED, draws=draws)
    assert torch.equal(images, before)
    for one in range(0, 448, 7):
        alone = make_view(images[one : one + 1], view, SMALL, seed=1, stream=LABELED, draws=draws[one : one + 1])
        assert torch.equal(alone[0], together[one])
    order = torch.randperm(448, generator=torch.Generator().manual_seed(0))
    shuffled = make_view(images[order], view, SMALL, seed=1, stream=LABELED, draws=draws[order])
    assert torch.equal(shuffled, together[order])


def test_draws_streams_seeds_and_views_are_independent() -> None:
    images = patches(32, 32)[:1].repeat(64, 1, 1, 1)
    settings = replace(SMALL, contrastive_view="randaugment")
    reference = {"view": View.STRONG, "seed": 1, "stream": LABELED, "draws": torch.arange(64)}
    first = make_view(images, settings=settings, **reference)
    assert len(torch.unique(first, dim=0)) == 64
    changes = {"seed": 2, "stream": UNLABELED, "draws": torch.arange(64) + 64, "view": View.CONTRASTIVE}
    for name, value in changes.items():
        other = make_view(images, settings=settings, **{**reference, name: value})
        assert (first != other).flatten(1).any(1).all(), name


# The distribution of the random numbers. Seeds are fixed, so the tests are deterministic.

NUMBER = 30_000


def assert_evenly_spread(values: Tensor, number: int) -> None:
    assert int(values.min()) >= 0
    assert int(values.max()) < number
    assert chisquare(torch.bincount(values, minlength=number).numpy()).pvalue > 1e-3


def assert_share(values: Tensor, share: float) -> None:
    count = int(values.sum())
    assert chisquare([count, len(values) - count], [share * len(values), (1 - share) * len(values)]).pvalue > 1e-3


def test_randaugment_draws_ops_magnitudes_signs_and_application_evenly_and_independently() -> None:
    random = uniform(0, 16 * UNLABELED + View.STRONG, torch.arange(NUMBER), 64).double()
    codes = []
    for number in range(2):
        op, magnitude, applied, sign = _randaugment_choices(random, number, SMALL)
        assert_evenly_spread(op, 14)
        assert_evenly_spread(magnitude - 1, 9)
        assert_share(applied, 0.5)
        assert_share(sign > 0, 0.5)
        assert_evenly_spread(((op * 9 + magnitude - 1) * 2 + applied.long()) * 2 + (sign > 0).long(), 14 * 9 * 4)
        codes.append(op)
    assert_evenly_spread(codes[0] * 14 + codes[1], 14 * 14)


def test_weak_crops_and_flips_are_uniform() -> None:
    # Red is the column and green the row of each pixel, which shows where it came from.
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([columns, rows, rows]).to(torch.uint8)[None].expand(NUMBER, -1, -1, -1)
    view = make_view(images, View.WEAK, SMALL, seed=0, stream=LABELED, draws=torch.arange(NUMBER)).long()
    flipped = view[:, 0, 16, 15] > view[:, 0, 16, 16]
    left = torch.where(flipped, view[:, 0, 16, 15] - 16, view[:, 0, 16, 16] - 16) + 4
    top = view[:, 1, 16, 16] - 16 + 4
    assert_evenly_spread((left * 9 + top) * 2 + flipped.long(), 9 * 9 * 2)


def test_resized_crops_are_spread_like_torchvisions() -> None:
    sizes = torch.full((NUMBER,), 1000)
    boxes = crop_boxes(
        View.CONTRASTIVE, SMALL, seed=0, stream=LABELED, draws=torch.arange(NUMBER), heights=sizes, widths=sizes
    )
    top, left, height, width = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert int((top + height).max()) <= 1000
    assert int((left + width).max()) <= 1000
    area, ratio = height * width / 1e6, width / height
    small = area < 0.5  # nothing below is turned down for its shape
    assert_evenly_spread(((area[small] - 0.2) / 0.3 * 10).long().clamp(0, 9), 10)
    position = (ratio[small].double().log() / math.log(4 / 3) + 1) / 2
    assert_evenly_spread((position * 10).long().clamp(0, 9), 10)
    assert_evenly_spread(((top + 0.5) / (1000 - height + 1) * 10).long(), 10)
    assert_evenly_spread(((left + 0.5) / (1000 - width + 1) * 10).long(), 10)


def test_an_image_too_long_for_any_crop_gets_the_central_one() -> None:
    settings = replace(LARGE, crop_scale=(1.0, 1.0))
    numbers = {"seed": 0, "stream": LABELED, "draws": torch.arange(2)}
    boxes = crop_boxes(View.WEAK, settings, **numbers, heights=torch.tensor([300, 60]), widths=torch.tensor([60, 300]))
    assert boxes.tolist() == [[110, 0, 80, 60], [0, 110, 60, 80]]


def test_jitter_factors_and_probabilities_are_those_of_the_settings() -> None:
    images = torch.full((NUMBER, 3, 8, 8), 100, dtype=torch.uint8)
    settings = replace(SMALL, image_size=8, jitter=(0.4, 0.0, 0.0, 0.0), grayscale_probability=0.0)
    numbers = {"seed": 0, "stream": LABELED, "draws": torch.arange(NUMBER)}
    grey = make_view(images, View.CONTRASTIVE, settings, **numbers)[:, 0, 0, 0].long()
    # A factor of exactly 1 keeps 100; so do 1/80 of the other factors.
    assert_share(grey == 100, 0.2 + 0.8 / 80)
    assert_evenly_spread(grey[grey != 100].sub(60).sub((grey[grey != 100] > 100).long()), 79)

    images[:, 1:] = 50
    settings = replace(settings, jitter=(0.0, 0.0, 0.0, 0.0), grayscale_probability=0.2)
    coloured = make_view(images, View.CONTRASTIVE, settings, **numbers)[:, :, 0, 0]
    assert_share(coloured[:, 0] == coloured[:, 1], 0.2)


def test_the_grey_square_lies_evenly_over_the_image() -> None:
    images = torch.zeros(NUMBER, 3, 32, 32, dtype=torch.uint8)
    settings = replace(SMALL, randaugment_ops=0)
    view = make_view(images, View.STRONG, settings, seed=0, stream=LABELED, draws=torch.arange(NUMBER))
    assert ((view == 0) | (view == 127)).all()
    rows, columns = (view[:, 0] == 127).any(2).sum(1), (view[:, 0] == 127).any(1).sum(1)
    # 16 pixels wide, unless its centre lies within 8 pixels of the border.
    assert_share(rows == 16, 17 / 32)
    assert_share(columns == 16, 17 / 32)
    assert int(rows.min()) == int(columns.min()) == 8


def test_an_accelerator_fills_the_same_squares() -> None:
    images = torch.randint(256, (64, 3, 12, 10), dtype=torch.uint8)
    top, left = torch.randint(-7, 16, (2, 64))
    expected, result = images.clone(), images.clone()
    ops.cutout(expected, top, left, size=5)
    ops._masked_cutout(result, top, left, 5)
    assert torch.equal(result, expected)
    assert not torch.equal(expected, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_subtracts_the_mean_and_divides_by_the_standard_deviation(dtype: torch.dtype) -> None:
    images = patches(32, 32)
    result = normalize(images, SMALL, view=View.CONTRASTIVE, dtype=dtype)
    expected = torch.stack([tvf.normalize(tvf.to_tensor(to_pil(image)), CIFAR_MEAN, CIFAR_STD) for image in images])
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(result[3:4], normalize(images[3:4], SMALL, view=View.CONTRASTIVE, dtype=dtype))


def test_only_the_contrastive_view_can_stay_unnormalised() -> None:
    images, settings = patches(32, 32), replace(SMALL, normalize_contrastive=False)
    torch.testing.assert_close(normalize(images, settings, view=View.CONTRASTIVE), images / 255)
    for view in (View.WEAK, View.STRONG):
        assert torch.equal(normalize(images, settings, view=view), normalize(images, SMALL, view=view))


# Errors.


@pytest.mark.parametrize(
    ("images", "draws", "settings", "cropped", "message"),
    [
        (torch.zeros(2, 3, 32, 32), torch.arange(2), SMALL, False, "uint8"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.arange(2), SMALL, False, r"\[N, 3, H, W\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), torch.arange(3), SMALL, False, r"\[N, 3, H, W\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(3), SMALL, False, r"int64 \[2\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2.0), SMALL, False, "int64"),
        (torch.zeros(2, 3, 40, 32, dtype=torch.uint8), torch.arange(2), SMALL, False, "weak_crop='resized'"),
        (torch.zeros(2, 3, 40, 32, dtype=torch.uint8), torch.arange(2), SMALL, True, "resize them to 32x32"),
    ],
)
def test_a_wrong_batch_is_refused(
    images: Tensor, draws: Tensor, settings: ViewSettings, cropped: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_view(images, View.WEAK, settings, seed=0, stream=LABELED, draws=draws, cropped=cropped)


def test_padded_views_have_no_box() -> None:
    one = torch.tensor([40])
    with pytest.raises(ValueError, match="weak_crop='resized'"):
        crop_boxes(View.STRONG, SMALL, seed=0, stream=LABELED, draws=torch.arange(1), heights=one, widths=one)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 4},
        {"mean": (0.5,)},
        {"std": (0.2, 0.0, 0.2)},
        {"weak_crop": "padded"},
        {"contrastive_view": "strong"},
        {"crop_scale": (0.0, 1.0)},
        {"contrastive_crop_scale": (0.8, 0.2)},
        {"crop_ratio": (4 / 3, 3 / 4)},
        {"randaugment_ops": -1},
        {"randaugment_magnitude": 12},
        {"cutout_size": -1},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"jitter_probability": 1.1},
        {"grayscale_probability": -0.1},
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SMALL, **wrong)


def test_settings_read_from_yaml_may_be_lists() -> None:
    assert replace(SMALL, mean=list(CIFAR_MEAN), jitter=[0.4, 0.4, 0.4, 0.1]) == SMALL
