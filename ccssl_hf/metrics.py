"""How good a classifier is, on the classes it knows and against images of none of them.

Plain functions of arrays, the same as `evaluate.Metric`s, and what the trainer reports by default. Nothing here touches
the network. Every value is a fraction in [0, 1]. A label of -1 marks an image that is out of distribution: of no known
class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, roc_auc_score
from transformers import EvalPrediction

from .data import OUT_OF_DISTRIBUTION


def to_numpy(values: Any) -> np.ndarray:
    """A list, array or tensor (of any device and dtype) as an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)


def _arrays(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, after the checks of what holds whether or not the classes are known."""
    logits, labels = to_numpy(logits), to_numpy(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"Pass logits [N, C] and labels [N]; their shapes are {logits.shape} and {labels.shape}.")
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise ValueError(
            "Logits are NaN or infinite: training diverged; lower the learning rate or use full precision."
        )
    return logits, labels


def _known(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, after the checks that every metric of known classes needs."""
    logits, labels = _arrays(logits, labels)
    if not len(labels):
        raise ValueError("There is no image of a known class to measure; pass at least one row with a label >= 0.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"Labels must lie in 0..{logits.shape[1] - 1} (the classifier's classes) but run from {labels.min()} to "
            f"{labels.max()}; map them to these, or to -1 where an image is of no known class."
        )
    return logits, labels


def confidences(logits: Any) -> np.ndarray:
    """The largest softmax probability of each row of `logits [N, C]`, `[N]`."""
    return torch.softmax(torch.from_numpy(to_numpy(logits)).double(), dim=-1).amax(-1).numpy()


def top_k_accuracy(logits: Any, labels: Any, *, k: int = 1) -> float:
    """Share of images whose label is among the `k` largest logits.

    Of equal logits the lower class comes first, so a classifier that has collapsed to a constant does not look right.
    With `k` at or above the number of classes every image counts as right: top-5 says nothing about five classes.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, in 0..C-1.
        k: How many guesses each image has.

    Raises:
        ValueError: If `k` is below 1, shapes or labels do not fit, or logits are NaN.
    """
    if k < 1:
        raise ValueError(f"k is the number of guesses and must be at least 1, not {k}.")
    logits, labels = _known(logits, labels)
    guesses = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((guesses == labels[:, None]).any(1).mean())


def macro_f1(logits: Any, labels: Any) -> float:
    """F1 of each class, averaged over the classes that occur among the labels or the predictions.

    A class that is predicted but never right, or never predicted, has F1 = 0.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, in 0..C-1.
    """
    logits, labels = _known(logits, labels)
    return float(f1_score(labels, logits.argmax(1), average="macro", zero_division=0))


def reliability_bins(logits: Any, labels: Any, *, num_bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images sorted by confidence into bins of equal width: (i / num_bins, (i + 1) / num_bins].

    Args:
        logits: `[N, C]`.
        labels: `[N]`, in 0..C-1.
        num_bins: How many bins cover (0, 1].

    Returns:
        The number of images, their accuracy and their mean confidence in each bin, `[num_bins]` each. The last two are
        0 in an empty bin.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}.")
    logits, labels = _known(logits, labels)
    confidence = confidences(logits)
    where = np.digitize(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    counts = np.bincount(where, minlength=num_bins)
    right = np.bincount(where, logits.argmax(1) == labels, minlength=num_bins)
    confident = np.bincount(where, confidence, minlength=num_bins)
    return counts, right / np.maximum(counts, 1), confident / np.maximum(counts, 1)


def expected_calibration_error(logits: Any, labels: Any, *, num_bins: int = 15) -> float:
    """ECE: how far confidence lies from accuracy, averaged over bins of confidence weighted by their images.

    Equation 3 of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, in 0..C-1.
        num_bins: Bins of equal width, 15 in that paper.
    """
    counts, accuracy, confidence = reliability_bins(logits, labels, num_bins=num_bins)
    return float((counts * np.abs(accuracy - confidence)).sum() / counts.sum())


def out_of_distribution_auroc(scores: Any, labels: Any) -> float:
    """The chance that an image of a known class scores higher than one of no known class; 0.5 is a coin.

    Args:
        scores: `[N]`, higher for images that look more like the known classes, such as the largest softmax probability.
        labels: `[N]`, below 0 where the image is of no known class.

    Raises:
        ValueError: If shapes differ or one of the two kinds of images is missing.
    """
    scores, labels = to_numpy(scores), to_numpy(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"Pass one score for each label; their shapes are {scores.shape} and {labels.shape}.")
    known = labels >= 0
    if known.all() or not known.any():
        raise ValueError("AUROC needs images of known classes (label >= 0) and of no known class (label -1).")
    return float(roc_auc_score(known, scores))


def classification_metrics(logits: Any, labels: Any, *, open_set_scores: Any = None) -> dict[str, float]:
    """Everything the trainer reports about one split.

    Args:
        logits: `[N, C]`.
        labels: `[N]`: 0..C-1, or -1 for an image of no known class. Rows of -1 count for `auroc` alone.
        open_set_scores: `[N]`, higher for images that look more like the known classes, from an algorithm that has such
            a score of its own.

    Returns:
        `top1`, `top5`, `macro_f1`, `ece` over the rows of known classes, and where some rows are -1 `auroc` of telling
        them apart by the largest softmax probability, and `auroc_open_set` of the same by `open_set_scores`.

    Raises:
        ValueError: If no row has a known class, a label lies outside -1..C-1, shapes do not fit, or logits are NaN.
    """
    logits, labels = _arrays(logits, labels)
    known = labels != OUT_OF_DISTRIBUTION
    known_logits, known_labels = logits[known], labels[known]
    metrics = {
        "top1": top_k_accuracy(known_logits, known_labels),
        "top5": top_k_accuracy(known_logits, known_labels, k=5),
        "macro_f1": macro_f1(known_logits, known_labels),
        "ece": expected_calibration_error(known_logits, known_labels),
    }
    if not known.all():
        metrics["auroc"] = out_of_distribution_auroc(confidences(logits), labels)
        if open_set_scores is not None:
            metrics["auroc_open_set"] = out_of_distribution_auroc(open_set_scores, labels)
    return metrics


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`classification_metrics` as `transformers.Trainer`'s `compute_metrics`.

    Logits are the first output; open-set scores are the second, where there is one.
    """
    outputs = prediction.predictions
    logits, scores = (*outputs, None)[:2] if isinstance(outputs, tuple) else (outputs, None)
    logits, labels = _arrays(logits, prediction.label_ids)
    known = labels != OUT_OF_DISTRIBUTION
    # Exact, where the Trainer's mean of batch means is not: batches hold different numbers of known classes.
    loss = F.cross_entropy(torch.from_numpy(logits[known]), torch.from_numpy(labels[known])).item()
    return {**classification_metrics(logits, labels, open_set_scores=scores), "loss": loss}


def pseudo_label_quality(*, pseudo_labels: Any, mask: Any, hidden_labels: Any) -> dict[str, float]:
    """How far the pseudo labels of unlabeled images can be trusted, judged by labels that training never saw.

    Args:
        pseudo_labels: `[U]`, in 0..C-1.
        mask: `[U]`, 1 where the image passes the threshold and 0 where not, or a weight in [0, 1] that it counts by.
        hidden_labels: `[U]`, the true classes; -1 for an image of no known class.

    Returns:
        `precision`: share of right pseudo labels among the images that pass; one of no known class is always wrong.
        `coverage`: share of all images that pass. `ood_share_passed`: share of the images of no known class that pass.
        NaN where there is nothing to take a share of.

    Raises:
        ValueError: If the three are not of one shape `[U]`.
    """
    pseudo_labels, passed, hidden_labels = to_numpy(pseudo_labels), to_numpy(mask), to_numpy(hidden_labels)
    if pseudo_labels.ndim != 1 or not pseudo_labels.shape == passed.shape == hidden_labels.shape:
        raise ValueError(
            "Pass pseudo_labels, mask and hidden_labels of one shape [U]; theirs are "
            f"{pseudo_labels.shape}, {passed.shape} and {hidden_labels.shape}."
        )
    passed = passed.astype(np.float64)
    unknown = hidden_labels < 0
    right = (pseudo_labels == hidden_labels) & ~unknown
    return {
        "precision": float((passed * right).sum() / passed.sum()) if passed.any() else float("nan"),
        "coverage": float(passed.mean()) if len(passed) else float("nan"),
        "ood_share_passed": float(passed[unknown].mean()) if unknown.any() else float("nan"),
    }


class _LocalMetric(evaluate.Metric):
    """A metric that keeps its rows in memory, so that two of them at once share no file; several processes cannot."""

    columns: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Sequence(datasets.Value("float32")),
        "references": datasets.Value("int64"),
    }
    inputs = "predictions: logits, one row of C numbers for each image. references: labels in 0..C-1."

    def __init__(self, config_name: str | None = None, *, num_process: int = 1, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", num_process == 1)
        super().__init__(config_name, num_process=num_process, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features(self.columns),
        )


class TopKAccuracy(_LocalMetric):
    """Share of images whose label is among the k largest logits; see `top_k_accuracy`."""

    def _compute(self, predictions: Any, references: Any, *, k: int = 1) -> dict[str, float]:
        return {f"top{k}": top_k_accuracy(predictions, references, k=k)}


class MacroF1(_LocalMetric):
    """F1 averaged over classes; see `macro_f1`."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": macro_f1(predictions, references)}


class ExpectedCalibrationError(_LocalMetric):
    """Mean distance of confidence from accuracy; see `expected_calibration_error`."""

    def _compute(self, predictions: Any, references: Any, *, num_bins: int = 15) -> dict[str, float]:
        return {"ece": expected_calibration_error(predictions, references, num_bins=num_bins)}


class OutOfDistributionAUROC(_LocalMetric):
    """How well a score tells known classes from anything else; see `out_of_distribution_auroc`."""

    columns: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Value("float64"),
        "references": datasets.Value("int64"),
    }
    inputs = (
        "predictions: one score for each image, higher for known classes. references: labels, -1 for no known class."
    )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"auroc": out_of_distribution_auroc(predictions, references)}
