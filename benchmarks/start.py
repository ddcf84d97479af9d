"""Time and memory to the end of the first step with a million unlabeled images, against a thousand.

Each run is a fresh process that loads both splits, shuffles the unlabeled one, uses its labels as hidden labels, and
trains one step, like a training script. Its time starts after the imports. What is computed once and cached is computed
before: the arrow files of `datasets`, its shuffled indices and, for `decode="memory"`, the table of decoded pixels.

Memory is the peak of the process's own memory (RssAnon and RssShmem of /proc) that the run adds. Pages of mapped files
are reported without an aim: they are the page cache of the system, which all processes share and which is freed when
memory is short. `datasets` maps its arrow files in batches of 100 images, and the kernel maps up to 64 KiB around the
head of each, read or not.

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
from workload import FEATURES, LABELS, StepEnds, make_trainer

from ccssl_hf.data import pixels
from ccssl_hf.data.sources import load_split

DISTINCT = 2000
"""Number of different images; they repeat in the files."""

SIDE = {"memory": 16, "stream": 64}
"""Side of the encoded images in pixels; the network has 16 px."""


def write(path: Path, rows: int, side: int) -> None:
    """Write a parquet file of `rows` encoded images with labels."""
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
            writer.write_table(pa.table([files.take(pa.array(number % DISTINCT)), number % len(LABELS)], schema))


def prepare(folder: Path, unlabeled: str, decode: str) -> None:
    """Fill the cache with a first run, which decodes a repeated file only once in each batch."""
    decode_batch = pixels._pixels

    def pixels_of_distinct(batch: list[Any], **given: Any) -> Any:
        distinct = {image["bytes"]: image for image in batch}
        decoded = decode_batch(list(distinct.values()), **given)["pixels"]
        by_file = dict(zip(distinct, decoded, strict=True))
        return {"pixels": [by_file[image["bytes"]] for image in batch], "error": [None] * len(batch)}

    pixels._pixels = pixels_of_distinct
    first_step(folder, unlabeled, decode)


def first_step(folder: Path, unlabeled: str, decode: str) -> tuple[float, float, float]:
    """Seconds to the end of the first step, and MiB of own memory and of mapped files. Called in a fresh process."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    watch = StepEnds()

    def run() -> None:
        started = time.perf_counter()
        trainer = make_trainer(
            str(folder / "outputs"),
            "wide_resnet10_1_cifar",
            load_split(str(folder / "labeled.parquet"), role="labeled"),
            load_split(str(folder / unlabeled), role="unlabeled").shuffle(seed=0),
            image_size=16,
            callbacks=[watch],
            max_steps=1,
            per_device_train_batch_size=8,
            hidden_label_column="label",
            decode=decode,
            weak_crop="pad" if decode == "memory" else "resized",
        )
        trainer.train()
        seconds.append(watch.times[-1] - started)

    seconds: list[float] = []
    mapped = resident("RssFile")
    own = rise_of_own_memory(run)
    return seconds[0], own, resident("RssFile") - mapped


def rows_of(decode: str, few: int, many: int, rounds: int) -> list[Row]:
    """Time and memory that `many` unlabeled images add, compared with `few`."""
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
        "own memory": ("MiB", Bar("≤", 100)),
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
