"""Operations on a uint8 batch, with separate parameters for each image and the results of PIL.

Images are uint8 `[N, 3, H, W]` (red, green, blue). Pillow computes with C floats and truncates, or uses fixed point or
tables of 256 grey levels. These functions do the same, so their results equal Pillow's byte for byte on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

_PRECISION = 22
"""Fraction bits of Pillow's resampling coefficients."""


def chunks(number: int, values: int, device: torch.device) -> Iterator[slice]:
    """Slices of `number` images with `values` values each, which bound temporaries and fit a CPU's cache."""
    step = max(1, (1 << 20 if device.type == "cpu" else 1 << 24) // values)
    return (slice(begin, begin + step) for begin in range(0, number, step))


def apply(images: Tensor, chosen: Tensor, op: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replaces the `chosen` images (bool `[N]`) by `op(images, *parameters)`; both and the parameters on the CPU."""
    indices = chosen.nonzero().flatten()
    for part in chunks(len(indices), images[:1].numel(), images.device):
        index = indices[part]
        there = index.to(images.device, non_blocking=True)
        changed = op(images.index_select(0, there), *(parameter[index] for parameter in parameters))
        if images.device.type == "cpu":
            images.numpy()[index.numpy()] = changed.numpy()  # copies whole rows; index_copy_ copies single bytes
        else:
            images.index_copy_(0, there, changed)


# Geometry. Parameters are on the CPU: positions are computed there exactly, and only integers go to the images' device.


def rotation_matrices(degrees: Tensor, height: int, width: int) -> Tensor:
    """The matrices of `Image.rotate` for `affine`, float64 `[N, 6]`; zero degrees give the identity."""
    angle = -torch.deg2rad(degrees.to(torch.float64))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y], dim=1)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, matrix)` with nearest neighbours and black outside.

    The matrices, float64 `[N, 6]`, map output to input pixels: x' = ax + by + c, y' = dx + ey + f.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrices.to(torch.float64).unbind(1)
    matrix = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5])
    # Pillow uses 16.16 fixed point, from the centre of the first pixel.
    fixed = (matrix * 65536.0 + 0.5).floor().to(torch.int32).to(images.device, non_blocking=True)[:, :, None, None]
    x = torch.arange(width, device=images.device, dtype=torch.int32)
    y = torch.arange(height, device=images.device, dtype=torch.int32)[:, None]
    column = (fixed[0] * x + (fixed[1] * y + fixed[2])) >> 16
    row = (fixed[3] * x + (fixed[4] * y + fixed[5])) >> 16
    # All bits are set if any of the four is negative. Comparisons would be slower on a CPU.
    outside = (column | row | (width - 1 - column) | (height - 1 - row)) >> 31
    inside = ~outside
    source = row.mul_(width).add_(column).bitwise_and_(inside).flatten(1).long()
    moved = images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    return moved.bitwise_and_(inside.to(torch.uint8)[:, None])


def reflect_crop(images: Tensor, top: Tensor, left: Tensor, *, pad: int, mirror: Tensor) -> Tensor:
    """Pads by `pad` pixels (reflection without repeating the edge), then crops back to the size of the images.

    `top` and `left` (int64 `[N]`) count from the corner of the padded image. Crops with `mirror` (bool `[N]`) are
    mirrored left to right.
    """
    number, channels, height, width = images.shape

    def reflected(start: Tensor, side: int) -> Tensor:
        index = (start[:, None] - pad + torch.arange(side)).abs()
        return torch.where(index >= side, 2 * (side - 1) - index, index)

    rows, columns = reflected(top, height), reflected(left, width)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    rows, columns = (index.to(images.device, non_blocking=True) for index in (rows, columns))
    first = torch.arange(number * channels, device=images.device).view(number, channels, 1) * height
    picked = images.reshape(-1, width).index_select(0, (first + rows[:, None]).flatten()).view(images.shape)
    return picked.gather(3, columns[:, None, None].expand(images.shape))


def _taps(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions (int64) and weights (int32, in 2**-22) of the `T` inputs of each output, `[T, N, size]` each."""
    scale = (length.to(torch.float64) / size)[:, None]
    support = scale.clamp(min=1.0)
    centre = (torch.arange(size, device=start.device, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).clamp(min=0).floor()
    end = torch.minimum((centre + support + 0.5).floor(), length[:, None].to(torch.float64))
    taps = int((end - first).max())
    position = first + torch.arange(taps, device=start.device)[:, None, None]
    weight = (1 - ((position - centre + 0.5) * (1.0 / support)).abs()).clamp(min=0) * (position < end)
    weight = (weight / weight.cumsum(0)[-1] * (1 << _PRECISION) + 0.5).to(torch.int32)  # summed in tap order
    return start[:, None] + torch.minimum(position, end - 1).long(), weight


def _resample(lines: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of lines: uint8 `[n, L, M]`, taps `[T, n, size]` → uint8 `[n, size, M]`, in int32 like Pillow."""
    number, length, width = lines.shape
    index = index + torch.arange(number, device=lines.device)[:, None] * length
    flat = lines.reshape(-1, width)
    total = torch.full((index[0].numel(), width), 1 << (_PRECISION - 1), dtype=torch.int32, device=lines.device)
    for source, share in zip(index.flatten(1), weight.flatten(1), strict=True):
        total.addcmul_(flat.index_select(0, source).to(torch.int32), share[:, None])
    return (total >> _PRECISION).to(torch.uint8).view(number, -1, width)


def resized_crop(images: Tensor, boxes: Tensor, *, size: int, mirror: Tensor) -> Tensor:
    """`image.crop(box).resize((size, size), BILINEAR)`: Pillow's antialiased resize, horizontal, then vertical.

    The boxes (top, left, height, width; int64 `[N, 4]`) lie within the images. Crops with `mirror` (bool `[N]`) are
    mirrored left to right. The result is uint8 `[N, 3, size, size]`.
    """
    number, channels, height, _ = images.shape
    top, left, box_height, box_width = boxes.unbind(1)
    across, across_weight = _taps(left, box_width, size)
    across = torch.where(mirror[:, None], across.flip(2), across)
    across_weight = torch.where(mirror[:, None], across_weight.flip(2), across_weight)
    down, down_weight = _taps(top, box_height, size)
    across, across_weight, down, down_weight = (
        taps.to(images.device, non_blocking=True) for taps in (across, across_weight, down, down_weight)
    )
    result = torch.empty((number, channels, size, size), dtype=torch.uint8, device=images.device)
    for part in chunks(number, channels * size * max(height, size), images.device):
        columns = images[part].permute(0, 3, 1, 2).flatten(2)  # a line is one column of all channels
        columns = _resample(columns, across[:, part], across_weight[:, part])
        rows = columns.view(-1, size, channels, height).permute(0, 3, 2, 1).flatten(2)
        rows = _resample(rows, down[:, part], down_weight[:, part])
        result[part] = rows.view(-1, size, channels, size).permute(0, 2, 1, 3)
    return result


def cutout(images: Tensor, top: Tensor, left: Tensor, *, size: int) -> None:
    """Fills a square of `size` pixels in each image, clipped at the borders, with grey (127), in place."""
    if images.device.type != "cpu":
        return _masked_cutout(images, top, left, size)
    for image, first, start in zip(images.numpy(), top.tolist(), left.tolist(), strict=True):
        image[:, max(first, 0) : max(first + size, 0), max(start, 0) : max(start + size, 0)] = 127


def _masked_cutout(images: Tensor, top: Tensor, left: Tensor, size: int) -> None:
    """`cutout` for all images at once: on an accelerator, one kernel per image would be slower."""

    def covered(start: Tensor, side: int) -> Tensor:
        offset = torch.arange(side, device=images.device) - start.to(images.device, non_blocking=True)[:, None]
        return (offset >= 0) & (offset < size)

    square = covered(top, images.shape[2])[:, None, :, None] & covered(left, images.shape[3])[:, None, None]
    images.masked_fill_(square, 127)


# Colour. Parameters, `[N]`, may be on any device.


def _per_image(values: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshapes one value per image, `[N]`, so that it broadcasts over `images`."""
    return values.to(images.device, dtype, non_blocking=True)[:, None, None, None]


def _blend(degenerate: Tensor | None, images: Tensor, factor: Tensor) -> Tensor:
    """`Image.blend`: degenerate (None: black) + factor * (images - degenerate). Overwrites `images`, float32."""
    factor = _per_image(factor, images, torch.float32)
    blended = images.mul_(factor) if degenerate is None else images.sub_(degenerate).mul_(factor).add_(degenerate)
    return blended.to(torch.int16).clamp_(0, 255).to(torch.uint8)  # int16 is faster on a CPU


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
    return luma(images.to(torch.float32)).to(torch.int16).to(torch.uint8).repeat(1, 3, 1, 1)


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
    """Tables of Pillow's hue and saturation, computed with its mixture of float and double, uint8.

    Hue by sector (the largest channel), difference of the two other channels in cyclic order (+ 256) and chroma,
    `[3 * 512 * 256]`; saturation by chroma and value, `[256 * 256]`.
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
