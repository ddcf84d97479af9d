"""`CCSSLTrainingArguments`: what `transformers.TrainingArguments` says of a run, and what semi-supervision adds."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from .algorithms import ALGORITHMS, algorithm_hyperparameters


def _hyperparameter(name: str) -> Any:
    """A field that is None until set: the algorithm's own default then holds, and one it does not have is an error."""
    tables = {algorithm: algorithm_hyperparameters(algorithm) for algorithm in ALGORITHMS}
    takers = [algorithm for algorithm, table in tables.items() if name in table]
    text = tables[takers[0]][name].help
    return field(
        default=None, metadata={"help": text if len(takers) == len(tables) else f"{text} ({', '.join(takers)})"}
    )


@dataclass
class HyperparameterArguments:
    """Hyperparameters of all algorithms: the same names in Python, YAML, on the command line and on the card."""

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


_WITHOUT_EFFECT = {
    "num_train_epochs": "says nothing here, as the splits have epochs of their own: set max_steps alone",
    "auto_find_batch_size": "would change the images of every step: set per_device_train_batch_size",
    "label_smoothing_factor": "does not reach the algorithms' losses: leave it out",
    "data_seed": "would be a second seed, and a step is a function of one: set seed",
    "ignore_data_skip": "would show a resumed run images that it has seen: leave it out",
}
"""Arguments of transformers that would be ignored, or break a promise."""


