"""Views of 224 px from JPEG files of 500 px on one core, decoding included: the loader's way against PIL one by one."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from harness import Bar, Row, in_turn, main, median, ratio
from PIL import Image
from pil_views import pil_transform
from sklearn.datasets import load_sample_images
from torch import Tensor

from ccssl_hf.images import ImageFiles
from ccssl_hf.sampling import UNLABELED
from ccssl_hf.transforms import View, ViewSettings, make_view, normalize

SETTINGS = ViewSettings(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), weak_crop="resized")
VIEWS = tuple(View)


def write_photos(folder: Path, number: int) -> list[str]:
    """JPEG files of quality 90, 500 px wide and 375 to 427 px high, cut out of scikit-learn's two photographs."""
    random, photos = np.random.default_rng(0), load_sample_images().images
    for index in range(number):
        height = int(random.integers(375, 428))
        top, left = int(random.integers(428 - height)), int(random.integers(141))
        cut = Image.fromarray(photos[index % 2][top : top + height, left : left + 500])
        cut.save(folder / f"{index:04d}.jpg", quality=90)
    return sorted(map(str, folder.glob("*.jpg")))


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    number, batch, rounds = (8, 8, 1) if quick else (240, 32, 9)
    transforms = [pil_transform(view, SETTINGS) for view in VIEWS]
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder), number)
        split = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
        reader = ImageFiles(split, image_column="image", role="unlabeled", settings=SETTINGS, seed=0, stream=UNLABELED)
        begins = [iter(range(0, 10**9, batch)) for _ in range(2)]  # each way takes the files in turn

        def one_by_one() -> list[Tensor]:
            begin, views = next(begins[0]), []
            for index in range(begin, begin + batch):
                with Image.open(files[index % number]) as file:
                    image = file.convert("RGB")
                views.append([transform(image) for transform in transforms])
            return [torch.stack(view) for view in zip(*views, strict=True)]

        def loaded() -> list[Tensor]:
            draws = np.arange(batch) + next(begins[1])
            crops = reader.read(draws % number, draws, VIEWS)
            numbers = {"seed": 0, "stream": UNLABELED, "draws": torch.from_numpy(draws)}
            return [
                normalize(make_view(crops[:, v], view, SETTINGS, cropped=True, **numbers), SETTINGS, view=view)
                for v, view in enumerate(VIEWS)
            ]

        pil, ours = in_turn(one_by_one, loaded, rounds=rounds, clock=time.process_time)
    what = f"weak, strong, contrastive of {batch} JPEG files of 500 px, 224 px, one core"
    speeds = {way: len(VIEWS) * batch / statistics.median(s) for way, s in (("baseline", pil), ("ours", ours))}
    details = {"baseline_seconds": pil, "our_seconds": ours, "views_per_second": speeds}
    return [Row(what, median(pil), median(ours), ratio(pil, ours), "times as fast", Bar("≥", 2), details)]


if __name__ == "__main__":
    main(__file__, measure)
