"""Each algorithm against loops written from its paper, and edge cases of its state."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccssl_hf.algorithms import SSLBatch, build_algorithm
from ccssl_hf.algorithms.state import MemoryBank
from ccssl_hf.backbones import build_head, describe_head
from test_algorithms import SIZES, build, make_batch

CLASSES, STEPS = 5, 7


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * logits.log_softmax(0)).sum()


def aligned_by_loop(probabilities: Tensor, history: deque[Tensor]) -> Tensor:
    history.append(probabilities.mean(0))
    aligned = probabilities / torch.stack(list(history)).mean(0)
    return aligned / aligned.sum(1, keepdim=True)


def read(batch: SSLBatch, *names: str) -> list[Tensor]:
    return [part.detach() for part in batch.read(*names)]


# ------------------------------------------------------------------------------------------------------------- memory


def test_the_memory_bank_is_exact_where_the_ring_wraps() -> None:
    bank, everything = MemoryBank(7, 3, 2), []
    generator = torch.Generator().manual_seed(0)
    for count in (3, 3, 3, 2, 7, 5, 1):  # 7 is no multiple of them: writes straddle the end
        rows = torch.randn(count, 5, generator=generator)
        bank.write(rows[:, :3], rows[:, 3:])
        everything += list(rows)
        held = torch.cat([bank.embeddings, bank.probabilities], dim=1)
        ages = range(max(0, len(everything) - 7), len(everything))
        expected = torch.zeros(7, 5)
        for age in ages:
            expected[age % 7] = everything[age]
        assert torch.equal(held, expected) and bank.written == len(everything)


def test_rows_not_yet_written_are_out_of_reach() -> None:
    bank, query = MemoryBank(4, 3, 2), F.normalize(torch.randn(2, 3), dim=1)
    assert bank.similarities(query, 0.1).softmax(1).isfinite().all()
    bank.write(torch.eye(3)[:2], torch.eye(2))
    expected = torch.cat([(query[:, :2] / 0.1).softmax(1), torch.zeros(2, 2)], dim=1)
    torch.testing.assert_close(bank.similarities(query, 0.1).softmax(1), expected)


def test_more_rows_than_the_memory_bank_holds_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 embeddings do not fit into a memory bank of 4: build the algorithm with"):
        MemoryBank(4, 3, 2).write(torch.ones(5, 3), torch.ones(5, 2))
    algorithm = build_algorithm("comatch", num_classes=5, embedding_dim=8, batch_size=1, mu=3, memory_batches=1)
    with pytest.raises(ValueError, match="do not fit"):
        algorithm(make_batch())


# ------------------------------------------------------------------------------------------------- CoMatch and SimMatch


def test_comatch_agrees_with_loops() -> None:
    options = {"memory_batches": 2, "distribution_alignment_window": 3, "graph_threshold": 0.3, "smoothing_alpha": 0.8}
    algorithm = build("comatch", confidence_threshold=0.6, **options)
    history: deque[Tensor] = deque(maxlen=3)
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=2 * (4 + 12))
    for step in range(STEPS):
        batch = make_batch(step)
        weak, strong, labeled, z_labeled, z_weak, z_strong, z_contrast = read(
            batch,
            *("logits_weak", "logits_strong", "logits_labeled"),
            *(f"embeddings_{view}" for view in ("labeled", "weak", "strong", "contrast")),
        )
        aligned = aligned_by_loop(weak.softmax(1), history)
        targets = []
        for b in range(12):
            target = aligned[b]
            if step > 2:  # full for one step
                weights = torch.stack([(z_weak[b] @ z / 0.2).exp() for z, _ in memory])
                weights = weights / weights.sum()
                target = 0.8 * target + 0.2 * sum(w * p for w, (_, p) in zip(weights, memory, strict=True))
            targets.append(target)
        memory += zip(z_weak, aligned, strict=True)
        memory += zip(z_labeled, torch.eye(CLASSES)[batch.labels], strict=True)

        loss_u, loss_graph = torch.zeros(()), torch.zeros(())
        for b in range(12):
            if targets[b].max() >= 0.6:
                loss_u += cross_entropy(targets[b], strong[b]) / 12
            edges = torch.stack([torch.ones(()) if j == b else targets[b] @ targets[j] for j in range(12)])
            edges = torch.where(edges >= 0.3, edges, 0)
            loss_graph += cross_entropy(edges / edges.sum(), z_contrast @ z_strong[b] / 0.2) / 12

        result = algorithm(batch)
        expected = {"loss_x": F.cross_entropy(labeled, batch.labels), "loss_u": loss_u, "loss_graph": loss_graph}
        torch.testing.assert_close(result.terms, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.confidences, torch.stack(targets).amax(1))
        assert 0 < result.mask.sum() < 12


def test_simmatch_agrees_with_loops() -> None:
    options = {"memory_batches": 2, "distribution_alignment_window": 3, "smoothing_alpha": 0.8}
    algorithm = build("simmatch", confidence_threshold=0.6, graph_temperature=0.15, **options)
    history: deque[Tensor] = deque(maxlen=3)
    memory: deque[tuple[Tensor, int]] = deque(maxlen=2 * 4)
    for step in range(STEPS):
        batch = make_batch(step)
        weak, strong, z_labeled, z_weak, z_strong = read(
            batch, "logits_weak", "logits_strong", "embeddings_labeled", "embeddings_weak", "embeddings_strong"
        )
        memory += zip(z_labeled, batch.labels.tolist(), strict=True)
        aligned = aligned_by_loop(weak.softmax(1), history)
        loss_u, loss_instance = torch.zeros(()), torch.zeros(())
        confidences = []
        for b in range(12):
            similar = torch.stack([(z_weak[b] @ z / 0.15).exp() for z, _ in memory])
            similar = similar / similar.sum()
            unfolded = torch.stack([s * aligned[b, label] for s, (_, label) in zip(similar, memory, strict=True)])
            unfolded = unfolded / unfolded.sum()
            target = 0.8 * aligned[b]
            for s, (_, label) in zip(similar, memory, strict=True):
                target[label] += 0.2 * s
            confidences.append(target.max())
            if target.max() >= 0.6:
                loss_u += cross_entropy(target, strong[b]) / 12
            loss_instance += cross_entropy(unfolded, torch.stack([z_strong[b] @ z / 0.15 for z, _ in memory])) / 12
        result = algorithm(batch)
        torch.testing.assert_close(result.terms["loss_u"], loss_u)
        torch.testing.assert_close(result.terms["loss_graph"], loss_instance)
        torch.testing.assert_close(result.confidences, torch.stack(confidences))
        assert 0 < result.mask.sum() < 12


def test_simmatch_survives_a_bank_without_the_predicted_class() -> None:
    batch = make_batch()
    batch.labels = torch.zeros_like(batch.labels)
    batch.logits_weak = torch.tensor([[-200.0, 200.0, 0.0, 0.0, 0.0]]).expand(12, 5)
    result = build("simmatch", distribution_alignment_window=0)(batch)
    result.loss.backward()
    assert result.loss.isfinite() and batch.embeddings_strong is not None
    assert batch.embeddings_strong.grad is not None and batch.embeddings_strong.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ FlexMatch


def flexmatch_batch(index: list[int], classes: list[int], confidences: list[float]) -> SSLBatch:
    """A batch of the images `index` with the given predictions for the weak views."""
    probabilities = torch.full((len(index), CLASSES), 0.0)
    for row, (label, confidence) in enumerate(zip(classes, confidences, strict=True)):
        probabilities[row] = (1 - confidence) / (CLASSES - 1)
        probabilities[row, label] = confidence
    return SSLBatch(
        logits_labeled=torch.zeros(2, CLASSES),
        labels=torch.tensor([0, 1]),
        logits_weak=probabilities.log(),
        logits_strong=torch.zeros(len(index), CLASSES),
        index=torch.tensor(index),
    )


@pytest.mark.parametrize("warmup", [True, False])
def test_flexmatch_agrees_with_loops(warmup: bool) -> None:
    algorithm = build("flexmatch", confidence_threshold=0.8, threshold_warmup=warmup)
    status: dict[int, int] = {}
    for step in range(20):
        batch = make_batch(step)
        weak, index = read(batch, "logits_weak", "index")
        confidences, pseudo_labels = weak.softmax(1).max(1)
        counts = [list(status.values()).count(c) for c in range(CLASSES)]
        most = max([*counts, SIZES["num_unlabeled"] - len(status)] if warmup else counts) or 1
        mask = []
        for confidence, label in zip(confidences.tolist(), pseudo_labels.tolist(), strict=True):
            beta = counts[label] / most
            mask.append(float(confidence >= 0.8 * beta / (2 - beta)))
        for confidence, label, image in zip(confidences.tolist(), pseudo_labels.tolist(), index.tolist(), strict=True):
            if confidence >= 0.8:
                status[image] = label
        result = algorithm(batch)
        assert result.mask.tolist() == mask
        for image in range(SIZES["num_unlabeled"]):
            assert algorithm.status[image] == status.get(image, CLASSES), (step, image)
        assert torch.equal(algorithm.counts, torch.bincount(algorithm.status.int(), minlength=CLASSES + 1))
    assert min(mask) == 0 and len(status) > SIZES["num_unlabeled"] / 2


def test_flexmatch_lets_the_last_confident_occurrence_of_an_image_decide() -> None:
    algorithm: Any = build_algorithm("flexmatch", num_classes=CLASSES, num_unlabeled=4, confidence_threshold=0.8)
    algorithm(flexmatch_batch([2, 2, 2, 1, 2], [0, 3, 1, 4, 2], [0.9, 0.9, 0.9, 0.7, 0.5]))
    assert algorithm.status.tolist() == [5, 5, 1, 5] and algorithm.counts.tolist() == [0, 1, 0, 0, 0, 3]
    algorithm(flexmatch_batch([1, 2, 1, 2], [1, 1, 1, 3], [0.9, 0.9, 0.9, 0.9]))
    assert algorithm.status.tolist() == [5, 1, 3, 5] and algorithm.counts.tolist() == [0, 1, 0, 1, 0, 2]


@pytest.mark.parametrize(("num_classes", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_flexmatch_keeps_one_small_integer_an_image(num_classes: int, dtype: torch.dtype) -> None:
    algorithm: Any = build_algorithm(
        "flexmatch", num_classes=num_classes, num_unlabeled=1_000_000, confidence_threshold=0.5
    )
    assert algorithm.status.dtype == dtype
    assert sum(each.nbytes for each in algorithm.buffers()) < 1_000_000 * dtype.itemsize + 9 * (num_classes + 1)
    logits = torch.zeros(3, num_classes)
    logits[:, -1] = 50
    algorithm(
        SSLBatch(
            logits_labeled=logits[:1],
            labels=torch.tensor([0]),
            logits_weak=logits,
            logits_strong=logits,
            index=torch.tensor([0, 999_999, 999_999]),
        )
    )
    assert algorithm.status[[0, 1, 999_999]].tolist() == [num_classes - 1, num_classes, num_classes - 1]
    assert algorithm.counts[-2:].tolist() == [2, 999_998]


# ---------------------------------------------------------------------------------------------- FreeMatch and SoftMatch


@pytest.mark.parametrize(("quantile", "clip"), [(False, False), (True, False), (False, True)])
def test_freematch_agrees_with_loops(quantile: bool, clip: bool) -> None:
    momentum = 0.1
    algorithm = build("freematch", momentum=momentum, use_quantile=quantile, clip_threshold=clip)
    threshold, means, histogram = 1 / CLASSES, torch.full((CLASSES,), 1 / CLASSES), torch.full((CLASSES,), 1 / CLASSES)
    clipped = False
    for step in range(STEPS):
        batch = make_batch(step)
        if clip:
            assert batch.logits_weak is not None
            batch.logits_weak = 20 * batch.logits_weak
        weak, strong = read(batch, "logits_weak", "logits_strong")
        probabilities = weak.softmax(1)
        confidences, pseudo_labels = probabilities.max(1)
        centre = confidences.quantile(0.8) if quantile else confidences.mean()
        threshold = momentum * threshold + (1 - momentum) * float(centre)
        clipped = clipped or threshold > 0.95
        threshold = min(threshold, 0.95) if clip else threshold
        means = momentum * means + (1 - momentum) * probabilities.mean(0)
        frequency = torch.tensor([(pseudo_labels == c).float().mean() for c in range(CLASSES)])
        histogram = momentum * histogram + (1 - momentum) * frequency
        used = [b for b in range(12) if confidences[b] >= threshold * means[pseudo_labels[b]] / means.max()]

        mean_strong = strong[used].softmax(1).mean(0)
        seen = [(strong[used].argmax(1) == c).float().mean() for c in range(CLASSES)]
        above = [means[c] / histogram[c] for c in range(CLASSES)]
        below = [mean_strong[c] / seen[c] if seen[c] > 0 else torch.zeros(()) for c in range(CLASSES)]
        fairness = sum(a / sum(above) * math.log(b / sum(below) + 1e-12) for a, b in zip(above, below, strict=True))

        result = algorithm(batch)
        torch.testing.assert_close(algorithm.global_threshold.item(), threshold)
        torch.testing.assert_close((algorithm.class_probs, algorithm.label_histogram), (means, histogram))
        assert result.mask.nonzero().flatten().tolist() == used
        torch.testing.assert_close(result.terms["loss_fairness"], torch.as_tensor(fairness))
    assert clipped or not clip


def test_freematch_without_a_used_image_has_a_gradient_of_zero() -> None:
    batch = make_batch()
    assert batch.logits_strong is not None
    algorithm = build("freematch")
    (-algorithm._fairness_loss(batch.logits_strong, torch.zeros(12))).backward()
    assert batch.logits_strong.grad is not None and not batch.logits_strong.grad.any()


def test_softmatch_agrees_with_loops() -> None:
    momentum, means, mean, variance = 0.6, None, 1 / CLASSES, 1.0
    algorithm = build("softmatch", momentum=momentum, n_sigma=1.5)
    for step in range(STEPS):
        batch = make_batch(step)
        weak, strong = read(batch, "logits_weak", "logits_strong")
        probabilities = weak.softmax(1)
        batch_mean = probabilities.mean(0)
        means = batch_mean if means is None else momentum * means + (1 - momentum) * batch_mean
        aligned = probabilities / means
        confidences = (aligned / aligned.sum(1, keepdim=True)).amax(1)
        mean = momentum * mean + (1 - momentum) * float(confidences.mean())
        variance = momentum * variance + (1 - momentum) * float(((confidences - confidences.mean()) ** 2).sum() / 11)
        weights = [math.exp(-(min(c - mean, 0) ** 2) / (2 * variance / 1.5**2)) for c in confidences.tolist()]
        losses = F.cross_entropy(strong, probabilities.argmax(1), reduction="none")
        result = algorithm(batch)
        torch.testing.assert_close(result.mask, torch.tensor(weights), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            result.terms["loss_u"], (losses * torch.tensor(weights)).mean(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(result.confidences, probabilities.amax(1))
    assert min(weights) < 0.9 and max(weights) == 1


def test_softmatch_takes_a_single_image() -> None:
    result = build("softmatch")(make_batch(num_unlabeled=1))
    assert result.loss.isfinite() and result.mask.tolist() == [1]


# -------------------------------------------------------------------------------------------------------------- IOMatch


def test_iomatch_agrees_with_loops() -> None:
    algorithm = build("iomatch", confidence_threshold=0.6, open_threshold=0.55, distribution_alignment_window=3)
    history: deque[Tensor] = deque(maxlen=3)
    for step in range(STEPS):
        batch = make_batch(step)
        weak, strong, labeled = read(batch, "logits_weak", "logits_strong", "logits_labeled")
        assert batch.heads is not None
        pairs_labeled, pairs_weak, _ = (part.detach().unflatten(1, (2, CLASSES)) for part in batch.heads["one_vs_all"])
        open_strong = batch.heads["open"][2].detach()
        positive, negative = torch.zeros(()), torch.zeros(())
        for row, label in enumerate(batch.labels.tolist()):
            out, inside = pairs_labeled[row].log_softmax(0)
            positive -= inside[label] / 4
            negative += max(-out[c] for c in range(CLASSES) if c != label) / 4
        aligned = aligned_by_loop(weak.softmax(1), history)
        loss_u, loss_open, mask = torch.zeros(()), torch.zeros(()), []
        for b in range(12):
            out, inside = pairs_weak[b].softmax(0)
            target = torch.cat([aligned[b] * inside, (aligned[b] * out).sum()[None]])
            mask.append(float(aligned[b].max() >= 0.6 and (aligned[b] * out).sum() < 0.5))
            loss_u += mask[-1] * cross_entropy(aligned[b], strong[b]) / 12
            if target.max() >= 0.55:
                loss_open += cross_entropy(target, open_strong[b]) / 12
        result = algorithm(batch)
        expected = {
            "loss_x": F.cross_entropy(labeled, batch.labels),
            "loss_u": loss_u,
            "loss_one_vs_all": positive + negative,
            "loss_open": loss_open,
        }
        torch.testing.assert_close(result.terms, expected)
        assert result.mask.tolist() == mask and 0 < sum(mask) < 12


def test_iomatch_declares_heads_that_a_model_can_carry() -> None:
    for name, width in (("one_vs_all", 2 * CLASSES), ("open", CLASSES + 1)):
        head = build("iomatch").heads[name](16)
        assert isinstance(head, nn.Sequential) and head(torch.randn(3, 16)).shape == (3, width)
        assert describe_head(build_head(describe_head(head))) == describe_head(head)


def test_iomatch_scores_images_by_its_heads() -> None:
    algorithm, batch = build("iomatch"), make_batch()
    (weak,) = batch.read("logits_weak")
    assert batch.heads is not None
    pairs = batch.heads["one_vs_all"][1]
    score = algorithm.open_set_score(weak, {"one_vs_all": pairs})
    out, inside = pairs.unflatten(1, (2, CLASSES)).softmax(1).unbind(1)
    torch.testing.assert_close(score, (weak.softmax(1) * inside).sum(1).detach())
    torch.testing.assert_close(score, 1 - (weak.softmax(1) * out).sum(1).detach())
    assert score.shape == (12,) and not score.requires_grad
    for heads in (None, {"open": pairs}):
        with pytest.raises(ValueError, match="pass the model's heads"):
            algorithm.open_set_score(weak, heads)
