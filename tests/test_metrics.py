"""Metrics against hand-made cases, plain loops from the definitions, and scikit-learn."""

from __future__ import annotations

import math
import os
import threading

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, top_k_accuracy_score
from transformers import EvalPrediction

from ccssl_hf import metrics as m


def some_predictions(num_images: int = 200, num_classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_images)
    logits = rng.normal(size=(num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), labels] += 1.5
    return logits, labels


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learn(k):
    logits, labels = some_predictions()
    assert m.top_k_accuracy(logits, labels, k=k) == pytest.approx(top_k_accuracy_score(labels, logits, k=k))


def test_top_k_of_a_constant_classifier_is_right_for_its_first_classes_only():
    labels = np.repeat(np.arange(10), 3)
    assert m.top_k_accuracy(np.zeros((30, 10)), labels, k=1) == pytest.approx(0.1)
    assert m.top_k_accuracy(np.zeros((30, 10)), labels, k=5) == pytest.approx(0.5)


def test_top_k_beyond_the_number_of_classes_is_one():
    logits, labels = some_predictions(num_classes=3)
    assert m.top_k_accuracy(logits, labels, k=5) == 1.0


def test_macro_f1_weighs_a_rare_class_like_a_common_one():
    logits = np.eye(2)[[0, 0, 0, 0, 0]]
    labels = np.array([0, 0, 0, 0, 1])
    assert m.macro_f1(logits, labels) == pytest.approx((8 / 9 + 0) / 2)


def test_calibration_error_equals_a_loop_from_the_definition():
    logits, labels = some_predictions(500)
    probabilities = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    expected = 0.0
    for i in range(15):
        inside = [n for n, p in enumerate(probabilities.max(1)) if i / 15 < p <= (i + 1) / 15]
        if inside:
            accuracy = np.mean([probabilities[n].argmax() == labels[n] for n in inside])
            expected += len(inside) / 500 * abs(accuracy - np.mean([probabilities[n].max() for n in inside]))
    assert m.expected_calibration_error(logits, labels) == pytest.approx(expected)


def test_calibration_error_of_certainty_is_the_error_rate():
    logits = 1e4 * np.eye(4)[[0, 1, 2, 3]]
    assert m.expected_calibration_error(logits, np.array([0, 1, 2, 0])) == pytest.approx(0.25)


def test_a_confidence_on_an_edge_falls_into_the_lower_bin():
    counts, accuracy, confidence = m.reliability_bins(np.zeros((3, 2)), np.array([0, 0, 1]), num_bins=2)
    assert counts.tolist() == [3, 0]
    assert accuracy.tolist() == pytest.approx([2 / 3, 0])
    assert confidence.tolist() == pytest.approx([0.5, 0])


def test_auroc_is_one_when_every_in_distribution_image_scores_higher_and_half_when_all_are_equal():
    labels = np.array([0, 3, -1, -1])
    assert m.out_of_distribution_auroc([0.9, 0.8, 0.7, 0.1], labels) == 1.0
    assert m.out_of_distribution_auroc([0.5] * 4, labels) == 0.5


