"""Predictions for a folder of JPEG files, against transformers' image-classification pipeline on the same cores.

The baseline is `pipeline("image-classification", model=FOLDER, batch_size=64)` with other defaults, called with the
list of paths. Ours is `predict_to_file`, which `ccssl-hf predict` calls, with its defaults. Both times are without
loading the model. Weights are random. Both must predict the same labels, with confidences within 1e-5.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet as pq
import torch
import transformers
from harness import FASTER, Bar, Row, compared, in_turn, main
from workload import LABELS, photo_cuts, write_jpegs

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.deploy.predict import Classifier, predict_to_file

PIPELINE_BATCH = 64
SCORES_WITHIN = 1e-5


class Case(NamedTuple):
    """A network, sides of the files and of the network's images in pixels, number of files, and the aim."""

    name: str
    side: int
    image_size: int
    count: int
    bar: Bar | None = None


CASES = [
    Case("resnet18", 500, 224, 256, Bar("≥", 1.5)),
    Case("resnet50", 500, 224, 128, Bar("≥", 1.5)),
    Case("wide_resnet28_2_cifar", 32, 32, 1024),
]
QUICK = [Case("test_resnet", 64, 32, 8), Case("wide_resnet10_1_cifar", 32, 32, 8)]


def prepare(case: Case, folder: Path) -> list[str]:
    """Write files of `side` px on their longer side, and a model with random weights to `<folder>/model`."""
    images = []
    for cut in photo_cuts(case.count, (384, 640), (256, 427)):
        scale = case.side / max(cut.size)
        images.append(cut.resize((round(cut.width * scale), round(cut.height * scale))))
    torch.manual_seed(0)
    model = CCSSLForImageClassification.from_timm(case.name, labels=LABELS, image_size=case.image_size)
    model.save_pretrained(folder / "model")
    return write_jpegs(folder / "images", images)


def largest_difference(ours: Sequence[tuple[str, float]], others: Sequence[tuple[str, float]]) -> float:
    """Largest difference of the confidences, after a check that labels are the same and confidences close."""
    assert [label for label, _ in ours] == [label for label, _ in others]
    largest = max(abs(one - other) for (_, one), (_, other) in zip(ours, others, strict=True))
    assert largest < SCORES_WITHIN, largest
    return largest


def for_each(cases: Sequence[Case], measure_case: Callable[[Case, Path], list[Row]]) -> list[Row]:
    """The rows of all cases, each measured in a new folder."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_case(case, Path(folder))
    return rows


def loaded(load: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return load(), time.perf_counter() - started


def measure(quick: bool) -> list[Row]:
    def measure_case(case: Case, folder: Path) -> list[Row]:
        files, model, out = prepare(case, folder), folder / "model", folder / "predictions.parquet"
        given = {"model": str(model), "batch_size": PIPELINE_BATCH, "device": "cpu"}
        pipeline, pipeline_load = loaded(lambda: transformers.pipeline("image-classification", **given))
        classifier, load = loaded(lambda: Classifier.from_pretrained(model, device="cpu"))
        answers: list[Any] = []

        def baseline() -> None:
            answers[:] = pipeline(files)

        def ours() -> None:
            predict_to_file(classifier, folder / "images", out)

        times = in_turn(baseline, ours, rounds=1 if quick else 5)
        rows = pq.read_table(out).to_pylist()
        assert [row["path"] for row in rows] == files
        predicted = [(row["label"], row["confidence"]) for row in rows]
        largest = largest_difference(predicted, [(top["label"], top["score"]) for top, *_ in answers])
        return [
            compared(
                f"predict {case.count} JPEGs of {case.side} px, {case.name} at {case.image_size} px",
                *times,
                FASTER,
                case.bar,
                per_second=(case.count, "images/s"),
                pipeline=f'transformers.pipeline("image-classification", batch_size={PIPELINE_BATCH}), list of paths',
                baseline_load_seconds=pipeline_load,
                load_seconds=load,
                largest_difference_of_scores=largest,
            )
        ]

    return for_each(QUICK if quick else CASES, measure_case)


if __name__ == "__main__":
    main(__file__, measure)
