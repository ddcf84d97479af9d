"""`CCSSLTrainingArguments`: `transformers.TrainingArguments` with the settings of semi-supervised training."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .algorithms import ALGORITHMS, algorithm_hyperparameters
from .argument_checks import ON_METRIC, SET_HERE, accelerator_settings, argument_errors, raise_all
from .data.images import MAX_PIXELS
from .errors import near_misses, summary
from .record import greater_is_better
from .transforms import MAX_SIDE_HELD, ViewSettings

CONFIGS = Path(__file__).parent / "configs"  # the packaged YAML files, which `from_config` reads by name


def argument(default: Any, text: str) -> Any:
    """A field of a dataclass with a default and a help text."""
    return field(default=default, metadata={"help": text})


def _hyperparameter(name: str) -> Any:
    """A field that is None, for the algorithm's default. Its help names the algorithms, unless all have it."""
    tables = {algorithm: algorithm_hyperparameters(algorithm) for algorithm in ALGORITHMS}
    takers = [algorithm for algorithm, table in tables.items() if name in table]
    text = tables[takers[0]][name].help
    return argument(None, text if len(takers) == len(tables) else f"{text} ({', '.join(takers)})")


@dataclass
class HyperparameterArguments:
    """Hyperparameters of all algorithms. Names are the same in Python, YAML, on the command line and on the card."""

    lambda_contrast: float | None = _hyperparameter("lambda_contrast")
    contrast_temperature: float | None = _hyperparameter("contrast_temperature")
    push_threshold: float | None = _hyperparameter("push_threshold")
    own_pair_weight: Literal["one", "squared"] | None = _hyperparameter("own_pair_weight")
    confidence_threshold: float | None = _hyperparameter("confidence_threshold")
    lambda_u: float | None = _hyperparameter("lambda_u")
    sharpen_temperature: float | None = _hyperparameter("sharpen_temperature")
    distribution_alignment_window: int | None = _hyperparameter("distribution_alignment_window")
    graph_temperature: float | None = _hyperparameter("graph_temperature")
    graph_threshold: float | None = _hyperparameter("graph_threshold")
    lambda_graph: float | None = _hyperparameter("lambda_graph")
    memory_batches: int | None = _hyperparameter("memory_batches")
    smoothing_alpha: float | None = _hyperparameter("smoothing_alpha")
    momentum: float | None = _hyperparameter("momentum")
    n_sigma: float | None = _hyperparameter("n_sigma")
    threshold_warmup: bool | None = _hyperparameter("threshold_warmup")
    use_quantile: bool | None = _hyperparameter("use_quantile")
    clip_threshold: bool | None = _hyperparameter("clip_threshold")
    lambda_fairness: float | None = _hyperparameter("lambda_fairness")
    open_threshold: float | None = _hyperparameter("open_threshold")
    lambda_one_vs_all: float | None = _hyperparameter("lambda_one_vs_all")
    lambda_open: float | None = _hyperparameter("lambda_open")


