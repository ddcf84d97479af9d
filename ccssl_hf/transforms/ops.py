"""Colour operations on a uint8 batch, with separate parameters for each image and the same results as PIL.

Images are uint8 `[N, 3, H, W]` (red, green, blue), parameters `[N]` on any device; the result has the shape of the
images. Pillow computes with C floats and truncates, or uses tables of 256 grey levels. These functions do the same, so
their results equal Pillow's byte for byte on every device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def _per_image(values: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshapes one value per image, `[N]`, so that it broadcasts over `images`."""
    return values.to(images.device, dtype, non_blocking=True)[:, None, None, None]


def _truncate(values: Tensor) -> Tensor:
    """Floats in 0..255 to uint8, through int16, which is three times as fast on a CPU."""
    return values.to(torch.int16).to(torch.uint8)


def _blend(degenerate: Tensor | None, images: Tensor, factor: Tensor) -> Tensor:
    """`Image.blend`: degenerate + factor * (images - degenerate), clipped and truncated; None is black.

    `images` are float32 and are overwritten.
    """
    factor = _per_image(factor, images, torch.float32)
    blended = images.mul_(factor) if degenerate is None else images.sub_(degenerate).mul_(factor).add_(degenerate)
    return blended.to(torch.int16).clamp_(0, 255).to(torch.uint8)  # like `_truncate`; clipping int16 is faster