def test_ood_rows_only_count_for_auroc():
    logits, labels = some_predictions()
    plain = m.classification_metrics(logits, labels)
    assert set(plain) == {"top1", "top5", "macro_f1", "ece"}
    ood = np.random.default_rng(1).normal(size=(50, 7)).astype(np.float32)
    both = m.classification_metrics(np.concatenate([ood, logits]), np.concatenate([np.full(50, -1), labels]))
    auroc = both.pop("auroc")
    assert both == plain
    labels = np.concatenate([np.full(50, -1), labels])
    own = m.classification_metrics(np.concatenate([ood, logits]), labels, open_set_scores=labels)
    assert own == {**plain, "auroc": auroc, "auroc_open_set": 1.0}
    scores = np.concatenate([m.confidences(ood), m.confidences(logits)])
    assert auroc == pytest.approx(roc_auc_score([0] * 50 + [1] * 200, scores))
    assert all(type(value) is float and 0 <= value <= 1 for value in [auroc, *plain.values()])
    assert m.top_k_accuracy(np.concatenate([ood, logits]), labels) == plain["top1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_arrays_and_lists_give_the_same(dtype):
    logits, labels = some_predictions()
    tensor = torch.from_numpy(logits).to(dtype).requires_grad_()
    array = tensor.detach().double().numpy()
    expected = m.classification_metrics(array, labels)
    assert m.classification_metrics(tensor, torch.from_numpy(labels)) == pytest.approx(expected)
    assert m.classification_metrics(array.tolist(), labels.tolist()) == pytest.approx(expected)


def test_compute_metrics_takes_the_first_output():
    logits, labels = some_predictions()
    expected = m.classification_metrics(logits, labels)
    for outputs in (logits, (logits, np.zeros((200, 64)))):
        metrics = m.compute_metrics(EvalPrediction(outputs, labels))
        assert metrics.pop("loss") > 0
        assert metrics == expected


@pytest.mark.parametrize(
    ("logits", "labels", "hint"),
    [
        (np.zeros((4, 3)), np.zeros(5, int), "shapes are"),
        (np.zeros(4, int), np.zeros((4, 3)), "shapes are"),
        (np.zeros((4, 3)), np.array([0, 1, 2, 3]), r"0\.\.2"),
        (np.zeros((4, 3)), np.array([0, 1, 2, -100]), r"0\.\.2"),
        (np.zeros((4, 3)), np.full(4, -1), "no in-distribution image"),
        (np.full((4, 3), np.nan), np.zeros(4, int), "diverged"),
        (np.full((4, 3), np.inf), np.zeros(4, int), "diverged"),
    ],
)
def test_wrong_input_is_named(logits, labels, hint):
    with pytest.raises(ValueError, match=hint):
        m.classification_metrics(logits, labels)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="at least 1"):
        m.top_k_accuracy(*some_predictions(), k=0)
    with pytest.raises(ValueError, match="num_bins"):
        m.expected_calibration_error(*some_predictions(), num_bins=0)
    with pytest.raises(ValueError, match=r"AUROC needs .* OOD images"):
        m.out_of_distribution_auroc([0.1, 0.2], [0, 1])
    with pytest.raises(ValueError, match="one score"):
        m.out_of_distribution_auroc(np.zeros((2, 3)), [0, -1])
    with pytest.raises(ValueError, match="one shape"):
        m.pseudo_label_quality(pseudo_labels=[0, 1], mask=[1], hidden_labels=[0, 1])


def test_pseudo_label_quality_counts_an_ood_image_that_passes_as_wrong():
    quality = m.pseudo_label_quality(
        pseudo_labels=torch.tensor([0, 1, 2, 0, 1, 1]),
        mask=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        hidden_labels=torch.tensor([0, 1, 2, -1, -1, 0]),
    )
    assert quality == {"precision": 0.5, "coverage": pytest.approx(4 / 6), "ood_share_passed": 0.5}


def test_pseudo_label_quality_counts_images_by_their_weight():
    quality = m.pseudo_label_quality(pseudo_labels=[0, 1], mask=[0.75, 0.25], hidden_labels=[0, -1])
    assert quality == {"precision": 0.75, "coverage": 0.5, "ood_share_passed": 0.25}


def test_pseudo_label_quality_without_anything_to_judge_is_nan():
    quality = m.pseudo_label_quality(pseudo_labels=[0, 1], mask=[False, False], hidden_labels=[0, 1])
    assert quality["coverage"] == 0
    assert math.isnan(quality["precision"]) and math.isnan(quality["ood_share_passed"])


def metric_cases():
    logits, labels = some_predictions()
    scores, kinds = m.confidences(logits), np.where(labels > 4, -1, labels)
    return [
        (m.TopKAccuracy, logits, labels, {}, {"top1": m.top_k_accuracy(logits, labels)}),
        (m.TopKAccuracy, logits, labels, {"k": 5}, {"top5": m.top_k_accuracy(logits, labels, k=5)}),
        (m.MacroF1, logits, labels, {}, {"macro_f1": m.macro_f1(logits, labels)}),
        (m.ExpectedCalibrationError, logits, labels, {}, {"ece": m.expected_calibration_error(logits, labels)}),
        (m.OutOfDistributionAUROC, scores, kinds, {}, {"auroc": m.out_of_distribution_auroc(scores, kinds)}),
        (m.OutOfDistributionAUROC, logits, kinds, {}, {"auroc": m.out_of_distribution_auroc(scores, kinds)}),
    ]


@pytest.mark.parametrize(("metric_class", "predictions", "references", "arguments", "expected"), metric_cases())
def test_metric_objects_work_offline_in_batches_and_again_after_an_error(
    metric_class, predictions, references, arguments, expected, no_network, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    metric = metric_class(cache_dir=str(tmp_path / "cache"))
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=predictions, references=references, **arguments) == pytest.approx(expected)
    with pytest.raises(ValueError):
        metric.compute(predictions=predictions, references=references[:-1], **arguments)
    for _ in range(2):
        for start in range(0, len(references), 64):
            rows = slice(start, start + 64)
            metric.add_batch(predictions=torch.from_numpy(predictions[rows]), references=references[rows].tolist())
        assert metric.compute(**arguments) == pytest.approx(expected)
    assert os.listdir(tmp_path) == []


