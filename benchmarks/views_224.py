"""Three views at 224 px from JPEG files of 500 px, as the data loader makes them, against PIL one image at a time.

Processor time of one core, with decoding.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from harness import FASTER, Bar, Row, compared, in_turn, main
from PIL import Image
from pil_views import pil_transform
from torch import Tensor
from workload import photo_cuts, write_jpegs

from ccssl_hf.data.pixels import ImageFiles
from ccssl_hf.sampling import UNLABELED
from ccssl_hf.transforms import View, ViewSettings, make_view, normalize

SETTINGS = ViewSettings(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), weak_crop="resized")
VIEWS = tuple(View)


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    number, batch, rounds = (8, 8, 1) if quick else (240, 32, 9)
    transforms = [pil_transform(view, SETTINGS) for view in VIEWS]
    with tempfile.TemporaryDirectory() as folder:
        files = write_jpegs(Path(folder), photo_cuts(number, (500, 500), (375, 427)))
        split = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
        reader = ImageFiles(split, image_column="image", role="unlabeled", settings=SETTINGS, seed=0, stream=UNLABELED)
        begins = [iter(range(0, 10**9, batch)) for _ in range(2)]  # both ways read the files in turn

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
    speeds = {way: len(VIEWS) * batch / statistics.median(s) for way, s in (("baseline", pil), ("ours", ours))}
    what = f"weak, strong, contrastive of {batch} JPEG files of 500 px, 224 px, one core"
    return [compared(what, pil, ours, FASTER, Bar("≥", 2), views_per_second=speeds)]


if __name__ == "__main__":
    main(__file__, measure)
