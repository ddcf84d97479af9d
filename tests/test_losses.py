"""The contrastive loss against reference values and a naive implementation, and its memory use."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccssl_hf.losses import _WeightedLogPartition, class_aware_contrastive_loss, masked_cross_entropy
from conftest import SHARED, needs_shared

GOLDEN = sorted((SHARED / "golden").glob("contrastive_*.npz"))


def make(
    num_images: int, num_classes: int = 3, dim: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of the loss by argument name."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(num_images, 2, dim, generator=generator, dtype=dtype), dim=-1)
    return {
        "embeddings": embeddings.requires_grad_(),
        "pseudo_labels": torch.randint(num_classes, (num_images,), generator=generator),
        "confidences": torch.rand(num_images, generator=generator, dtype=dtype),
    }


def definition(
    *,
    embeddings: Tensor,
    pseudo_labels: Tensor,
    confidences: Tensor,
    temperature: float = 0.07,
    push_threshold: float | None = None,
    own_pair_weight: str = "one",
) -> Tensor:
    """The definition as loops over pairs, in float64."""
    views = [(image, embeddings[image, view].double()) for image in range(len(embeddings)) for view in range(2)]
    q = confidences.double().tolist()
    confident = [push_threshold is None or value >= push_threshold for value in confidences]
    total = torch.zeros((), dtype=torch.float64)
    for i, (image_i, z_i) in enumerate(views):
        partition = sum(torch.exp(z_i @ z_k / temperature) for k, (_, z_k) in enumerate(views) if k != i)
        weighted, weights = torch.zeros((), dtype=torch.float64), 0.0
        for j, (image_j, z_j) in enumerate(views):
            if i == j:
                continue
            if image_i == image_j:
                weight = 1.0 if own_pair_weight == "one" else q[image_i] ** 2
            else:
                both = (
                    confident[image_i] and confident[image_j] and bool(pseudo_labels[image_i] == pseudo_labels[image_j])
                )
                weight = q[image_i] * q[image_j] if both else 0.0
            weighted = weighted + weight * torch.log(torch.exp(z_i @ z_j / temperature) / partition)
            weights += weight
        if weights > 0:
            total = total + weighted / weights
    return -(temperature / 0.07) * total / len(views)


@needs_shared
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_agrees_with_the_reference(path: Any) -> None:
    data = np.load(path)
    embeddings = torch.tensor(data["embeddings"], requires_grad=True)
    push_threshold = float(data["push_threshold"])
    loss = class_aware_contrastive_loss(
        embeddings=embeddings,
        pseudo_labels=torch.tensor(data["pseudo_labels"]),
        confidences=torch.tensor(data["confidences"]),
        temperature=float(data["temperature"]),
        push_threshold=None if push_threshold < 0 else push_threshold,
        own_pair_weight=str(data["own_pair_weight"]),  # type: ignore[arg-type]
    )
    loss.backward()
    np.testing.assert_allclose(loss.item(), data["loss"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embeddings.grad, data["grad"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_pair_weight", ["one", "squared"])
@pytest.mark.parametrize("push_threshold", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("num_images", "num_classes", "temperature"), [(1, 1, 0.07), (2, 1, 0.5), (5, 2, 0.07), (9, 4, 0.2)]
)
def test_agrees_with_its_definition(
    num_images: int, num_classes: int, temperature: float, push_threshold: float | None, own_pair_weight: str
) -> None:
    inputs = make(num_images, num_classes)
    inputs["confidences"][0] = push_threshold or 0.5  # exactly at the threshold
    options: Any = {"temperature": temperature, "push_threshold": push_threshold, "own_pair_weight": own_pair_weight}
    expected = definition(**inputs, **options)
    (expected_grad,) = torch.autograd.grad(expected, inputs["embeddings"])
    loss = class_aware_contrastive_loss(**inputs, **options)
    (grad,) = torch.autograd.grad(loss, inputs["embeddings"])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_pair_weight", ["one", "squared"])
def test_gradient_is_that_of_finite_differences(own_pair_weight: Any) -> None:
    inputs = make(6, dtype=torch.float64)

    def loss(embeddings: Tensor) -> Tensor:
        options: Any = {"temperature": 0.3, "push_threshold": 0.3, "own_pair_weight": own_pair_weight}
        return class_aware_contrastive_loss(**{**inputs, "embeddings": embeddings}, **options)

    assert torch.autograd.gradcheck(loss, inputs["embeddings"])


def test_order_of_images_and_of_views_does_not_matter() -> None:
    inputs = make(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    shuffled["embeddings"] = shuffled["embeddings"].flip(1)
    expected = class_aware_contrastive_loss(**inputs, push_threshold=0.3)
    torch.testing.assert_close(class_aware_contrastive_loss(**shuffled, push_threshold=0.3), expected)


@pytest.mark.parametrize("values", [(0, 1, 2), (-5, 2**62, 7)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_only_equality_of_labels_counts(values: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(12)
    expected = class_aware_contrastive_loss(**inputs)
    labels = (
        torch.tensor(values)[inputs["pseudo_labels"]] if dtype == torch.int64 else inputs["pseudo_labels"].to(dtype)
    )
    torch.testing.assert_close(class_aware_contrastive_loss(**{**inputs, "pseudo_labels": labels}), expected)


def test_chunks_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(23, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(10, generator=generator, dtype=torch.float64)
    results = []
    for chunk_rows in (1, 3, 10, None):
        value = _WeightedLogPartition.apply(keys[5:15], keys, weights, 5, chunk_rows)
        results.append((value, *torch.autograd.grad(value, keys)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_half_precision_is_computed_in_float32_even_under_autocast() -> None:
    inputs = make(12)
    half = inputs["embeddings"].detach().bfloat16()
    expected = class_aware_contrastive_loss(**{**inputs, "embeddings": half.float()})
    half.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = class_aware_contrastive_loss(**{**inputs, "embeddings": half})
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    loss.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_an_image_without_any_positive_adds_zero() -> None:
    inputs = make(4)
    inputs["confidences"] = torch.tensor([0.0, 0.0, 0.9, 0.8])
    loss = class_aware_contrastive_loss(**inputs, own_pair_weight="squared")
    torch.testing.assert_close(loss.double(), definition(**inputs, own_pair_weight="squared"), rtol=1e-5, atol=1e-5)
    inputs["confidences"] = torch.zeros(4)
    loss = class_aware_contrastive_loss(**inputs, own_pair_weight="squared")
    loss.backward()
    assert loss.item() == 0
    assert inputs["embeddings"].grad is not None and not inputs["embeddings"].grad.any()


def test_confidences_get_no_gradient_and_no_gradient_is_needed() -> None:
    inputs = make(5)
    expected = class_aware_contrastive_loss(**inputs)
    with torch.no_grad():
        assert class_aware_contrastive_loss(**inputs).item() == expected.item()
    inputs["confidences"].requires_grad_()
    class_aware_contrastive_loss(**inputs).backward()
    assert inputs["confidences"].grad is None
    assert not class_aware_contrastive_loss(**{**inputs, "embeddings": inputs["embeddings"].detach()}).requires_grad


def test_very_low_temperature_stays_finite() -> None:
    inputs = make(8)
    loss = class_aware_contrastive_loss(**inputs, temperature=1e-3)
    loss.backward()
    assert math.isfinite(loss.item())
    assert inputs["embeddings"].grad is not None and inputs["embeddings"].grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(4, 8)}, r"\[N, 2, D\]"),
        ({"embeddings": torch.zeros(4, 3, 8)}, r"\[N, 2, D\]"),
        ({"embeddings": torch.zeros(0, 2, 8)}, "N >= 1"),
        ({"embeddings": torch.zeros(4, 2, 8, dtype=torch.int64)}, "floating point"),
        ({"pseudo_labels": torch.rand(4)}, "`pseudo_labels` must be integers"),
        ({"pseudo_labels": torch.ones(4, dtype=torch.bool)}, "`pseudo_labels` must be integers"),
        ({"pseudo_labels": torch.zeros(3, dtype=torch.int64)}, r"\[4\]"),
        ({"confidences": torch.zeros(4, dtype=torch.int64)}, "`confidences` must be floating point"),
        ({"confidences": torch.zeros(4, 1)}, r"\[4\]"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"push_threshold": 90}, "`push_threshold` must be a confidence"),
        ({"own_pair_weight": "two"}, "one of \\('one', 'squared'\\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_aware_contrastive_loss(**{**make(4), **change})


def test_swapped_arguments_raise() -> None:
    inputs = make(4)
    with pytest.raises(ValueError, match="pseudo_labels"):
        class_aware_contrastive_loss(
            embeddings=inputs["embeddings"], pseudo_labels=inputs["confidences"], confidences=inputs["pseudo_labels"]
        )
    with pytest.raises(TypeError):
        class_aware_contrastive_loss(*inputs.values())  # type: ignore[misc]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_memory_is_linear_in_the_batch() -> None:
    """8,192 images have 2**28 pairs of views, 1 GiB per matrix; a step may use a tenth of that."""
    code = """
import re, torch
from ccssl_hf.losses import class_aware_contrastive_loss
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
embeddings = torch.nn.functional.normalize(torch.randn(8192, 2, 64), dim=-1).requires_grad_()
labels, confidences = torch.randint(10, (8192,)), torch.rand(8192)
def step(n):
    views, y, q = embeddings[:n], labels[:n], confidences[:n]
    loss = class_aware_contrastive_loss(embeddings=views, pseudo_labels=y, confidences=q)
    loss.backward()
step(64)
before = peak()
step(8192)
print(peak() - before)
"""
    mebibytes = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert mebibytes < 100


def test_masked_cross_entropy_averages_over_masked_images_too() -> None:
    logits, targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    loss = masked_cross_entropy(logits=logits, targets=targets, mask=torch.tensor([1.0, 0.0, 0.5, 0.0]))
    log_probabilities = logits.log_softmax(1)
    torch.testing.assert_close(loss, -(log_probabilities[0, 0] + 0.5 * log_probabilities[2, 1]) / 4)
    soft = masked_cross_entropy(logits=logits, targets=F.one_hot(targets, 3).float(), mask=torch.ones(4))
    torch.testing.assert_close(soft, F.cross_entropy(logits, targets))
