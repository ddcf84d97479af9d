"""Three views of 32 px images, in batches against PIL one by one: processor time of one core."""

from __future__ import annotations

import io
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from harness import FASTER, Bar, Row, compared, in_turn, main, median
from PIL import Image
from pil_views import pil_transform
from torch import Tensor
from workload import photo_cuts

from ccssl_hf.sampling import UNLABELED
from ccssl_hf.transforms import View, ViewSettings, make_view, normalize

SETTINGS = ViewSettings(32, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
UNLABELED_PER_STEP = 7 * 64
"""The paper's step on CIFAR-10: 64 labeled images, seven times as many unlabeled ones."""

CIFAR = Path(__file__).parents[2] / "shared/data/cifar10_mini/train.parquet"


def cifar_images(number: int) -> np.ndarray:
    """The first images of CIFAR-10, uint8 `[number, 32, 32, 3]`."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(CIFAR, columns=["image"]).slice(0, number)["image"].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows])


def compare(images: np.ndarray, views: tuple[View, ...], *, rounds: int) -> list[list[float]]:
    """Processor seconds for `views` of all images: with PIL one by one, and in batches."""
    pictures = [Image.fromarray(image) for image in images]
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    draws = torch.arange(len(images))
    transforms = [pil_transform(view, SETTINGS) for view in views]

    def one_by_one() -> list[Tensor]:
        return [torch.stack([transform(picture) for picture in pictures]) for transform in transforms]

    def batched() -> list[Tensor]:
        draws.add_(len(draws))  # other random numbers for each batch
        return [
            normalize(make_view(batch, view, SETTINGS, seed=0, stream=UNLABELED, draws=draws), SETTINGS, view=view)
            for view in views
        ]

    return in_turn(one_by_one, batched, rounds=rounds, clock=time.process_time)


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    number, rounds = (32, 1) if quick else (UNLABELED_PER_STEP, 9)
    sources = {"photo tiles": np.stack([np.asarray(cut) for cut in photo_cuts(number, (32, 32), (32, 32))])}
    if CIFAR.is_file():
        sources["CIFAR-10 images"] = cifar_images(number)
    rows = []
    for source, images in sources.items():
        what = f"of {number} {source}, 32 px, one core"
        pil, ours = compare(images, tuple(View), rounds=rounds)
        all_views, total = f"weak, strong, contrastive {what}", len(View) * number
        rows.append(compared(all_views, pil, ours, FASTER, Bar("≥", 5), per_second=(total, "views/s")))
        rate = total / statistics.median(ours)
        rows.append(Row(all_views, median(pil), median(ours), rate, "views/s", Bar("≥", 15_000)))
        for view in View:
            times = compare(images, (view,), rounds=rounds)
            rows.append(compared(f"{view.name.lower()} {what}", *times, FASTER, per_second=(number, "views/s")))
    return rows


if __name__ == "__main__":
    main(__file__, measure)
