"""A folder of JPEGs to parquet: ours against transformers' image-classification pipeline, on the same cores and files.

The pipeline is used as its users use it: `pipeline("image-classification", model=FOLDER, batch_size=64)` over the list
of paths, defaults otherwise. Ours is what `ccssl-hf predict` calls, with its defaults. Neither time holds the loading
of the model. Weights are random; both must give the same labels, and scores within 1e-5.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import harness
import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.deploy.predict import Classifier, predict_to_parquet

LABELS = [f"class {number}" for number in range(10)]
PIPELINE_BATCH = 64
SCORES_WITHIN = 1e-5

# Network, side of the files in pixels, side of the network's images, files, and what must be reached.
CASES: list[tuple[str, int, int, int, harness.Bar | None]] = [
    ("resnet18", 500, 224, 256, harness.Bar("≥", 1.5)),
    ("resnet50", 500, 224, 128, harness.Bar("≥", 1.5)),
    ("wide_resnet28_2_cifar", 32, 32, 1024, None),
]
QUICK: list[tuple[str, int, int, int, harness.Bar | None]] = [
    ("test_resnet", 64, 32, 8, None),
    ("wide_resnet10_1_cifar", 32, 32, 8, None),
]


def write_jpegs(folder: Path, *, count: int, side: int) -> list[str]:
    """Files of `side` px on their longer side, each another cut of scikit-learn's two photographs."""
    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir()
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width, height = (int(length * generator.uniform(0.6, 1)) for length in photograph.size)
        left = int(generator.integers(0, photograph.width - width + 1))
        top = int(generator.integers(0, photograph.height - height + 1))
        cut = photograph.crop((left, top, left + width, top + height))
        scale = side / max(cut.size)
        cut.resize((round(cut.width * scale), round(cut.height * scale))).save(folder / f"{number:05}.jpg", quality=90)
    return sorted(map(str, folder.glob("*.jpg")))


def loaded(load: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return load(), time.perf_counter() - started


def measure_case(case: tuple[str, int, int, int, harness.Bar | None], folder: Path, *, rounds: int) -> harness.Row:
    name, side, image_size, count, bar = case
    files = write_jpegs(folder / "images", count=count, side=side)
    torch.manual_seed(0)
    model, out = folder / "model", folder / "predictions.parquet"
    CCSSLForImageClassification.from_timm(name, labels=LABELS, image_size=image_size).save_pretrained(model)
    pipeline, pipeline_load = loaded(
        lambda: transformers.pipeline("image-classification", model=str(model), batch_size=PIPELINE_BATCH, device="cpu")
    )
    classifier, load = loaded(lambda: Classifier.from_pretrained(model, device="cpu"))
    said: list[Any] = []

    def baseline() -> None:
        said[:] = pipeline(files)

    baseline_seconds, seconds = harness.in_turn(
        baseline, lambda: predict_to_parquet(classifier, folder / "images", out), rounds=rounds
    )
    rows = pq.read_table(out).to_pylist()
    assert [row["path"] for row in rows] == files
    tops = [top for top, *_ in said]
    assert [row["label"] for row in rows] == [top["label"] for top in tops]
    furthest = max(abs(row["confidence"] - top["score"]) for row, top in zip(rows, tops, strict=True))
    assert furthest < SCORES_WITHIN, furthest

    def rate(taken: list[float]) -> str:
        return f"{count / statistics.median(taken):,.3g} images/s"

    return harness.Row(
        what=f"predict {count} JPEGs of {side} px, {name} at {image_size} px",
        baseline=rate(baseline_seconds),
        ours=rate(seconds),
        figure=harness.ratio(baseline_seconds, seconds),
        unit="times as fast",
        bar=bar,
        details={
            "baseline": f'transformers.pipeline("image-classification", batch_size={PIPELINE_BATCH}), list of paths',
            "baseline_seconds": baseline_seconds,
            "seconds": seconds,
            "baseline_load_seconds": pipeline_load,
            "load_seconds": load,
            "largest_difference_of_scores": furthest,
        },
    )


def measure(quick: bool) -> list[harness.Row]:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for case in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure_case(case, Path(folder), rounds=1 if quick else 5))
    return rows


if __name__ == "__main__":
    harness.main(__file__, measure)
