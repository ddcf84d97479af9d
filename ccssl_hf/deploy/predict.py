"""Predict labels, confidences and embeddings of images, and of whole folders to a Parquet, CSV or JSON Lines file.

On a CPU a few threads each take a batch from file to result, and each runs the network on its own share of the cores.
Pillow and torch release Python's lock while they work, so threads suffice and share one copy of the weights.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from ..backbones import features_and_logits
from ..checkpoint import HEAD_FILE, find_checkpoint
from ..data import check_images
from ..data.files import find_images
from ..data.images import MAX_PIXELS, encoded_images, open_encoded, upright_rgb
from ..data.sources import load_split
from ..data.survey import unreadable_images
from ..errors import listed
from ..modeling import CCSSLForImageClassification
from .rows import check_output, rows_to

MAX_WORKERS = 8  # default maximum of threads: more of them wait for Python's lock
CPU_BATCH, ACCELERATOR_BATCH = 16, 64  # a CPU's cache should hold the output of a layer until the next layer reads it
NOT_FINITE = "the network's output is NaN or infinite: use float32 or weights of an earlier step"
ROW_GROUP = 4096  # rows that are written at a time: 32 MiB with embeddings of size 2048


@dataclass(frozen=True)
class Predictions:
    """Predictions for `N` images, with `C` classes and embedding size `D`. All tensors are float32."""

    labels: list[str]  # name of each image's most probable class
    confidences: Tensor  # probability of that class, `[N]`
    probabilities: Tensor  # `[N, C]`
    logits: Tensor  # `[N, C]`
    embeddings: Tensor  # `[N, D]`, see `Classifier.embedding`

    def is_finite(self) -> list[bool]:
        """Whether the output for each image is finite. A logit of minus infinity leaves out a class."""
        wrong = (self.logits.isnan() | self.logits.isposinf()).any(1) | ~self.embeddings.isfinite().all(1)
        return (self.confidences.isfinite() & ~wrong).tolist()


class _Network(nn.Module):
    """Images to logits and embeddings in one pass of the backbone."""

    def __init__(self, backbone: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = features_and_logits(self.backbone, images)
        embeddings = features if self.projection is None else F.normalize(self.projection(features).float(), dim=1)
        return logits.float(), embeddings.float()


def _fold(network: nn.Module, image: Tensor) -> nn.Module:
    """Fold BatchNorms into the convolutions before them; return the network itself where that is impossible.

    A module that is called in two places would be folded for one of them only: `image` `[1, 3, H, W]` shows that.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    try:
        folded = fuse(network)
    except (TraceError, TypeError, AttributeError, NotImplementedError, RuntimeError):
        return network
    close = (torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(folded(image), network(image), strict=True))
    return folded if all(close) else network


