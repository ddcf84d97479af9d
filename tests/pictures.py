"""Small pictures and datasets for tests of data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 24, height: int = 20) -> Image.Image:
    """Smooth, and no two alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def dataset(images: list[Any], **columns: list[Any]) -> datasets.Dataset:
    images = [encoded(image) if isinstance(image, Image.Image) else image for image in images]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def mixed_sizes(count: int, first: int = 0) -> datasets.Dataset:
    return dataset([picture(first + i, 20 + i % 5, 18 + i % 7) for i in range(count)])


def write(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, Image.registered_extensions()[path.suffix.lower()])
