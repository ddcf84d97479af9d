"""Supervised and FixMatch, alone and with CCSSL, step by step against reference values; the registry and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccssl_hf.algorithms import ALGORITHMS, SSLBatch, algorithm_hyperparameters, build_algorithm
from ccssl_hf.algorithms.alignment import DistributionAlignment
from ccssl_hf.losses import class_aware_contrastive_loss
from conftest import SHARED, needs_shared

GOLDEN = sorted((SHARED / "golden").glob("step_fixmatch*.npz"))


def make_batch(
    num_labeled: int = 4, num_unlabeled: int = 12, num_classes: int = 5, dim: int = 8, seed: int = 0
) -> SSLBatch:
    generator = torch.Generator().manual_seed(seed)

    def logits(count: int) -> Tensor:
        return (3 * torch.randn(count, num_classes, generator=generator)).requires_grad_()

    def embeddings() -> Tensor:
        return F.normalize(torch.randn(num_unlabeled, dim, generator=generator), dim=1).requires_grad_()

    return SSLBatch(
        logits_labeled=logits(num_labeled),
        labels=torch.randint(num_classes, (num_labeled,), generator=generator),
        logits_weak=logits(num_unlabeled),
        logits_strong=logits(num_unlabeled),
        embeddings_strong=embeddings(),
        embeddings_contrast=embeddings(),
    )


def split(tensor: Tensor | None, sizes: list[int]) -> list[Any]:
    """The parts of a concatenated batch: labeled, weak, strong and, where there is one, contrastive; else None."""
    parts: list[Any] = [] if tensor is None else list(tensor.split(sizes[: 1 + (len(tensor) - sizes[0]) // sizes[1]]))
    return parts + [None] * (4 - len(parts))


@needs_shared
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_fixmatch_agrees_with_the_reference(path: Path) -> None:
    data = np.load(path)
    config = json.loads(str(data["config"]))
    algorithm = build_algorithm(config.pop("algorithm"), num_classes=int(data["num_classes"]), **config)
    contrastive = config["lambda_contrast"] > 0
    sizes = [int(data["batch_size"])] + 3 * [int(data["batch_size"] * data["mu"])]
    for step in range(int(data["steps"])):
        reference = {
            name.removeprefix(f"step{step}_"): data[name] for name in data.files if name.startswith(f"step{step}_")
        }
        logits = torch.tensor(reference["logits"], requires_grad=True)
        embeddings = torch.tensor(reference["embeddings"], requires_grad=True) if contrastive else None
        labeled, weak, strong, _ = split(logits, sizes)
        *_, embeddings_strong, embeddings_contrast = split(embeddings, sizes)
        result = algorithm(
            SSLBatch(
                logits_labeled=labeled,
                labels=torch.tensor(reference["labels"]),
                logits_weak=weak,
                logits_strong=strong,
                embeddings_strong=embeddings_strong,
                embeddings_contrast=embeddings_contrast,
            )
        )
        result.loss.backward()
        right = result.pseudo_labels == torch.tensor(reference["hidden_unlabeled_labels"])
        found = {
            "loss": result.loss.item(),
            **{name: term.item() for name, term in result.terms.items()},
            "mask_prob": result.mask.mean().item(),
            "pseudo_acc": (right * result.mask).sum().item() / result.mask.sum().item(),
            "grad_logits": logits.grad,
        }
        if embeddings is not None:
            found["grad_embeddings"] = embeddings.grad
        assert set(result.terms) == {name for name in reference if name.startswith("loss_")}
        for name, value in found.items():
            np.testing.assert_allclose(value, reference[name], rtol=1e-4, atol=1e-5, err_msg=f"step {step}, {name}")


def test_a_confidence_at_the_threshold_counts() -> None:
    batch = make_batch()
    (logits_weak,) = batch.read("logits_weak")
    threshold = logits_weak.softmax(1).amax(1).median().item()
    mask = build_algorithm("fixmatch", num_classes=5, confidence_threshold=threshold)(batch).mask
    assert mask is not None and mask.sum() == 7  # of 12: torch takes the lower of two medians


def test_fixmatch_trains_on_confident_images_and_averages_over_all() -> None:
    batch = make_batch()
    result = build_algorithm("fixmatch", num_classes=5, confidence_threshold=0.8, sharpen_temperature=0.5)(batch)
    assert batch.logits_weak is not None and batch.logits_strong is not None
    confidences, pseudo_labels = (batch.logits_weak / 0.5).softmax(1).max(1)
    used = confidences >= 0.8
    assert 0 < used.sum() < len(used)
    expected = F.cross_entropy(batch.logits_strong[used], pseudo_labels[used], reduction="sum") / len(used)
    torch.testing.assert_close(result.terms["loss_u"], expected)
    torch.testing.assert_close(result.loss, F.cross_entropy(batch.logits_labeled, batch.labels) + expected)
    assert torch.equal(result.mask, used.float()) and torch.equal(result.pseudo_labels, pseudo_labels)
    result.loss.backward()
    assert batch.logits_weak.grad is None


@pytest.mark.parametrize("name", ["supervised", "fixmatch"])
def test_contrast_is_added_to_any_algorithm(name: str) -> None:
    batch = make_batch()
    alone = build_algorithm(name, num_classes=5)(batch)
    options: Any = {"push_threshold": 0.5, "own_pair_weight": "squared"}
    result = build_algorithm(name, num_classes=5, lambda_contrast=2, contrast_temperature=0.1, **options)(batch)
    contrast = class_aware_contrastive_loss(
        embeddings=torch.stack([batch.embeddings_strong, batch.embeddings_contrast], dim=1),  # type: ignore[list-item]
        pseudo_labels=result.pseudo_labels,
        confidences=result.confidences,
        temperature=0.1,
        **options,
    )
    torch.testing.assert_close(result.terms["loss_contrast"], contrast.detach())
    torch.testing.assert_close(result.loss, alone.loss + 2 * contrast)
    assert batch.logits_weak is not None
    assert torch.equal(result.pseudo_labels, batch.logits_weak.argmax(1))


def test_supervised_reads_the_labels_alone() -> None:
    batch = SSLBatch(logits_labeled=torch.randn(4, 5), labels=torch.tensor([0, 1, 2, 3]))
    result = build_algorithm("supervised", num_classes=5)(batch)
    assert result.loss.item() == F.cross_entropy(batch.logits_labeled, batch.labels).item()
    assert list(result.terms) == ["loss_x"] and result.mask is None and result.pseudo_labels is None


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("supervised", {}, ""),
        ("supervised", {"lambda_contrast": 1}, "unlabeled contrastive_view embeddings"),
        ("fixmatch", {}, "unlabeled"),
        ("fixmatch", {"lambda_contrast": 1}, "unlabeled contrastive_view embeddings"),
    ],
)
def test_an_algorithm_says_what_it_reads(name: str, options: dict[str, Any], needs: str) -> None:
    algorithm = build_algorithm(name, num_classes=5, **options)
    for part in ("unlabeled", "contrastive_view", "embeddings", "index"):
        assert getattr(algorithm, f"needs_{part}") == (part in needs.split()), part
    assert algorithm.heads == {}


@pytest.mark.parametrize(
    ("options", "missing"), [({}, "logits_strong"), ({"lambda_contrast": 1}, "embeddings_contrast")]
)
def test_a_missing_part_of_the_batch_is_named_before_any_state_changes(options: dict[str, Any], missing: str) -> None:
    batch = make_batch()
    setattr(batch, missing, None)
    algorithm = build_algorithm("fixmatch", num_classes=5, distribution_alignment_window=2, **options)
    with pytest.raises(ValueError, match=missing):
        algorithm(batch)
    assert algorithm.state_dict()["alignment.count"] == 0


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[B, 7\]"):
        build_algorithm("fixmatch", num_classes=7)(make_batch())


def test_half_precision_is_computed_in_float32_under_autocast() -> None:
    batch = make_batch()
    half = SSLBatch(**{k: v if v is None or k == "labels" else v.detach().bfloat16() for k, v in vars(batch).items()})
    algorithm = build_algorithm("fixmatch", num_classes=5, lambda_contrast=1)
    expected = algorithm(half.upcast())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = algorithm(half)
    assert result.loss.dtype == torch.float32 and result.loss.item() == expected.loss.item()


def test_heads_are_brought_to_float32_too() -> None:
    head = tuple(torch.ones(2, 3, dtype=torch.bfloat16) for _ in range(3))
    batch = SSLBatch(
        logits_labeled=torch.ones(2, 3), labels=torch.ones(2, dtype=torch.int64), heads={"open": head}
    ).upcast()
    assert batch.heads is not None and [part.dtype for part in batch.heads["open"]] == 3 * [torch.float32]
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("window", [1, 3])
def test_alignment_divides_by_the_mean_of_the_last_batches(window: int) -> None:
    alignment, history = DistributionAlignment(4, window), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        probabilities = torch.randn(6, 4, generator=generator).softmax(1)
        history.append(probabilities.mean(0))
        expected = probabilities / torch.stack(history[-window:]).mean(0)
        torch.testing.assert_close(alignment(probabilities), expected / expected.sum(1, keepdim=True))


def test_alignment_survives_a_class_that_is_never_predicted() -> None:
    aligned = DistributionAlignment(3, 2)(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    assert aligned.isfinite().all()


def test_state_is_buffers_alone_and_resumes_a_run() -> None:
    def build() -> Any:
        return build_algorithm("fixmatch", num_classes=5, distribution_alignment_window=3)

    run = build()
    assert not list(run.parameters())
    losses = []
    for step in range(6):
        if step == 4:
            state = {name: tensor.clone() for name, tensor in run.state_dict().items()}
        losses.append(run(make_batch(seed=step)).loss.item())
    resumed = build()
    resumed.load_state_dict(state)
    assert [resumed(make_batch(seed=step)).loss.item() for step in (4, 5)] == losses[4:]


@pytest.mark.parametrize("window", [None, 0])
def test_alignment_is_off_by_zero_or_none(window: int | None) -> None:
    assert not build_algorithm("fixmatch", num_classes=5, distribution_alignment_window=window).state_dict()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_hyperparameter_has_a_type_a_default_and_help(name: str) -> None:
    table = algorithm_hyperparameters(name)
    assert {"lambda_contrast", "contrast_temperature", "push_threshold", "own_pair_weight"} <= set(table)
    sizes = {"num_unlabeled": 20, "embedding_dim": 8, "batch_size": 4, "mu": 3}
    defaults = {key: row.default for key, row in table.items()}
    assert build_algorithm(name, num_classes=5, **sizes).hyperparameters == defaults
    assert all(row.help.endswith(".") and row.type is not None for row in table.values())


def test_fixmatch_has_the_papers_defaults() -> None:
    assert {name: row.default for name, row in algorithm_hyperparameters("fixmatch").items()} == {
        "lambda_contrast": 0.0,
        "contrast_temperature": 0.07,
        "push_threshold": None,
        "own_pair_weight": "one",
        "confidence_threshold": 0.95,
        "lambda_u": 1.0,
        "sharpen_temperature": 1.0,
        "distribution_alignment_window": 0,
    }
    assert algorithm_hyperparameters("fixmatch")["confidence_threshold"].type is float


def test_hyperparameters_are_told_resolved() -> None:
    algorithm = build_algorithm("fixmatch", num_classes=5, lambda_u=2, push_threshold=0.9)
    assert json.loads(json.dumps(algorithm.hyperparameters))["lambda_u"] == 2.0
    assert isinstance(algorithm.hyperparameters["lambda_u"], float)
    assert algorithm.hyperparameters["push_threshold"] == 0.9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixmach", {}, "Did you mean 'fixmatch'.*supervised, fixmatch"),
        ("zzz", {}, "Unknown algorithm 'zzz'. Choose one of"),
        ("fixmatch", {"confidence_treshold": 0.9}, "fixmatch has no .*Did you mean 'confidence_threshold'.*lambda_u"),
        ("supervised", {"lambda_u": 1}, "supervised has no hyperparameter 'lambda_u'"),
        ("fixmatch", {"confidence_threshold": 1.5}, r"confidence_threshold is 1.5: choose a value in \[0, 1\]"),
        ("fixmatch", {"confidence_threshold": None}, "confidence_threshold is None: give a finite float"),
        ("fixmatch", {"push_threshold": -0.1}, r"push_threshold is -0.1: choose a value in \[0, 1\]"),
        ("fixmatch", {"lambda_u": -1}, "lambda_u is -1: choose a value at least 0"),
        ("fixmatch", {"lambda_u": float("nan")}, "lambda_u is nan: give a finite float"),
        ("fixmatch", {"lambda_u": "1"}, "lambda_u is '1': give a finite float"),
        ("fixmatch", {"lambda_contrast": True}, "lambda_contrast is True"),
        ("fixmatch", {"contrast_temperature": 0}, "contrast_temperature is 0: choose a value above 0"),
        ("fixmatch", {"sharpen_temperature": 0.0}, "sharpen_temperature is 0.0: choose a value above 0"),
        ("fixmatch", {"distribution_alignment_window": 2.5}, "distribution_alignment_window is 2.5: give a finite int"),
        ("fixmatch", {"distribution_alignment_window": -1}, "distribution_alignment_window is -1: choose"),
        ("fixmatch", {"own_pair_weight": "two"}, "own_pair_weight is 'two': choose one of one, squared"),
    ],
)
def test_a_wrong_name_or_value_is_an_error_that_names_the_fix(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_algorithm(name, num_classes=5, **options)
