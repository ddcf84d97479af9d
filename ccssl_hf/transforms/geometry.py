"""Geometric operations on a uint8 batch, with separate parameters for each image and the same results as PIL.

Images are uint8 `[N, 3, H, W]`. Keep the parameters on the CPU: source positions are computed there exactly, and only
integers are copied to the device of the images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PRECISION = 22
"""Fraction bits of Pillow's resampling coefficients."""


def chunks(number: int, values: int, device: torch.device) -> Iterator[slice]:
    """Slices of `number` images with `values` values each, which bound temporaries and fit a CPU's cache."""
    step = max(1, (1 << 20 if device.type == "cpu" else 1 << 24) // values)
    return (slice(begin, begin + step) for begin in range(0, number, step))


def rotation_matrices(degrees: Tensor, height: int, width: int) -> Tensor:
    """The matrices that `Image.rotate` passes to `Image.transform`: output to input coordinates, float64 `[N, 6]`."""
    angle = -torch.deg2rad(degrees.to(torch.float64))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y], dim=1)


def affine_matrices(number: int) -> Tensor:
    """Identity matrices in the order of `Image.transform`, float64 `[number, 6]`."""
    return torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64).repeat(number, 1)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, matrix)` with nearest neighbours and black outside.

    Args:
        images: uint8 `[N, 3, H, W]`.
        matrices: float64 `[N, 6]`, from output to input pixel coordinates: x' = ax + by + c, y' = dx + ey + f.
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


def put_rows(images: Tensor, index: Tensor, rows: Tensor) -> None:
    """Replaces the images at `index` (int64 `[n]`, on the CPU) by `rows` `[n, 3, H, W]`, in place."""
    if images.device.type == "cpu":
        images.numpy()[index.numpy()] = rows.numpy()  # copies whole rows; index_copy_ copies single bytes
    else:
        images.index_copy_(0, index.to(images.device, non_blocking=True), rows)


def flip(images: Tensor, mirror: Tensor) -> Tensor:
    """Returns a copy in which the images with `mirror` (bool `[N]`) are mirrored left to right."""
    index = mirror.cpu().nonzero().flatten()
    result = images.clone(memory_format=torch.contiguous_format)
    put_rows(result, index, images.index_select(0, index.to(images.device, non_blocking=True)).flip(3))
    return result


def _select(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows `[N, h]` and columns `[N, w]` of each image: uint8 `[N, 3, h, w]`."""
    number, channels, height, width = images.shape
    rows, columns = (index.to(images.device, non_blocking=True) for index in (rows, columns))
    start = torch.arange(number * channels, device=images.device).view(number, channels, 1) * height
    picked = images.reshape(-1, width).index_select(0, (start + rows[:, None]).flatten())
    picked = picked.view(number, channels, -1, width)
    return picked.gather(3, columns[:, None, None].expand(-1, *picked.shape[1:3], -1))


def reflect_crop(images: Tensor, top: Tensor, left: Tensor, *, pad: int, mirror: Tensor) -> Tensor:
    """Pads by `pad` pixels (reflection without repeating the edge), then crops back to the size of the images.

    Args:
        images: uint8 `[N, 3, H, W]`.
        top, left: First row and column of the crop in the padded image, `0..2 * pad`, int64 `[N]` each.
        pad: Pixels on each side, less than the image side.
        mirror: Which crops are mirrored left to right, bool `[N]`.
    """

    def reflected(start: Tensor, side: int) -> Tensor:
        index = (start[:, None] - pad + torch.arange(side, device=start.device)).abs()
        return torch.where(index >= side, 2 * (side - 1) - index, index)

    columns = reflected(left, images.shape[3])
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    return _select(images, reflected(top, images.shape[2]), columns)


def _taps(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Input positions and weights of each output of a bilinear, antialiased resize.

    Args:
        start, length: First position and length of each crop, int64 `[N]` each.
        size: Length of the output.

    Returns:
        int64 positions and int32 weights in units of 2**-22, `[T, N, size]` each, with `T` taps.
    """
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

    Args:
        images: uint8 `[N, 3, H, W]`.
        boxes: top, left, height, width in pixels, within the images, int64 `[N, 4]`.
        size: Side of the output in pixels, `S`.
        mirror: Which crops are mirrored left to right, bool `[N]`.

    Returns:
        uint8 `[N, 3, S, S]`.
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


def cutout(images: Tensor, top: Tensor, left: Tensor, *, size: int, value: int = 127) -> Tensor:
    """Fills a square of each image, clipped at the borders, with one grey level.

    Args:
        images: uint8 `[N, 3, H, W]`.
        top, left: First row and column of the square, may be negative, int64 `[N]` each.
        size: Side of the square in pixels.
        value: The grey level.
    """
    if images.device.type != "cpu":
        return _masked_cutout(images, top, left, size, value)
    result = images.clone()
    for image, first, start in zip(result.numpy(), top.tolist(), left.tolist(), strict=True):
        image[:, max(first, 0) : max(first + size, 0), max(start, 0) : max(start + size, 0)] = value
    return result


def _masked_cutout(images: Tensor, top: Tensor, left: Tensor, size: int, value: int) -> Tensor:
    """All squares at once: on an accelerator, one kernel per image would be slower."""

    def covered(start: Tensor, side: int) -> Tensor:
        offset = torch.arange(side, device=images.device) - start.to(images.device, non_blocking=True)[:, None]
        return (offset >= 0) & (offset < size)

    square = covered(top, images.shape[2])[:, None, :, None] & covered(left, images.shape[3])[:, None, None]
    return torch.where(square, value, images)
