"""Predictions of a published model: labels, confidences and embeddings of images, and of whole folders to parquet.

On the CPU each of a few threads takes a batch from file to result, with the network on its own share of the cores: no
core waits for another to decode, and none for the slowest part of a convolution. PIL and torch leave Python's lock
while they work, so threads will do, and all share one copy of the weights.
"""

from __future__ import annotations

import glob
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from ..backbones import features_and_logits
from ..checkpoint import HEAD_FILE, find_checkpoint
from ..data import check_images, check_writable, load_split
from ..images import decode_image, encoded_images
from ..modeling import CCSSLForImageClassification

MAX_WORKERS = 8
"""Threads by default at most: more of them wait for Python's lock."""

CPU_BATCH, ACCELERATOR_BATCH = 16, 64
"""Images of a batch by default. On a CPU what one layer writes should still be in the cache for the next."""

T = TypeVar("T")

ROW_GROUP = 4096
"""Rows that are held before they are written: 32 MiB with embeddings of 2048 numbers."""


# ---------------------------------------------------------------------------------------------------------- classifier


@dataclass(frozen=True)
class Predictions:
    """What the model says of `N` images; `C` classes, `D` embedding size.

    Attributes:
        labels: The name of each image's most probable class.
        confidences: Its probability, `[N]`.
        probabilities: Of all classes, float32 `[N, C]`.
        logits: Before they were made probabilities, float32 `[N, C]`.
        embeddings: float32 `[N, D]`, see `Classifier.embedding`.
    """

    labels: list[str]
    confidences: Tensor
    probabilities: Tensor
    logits: Tensor
    embeddings: Tensor


