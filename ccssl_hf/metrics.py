"""Metrics of a classifier of `C` classes, as functions of arrays and as `evaluate.Metric` classes of the same numbers.

Values are fractions in [0, 1]. Labels `[N]` lie in 0..C-1, or are -1 for out-of-distribution (OOD) images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, roc_auc_score
from transformers import EvalPrediction

from .data import OUT_OF_DISTRIBUTION
from .errors import listed, near_misses


def to_numpy(values: Any) -> np.ndarray:
    """A list, an array, a tensor of any device and dtype, or an Arrow column of numbers or of equally long lists."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    elif isinstance(values, pa.ChunkedArray):
        rows = values.combine_chunks()
        if not pa.types.is_large_list(rows.type):
            return rows.to_numpy(zero_copy_only=False)
        width = len(rows[0]) if len(rows) else 1
        numbers = rows.cast(pa.list_(rows.type.value_type, width)).flatten()
        return numbers.to_numpy(zero_copy_only=False).reshape(-1, width)
    return np.asarray(values)


def check_outputs(logits: Any) -> None:
    """Raises a ValueError that names the images whose logits `[N, C]` are NaN or infinite. Ignores other outputs."""
    if isinstance(logits, np.ndarray) and logits.ndim == 2 and np.issubdtype(logits.dtype, np.floating):
        rows = np.flatnonzero((np.isnan(logits) | np.isposinf(logits)).any(axis=1))
        if len(rows):
            raise ValueError(
                f"Logits are NaN or infinite for {len(rows)} of {len(logits)} images (rows {listed(rows)}): training "
                "diverged; lower the learning rate, or use float32."
            )