def load_published(folder: str | Path) -> CCSSLForImageClassification:
    """Load a published model, with or without its projection head."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no projection head")  # only training needs it
        return CCSSLForImageClassification.from_pretrained(folder)


class Classifier:
    """A published model, ready to predict.

    Attributes:
        name: The folder or Hub id that the model was loaded from.
        labels: The class names, in the order of the probabilities.
        embedding: `projection` where the folder has the projection head (embeddings have unit norm), else `pre_logits`:
            the backbone's pooled features.
        device: The device of the network.
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        fold: bool = True,
        **hub_kwargs: Any,
    ) -> Classifier:
        """Load a published folder, with or without the projection head, or a Hub id. No code from there is run.

        Args:
            device: A device such as "cuda"; the accelerator, if there is one, where None.
            dtype: Precision of the network. Probabilities and embeddings are always float32.
            fold: Whether to fold BatchNorms into convolutions. Faster; changes the last digits.
            **hub_kwargs: `revision`, `token`, `cache_dir` and `local_files_only`.

        Raises ValueError if the device does not exist, and the errors of `CCSSLForImageClassification.from_pretrained`.
        """
        try:
            found = torch.accelerator.current_accelerator(check_available=True) if device is None else device
            place = torch.device(found or "cpu")
            torch.empty(0, device=place)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"There is no device '{device}' here ({reason}): use cpu, or leave it out.") from error
        return cls(str(name), find_checkpoint(name, **hub_kwargs), device=place, dtype=dtype, fold=fold)

    @torch.inference_mode()
    def __init__(self, name: str, folder: Path, *, device: torch.device, dtype: torch.dtype, fold: bool) -> None:
        model, with_head = load_published(folder), (folder / HEAD_FILE).is_file()
        config, data_config = model.config, resolve_data_config(pretrained_cfg=model.backbone.pretrained_cfg)
        self.name, self.labels, self.device, self._dtype = name, config.labels, device, dtype
        self.embedding = "projection" if with_head else "pre_logits"
        # The same rule as in transformers' pipeline.
        self._independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        # timm's evaluation transform up to uint8. Normalization runs on whole batches on the device.
        self._transform = create_transform(**data_config, use_prefetcher=True)
        self._mean, self._std = (torch.tensor(data_config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        network: nn.Module = _Network(model.backbone, model.projection if with_head else None).eval()
        if fold:
            size = data_config["input_size"]
            network = _fold(network, torch.linspace(-1, 1, math.prod(size)).view(1, *size))
        self._network = network.to(device, dtype).to(memory_format=torch.channels_last)

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop an image of any size and mode as in the published preprocessing: uint8 `[3, H, W]`."""
        return self._transform(upright_rgb(image))

    def predict(self, images: Sequence[Image.Image] | Tensor) -> Predictions:
        """Predict one batch of PIL images, or a tensor `[N, 3, H, W]`: uint8 as from `pixels`, or normalized floats.

        Raises a ValueError if the network's output for an image is NaN or infinite.
        """
        found = self.predict_unchecked(images)
        if wrong := [row for row, finite in enumerate(found.is_finite()) if not finite]:
            raise ValueError(f"Image {listed(wrong)} of the batch: {NOT_FINITE}.")
        return found

    @torch.inference_mode()
    def predict_unchecked(self, images: Sequence[Image.Image] | Tensor) -> Predictions:
        """`predict`, also of images whose output is NaN or infinite: see `Predictions.is_finite`."""
        batch = images if isinstance(images, Tensor) else torch.stack([self.pixels(image) for image in images])
        batch = batch.to(self.device, memory_format=torch.channels_last)
        if batch.dtype == torch.uint8:
            batch = batch.float().div_(255).sub_(self._mean).div_(self._std)
        logits, embeddings = self._network(batch.to(self._dtype))
        logits = logits.cpu()
        probabilities = self.scores(logits)
        confidences, numbers = probabilities.max(dim=1)
        labels = [self.labels[number] for number in numbers.tolist()]
        return Predictions(labels, confidences, probabilities, logits, embeddings.cpu())

    def scores(self, logits: Tensor, function: str | None = None) -> Tensor:
        """Apply "softmax", "sigmoid" or "none" to logits `[..., C]`; None chooses as transformers' pipeline does."""
        if function == "none":
            return logits
        if function == "sigmoid" or (function is None and self._independent):
            return logits.sigmoid()
        return logits.softmax(dim=-1)


def open_images(
    source: str | Path | Sequence[str | Path] | datasets.Dataset,
    *,
    image_column: str = "image",
    image_root: str | Path | None = None,
) -> datasets.Dataset:
    """The undecoded images of a source; files are sorted by path. Opens no image. Raises ValueError if there are none.

    `source` is a folder, file or glob of images (see `files.find_images`), a list of files, a `datasets.Dataset`, or
    what `load_split` reads: tables of file names, parquet files and Hub datasets, of which it takes the test split
    unless another is named. For `image_root` see `load_split`.
    """
    if isinstance(source, (str, Path)):
        found = find_images(Path(source).expanduser())
        if found is not None:
            if not found.images:
                fix = "name a folder, file or glob of images such as photo.jpg"
                raise ValueError(f"{source}: no image files; {fix}. {found.describe()}".rstrip())
            found.tell(str(source))
        source = load_split(str(source), role="test", image_root=image_root) if found is None else found.images
    if isinstance(source, Sequence):
        if not source:
            raise ValueError("The list of images is empty: name at least one file.")
        features = datasets.Features({image_column: datasets.Image(decode=False)})
        return datasets.Dataset.from_dict({image_column: [str(file) for file in source]}, features)
    check_images(source, role="test", image_column=image_column)
    return encoded_images(source, image_column)


@contextmanager
def sharing_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that divide torch's own threads among them. Restores torch's number of threads at the end."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's call also sets the default of later threads


_Batch = tuple[list[dict[str, Any]], Predictions | None]  # rows of all images, predictions for the readable ones


def _in_batches(
    classifier: Classifier,
    images: datasets.Dataset,
    batch_size: int | None,
    num_workers: int | None,
    max_pixels: int,
) -> Generator[_Batch, None, None]:
    """Predict undecoded images on a few threads. Yields the batches in order, and shows a progress bar."""
    on_cpu = classifier.device.type == "cpu"
    workers = num_workers or min(MAX_WORKERS, torch.get_num_threads() if on_cpu else os.cpu_count() or 1)
    size = batch_size or (CPU_BATCH if on_cpu else ACCELERATOR_BATCH)

    def work(start: int, batch: dict[str, list[Any]]) -> _Batch:
        rows: list[dict[str, Any]] = []
        pixels = []
        for number, encoded in enumerate(next(iter(batch.values())), start):
            rows.append({"path": (encoded or {}).get("path") or str(number), "error": None})
            try:
                pixels.append(classifier.pixels(open_encoded(encoded, max_pixels=max_pixels)))
            except Exception as error:  # one image must not end the run
                rows[-1]["error"] = str(error)
        if not pixels:
            return rows, None
        found = classifier.predict_unchecked(torch.stack(pixels))
        readable = [row for row in rows if row["error"] is None]
        arrays = found.probabilities.numpy(), found.embeddings.numpy()
        answers = zip(found.labels, found.confidences.tolist(), *arrays, strict=True)
        for row, finite, answer in zip(readable, found.is_finite(), answers, strict=True):
            names = ("label", "confidence", "probabilities", "embedding")
            row |= dict(zip(names, answer, strict=True)) if finite else {"error": NOT_FINITE}
        return rows, found

    starts = iter(range(0, len(images), size))
    bar = datasets.utils.tqdm(total=len(images), desc="Predicting", unit=" images")
    with sharing_threads(workers) as pool, bar:
        waiting = deque(pool.submit(work, start, images[start : start + size]) for start in islice(starts, 2 * workers))
        while waiting:
            rows, found = waiting.popleft().result()
            waiting.extend(pool.submit(work, start, images[start : start + size]) for start in islice(starts, 1))
            yield rows, found
            bar.update(len(rows))


def predict_all(
    classifier: Classifier,
    dataset: datasets.Dataset,
    *,
    image_column: str = "image",
    batch_size: int | None = None,
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    role: str = "test",
) -> Predictions:
    """Predict a split that passed `data.check_images`, in memory. Raises ValueError with all unreadable images."""
    images, parts, bad = encoded_images(dataset, image_column), [], list[str]()
    with closing(_in_batches(classifier, images, batch_size, num_workers, max_pixels)) as results:
        for rows, found in results:
            bad += [f"{row['path']}: {row['error']}" for row in rows if row["error"]]
            parts += [found] if found else []
    for error in unreadable_images(role, bad):
        raise ValueError(error)
    labels = [label for part in parts for label in part.labels]
    names = ("confidences", "probabilities", "logits", "embeddings")
    return Predictions(labels, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


class Written(NamedTuple):
    """Number of images, how many of them could not be read, and seconds without loading the model."""

    images: int
    unreadable: int
    seconds: float


def predict_to_file(
    classifier: Classifier,
    source: str | Path | Sequence[str | Path] | datasets.Dataset,
    out: str | Path,
    *,
    top_k: int = 1,
    probabilities: bool = False,
    embedding: bool = False,
    batch_size: int | None = None,
    num_workers: int | None = None,
    image_column: str = "image",
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Written:
    """Predict all images of a source and write one row for each, in order. Memory does not grow with their number.

    Columns: `path` (unchanged; the row number of images without one), `label`, `confidence`, and `error`: why an image
    has no answer; the other columns are null then, and empty in CSV. Paths and labels are written as they are: import
    them as text if a spreadsheet would take them for formulas (`=a.png`), or pandas for missing values (`NA`).

    Args:
        source, image_column: See `open_images`.
        out: The file: of one of `rows.FORMATS`, in UTF-8. It is replaced at the end: until then rows
            are in `partial_file(out)`. An interrupted run leaves that file readable.
        top_k: Write the next best classes, too, as `label_2`, `confidence_2` and so on.
        probabilities: Write the probability of every class. Parquet: a list `probabilities`, in the order of `labels`
            in the file's metadata. JSON Lines: an object by class. CSV: a column `probability_<class>` for each class.
        embedding: Write embeddings, as a list; as JSON text in CSV. See `Classifier.embedding`.
        batch_size: Images per forward pass; where None 16 on a CPU and 64 on an accelerator.
        num_workers: Threads that decode and predict; where None as many as torch uses, at most 8.
        strict: Whether to stop at the first image that cannot be read.
        max_pixels: Pixels of an image above which it counts as unreadable. They are not decoded.

    Raises:
        ValueError: There are no images, `out` cannot be written, or with `strict` an image cannot be read.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: set it to 1 or more.")
    out = check_output(out, source)
    images = open_images(source, image_column=image_column)
    ranks = range(2, min(top_k, len(classifier.labels)) + 1)
    columns = {"path": pa.string(), "label": pa.string(), "confidence": pa.float32()}
    for rank in ranks:
        columns |= {f"label_{rank}": pa.string(), f"confidence_{rank}": pa.float32()}
    metadata = {"model": classifier.name, "labels": json.dumps(classifier.labels)}
    if probabilities:
        columns["probabilities"] = pa.list_(pa.float32())
    if embedding:
        columns["embedding"], metadata["embedding"] = pa.list_(pa.float32()), classifier.embedding
    columns["error"] = pa.string()
    schema = pa.schema(columns, metadata)
    rows: list[dict[str, Any]] = []
    unreadable, started = 0, time.perf_counter()
    with (
        closing(_in_batches(classifier, images, batch_size, num_workers, max_pixels)) as results,
        rows_to(out, schema, classifier.labels) as write,
    ):
        try:
            for new, _ in results:
                for row in new:
                    if error := row["error"]:
                        if strict:
                            unread = f" can't be read ({error}): repair or remove it"
                            raise ValueError(f"Image {row['path']}{f': {error}' if error == NOT_FINITE else unread}.")
                        unreadable += 1
                        continue
                    best = np.argsort(-row["probabilities"], kind="stable")
                    for rank in ranks:
                        number = best[rank - 1]
                        row[f"label_{rank}"] = classifier.labels[number]
                        row[f"confidence_{rank}"] = row["probabilities"][number].item()
                rows += [{key: value for key, value in row.items() if key in columns} for row in new]
                if len(rows) >= ROW_GROUP:
                    group, rows = rows, []
                    write(group)
        finally:
            write(rows)
    return Written(len(images), unreadable, time.perf_counter() - started)