@dataclass
class CCSSLTrainingArguments(HyperparameterArguments, TrainingArguments):  # the order of bases keeps output_dir first
    """Arguments of `CCSSLTrainer`; defaults are the paper's for CIFAR-10 (arXiv 2203.02261, section 4).

    Hyperparameters of the algorithm are None until set: the algorithm's own default then holds, see the table in the
    README. Batch sizes are in labeled images; every step also takes `mu` times as many unlabeled ones.

    Raises:
        ValueError: Two flags contradict each other, a value is out of range, or a launcher is not supported.
    """

    # What transformers has already, with the paper's values.
    max_steps: int = field(default=512 * 1024, metadata={"help": "Length of the run in optimizer steps."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Labeled images a step on each device, B."})
    learning_rate: float = field(default=0.03, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-3, metadata={"help": "Weight decay, on neither norms nor biases."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer; sgd takes sgd_momentum and nesterov."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient to this norm; 0: no clipping."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the logged mean, which hides them."}
    )

    algorithm: str = field(
        default="fixmatch", metadata={"help": "Pseudo-labeling algorithm; supervised reads labels only."}
    )
    mu: int = field(default=7, metadata={"help": "Unlabeled images for each labeled one."})

    # The step.
    weak_forward: Literal["joint", "separate"] = field(
        default="joint",
        metadata={
            "help": "joint: one forward over all views, as the paper. separate: the weak views in a forward of their "
            "own, without gradient: faster, but BatchNorm then normalises them apart."
        },
    )
    ema_decay: float = field(
        default=0.999, metadata={"help": "Decay of the averaged weights each step; 0: no averaging."}
    )
    eval_weights: Literal["ema", "raw"] = field(
        default="ema", metadata={"help": "Weights that are evaluated and published."}
    )
    sgd_momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    nesterov: bool = field(default=True, metadata={"help": "Nesterov momentum in SGD."})
    schedule: Literal["cosine_7_16", "lr_scheduler_type"] = field(
        default="cosine_7_16",
        metadata={
            "help": "cosine_7_16: FixMatch's cosine, from 1 to cos(7/16 pi). lr_scheduler_type: what that flag says."
        },
    )

    # Data.
    image_column: str = field(default="image", metadata={"help": "Column with the images, in every split."})
    label_column: str = field(default="label", metadata={"help": "Column with the labels."})
    hidden_label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the unlabeled split with true classes, for study: logged, not trained on."},
    )
    repeat_labeled: bool = field(
        default=False,
        metadata={"help": "Let fewer labeled images than a batch repeat in it, each under views of its own."},
    )
    decode: Literal["auto", "memory", "stream"] = field(
        default="auto",
        metadata={
            "help": "memory: every image is decoded once, to the training size. stream: decoded when it is drawn, each "
            "view cut from the whole image. auto: memory up to 64 px."
        },
    )

    dataloader_num_workers: int = field(
        default=-1,
        metadata={
            "help": "Processes that load batches; results do not depend on it. -1: where images are decoded for an "
            "accelerator, one for each core of a training process, up to 8; otherwise 0, the training process itself."
        },
    )

    # Views. Sizes in pixels at the model's input size, which images are trained and evaluated at.
    weak_crop: Literal["auto", "pad", "resized"] = field(
        default="auto",
        metadata={
            "help": "pad: shift by up to an eighth, reflecting. resized: random resized crop. auto: pad up to 64 px."
        },
    )
    horizontal_flip: bool = field(
        default=True, metadata={"help": "Mirror images at random; off where it changes meaning."}
    )
    randaugment_ops: int = field(default=2, metadata={"help": "RandAugment operations on the strong view."})
    randaugment_magnitude: int = field(
        default=10, metadata={"help": "RandAugment magnitudes are drawn from 1 to this less 1."}
    )
    cutout_size: int = field(default=16, metadata={"help": "Side of the grey square on the strong view; 0: none."})
    contrastive_view: Literal["simclr", "randaugment"] = field(
        default="simclr",
        metadata={"help": "simclr: resized crop, colour jitter, grey. randaugment: a second, independent strong view."},
    )
    normalize_contrastive: bool = field(
        default=True, metadata={"help": "Normalise the contrastive view too; the authors' CCSSL configs do not."}
    )

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_contradictions()
        super().__post_init__()
        self._check_compiler()
        self.remove_unused_columns = False  # the image column is no argument of forward, and must not be dropped
        self.label_names = ["labels"]
        self.ddp_find_unused_parameters = False  # one forward reaches every parameter that is trained
        self.ddp_broadcast_buffers = False  # BatchNorm statistics are averaged before they are read instead
        if self.device.type == "cuda":  # or the processor would wait for each batch's copy behind the step before
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def _check_ranges(self) -> None:
        for name in ("mu", "per_device_train_batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more.")
        if self.dataloader_num_workers < -1:
            raise ValueError(f"dataloader_num_workers is {self.dataloader_num_workers}: set it to -1 (chosen) or more.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: choose a value from 0 (no averaging) to below 1.")
        for name, hint in get_type_hints(type(self)).items():
            options = get_args(hint) if get_origin(hint) is Literal else ()
            if options and getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(options)}.")

    def _check_contradictions(self) -> None:
        launched = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
        if self.fsdp or self.deepspeed or launched:
            raise ValueError("FSDP and DeepSpeed are not supported yet: launch with plain data parallelism (DDP).")
        for name, reason in _WITHOUT_EFFECT.items():
            if getattr(self, name) != self._default(name):
                raise ValueError(f"{name}={getattr(self, name)!r} {reason}.")
        if self.schedule != "lr_scheduler_type" and self.lr_scheduler_type != self._default("lr_scheduler_type"):
            raise ValueError(
                f"lr_scheduler_type has no effect with schedule={self.schedule!r}: set schedule='lr_scheduler_type' "
                "instead."
            )
        if self.optim == "sgd" and self.nesterov and self.sgd_momentum == 0:
            raise ValueError("nesterov needs momentum: set sgd_momentum above 0, or nesterov=False.")
        if self.optim != "sgd" and (not self.nesterov or self.sgd_momentum != self._default("sgd_momentum")):
            raise ValueError(f"sgd_momentum and nesterov have no effect with optim={self.optim!r}: leave them out.")
        if self.load_best_model_at_end and self.save_only_model:
            raise ValueError(
                "load_best_model_at_end brings back raw and averaged weights, which save_only_model does not write: "
                "leave out one of the two."
            )
        if self.eval_weights == "ema" and self.ema_decay == 0:
            raise ValueError(
                "eval_weights='ema' with ema_decay=0: there are no averaged weights; set eval_weights='raw'."
            )
        chosen = self.hyperparameters()
        for name in ("push_threshold", "contrast_temperature", "own_pair_weight"):
            if name in chosen and chosen["lambda_contrast"] == 0:
                raise ValueError(
                    f"{name} is part of CCSSL, which lambda_contrast=0 leaves out: raise lambda_contrast, or leave out "
                    f"{name} (--{name} none on the command line)."
                )
        if self.hidden_label_column == self.image_column:
            raise ValueError("hidden_label_column and image_column name the same column: name a column of labels.")

    def _check_compiler(self) -> None:
        if not (self.torch_compile and self.torch_compile_backend == "inductor" and self.device.type == "cpu"):
            return
        # What torch._inductor.config.cpp.cxx names. Without it the first step would fail, after all the decoding.
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise ValueError(
                f"torch_compile needs a C++ compiler on a CPU, and {compiler!r} is not found: install g++, set CXX to "
                "another compiler, or leave out torch_compile."
            )

    def _default(self, name: str) -> Any:
        return next(f.default for f in fields(self) if f.name == name)

    def hyperparameters(self) -> dict[str, Any]:
        """The algorithm's hyperparameters that were set, by name, and the weight of CCSSL's loss in any case."""
        values = {f.name: getattr(self, f.name) for f in fields(HyperparameterArguments)}
        values = {name: value for name, value in values.items() if value is not None}
        return {"lambda_contrast": 0.0 if self.algorithm == "supervised" else 1.0, **values}