def _arrays(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, C]` and labels `[N]` as arrays, if shapes fit and logits are finite."""
    logits, labels = to_numpy(logits), to_numpy(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"Pass logits [N, C] and labels [N]; their shapes are {logits.shape} and {labels.shape}.")
    check_outputs(logits)
    return logits, labels


def _in_distribution(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows of in-distribution images, if there are any and their labels are classes."""
    logits, labels = _arrays(logits, labels)
    rows = labels != OUT_OF_DISTRIBUTION
    if not rows.any():
        raise ValueError("There is no in-distribution image; pass at least one row with a label >= 0.")
    if not rows.all():  # spare a copy
        logits, labels = logits[rows], labels[rows]
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()}: use 0..{logits.shape[1] - 1}, or -1 for OOD images."
        )
    return logits, labels


def confidences(logits: Any) -> np.ndarray:
    """The largest softmax probability of each row of `logits [N, C]`, `[N]`."""
    logits = to_numpy(logits).astype(np.float64)  # a copy: torch warns of arrays that cannot be written, as Arrow's
    return torch.softmax(torch.from_numpy(logits), dim=-1).amax(-1).numpy()


def top_k_accuracy(logits: Any, labels: Any, *, k: int = 1) -> float:
    """Share of in-distribution images whose label is among the `k` largest of their logits `[N, C]`.

    Of equal logits the lower class comes first, so a model with constant output gets the accuracy of chance.

    Raises:
        ValueError: `k` is below 1, shapes or labels do not fit, all images are OOD, or logits are NaN.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    logits, labels = _in_distribution(logits, labels)
    guesses = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((guesses == labels[:, None]).any(1).mean())


def macro_f1(logits: Any, labels: Any) -> float:
    """F1 of each class, averaged over the classes that occur among labels or predictions.

    A class that is never predicted correctly has F1 = 0. Raises the errors of `top_k_accuracy`.
    """
    logits, labels = _in_distribution(logits, labels)
    return float(f1_score(labels, logits.argmax(1), average="macro", zero_division=0))


def reliability_bins(logits: Any, labels: Any, *, num_bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bins of equal width over the confidence, (i / num_bins, (i + 1) / num_bins], as in a reliability diagram.

    Returns the number of images, the accuracy and the mean confidence of each bin, `[num_bins]` each; all are 0 for an
    empty bin. Raises the errors of `top_k_accuracy`.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}.")
    logits, labels = _in_distribution(logits, labels)
    confidence = confidences(logits)
    where = np.digitize(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    counts = np.bincount(where, minlength=num_bins)
    right = np.bincount(where, logits.argmax(1) == labels, minlength=num_bins)
    confident = np.bincount(where, confidence, minlength=num_bins)
    return counts, right / np.maximum(counts, 1), confident / np.maximum(counts, 1)


def expected_calibration_error(logits: Any, labels: Any, *, num_bins: int = 15) -> float:
    """ECE: the difference between confidence and accuracy, averaged over the images of `reliability_bins`.

    Equation 3 of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599,
    which uses 15 bins.
    """
    counts, accuracy, confidence = reliability_bins(logits, labels, num_bins=num_bins)
    return float((counts * np.abs(accuracy - confidence)).sum() / counts.sum())


def out_of_distribution_auroc(scores: Any, labels: Any) -> float:
    """Probability that an in-distribution image has a higher score `[N]` than an OOD image; 0.5 is chance.

    Raises:
        ValueError: Shapes differ, or one of the two kinds of images is missing.
    """
    scores, labels = to_numpy(scores), to_numpy(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"Pass one score for each label; their shapes are {scores.shape} and {labels.shape}.")
    known = labels >= 0
    if known.all() or not known.any():
        raise ValueError("AUROC needs in-distribution images (label >= 0) and OOD images (label -1).")
    return float(roc_auc_score(known, scores))


# -------------------------------------------------------------------------------------------------- evaluate's metrics


class _ArrowFeatures(datasets.Features):
    """Features that write a batch of arrays to Arrow without a Python object for each number."""

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, pa.Array]:
        def encoded(array: np.ndarray) -> pa.Array:
            numbers = pa.array(array.reshape(-1))
            return numbers if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(numbers, array.shape[1])

        return {name: encoded(to_numpy(column)) for name, column in batch.items()}


_LABELS = datasets.Value("int64")
_LOGITS = _ArrowFeatures(predictions=datasets.LargeList(datasets.Value("float32")), references=_LABELS)
_SCORES = _ArrowFeatures(predictions=datasets.Value("float64"), references=_LABELS)


class _InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that writes no files, so several instances can be used at the same time."""

    features_of_inputs: ClassVar[Any] = _LOGITS

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(config_name, **{"keep_in_memory": True, **kwargs})

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        features = self.features_of_inputs
        info = evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)
        info.format = "arrow"  # not in the constructor, which allows a format only for features without lists
        return info


class TopKAccuracy(_InMemoryMetric):
    """Share of images whose label is among the `k` largest logits; see `top_k_accuracy`. Its key is `top{k}`."""

    def __init__(self, config_name: str | None = None, *, k: int = 1, **kwargs: Any) -> None:
        super().__init__(config_name, **kwargs)
        self.k = k

    def _compute(self, predictions: Any, references: Any, *, k: int | None = None) -> dict[str, float]:
        k = self.k if k is None else k
        return {f"top{k}": top_k_accuracy(predictions, references, k=k)}


class MacroF1(_InMemoryMetric):
    """F1 averaged over classes; see `macro_f1`."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": macro_f1(predictions, references)}


class ExpectedCalibrationError(_InMemoryMetric):
    """Mean difference between confidence and accuracy; see `expected_calibration_error`."""

    def _compute(self, predictions: Any, references: Any, *, num_bins: int = 15) -> dict[str, float]:
        return {"ece": expected_calibration_error(predictions, references, num_bins=num_bins)}


class OutOfDistributionAUROC(_InMemoryMetric):
    """How well the confidence of logits `[N, C]`, or scores `[N]`, separate OOD images: `out_of_distribution_auroc`."""

    features_of_inputs: ClassVar[Any] = [_LOGITS, _SCORES]

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if pa.types.is_large_list(predictions.type):
            logits, references = _arrays(predictions, references)
            predictions = confidences(logits)
        return {"auroc": out_of_distribution_auroc(predictions, references)}


def classification_metrics(logits: Any, labels: Any, *, open_set_scores: Any = None) -> dict[str, float]:
    """The metrics that the trainer reports for a split, of float32 logits `[N, C]`, through `evaluate.combine`.

    Returns `top1`, `top5`, `macro_f1` and `ece` of the in-distribution images. If there are OOD images, also `auroc` of
    the confidence and, with `open_set_scores [N]` (higher for in-distribution images), `auroc_open_set`. Raises the
    errors of `top_k_accuracy`.
    """
    logits, labels = _arrays(logits, labels)
    metrics = [TopKAccuracy(), TopKAccuracy(k=5), MacroF1(), ExpectedCalibrationError()]
    ood = (labels == OUT_OF_DISTRIBUTION).any()
    results = evaluate.combine([*metrics, OutOfDistributionAUROC()] if ood else metrics).compute(logits, labels)
    if ood and open_set_scores is not None:
        auroc = OutOfDistributionAUROC().compute(predictions=to_numpy(open_set_scores), references=labels)
        results["auroc_open_set"] = auroc["auroc"]
    return results


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`classification_metrics` and the loss, of outputs `logits` or `(logits, open_set_scores)`."""
    outputs = prediction.predictions
    logits, scores = (*outputs, None)[:2] if isinstance(outputs, tuple) else (outputs, None)
    # Exact. The Trainer averages the means of batches, which hold different numbers of in-distribution images.
    known_logits, known_labels = _in_distribution(logits, prediction.label_ids)
    loss = F.cross_entropy(torch.from_numpy(known_logits), torch.from_numpy(known_labels)).item()
    return {**classification_metrics(logits, prediction.label_ids, open_set_scores=scores), "loss": loss}


def check_best_metric(name: str, splits: Mapping[str, bool], *, open_set: bool) -> None:
    """Raises a ValueError unless `compute_metrics` measures `metric_for_best_model` in each evaluation of a run.

    `splits` are the names of an evaluation's splits (the name of a single one is ""), and whether each has OOD images.
    `open_set`: whether the algorithm has an open-set score.
    """
    measured = []
    for split, has_ood in splits.items():
        names = ["loss", "top1", "top5", "macro_f1", "ece", *(["auroc"] if has_ood else [])]
        names += ["auroc_open_set"] if has_ood and open_set else []
        measured += [f"{split}_{each}" if split else each for each in names]
    plain = name.removeprefix("eval_")
    if plain not in measured:
        raise ValueError(
            f"metric_for_best_model {name!r} is not measured in this run's evaluations.{near_misses(plain, measured)} "
            f"Choose one of {', '.join(measured)}, or pass your own compute_metrics."
        )


def pseudo_label_quality(*, pseudo_labels: Any, mask: Any, hidden_labels: Any) -> dict[str, float]:
    """Quality of pseudo labels `[U]`, measured by true labels `[U]` that training does not use.

    `mask [U]` is 1 for images that pass the threshold and 0 for others, or weights in [0, 1].

    Returns:
        `precision`: share of correct pseudo labels among the images that pass; those of OOD images are wrong.
        `coverage`: share of all images that pass. `ood_share_passed`: share of OOD images that pass.
        NaN for a share of no images.

    Raises:
        ValueError: The three do not have one shape `[U]`.
    """
    pseudo_labels, passed, hidden_labels = to_numpy(pseudo_labels), to_numpy(mask), to_numpy(hidden_labels)
    shapes = pseudo_labels.shape, passed.shape, hidden_labels.shape
    if pseudo_labels.ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(f"Pass pseudo_labels, mask and hidden_labels of one shape [U]; theirs are {shapes}.")
    passed = passed.astype(np.float64)
    ood = hidden_labels < 0
    right = (pseudo_labels == hidden_labels) & ~ood
    return {
        "precision": float((passed * right).sum() / passed.sum()) if passed.any() else float("nan"),
        "coverage": float(passed.mean()) if len(passed) else float("nan"),
        "ood_share_passed": float(passed[ood].mean()) if ood.any() else float("nan"),
    }
