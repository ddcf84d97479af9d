"""Training on an accelerator: share of a step outside the network, views and images a second, and memory.

    python benchmarks/accelerator.py                       # on a GPU; without one, every row says "not measured"
    python benchmarks/accelerator.py --device cpu --quick  # only checks that it runs

Three ways of training are compared, all in bf16 and compiled. Bare: forward, cross-entropy, backward and an SGD step of
the plain network on preloaded tensors. Naive: the same, with views from PIL, one image at a time in one worker process
for each core. Ours: a real run of `CCSSLTrainer` with FixMatch and CCSSL. All process the same number of images a step:
labeled images, and `mu` times as many unlabeled images in three views.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from harness import FASTER, Bar, Row, in_turn, parser, publish
from PIL import Image
from pil_views import pil_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from workload import StepEnds, as_dataset, bare_step, jpeg, make_trainer, photo_cuts

from ccssl_hf.sampling import UNLABELED
from ccssl_hf.transforms import View, ViewSettings, make_view, normalize

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class Setting:
    """A network at `size` px, files of `side` px, and `batch` labeled images a step with `mu` unlabeled ones each."""

    backbone: str
    size: int
    side: int
    batch: int
    mu: int
    steps: int = 100
    warmup: int = 20

    @property
    def images(self) -> int:
        return self.batch * (1 + 3 * self.mu)

    @property
    def views(self) -> ViewSettings:
        return ViewSettings(self.size, MEAN, STD, weak_crop="pad" if self.size <= 64 else "resized")


SMALL = Setting("wide_resnet28_2_cifar", 32, 32, 64, 7)
LARGE = Setting("resnet50", 224, 256, 16, 7, steps=50, warmup=10)
QUICK = {
    SMALL: Setting("wide_resnet10_1_cifar", 32, 32, 2, 2, steps=2, warmup=2),
    LARGE: Setting("test_resnet", 96, 128, 2, 2, steps=2, warmup=2),
}
VIEWS_AT_ONCE = {"step": 448, "large": 4096}

_STEP = "{backbone}, {size} px, {batch} labeled, mu {mu}"
_SMALL, _LARGE = (_STEP.format(**vars(setting)) for setting in (SMALL, LARGE))
PLAN: dict[str, tuple[str, str, Bar | None]] = {
    "share": (f"share of a step outside the network: {_SMALL}", "% of the step", Bar("≤", 10)),
    "views_large": (f"three views of {VIEWS_AT_ONCE['large']} images, 32 px", "views/s", Bar("≥", 1_000_000)),
    "views_step": (f"three views of {VIEWS_AT_ONCE['step']} images, 32 px", "views/s", None),
    "small": (f"training against PIL's views on all cores: {_SMALL}", FASTER, None),
    "large": (f"training against PIL's views on all cores: {_LARGE}", FASTER, None),
    "memory_small": (f"peak device memory of a step: {_SMALL}", "MiB", None),
    "memory_large": (f"peak device memory of a step: {_LARGE}", "MiB", None),
}
"""Every row: what it measures, the unit of its figure, its aim."""


def row(key: str, baseline: str = "", ours: str = "", figure: float | None = None, **details: Any) -> Row:
    what, unit, bar = PLAN[key]
    return Row(what, baseline, ours, figure, unit, bar, details)


def photos(number: int, side: int) -> list[bytes]:
    """Square JPEG files."""
    return [jpeg(cut) for cut in photo_cuts(number, (side, side), (side, side))]


class PilViews(Dataset[Tensor]):
    """The weak view of a labeled image and three views of `mu` unlabeled images, `[1 + 3 * mu, 3, S, S]`."""

    def __init__(self, files: list[bytes], setting: Setting) -> None:
        self.setting, self.files = setting, files
        # Small images are decoded once, like torchvision's CIFAR-10.
        self.decoded = [self._decode(file) for file in files] if setting.size <= 64 else None
        self.transforms = {view: pil_transform(view, setting.views) for view in View}

    @staticmethod
    def _decode(file: bytes) -> Image.Image:
        return Image.open(io.BytesIO(file)).convert("RGB")

    def _image(self, index: int) -> Image.Image:
        index %= len(self.files)
        return self._decode(self.files[index]) if self.decoded is None else self.decoded[index]

    def __len__(self) -> int:
        return self.setting.batch * (self.setting.warmup + self.setting.steps)

    def __getitem__(self, index: int) -> Tensor:
        views = [self.transforms[View.WEAK](self._image(index))]
        for number in range(self.setting.mu):
            image = self._image(index * self.setting.mu + number)
            views += [self.transforms[view](image) for view in View]
        return torch.stack(views)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(steps: Iterator[None], setting: Setting, device: str) -> float:
    """Mean over the steps after the warm-up, until the device has finished them."""
    for _ in range(setting.warmup):
        next(steps)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(setting.steps):
        next(steps)
    synchronize(device)
    return (time.perf_counter() - started) / setting.steps


def bare(setting: Setting, device: str, backend: str) -> float:
    """Seconds a step of the network alone."""
    step = bare_step(setting.backbone, setting.images, device=device, compiler=backend)
    images = torch.randn(setting.images, 3, setting.size, setting.size).to(device, memory_format=torch.channels_last)

    def steps() -> Iterator[None]:
        while True:
            yield step(images)

    return seconds_a_step(steps(), setting, device)


def naive(setting: Setting, files: list[bytes], device: str, backend: str, workers: int) -> float:
    """Seconds a step of the network with views from PIL in worker processes."""
    step = bare_step(setting.backbone, setting.images, device=device, compiler=backend)
    data = PilViews(files, setting)
    loader = DataLoader(data, batch_size=setting.batch, num_workers=workers, pin_memory=device == "cuda")

    def steps() -> Iterator[None]:
        for views in loader:
            images = views.flatten(0, 1).to(device, non_blocking=True, memory_format=torch.channels_last)
            yield step(images)

    return seconds_a_step(steps(), setting, device)


class SynchronizedEnds(StepEnds):
    """Notes the time only at the end of the warm-up and of the run, after the device has finished."""

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__()
        self.setting, self.device = setting, device

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.setting.warmup, state.max_steps):
            synchronize(self.device)
            super().on_step_end(args, state, control, **kwargs)


def ours(setting: Setting, files: list[bytes], device: str, backend: str, workers: int) -> float:
    """Seconds a step of `CCSSLTrainer`."""
    clock = SynchronizedEnds(setting, device)
    with tempfile.TemporaryDirectory() as folder:
        split = as_dataset(files)
        make_trainer(
            folder,
            setting.backbone,
            split,
            split,
            image_size=setting.size,
            callbacks=[clock],
            max_steps=setting.warmup + setting.steps,
            per_device_train_batch_size=setting.batch,
            mu=setting.mu,
            bf16=True,
            torch_compile_backend=backend,
            dataloader_num_workers=workers if setting.size > 64 else 0,
            logging_strategy="no",
            use_cpu=device == "cpu",
        ).train()
    return (clock.times[-1] - clock.times[-2]) / setting.steps


def peak_memory(device: str, run: Callable[..., float], *given: Any) -> tuple[float, float | None]:
    """The result of `run`, and the peak of the memory of tensors on the device, in MiB."""
    if device != "cuda":
        return run(*given), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = run(*given)
    return seconds, torch.cuda.max_memory_allocated() / 2**20


def training_rows(name: str, setting: Setting, device: str, quick: bool) -> list[Row]:
    """Bare, ours, naive, and bare again to show a drift of the machine's speed."""
    if quick:
        setting = QUICK[setting]
    backend, workers = ("eager", 1) if quick else ("inductor", CORES)
    files = photos(max(2000 if not quick else 0, setting.batch * setting.mu), setting.side)
    first, bare_memory = peak_memory(device, bare, setting, device, backend)
    mine, memory = peak_memory(device, ours, setting, files, device, backend, workers)
    theirs = naive(setting, files, device, backend, workers)
    alone = [first, bare(setting, device, backend)]
    floor = statistics.mean(alone)
    seconds = {"bare_seconds": alone, "our_seconds": mine, "naive_seconds": theirs, "workers": workers}
    speeds = [f"{setting.images / value:,.0f} images/s" for value in (theirs, mine)]
    share = [row("share", *(f"{1000 * s:.3g} ms" for s in (floor, mine)), 100 * (1 - floor / mine), **seconds)]
    mib = ["" if value is None else f"{value:,.0f} MiB" for value in (bare_memory, memory)]
    return [
        *(share if name == "small" else []),
        row(name, *speeds, theirs / mine, **seconds),
        row(f"memory_{name}", *mib, memory),
    ]