def _lookup(images: Tensor, table: Tensor) -> Tensor:
    """`Image.point`: looks up each pixel in the table of its image and channel, uint8 `[N, 3, 256]`."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def luma(images: Tensor) -> Tensor:
    """`convert("L")`: ITU-R 601 luma in 16-bit fixed point, float32 `[N, 3, H, W]` to `[N, 1, H, W]`, integers."""
    red, green, blue = images.split(1, dim=1)
    # Sums stay below 2**24, so float32 is exact.
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).mul_(2.0**-16).floor_()


def grayscale(images: Tensor) -> Tensor:
    """Luma in all three channels."""
    return _truncate(luma(images.to(torch.float32))).repeat(1, 3, 1, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`ImageEnhance.Brightness`: blends with black. Factor 0 is black, 1 the image."""
    return _blend(None, images.to(torch.float32), factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """`ImageEnhance.Color` (saturation): blends with the image's luma. Factor 0 is grey, 1 the image."""
    wide = images.to(torch.float32)
    return _blend(luma(wide), wide, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`ImageEnhance.Contrast`: blends with the rounded mean of the image's luma. Factor 0 is flat, 1 the image."""
    pixels = images.shape[2] * images.shape[3]
    wide = images.to(torch.float32)
    total = luma(wide).sum(3).flatten(1).sum(1, dtype=torch.float64).long()  # float32 is exact for a row
    mean = (2 * total + pixels).div(2 * pixels, rounding_mode="floor")
    return _blend(_per_image(mean, images, torch.float32), wide, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """`ImageEnhance.Sharpness`: blends with `ImageFilter.SMOOTH`. Factor 0 is smooth, 1 the image."""
    smooth = images.to(torch.float32)
    rows = smooth[..., :-2] + smooth[..., 1:-1] + smooth[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * smooth[..., 1:-1, 1:-1]
    # (total + 6.5) / 13 is at least 1/26 away from an integer, so its floor is exact. The border is not filtered.
    smooth[..., 1:-1, 1:-1] = total.add_(6.5).div_(13).floor_()
    return _blend(smooth, images.to(torch.float32), factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """`ImageOps.posterize`: keeps the highest `bits` (1 to 8) of every value."""
    return images & _per_image(256 - 2 ** (8 - bits), images, torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """`ImageOps.solarize`: inverts values of at least `threshold` (0 to 256)."""
    reached = (_per_image(threshold - 1, images, torch.int16) - images) >> 15  # all bits set if at least the threshold
    return images ^ reached.to(torch.uint8)


def autocontrast(images: Tensor) -> Tensor:
    """`ImageOps.autocontrast`: stretches each channel to 0..255."""
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).to(torch.float64), flat.amax(2, keepdim=True).to(torch.float64)
    ramp = torch.arange(256, device=images.device, dtype=torch.float64)
    # Same order of double operations as Pillow, because the result is truncated. A flat channel does not change.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    table = torch.where(high > low, ramp * scale + -low * scale, ramp)
    return _lookup(images, table.clamp_(0, 255).to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """`ImageOps.equalize`: equalizes the histogram of each channel."""
    channels = images.shape[0] * 3
    bins = images.reshape(channels, -1).long() + 256 * torch.arange(channels, device=images.device)[:, None]
    histogram = torch.zeros(channels * 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(0, bins.flatten(), histogram.new_ones(1).expand(bins.numel()))
    histogram = histogram.view(-1, 3, 256)
    last = histogram.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (images.shape[2] * images.shape[3] - last).div(255, rounding_mode="floor")
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    table = (below + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    ramp = torch.arange(256, device=images.device, dtype=torch.int32)
    return _lookup(images, torch.where(step > 0, table, ramp).to(torch.uint8))


@lru_cache(maxsize=8)
def _hsv_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of Pillow's hue and saturation, computed with its mixture of float and double.

    Returns:
        Hue by sector (the largest channel), difference of the two other channels in cyclic order (+ 256) and chroma,
        uint8 `[3 * 512 * 256]`; saturation by chroma and value, uint8 `[256 * 256]`.
    """
    value = torch.arange(256, dtype=torch.float32)
    chroma = value.clamp(min=1)
    difference = torch.arange(-256, 256, dtype=torch.float32)[:, None]
    # Distance of the two other channels from the largest, in units of the chroma. One of the two is the smallest.
    first = (chroma - difference.clamp(min=0)) / chroma
    second = (chroma + difference.clamp(max=0)) / chroma
    sectors = torch.stack([(second - first).double(), 2 + second.double() - first, 4 + second.double() - first]).float()
    hue = torch.fmod(sectors.double() / 6 + 1, 1).float().double() * 255
    hue[..., 0] = 0
    saturation = (value[:, None] / chroma).double() * 255
    hue, saturation = (table.clamp(0, 255).to(torch.uint8).flatten().to(device) for table in (hue, saturation))
    return hue, saturation


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """torchvision's `adjust_hue`: rotates the hue in Pillow's HSV by `shift` / 255 of the circle (integer `shift`)."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = (value - torch.minimum(torch.minimum(red, green), blue)).to(torch.int32)
    hue_table, saturation_table = _hsv_tables(images.device)

    # Masks and products are faster than torch.where on a CPU.
    is_red = (red == value).to(torch.int16)
    is_green = (green == value).to(torch.int16).mul_(1 - is_red)
    wide_red, wide_green, wide_blue = images.to(torch.int16).unbind(1)
    entry = (wide_red - wide_green).add_(1024 + 256)
    entry.add_((wide_green - wide_blue + 256).sub_(entry).mul_(is_red))
    entry.add_((wide_blue - wide_red + 512 + 256).sub_(entry).mul_(is_green))
    entry = entry.to(torch.int32).mul_(256).add_(chroma)
    angle = hue_table.index_select(0, entry.flatten()).view_as(value)
    angle = (angle + _per_image(shift & 255, images, torch.uint8)[:, 0]).to(torch.int16).mul_(2)  # bytes wrap around
    saturation = saturation_table.index_select(0, chroma.mul_(256).add_(value).flatten()).view_as(value)

    # Back to RGB. On a circle of 510 units a channel is full within 85 of its hue (0, 170, 340), then falls over 85:
    # round(value * (1 - saturation / 255 * fall / 85)). Integers below 2**24 without ties, so float32 is exact.
    full, half = value.to(torch.float32), images.new_tensor(255 * 85 / 2, dtype=torch.float32)
    whole = images.new_tensor(255 * 85, dtype=torch.int16)
    result = torch.empty_like(images)
    falls = ((angle - 255).abs_().neg_().add_(170), (angle - 170).abs_().sub_(85), (angle - 340).abs_().sub_(85))
    saturation = saturation.to(torch.int16)
    for channel, fall in enumerate(falls):
        share = torch.addcmul(whole, fall.clamp_(0, 85), saturation, value=-1).to(torch.float32)
        result[:, channel] = torch.addcmul(half, share, full).mul_(1 / (255 * 85)).to(torch.int16)
    return result