def test_metric_objects_at_the_same_time_do_not_mix(tmp_path):
    results = {}

    def work(seed):
        logits, labels = some_predictions(seed=seed)
        metric = m.TopKAccuracy(cache_dir=str(tmp_path))
        for row in range(200):
            metric.add(prediction=logits[row], reference=labels[row])
        results[seed] = (metric.compute()["top1"], m.top_k_accuracy(logits, labels))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(one == pytest.approx(other) for one, other in results.values())


def test_combined_metrics_take_all_rows_and_give_the_numbers_of_the_functions(no_network):
    logits, labels = some_predictions()
    labels[::4] = -1
    inside = labels >= 0
    combined = evaluate.combine(
        [m.TopKAccuracy(), m.TopKAccuracy(k=5), m.MacroF1(), m.ExpectedCalibrationError(), m.OutOfDistributionAUROC()]
    )
    expected = {
        "top1": m.top_k_accuracy(logits[inside], labels[inside]),
        "top5": m.top_k_accuracy(logits[inside], labels[inside], k=5),
        "macro_f1": m.macro_f1(logits[inside], labels[inside]),
        "ece": m.expected_calibration_error(logits[inside], labels[inside]),
        "auroc": m.out_of_distribution_auroc(m.confidences(logits), labels),
    }
    for start in range(0, 200, 64):
        combined.add_batch(predictions=logits[start : start + 64], references=labels[start : start + 64])
    assert combined.compute() == expected
    assert combined.compute(predictions=logits, references=labels) == expected
    assert m.classification_metrics(logits, labels) == expected  # equal, not nearly equal


def test_logits_reach_a_metric_unchanged(monkeypatch):
    logits = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    seen = []
    monkeypatch.setattr(m, "macro_f1", lambda logits, labels: seen.append(m.to_numpy(logits)) or 0.0)
    metric = m.MacroF1()
    metric.compute(predictions=logits, references=np.zeros(60, int))
    for rows in (slice(0, 59), slice(59, 60)):
        metric.add_batch(predictions=torch.from_numpy(logits[rows]), references=[0] * len(logits[rows]))
    metric.compute()
    assert all(np.array_equal(array, logits) for array in seen) and len(seen) == 2


def test_rows_of_another_number_of_classes_are_an_error():
    metric = m.TopKAccuracy()
    metric.add_batch(predictions=np.zeros((2, 3)), references=[0, 1])
    metric.add_batch(predictions=np.zeros((2, 5)), references=[0, 1])
    with pytest.raises(ValueError, match="lists"):
        metric.compute()


def test_the_loss_is_exact_over_the_in_distribution_images() -> None:
    logits, labels = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], np.float32), np.array([0, 0, -1])
    expected = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0))])
    assert m.compute_metrics(EvalPrediction(logits, labels))["loss"] == pytest.approx(expected)


def test_the_metric_of_the_best_model_is_measured_or_refused() -> None:
    for name, splits in (("eval_ece", {"": False}), ("auroc", {"": True}), ("far_auroc", {"near": False, "far": True})):
        m.check_best_metric(name, splits, open_set=False)
    m.check_best_metric("auroc_open_set", {"": True}, open_set=True)
    for name, splits in (
        *(("auroc", {"": False}), ("auroc_open_set", {"": True}), ("precision@0.95", {"": True})),
        *(("top1", {"near": True}), ("near_auroc", {"near": False, "far": True})),
    ):
        with pytest.raises(ValueError, match=f"metric_for_best_model '{name}' is not measured in this run's"):
            m.check_best_metric(name, splits, open_set=False)
    with pytest.raises(ValueError, match=r"Did you mean 'near_top1'.*Choose one of near_loss, near_top1"):
        m.check_best_metric("eval_top1", {"near": False}, open_set=False)


def test_logits_that_are_not_finite_are_refused_with_their_rows() -> None:
    logits = np.zeros((30, 3), np.float32)
    logits[4], logits[7, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"NaN or infinite for 2 of 30 images \(rows 4, 7\)"):
        m.classification_metrics(logits, np.full(30, 1))
    logits[:] = np.nan
    with pytest.raises(ValueError, match=r"\(rows 0, .*, 9 and 20 more\)"):
        m.check_outputs(logits)
    m.check_outputs(np.array([[0.0, -np.inf]]))  # a class that is left out
    m.check_outputs((logits,))  # outputs of the user's own preprocessing