def views_row(name: str, device: str, quick: bool) -> Row:
    """Three views, from uint8 images on the device to normalized tensors."""
    number = 8 if quick else VIEWS_AT_ONCE[name]
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1) for file in photos(number, 32)]
    ).to(device)
    draws = torch.arange(number)
    settings = SMALL.views

    def make() -> None:
        draws.add_(number)  # other random numbers for each batch
        for view in View:
            made = make_view(images, view, settings, seed=0, stream=UNLABELED, draws=draws)
            normalize(made, settings, view=view)

    [seconds] = in_turn(make, rounds=2 if quick else 30, warmup=1 if quick else 5)
    speed = 3 * number / statistics.median(seconds)
    return row(f"views_{name}", "", f"{1000 * statistics.median(seconds):.3g} ms", speed, our_seconds=seconds)


def measure(device: str | None, quick: bool) -> list[Row]:
    """All rows in the order of `PLAN`; without a device nothing is measured."""
    if device is None:
        return [row(key) for key in PLAN]
    rows = [*training_rows("small", SMALL, device, quick), *training_rows("large", LARGE, device, quick)]
    rows += [views_row(name, device, quick) for name in VIEWS_AT_ONCE]
    order = [what for what, *_ in PLAN.values()]
    rows.sort(key=lambda each: order.index(each.what))
    return [replace(each, what=f"tiny, in place of: {each.what}") for each in rows] if quick else rows


def main() -> None:
    flags, gpu = parser(__doc__), "cuda" if torch.cuda.is_available() else None
    flags.add_argument("--device", choices=("cuda", "cpu"), default=gpu, help="default: the GPU, if there is one")
    given = flags.parse_args()
    if given.device == "cpu" and not given.quick:
        flags.error("--device cpu only checks that the benchmark runs: add --quick.")
    publish(__file__, measure(given.device, given.quick), quick=given.quick, output=given.output)


if __name__ == "__main__":
    main()
