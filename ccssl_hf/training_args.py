"""`CCSSLTrainingArguments`: what `transformers.TrainingArguments` says of a run, and what semi-supervision adds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments


def _hyperparameter(text: str) -> Any:
    """A field that is None until set: the algorithm's own default then holds, and one it does not have is an error."""
    return field(default=None, metadata={"help": text})


@dataclass
class HyperparameterArguments:
    """Hyperparameters of all algorithms: the same names in Python, YAML, on the command line and on the card."""

    confidence_threshold: float | None = _hyperparameter("Least confidence at which a pseudo label is trained on.")
    push_threshold: float | None = _hyperparameter(
        "Least confidence at which an image joins its class in the contrastive loss (T_push); None: every image does."
    )
    lambda_u: float | None = _hyperparameter("Weight of the loss on unlabeled images.")
    lambda_contrast: float | None = _hyperparameter(
        "Weight of the class-aware contrastive loss; 0 leaves CCSSL out. 1 if not set, and 0 for supervised."
    )
    contrast_temperature: float | None = _hyperparameter("Temperature of the class-aware contrastive loss.")
    own_pair_weight: Literal["one", "squared"] | None = _hyperparameter(
        "Weight of the pair of views of one image: one, or squared (its confidence squared, as for the "
        "paper's numbers)."
    )
    sharpen_temperature: float | None = _hyperparameter(
        "Temperature that pseudo labels are sharpened with; 1: as they are."
    )
    distribution_alignment_window: int | None = _hyperparameter(
        "Batches over which the distribution of pseudo labels is aligned; 0: no alignment."
    )
    graph_temperature: float | None = _hyperparameter("CoMatch: temperature of the similarity graph.")
    graph_threshold: float | None = _hyperparameter("CoMatch: least similarity of two pseudo labels for an edge.")
    lambda_graph: float | None = _hyperparameter("CoMatch: weight of the graph loss.")
    memory_batches: int | None = _hyperparameter("CoMatch, SimMatch: batches that the memory bank holds.")
    smoothing_alpha: float | None = _hyperparameter(
        "CoMatch, SimMatch: share of a pseudo label that is its own prediction."
    )
    momentum: float | None = _hyperparameter(
        "FreeMatch, SoftMatch: momentum of running statistics (not the optimizer's)."
    )
    n_sigma: float | None = _hyperparameter("SoftMatch: width of the weighting in standard deviations.")
    threshold_warmup: bool | None = _hyperparameter("FlexMatch: count unused images while thresholds warm up.")
    use_quantile: bool | None = _hyperparameter("FreeMatch: track a quantile of the confidence, not its mean.")
    clip_threshold: bool | None = _hyperparameter("FreeMatch: keep the global threshold in [0, 0.95].")
    lambda_fairness: float | None = _hyperparameter("FreeMatch: weight of the fairness loss.")
    open_threshold: float | None = _hyperparameter("IOMatch: least inlier score at which an image is trained on.")
    lambda_one_vs_all: float | None = _hyperparameter("IOMatch: weight of the one-vs-all loss.")
    lambda_open: float | None = _hyperparameter("IOMatch: weight of the open-set loss.")


@dataclass
class CCSSLTrainingArguments(TrainingArguments, HyperparameterArguments):
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
        super().__post_init__()
        self._check_contradictions()
        self.remove_unused_columns = False  # the image column is no argument of forward, and must not be dropped
        self.label_names = ["labels"]
        self.ddp_find_unused_parameters = False  # one forward reaches every parameter that is trained
        self.ddp_broadcast_buffers = False  # BatchNorm statistics are averaged before they are read instead

    def _check_ranges(self) -> None:
        if self.mu < 1:
            raise ValueError(f"mu is {self.mu}: give at least 1 unlabeled image for each labeled one.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: choose a value from 0 (no averaging) to below 1.")
        if self.nesterov and self.optim == "sgd" and self.sgd_momentum == 0:
            raise ValueError("nesterov needs momentum: set sgd_momentum above 0, or nesterov=False.")
        for choice in fields(self):
            options = _choices(choice.type)
            value = getattr(self, choice.name)
            if options and value is not None and value not in options:
                raise ValueError(f"{choice.name} is {value!r}: choose one of {', '.join(options)}.")

    def _check_contradictions(self) -> None:
        if self.fsdp or self.deepspeed:
            raise ValueError("FSDP and DeepSpeed are not supported yet: launch with plain data parallelism (DDP).")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the images of every step: set per_device_train_batch_size."
            )
        if self.max_steps <= 0:
            raise ValueError(
                "A run's length is max_steps, in optimizer steps, not num_train_epochs: set max_steps above 0."
            )
        if self.num_train_epochs != 3.0:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs}, but a run's length is max_steps: set max_steps alone "
                "(an epoch of the labeled split means nothing to the unlabeled one)."
            )
        if self.eval_weights == "ema" and self.ema_decay == 0:
            raise ValueError(
                "eval_weights='ema' with ema_decay=0: there are no averaged weights; set eval_weights='raw'."
            )
        if self.push_threshold is not None and self.lambda_contrast == 0:
            raise ValueError(
                "push_threshold is part of CCSSL, which lambda_contrast=0 leaves out: drop one of the two."
            )
        if self.hidden_label_column is not None and self.hidden_label_column == self.image_column:
            raise ValueError("hidden_label_column and image_column name the same column: name a column of labels.")

    def hyperparameters(self) -> dict[str, Any]:
        """The algorithm's hyperparameters that were set, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(HyperparameterArguments)}
        values = {name: value for name, value in values.items() if value is not None}
        return {"lambda_contrast": 0.0 if self.algorithm == "supervised" else 1.0, **values}


def _choices(annotation: Any) -> tuple[str, ...]:
    """The options of a `Literal[...]` annotation of this file, which are strings at run time."""
    text = str(annotation)
    if not text.startswith("Literal["):
        return ()
    return tuple(part.strip().strip("\"'") for part in text[len("Literal[") : text.index("]")].split(","))
