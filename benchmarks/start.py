"""From the imports' end to the first step's end, with a million unlabeled images and with a thousand.

    python benchmarks/start.py

Each run is a fresh process that loads both splits, shuffles the unlabeled one, takes its labels as hidden ones, and
trains one step, as a training script does. What is done once for all runs is done before: the arrow files of
`datasets`, its shuffled indices and, for `decode="memory"`, the table of decoded pixels are in the cache. Time begins
after the imports.

Memory is what the run adds, at its highest, to the process's own memory after the imports (RssAnon and RssShmem of
/proc). Pages of mapped files are told beside it, without a bar: they are the system's page cache, which all processes
share and which is dropped whenever memory is short. `datasets` maps its arrow files in batches of 100 images, and the
kernel maps up to 64 KiB around the head of each, read or not.

The files take 2.3 GB of the folder for temporary files.
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
from harness import Bar, Row, in_child, main, resident, rise_of_own_memory
from PIL import Image
from transformers import TrainerCallback

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments, images
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
    files = pa.array(encoded, schema.field("image").type)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50 * DISTINCT):
            number = np.arange(start, min(rows, start + 50 * DISTINCT))
            writer.write_table(pa.table([files.take(pa.array(number % DISTINCT)), number % len(CLASSES)], schema))


class Stopwatch(TrainerCallback):
    """Notes the times when training code starts and when its first step ends."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


def prepare(folder: Path, unlabeled: str, decode: str) -> None:
    """A first run, which fills the cache; it decodes a file that repeats once per batch, as the pixels are the same."""
    pixels = images._pixels

    def pixels_of_distinct(batch: dict[str, list[Any]], rows: list[int], *, column: str, **given: Any) -> Any:
        row_of = {image["bytes"]: row for row, image in enumerate(batch[column])}
        distinct = [batch[column][row] for row in row_of.values()]
        decoded = pixels({column: distinct}, list(row_of.values()), column=column, **given)["pixels"]
        by_file = dict(zip(row_of, decoded, strict=True))
        return {"pixels": [by_file[image["bytes"]] for image in batch[column]]}

    images._pixels = pixels_of_distinct
    first_step(folder, unlabeled, decode)


def first_step(folder: Path, unlabeled: str, decode: str) -> tuple[float, float, float]:
    """Seconds to the end of the first step, MiB of its own and of mapped files that were added: for a fresh process."""
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

    mapped = resident("RssFile")
    own = rise_of_own_memory(run)
    return watch.ended - watch.started, own, resident("RssFile") - mapped


def rows_of(decode: str, few: int, many: int, rounds: int) -> list[Row]:
    """What many unlabeled images add to few, in time and in memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "labeled.parquet", 100, SIDE[decode])
        runs: dict[int, list[tuple[float, float, float]]] = {few: [], many: []}
        started = time.perf_counter()
        for count in runs:
            write(folder / f"{count}.parquet", count, SIDE[decode])
            in_child(prepare, folder, f"{count}.parquet", decode)
        preparation = time.perf_counter() - started
        for _ in range(rounds):
            for count, results in runs.items():
                results.append(in_child(first_step, folder, f"{count}.parquet", decode))
    rows = []
    bars = {
        "time": ("s", Bar("≤", 2)),
        "memory of its own": ("MiB", Bar("≤", 100)),
        "pages of mapped files": ("MiB", None),
    }
    for position, (quantity, (unit, bar)) in enumerate(bars.items()):
        small, large = ([result[position] for result in results] for results in runs.values())
        rows.append(
            Row(
                what=f'start, decode="{decode}", {many:,} unlabeled images against {few:,}, {quantity}',
                baseline=f"{statistics.median(small):.4g} {unit}",
                ours=f"{statistics.median(large):.4g} {unit}",
                figure=statistics.median(b - a for a, b in zip(small, large, strict=True)),
                unit=f"{unit} more",
                bar=bar,
                details={"few": small, "many": large, "seconds_of_preparation": preparation},
            )
        )
    return rows


def measure(quick: bool) -> list[Row]:
    few, many, rounds = (1000, 2000, 1) if quick else (1000, 1_000_000, 3)
    return [row for decode in ("memory", "stream") for row in rows_of(decode, few, many, rounds)]


if __name__ == "__main__":
    main(__file__, measure)