class _Network(nn.Module):
    """Images to logits and embeddings, in one pass of the backbone: both heads cost nearly nothing beside it."""

    def __init__(self, backbone: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = features_and_logits(self.backbone, images)
        embeddings = features if self.projection is None else F.normalize(self.projection(features).float(), dim=1)
        return logits.float(), embeddings.float()


def _folded(network: nn.Module, image: Tensor) -> nn.Module:
    """The network with BatchNorms folded into the convolutions before them; itself where that can't be done.

    torch.fx must be able to follow `forward`, and the folded network is tried on `image` `[1, 3, H, W]`: a module that
    is called in two places would be folded for one of them.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    try:
        folded = fuse(network)
    except (TraceError, TypeError, AttributeError, NotImplementedError, RuntimeError):
        return network
    alike = (torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(folded(image), network(image), strict=True))
    return folded if all(alike) else network


class Classifier:
    """A published model, ready to predict. Build one with `from_pretrained`.

    Attributes:
        name: Where it comes from.
        labels: The class names, in the order of the probabilities.
        embedding: `projection` where the folder has the projection head, and embeddings have unit norm; else
            `pre_logits`, the backbone's pooled features.
        device: Where the network runs.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: CCSSLForImageClassification,
        *,
        name: str,
        with_head: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        fold: bool = True,
    ) -> None:
        data_config = resolve_data_config(pretrained_cfg=model.backbone.pretrained_cfg)
        # timm's evaluation transform up to uint8: what follows is done with a batch at a time, on the device.
        self._transform = create_transform(**data_config, use_prefetcher=True)
        self._mean, self._std = (torch.tensor(data_config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        config = model.config
        self.name, self.labels, self.device, self._dtype = name, config.labels, device, dtype
        self.embedding = "projection" if with_head else "pre_logits"
        # As transformers' pipeline decides.
        self._independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        network: nn.Module = _Network(model.backbone, model.projection if with_head else None).eval()
        size = data_config["input_size"]
        if fold:
            network = _folded(network, torch.linspace(-1, 1, math.prod(size)).view(1, *size))
        self._network = network.to(device, dtype).to(memory_format=torch.channels_last)

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
        """The model from a folder or Hub repository. Never runs code from there; our own Wide ResNets need none.

        Args:
            name: A plain folder, with or without the projection head, or a Hub id.
            device: Such as "cuda"; an accelerator where there is one, if None.
            dtype: Of the network; probabilities and embeddings are float32 in any case.
            fold: Whether BatchNorms may be folded into convolutions: quicker, and other in the last digits.
            **hub_kwargs: `revision`, `token`, `cache_dir` and `local_files_only`.

        Raises:
            FileNotFoundError: There is no such folder or repository.
            ValueError: A file is damaged, timm does not know the backbone, or there is no such device.
        """
        try:
            found = torch.accelerator.current_accelerator(check_available=True) if device is None else device
            place = torch.device(found or "cpu")
            torch.empty(0, device=place)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"There is no device '{device}' here ({reason}): use cpu, or leave it out.") from error
        folder = find_checkpoint(name, **hub_kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no projection head")  # of no use here
            model = CCSSLForImageClassification.from_pretrained(folder)
        with_head = (folder / HEAD_FILE).is_file()
        return cls(model, name=str(name), with_head=with_head, device=place, dtype=dtype, fold=fold)

    def pixels(self, image: Image.Image) -> Tensor:
        """An image of any size and mode, resized and cropped as the published processor does it: uint8 `[3, H, W]`."""
        return self._transform(ImageOps.exif_transpose(image).convert("RGB"))

    @torch.inference_mode()
    def predict(self, images: Sequence[Image.Image] | Tensor) -> Predictions:
        """Predictions of one batch.

        Args:
            images: PIL images, or a tensor `[N, 3, H, W]`: uint8 as from `pixels`, or already normalised floats.
        """
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
        """Scores of logits `[..., C]` by "softmax", "sigmoid" or "none"; as the pipeline decides, where None."""
        if function == "none":
            return logits
        if function == "sigmoid" or (function is None and self._independent):
            return logits.sigmoid()
        return logits.softmax(dim=-1)


# -------------------------------------------------------------------------------------------------------------- images


def open_images(
    source: str | Path | Sequence[str | Path] | datasets.Dataset, *, image_column: str = "image"
) -> list[str] | datasets.Dataset:
    """The image files of a source, sorted by path, or a data set with undecoded images. Files are not opened.

    Args:
        source: A folder (with all below it), an image file, a glob, a list of files, parquet files, a Hub data set as
            `user/name` or `user/name:split` (its test split unless named), or a data set. Of a folder and a glob,
            files that are no images by their names are passed over.
        image_column: Of a data set.

    Raises:
        ValueError: There are no images.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir() and not any(path.glob("*.parquet")):
            below = (os.path.join(folder, file) for folder, _, files in os.walk(path) for file in files)
            return _image_files(below, source)
        if path.suffix.lower() != ".parquet" and path.is_file():
            return _image_files([str(path)], source)
        if path.suffix.lower() != ".parquet" and glob.has_magic(str(path)):
            return _image_files(glob.iglob(str(path), recursive=True), source)
        try:
            source = load_split(str(source), role="test")
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--test ")) from error
    if isinstance(source, Sequence):
        if not source:
            raise ValueError("The list of images is empty: name at least one file.")
        return [str(file) for file in source]
    check_images(source, role="test", image_column=image_column)
    return encoded_images(source, image_column)


def _image_files(files: Iterable[str], source: str | Path) -> list[str]:
    endings = tuple(ImageFolder.EXTENSIONS)
    found = sorted(file for file in files if file.lower().endswith(endings))
    if not found:
        raise ValueError(f"{source}: no image files; name a folder, file or glob of images such as photo.jpg.")
    return found


_Batch = list[tuple[str, dict[str, Any]]]
"""Path and encoded image, as `datasets.Image(decode=False)` gives it, of each."""


def _batches(images: list[str] | datasets.Dataset, size: int) -> Iterator[_Batch]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        if isinstance(part, list):
            # Absolute, as `datasets` would take what is before a colon for a protocol.
            yield [(path, {"path": os.path.abspath(path), "bytes": None}) for path in part]
        else:
            [column] = part.values()
            yield [(encoded["path"] or str(row), encoded) for row, encoded in enumerate(column, start)]


def predict_all(
    classifier: Classifier,
    dataset: datasets.Dataset,
    *,
    image_column: str = "image",
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> Predictions:
    """Predictions of a whole data set, in its order and held in memory.

    Args:
        classifier: The model.
        dataset: One that passed `data.check_images`.
        image_column: Its images.
        batch_size, num_workers: As of `predict_to_parquet`.

    Raises:
        ValueError: An image can't be read.
    """

    def work(batch: _Batch) -> Predictions:
        pixels = []
        for path, encoded in batch:
            try:
                pixels.append(classifier.pixels(decode_image(encoded, 0, "")))
            except Exception as error:  # PIL raises nearly anything for a broken file
                cause = error.__cause__ or error
                raise ValueError(f"Image {path} can't be read ({cause}): mend it, or leave it out.") from error
        return classifier.predict(torch.stack(pixels))

    images, parts = encoded_images(dataset, image_column), []
    with (
        _batch_by_batch(classifier, images, work, batch_size, num_workers) as results,
        datasets.utils.tqdm(total=len(images), desc="Predicting", unit=" images") as progress,
    ):
        for part in results:
            parts.append(part)
            progress.update(len(part.labels))
    labels = [label for part in parts for label in part.labels]
    names = ("confidences", "probabilities", "logits", "embeddings")
    return Predictions(labels, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


# ------------------------------------------------------------------------------------------------------------- parquet


@dataclass(frozen=True)
class Written:
    """What became of a run: images, how many of them could not be read, and seconds without loading the model."""

    images: int
    unreadable: int
    seconds: float


def predict_to_parquet(
    classifier: Classifier,
    source: str | Path | Sequence[str | Path] | datasets.Dataset,
    out: str | Path,
    *,
    embedding: bool = False,
    batch_size: int | None = None,
    num_workers: int | None = None,
    image_column: str = "image",
    strict: bool = False,
) -> Written:
    """Predict all images of a source, and write a row for each, in their order.

    Columns are `path` (the row number for images that have none), `label`, `confidence`, `embedding` if asked for, and
    `error`: why an image could not be read, whose other columns are null then. The file's metadata holds the `model`
    and, with embeddings, which (`embedding`: `projection` or `pre_logits`). Memory does not grow with the images.

    Args:
        classifier: The model.
        source: What `open_images` takes.
        out: The file. It is replaced at the end and not before: until then rows are in `_<name>.partial` beside it,
            which an interrupted run leaves behind, readable.
        embedding: Whether to write embeddings.
        batch_size: Images that go through the network at once; 16 on a CPU and 64 on an accelerator where None.
        num_workers: Threads that decode and predict; where None as many as torch uses, at most 8.
        image_column: Of a data set.
        strict: Whether the first image that can't be read ends the run.

    Raises:
        ValueError: There are no images, `out` can't be written to, or with `strict` an image can't be read.
    """
    images = open_images(source, image_column=image_column)
    out = check_output(out, source)
    schema = _schema(classifier, embedding)
    partial = out.with_name(f"_{out.name}.partial")
    rows: list[dict[str, Any]] = []
    unreadable, started = 0, time.perf_counter()
    with (
        _batch_by_batch(
            classifier, images, lambda batch: _rows(classifier, batch, embedding), batch_size, num_workers
        ) as results,
        pq.ParquetWriter(partial, schema) as writer,
        datasets.utils.tqdm(total=len(images), desc="Predicting", unit=" images") as progress,
    ):
        try:
            for done in results:
                bad = [row for row in done if row["error"]]
                if bad and strict:
                    raise ValueError(f"{bad[0]['path']} can't be read ({bad[0]['error']}): mend or remove that file.")
                unreadable += len(bad)
                rows += done
                progress.update(len(done))
                if len(rows) >= ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
        finally:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    os.replace(partial, out)
    return Written(len(images), unreadable, time.perf_counter() - started)


def check_output(out: str | Path, source: Any) -> Path:
    """The path of the file to write; raises ValueError where it can't be written, or is what is read."""
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the parquet file to write, such as {out / 'predictions.parquet'}.")
    if isinstance(source, (str, Path)) and out.resolve() == Path(source).resolve():
        raise ValueError(f"{out} is what is read: write the predictions to another file.")
    check_writable(out.parent)
    return out


def _schema(classifier: Classifier, embedding: bool) -> pa.Schema:
    columns = {"path": pa.string(), "label": pa.string(), "confidence": pa.float32()}
    metadata = {"model": classifier.name}
    if embedding:
        columns["embedding"], metadata["embedding"] = pa.list_(pa.float32()), classifier.embedding
    return pa.schema({**columns, "error": pa.string()}, metadata)


def _rows(classifier: Classifier, batch: _Batch, embedding: bool) -> list[dict[str, Any]]:
    """The rows of a batch, from encoded images; absent keys are nulls."""
    rows: list[dict[str, Any]] = []
    pixels, readable = [], []
    for path, encoded in batch:
        row: dict[str, Any] = {"path": path, "error": None}
        rows.append(row)
        try:
            pixels.append(classifier.pixels(decode_image(encoded, 0, "")))
            readable.append(row)
        except Exception as error:  # PIL raises nearly anything for a broken file
            cause = error.__cause__ or error
            row["error"] = f"{type(cause).__name__}: {cause}"
    if readable:
        said = classifier.predict(torch.stack(pixels))
        for row, label, confidence, vector in zip(
            readable, said.labels, said.confidences.tolist(), said.embeddings.numpy(), strict=True
        ):
            row.update(label=label, confidence=confidence, **({"embedding": vector} if embedding else {}))
    return rows


@contextmanager
def sharing_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share torch's own: with two of two, each computes on one core. Leaves torch as it was."""
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' calls also set it for threads to come


@contextmanager
def _batch_by_batch(
    classifier: Classifier,
    images: list[str] | datasets.Dataset,
    work: Callable[[_Batch], T],
    batch_size: int | None,
    num_workers: int | None,
) -> Iterator[Iterator[T]]:
    """What `work` makes of each batch, in their order, on a few threads."""
    on_cpu = classifier.device.type == "cpu"
    workers = num_workers or min(MAX_WORKERS, torch.get_num_threads() if on_cpu else os.cpu_count() or 1)
    batches = _batches(images, batch_size or (CPU_BATCH if on_cpu else ACCELERATOR_BATCH))
    with sharing_threads(workers) as pool:
        yield _in_order(pool, work, batches, ahead=2 * workers)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[_Batch], T], batches: Iterable[_Batch], *, ahead: int
) -> Iterator[T]:
    """What `work` makes of each batch, in their order; at most `ahead` batches are in hand besides."""
    waiting: deque[Future[T]] = deque()
    for batch in batches:
        waiting.append(pool.submit(work, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
