"""Views of 32 px a second on one core, from uint8 images to normalised tensors: in batches, against PIL one by one."""

from __future__ import annotations

import io
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from harness import Bar, Row, in_turn, main, median, ratio
from PIL import Image
from pil_views import pil_transform
from sklearn.datasets import load_sample_images
from torch import Tensor

from ccssl_hf.sampling import UNLABELED
from ccssl_hf.transforms import View, ViewSettings, make_view, normalize

SIDE = 32
SETTINGS = ViewSettings(SIDE, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
UNLABELED_PER_STEP = 7 * 64
"""The paper's step on CIFAR-10: 64 labeled images, seven times as many unlabeled ones."""

CIFAR = Path(__file__).parents[2] / "shared/data/cifar10_mini/train.parquet"


def photo_tiles(number: int) -> np.ndarray:
    """Tiles of scikit-learn's two photographs, uint8 `[number, 32, 32, 3]`."""
    photos = load_sample_images().images
    corners = [(t, x) for t in range(0, 427 - SIDE, SIDE) for x in range(0, 640 - SIDE, SIDE)]
    tiles = [photo[top : top + SIDE, left : left + SIDE] for photo in photos for top, left in corners]
    return np.stack(tiles[:number])


def cifar_images(number: int) -> np.ndarray:
    """The first images of CIFAR-10, uint8 `[number, 32, 32, 3]`."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(CIFAR, columns=["image"]).slice(0, number)["image"].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows])


def compare(images: np.ndarray, views: tuple[View, ...], *, rounds: int) -> list[list[float]]:
    """Seconds for one batch with `views` of each image: PIL's one by one, ours."""
    pictures = [Image.fromarray(image) for image in images]
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    draws = torch.arange(len(images))
    transforms = [pil_transform(view, SETTINGS) for view in views]

    def one_by_one() -> list[Tensor]:
        return [torch.stack([transform(picture) for picture in pictures]) for transform in transforms]

    def batched() -> list[Tensor]:
        draws.add_(len(draws))  # another batch sees other random numbers
        return [
            normalize(make_view(batch, view, SETTINGS, seed=0, stream=UNLABELED, draws=draws), SETTINGS, view=view)
            for view in views
        ]

    return in_turn(one_by_one, batched, rounds=rounds, clock=time.process_time)


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    number, rounds = (32, 1) if quick else (UNLABELED_PER_STEP, 9)
    sources = {"photo tiles": photo_tiles(number)}
    if CIFAR.is_file():
        sources["CIFAR-10 images"] = cifar_images(number)
    rows = []
    for source, images in sources.items():
        what = f"of {number} {source}, 32 px, one core"
        for name, views in {"weak, strong, contrastive": tuple(View), **{v.name.lower(): (v,) for v in View}}.items():
            pil, ours = compare(images, views, rounds=rounds)
            speeds = [f"{len(views) * number / statistics.median(s):,.0f} views/s" for s in (pil, ours)]
            details = {"baseline_seconds": pil, "our_seconds": ours}
            whole = len(views) > 1
            rows.append(
                Row(
                    f"{name} {what}",
                    *speeds,
                    ratio(pil, ours),
                    "times as fast",
                    Bar("≥", 5) if whole else None,
                    details,
                )
            )
            if whole:
                speed = len(views) * number / statistics.median(ours)
                rows.append(Row(f"{name} {what}", median(pil), median(ours), speed, "views/s", Bar("≥", 15_000)))
    return rows


if __name__ == "__main__":
    main(__file__, measure)