@dataclass
class ViewArguments:
    """Settings of the views, with the names of `ViewSettings`. Sizes are in pixels at the model's input size."""

    weak_crop: Literal["auto", "pad", "resized"] = argument(
        "auto",
        "Crop of the weak and strong view. pad: shift by up to an eighth of the side, with reflected "
        "borders. resized: random resized crop. auto: pad up to 64 px, resized above.",
    )
    horizontal_flip: bool = argument(True, "Mirror images at random. Turn it off where a mirrored image changes class.")
    randaugment_ops: int = argument(2, "Number of RandAugment operations on the strong view.")
    randaugment_magnitude: int = argument(10, "RandAugment draws magnitudes from 1 to this number minus 1.")
    cutout_size: int = argument(16, "Side of the grey square on the strong view, in pixels. 0: no square.")
    contrastive_view: Literal["simclr", "randaugment"] = argument(
        "simclr", "simclr: resized crop, colour jitter and random grayscale. randaugment: a second strong view."
    )
    normalize_contrastive: bool = argument(True, "Normalize the contrastive view. The authors' CCSSL configs do not.")

    def view_settings(self, pretrained_cfg: Mapping[str, Any]) -> ViewSettings:
        """The views of a run, with the input size, mean and standard deviation of timm's `pretrained_cfg`.

        Raises a ValueError if the input is not square.
        """
        chosen = {f.name: getattr(self, f.name) for f in fields(ViewArguments)}
        height, size = pretrained_cfg["input_size"][-2:]
        if height != size:
            raise ValueError(
                f"The model's images are {height} x {size} pixels, and only square ones can be trained: build it with "
                "one image_size."
            )
        if chosen["weak_crop"] == "auto":
            chosen["weak_crop"] = "pad" if size <= MAX_SIDE_HELD else "resized"
        return ViewSettings(size, tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"]), **chosen)


# Arguments that the card always shows (of SGD only with SGD).
_OPTIMIZATION = """
    gradient_accumulation_steps optim learning_rate sgd_momentum nesterov schedule warmup_steps weight_decay
    max_grad_norm ema_decay eval_weights weak_forward repeat_labeled
"""
# Starts of the names of arguments that do not affect the weights, or that the record has elsewhere.
_ELSEWHERE = """
    algorithm mu max_steps per_device_train_batch_size seed decode output_dir overwrite allow_changes run_name project
    trackio report_to log disable_tqdm save hub push eval_strategy eval_steps eval_delay eval_on_start per_device_eval
    prediction_loss do_ dataloader ddp use_cpu accelerator_config skip_memory debug resume restore local_rank
    label_names label_column image_column hidden_label remove_unused include_
"""


@dataclass
class CCSSLTrainingArguments(HyperparameterArguments, ViewArguments, TrainingArguments):  # output_dir stays first
    """Arguments of `CCSSLTrainer`. Defaults are those of the paper for CIFAR-10 (arXiv 2203.02261, section 4).

    Hyperparameters of the algorithm are None by default, which means the algorithm's default. Batch sizes count labeled
    images; each step also uses `mu` times as many unlabeled images. Raises one ValueError, with a line for each
    problem, if arguments contradict each other, have no effect, are out of range, or are not supported.
    """

    # Arguments of transformers, with the paper's values.
    max_steps: int = argument(512 * 1024, "Length of the run in optimizer steps.")
    per_device_train_batch_size: int = argument(64, "Labeled images on each device in each step (B).")
    learning_rate: float = argument(0.03, "Peak learning rate.")
    weight_decay: float = argument(1e-3, "Weight decay. It does not apply to norms and biases.")
    optim: str = argument("sgd", "Optimizer. sgd uses sgd_momentum and nesterov.")
    max_grad_norm: float = argument(0.0, "Clip the gradient to this norm. 0: no clipping.")
    logging_nan_inf_filter: bool = argument(False, "Not supported: it would hide that a run diverges.")
    num_train_epochs: float = argument(-1.0, "Not supported: each split has its own epochs. Set max_steps.")

    algorithm: str = argument("fixmatch", "Pseudo-labeling algorithm. supervised uses labeled images only.")
    mu: int = argument(7, "Unlabeled images for each labeled image in a step.")

    # Step
    weak_forward: Literal["joint", "separate"] = argument(
        "joint",
        "joint: one forward pass over all views, as in the paper. separate: a forward pass without "
        "gradient for the weak views, which is faster; BatchNorm then normalizes them separately.",
    )
    overwrite: bool = argument(
        False, "Delete checkpoints, model, card and metrics of an earlier run in output_dir before the first step."
    )
    allow_changes: bool = argument(
        False, "Resume although settings or data differ from those of the checkpoint. The log names them."
    )
    ema_decay: float = argument(0.999, "Decay of the averaged weights (EMA) in each step. 0: no averaging.")
    eval_weights: Literal["ema", "raw"] = argument("ema", "Evaluated and published weights: averaged (ema) or raw.")
    sgd_momentum: float = argument(0.9, "Momentum of SGD.")
    nesterov: bool = argument(True, "Use Nesterov momentum in SGD.")
    schedule: Literal["cosine_7_16", "lr_scheduler_type"] = argument(
        "cosine_7_16", "Learning rate: FixMatch's cosine from 1 to cos(7/16 pi), or as lr_scheduler_type says."
    )
    on_nonfinite: Literal["stop", "skip"] = argument(
        "stop",
        "If a loss or gradient is NaN or infinite. stop: end the run with an error that names step, term and rows. "
        "skip: leave out the update of that step, and count it.",
    )
    sync_batchnorm: bool = argument(
        False, "Compute BatchNorm over the images of all processes, so that their number does not change the result."
    )

    # Data
    image_column: str = argument("image", "Column of the images in every split.")
    label_column: str = argument("label", "Column of the labels.")
    hidden_label_column: str | None = argument(None, "Column of the unlabeled images' true classes, only logged.")
    repeat_labeled: bool = argument(False, "If labeled images are fewer than a batch, repeat them, with other views.")
    decode: Literal["auto", "memory", "stream"] = argument(
        "auto",
        "memory: decode every image once, to the training size. stream: decode an image each time it is "
        "drawn, and crop each view from the full image. auto: memory up to 64 px, stream above.",
    )
    dataloader_num_workers: int = argument(
        -1,
        "Processes that load batches. Results do not depend on it. -1: one for each CPU core of a training "
        "process, up to 8, where images are decoded for an accelerator; otherwise 0, the training process itself.",
    )
    on_bad_image: Literal["skip", "stop"] = argument(
        "skip",
        "Unlabeled image that cannot be read. skip: train on another one, and list it; the run stops if more than one "
        "in twenty are unreadable. stop: stop the run. Labeled, validation and test images must be readable.",
    )
    max_image_pixels: int = argument(MAX_PIXELS, "Pixels of an image above which it counts as unreadable.")

    @classmethod
    def from_config(cls, config: str | Path = "imagefolder", **changes: Any) -> CCSSLTrainingArguments:
        """Arguments from a YAML file (a packaged name, or a path), as the command line reads it, with `changes`.

        Raises a ValueError if the file cannot be read, a name is unknown, or a value has the wrong type.
        """
        packaged = CONFIGS / f"{config}.yaml"
        path = packaged if packaged.is_file() else Path(config)
        plain, structured = read_config(path, [f.name for f in fields(cls) if f.init])
        try:
            parsed = vars(StrictParser(cls).parse_args([f"--{name}={word}" for name, word in plain.items()]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(**{**{name: parsed[name] for name in plain}, **structured, **changes})

    def __post_init__(self) -> None:
        raise_all(argument_errors(self))
        given = accelerator_settings(self)
        if self.metric_for_best_model is not None and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = greater_is_better(self.metric_for_best_model)
        super().__post_init__()
        raise_all(self._errors_on_device())
        for name, value in SET_HERE.items():
            setattr(self, name, value)
        if self.schedule == "lr_scheduler_type" and self.lr_scheduler_type in ON_METRIC:
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **(self.lr_scheduler_kwargs or {})}  # type: ignore[has-type]
        if self.device.type == "cuda" and "non_blocking" not in given:
            # else the CPU waits until the batch is copied, after the previous step
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def _errors_on_device(self) -> Iterator[str]:
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # torch's
        needs_compiler = self.torch_compile and self.torch_compile_backend == "inductor" and self.device.type == "cpu"
        if needs_compiler and shutil.which(shlex.split(compiler)[0]) is None:  # the first step would fail
            yield (
                f"torch_compile needs a C++ compiler on a CPU, and {compiler!r} is not found: install g++, set CXX to "
                "another compiler, or leave out torch_compile"
            )
        if self.fp16 and self.device.type == "cpu":
            yield "fp16 has no effect on a CPU: set bf16, or leave it out"

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters that were set, by name, and always `lambda_contrast`."""
        values = {f.name: getattr(self, f.name) for f in fields(HyperparameterArguments)}
        chosen = {name: value for name, value in values.items() if value is not None}
        return {"lambda_contrast": 0.0 if self.algorithm == "supervised" else 1.0, **chosen}

    def optimization_settings(self) -> dict[str, Any]:
        """Settings that affect the weights, without hyperparameters and views: the main ones, and all that were set."""
        of_sgd = {"sgd_momentum", "nesterov"}
        names = [name for name in _OPTIMIZATION.split() if self.optim == "sgd" or name not in of_sgd]
        names += ["lr_scheduler_type"] if self.schedule == "lr_scheduler_type" else []
        elsewhere = {f.name for cls in (HyperparameterArguments, ViewArguments) for f in fields(cls)}
        for f in fields(self):
            value = getattr(self, f.name)
            is_set = value != f.default and not (f.default is None and not value)
            if is_set and f.name not in {*elsewhere, *names} and not f.name.startswith(tuple(_ELSEWHERE.split())):
                names.append(f.name)
        return {name: getattr(self, name) for name in names}


class StrictParser(HfArgumentParser):
    """Raises a ValueError instead of printing a usage of 200 flags, and reads `none` where a value is optional."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        kind = settings.get("type", str)
        if settings.get("default") is None and kind is not str:

            def read(text: str) -> Any:
                return None if text.lower() == "none" else kind(text)

            read.__name__ = getattr(kind, "__name__", "value")  # argparse shows it in errors
            settings["type"] = read
            if "choices" in settings:
                settings["choices"] = [*settings["choices"], None]
        return super().add_argument(*flags, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}.")


def read_config(path: Path, known: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The settings of a YAML file: plain values as they are written, without `null`, and lists and dictionaries.

    Raises a ValueError if the file cannot be read, or a name is not in `known`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        words = yaml.load(text, yaml.BaseLoader)  # as it is written: `no` is not a boolean, and 1e-3 is a number
    except (OSError, yaml.YAMLError) as error:
        packaged = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise ValueError(
            f"The config {path} cannot be read ({summary(error)}): pass the path of a YAML file or a packaged name "
            f"({packaged})."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"The config {path} has no settings: write one `name: value` per line.")
    for name in values:
        if name not in known:
            raise ValueError(f"The config {path} has the unknown key {name!r}.{near_misses(str(name), known)}")
    structured = {name: value for name, value in values.items() if isinstance(value, (list, dict))}
    plain = {name: words[name] for name, value in values.items() if value is not None and name not in structured}
    return plain, structured
