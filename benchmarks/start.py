"""From the imports' end to the first step's end, with a million unlabeled images and with a thousand.

    python benchmarks/start.py

Each run is a fresh process that loads both splits, shuffles the unlabeled one, takes its labels as hidden ones, and
trains one step, as a training script does. What is done once for all runs is done before: the arrow files of
`datasets`, its shuffled indices and, for `decode="memory"`, the table of decoded pixels are in the cache. Time begins
after the imports. Memory is what the run adds to the resident memory after the imports, at its highest: pages of mapped
files that were touched count.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import Bar, Row, in_child, main, rise_of_memory
from PIL import Image
from transformers import TrainerCallback

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.data import load_split

DISTINCT = 2000
"""Different images, which repeat: as files they are as many as there are rows."""

SIDE = {"memory": 16, "stream": 64}
"""Pixels of the images as they are encoded; the network has 16 px."""

CLASSES = [f"class {number}" for number in range(10)]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})


def write(path: Path, rows: int, side: int) -> None:
    """A parquet file of `rows` encoded images with labels."""
    random = np.random.default_rng(0)
    encoded = []
    for small in random.integers(0, 256, (DISTINCT, 8, 8, 3), np.uint8):
        file = BytesIO()
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    schema = FEATURES.arrow_schema
    images = pa.array(encoded, schema.field("image").type)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50 * DISTINCT):
            number = np.arange(start, min(rows, start + 50 * DISTINCT))
            writer.write_table(pa.table([images.take(pa.array(number % DISTINCT)), number % len(CLASSES)], schema))


class Stopwatch(TrainerCallback):
    """Notes the times when training code starts and when its first step ends."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


def first_step(folder: Path, unlabeled: str, decode: str) -> tuple[float, float]:
    """Seconds to the end of the first step, and MiB that were added: for a fresh process."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    watch = Stopwatch()

    def run() -> None:
        watch.started = time.perf_counter()
        model = CCSSLForImageClassification.from_timm("wide_resnet10_1_cifar", labels=CLASSES, image_size=16)
        args = CCSSLTrainingArguments(
            str(folder / "outputs"),
            max_steps=1,
            per_device_train_batch_size=8,
            hidden_label_column="label",
            decode=decode,
            weak_crop="pad" if decode == "memory" else "resized",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = CCSSLTrainer(
            model,
            args,
            train_dataset=load_split(str(folder / "labeled.parquet"), role="labeled"),
            unlabeled_dataset=load_split(str(folder / unlabeled), role="unlabeled").shuffle(seed=0),
            callbacks=[watch],
        )
        trainer.train()

    mebibytes = rise_of_memory(run)
    return watch.ended - watch.started, mebibytes


def rows_of(decode: str, few: int, many: int, rounds: int) -> list[Row]:
    """What many unlabeled images add to few, in time and in memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "labeled.parquet", 100, SIDE[decode])
        runs: dict[int, list[tuple[float, float]]] = {few: [], many: []}
        started = time.perf_counter()
        for count in runs:
            write(folder / f"{count}.parquet", count, SIDE[decode])
            in_child(first_step, folder, f"{count}.parquet", decode)
        preparation = time.perf_counter() - started
        for _ in range(rounds):
            for count, results in runs.items():
                results.append(in_child(first_step, folder, f"{count}.parquet", decode))
    rows = []
    for position, (quantity, unit, most) in enumerate((("time", "s", 2.0), ("memory", "MiB", 100.0))):
        small, large = ([result[position] for result in results] for results in runs.values())
        rows.append(
            Row(
                what=f'start, decode="{decode}", {many:,} unlabeled images against {few:,}, {quantity}',
                baseline=f"{statistics.median(small):.4g} {unit}",
                ours=f"{statistics.median(large):.4g} {unit}",
                figure=statistics.median(b - a for a, b in zip(small, large, strict=True)),
                unit=f"{unit} more",
                bar=Bar("≤", most),
                details={"few": small, "many": large, "seconds_of_preparation": preparation},
            )
        )
    return rows


def measure(quick: bool) -> list[Row]:
    few, many, rounds = (1000, 2000, 1) if quick else (1000, 1_000_000, 3)
    return [row for decode in ("memory", "stream") for row in rows_of(decode, few, many, rounds)]


if __name__ == "__main__":
    main(__file__, measure)
