"""Every algorithm against several steps of the authors' code: terms, masks, statistics and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccssl_hf.algorithms import SSLBatch, algorithm_hyperparameters, build_algorithm
from conftest import SHARED, needs_shared

GOLDEN = sorted((SHARED / "golden").glob("step_*.npz"))

SAME = {"loss_c": "loss_graph", "Lcontrast": "loss_contrast", "weight": "mask", "selected": "mask_prob"}
"""Names in the files that differ from this package."""

NOT_HYPERPARAMETERS = {"mapping", "distribution_alignment", "note"}  # the only choice here, and a remark

INPUTS = {"logits", "embeddings", "labels", "index", "hidden_unlabeled_labels"}


def read_batch(step: dict[str, Any], sizes: list[int]) -> SSLBatch:
    """The batch of a step. Its floating-point tensors are views of the leaves in `step`."""

    def split(name: str) -> list[Any]:
        """The labeled, weak, strong and, if present, contrastive part of a concatenated batch; None if absent."""
        whole = step.get(name)
        parts: list[Any] = [] if whole is None else list(whole.split(sizes[: 1 + (len(whole) - sizes[0]) // sizes[1]]))
        return parts + [None] * (4 - len(parts))

    logits = split("logits") if "logits" in step else [step[f"logits_{view}"] for view in ("labeled", "weak", "strong")]
    embeddings = split("embeddings")
    heads = {name: tuple(split(f"logits_{name}")[:3]) for name in ("one_vs_all", "open") if f"logits_{name}" in step}
    return SSLBatch(
        logits_labeled=logits[0],
        labels=step["labels"],
        logits_weak=logits[1],
        logits_strong=logits[2],
        embeddings_labeled=embeddings[0],
        embeddings_weak=embeddings[1],
        embeddings_strong=embeddings[2],
        embeddings_contrast=embeddings[3],
        index=step.get("index"),
        heads=heads or None,
    )


@needs_shared
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_agrees_with_the_reference(path: Path) -> None:
    data = np.load(path)
    config = json.loads(str(data["config"]))
    name = config.pop("algorithm")
    sizes = {key: int(data[key]) for key in ("num_unlabeled", "embedding_dim", "batch_size", "mu") if key in data}
    options = {key: value for key, value in config.items() if key not in NOT_HYPERPARAMETERS}
    assert set(options) <= set(algorithm_hyperparameters(name))
    algorithm = build_algorithm(name, num_classes=int(data["num_classes"]), **sizes, **options)
    inliers = None
    if name == "iomatch":  # all that its mask leaves where any confidence is enough
        options["confidence_threshold"] = 0
        inliers = build_algorithm(name, num_classes=int(data["num_classes"]), **options)
    rows = [sizes["batch_size"]] + 3 * [sizes["batch_size"] * sizes["mu"]]
    for number in range(int(data["steps"])):
        prefix = f"step{number}_"
        reference = {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}
        inputs = {key for key in reference if key in INPUTS or key.startswith("logits_")}
        step = {key: torch.tensor(reference[key]) for key in inputs}
        for value in step.values():
            value.requires_grad_(value.is_floating_point())
        result = algorithm(read_batch(step, rows))
        result.loss.backward()

        assert result.mask is not None
        found: dict[str, Any] = {
            "loss": result.loss.detach(),
            **result.terms,
            "mask": result.mask,
            "mask_prob": result.mask.mean(),
            **{key: getattr(algorithm, key) for key in reference if hasattr(algorithm, key)},
            **{f"grad_{key}": value.grad for key, value in step.items()},
        }
        if inliers is not None:
            found["inlier"] = inliers(read_batch(step, rows)).mask.mean()
        if "hidden_unlabeled_labels" in step:
            right = result.pseudo_labels == step["hidden_unlabeled_labels"]
            found["pseudo_acc"] = (right * result.mask).sum() / result.mask.sum()
        terms = {SAME.get(key, key) for key in reference if key.startswith("loss_") or key == "Lcontrast"}
        assert terms <= set(result.terms)
        for key in reference.keys() - inputs:
            value = found[SAME.get(key, key)]
            np.testing.assert_allclose(
                value, reference[key], rtol=1e-4, atol=1e-5, err_msg=f"{path.stem}, step {number}, {key}"
            )
