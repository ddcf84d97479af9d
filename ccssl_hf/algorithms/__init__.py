"""Semi-supervised algorithms. A new one is a file here and a line in `ALGORITHMS`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from .base import Algorithm, SSLBatch, SSLLoss
from .fixmatch import FixMatch
from .hyperparameters import Hyperparameter
from .supervised import Supervised

__all__ = ["ALGORITHMS", "Algorithm", "SSLBatch", "SSLLoss", "algorithm_hyperparameters", "build_algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "supervised": Supervised,
    "fixmatch": FixMatch,
}

SIZES = ("num_unlabeled", "embedding_dim", "batch_size", "mu")
"""Facts of a run that some constructors take: images, dimensions, labeled images a batch, unlabeled ones for each."""


def _suggest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def _algorithm_class(name: str) -> type[Algorithm]:
    if name not in ALGORITHMS:
        known = list(ALGORITHMS)
        raise ValueError(f"Unknown algorithm {name!r}. {_suggest(name, known)}Choose one of {', '.join(known)}.")
    return ALGORITHMS[name]


def algorithm_hyperparameters(name: str) -> dict[str, Hyperparameter]:
    """Type, default and help of each hyperparameter of the algorithm `name`.

    Raises:
        ValueError: There is no such algorithm.
    """
    return _algorithm_class(name).hyperparameters_class.table()


def build_algorithm(name: str, *, num_classes: int, **hyperparameters: Any) -> Algorithm:
    """The algorithm `name`, with CCSSL composed on it where `lambda_contrast` is above 0.

    Args:
        name: A key of `ALGORITHMS`.
        num_classes: `C`.
        **hyperparameters: See `algorithm_hyperparameters`. Besides these the facts of the run that `SIZES` names,
            which an algorithm that has no use for them ignores.

    Returns:
        A module without parameters: call it with an `SSLBatch`, get an `SSLLoss`.

    Raises:
        ValueError: The algorithm or a hyperparameter is unknown, a value out of range, or a fact of the run missing.
    """
    algorithm = _algorithm_class(name)
    sizes = {key: hyperparameters.pop(key) for key in SIZES if key in hyperparameters}
    accepted = list(algorithm_hyperparameters(name))
    for key in hyperparameters:
        if key not in accepted:
            raise ValueError(
                f"{name} has no hyperparameter {key!r}. {_suggest(key, accepted)}It takes {', '.join(accepted)}."
            )
    missing = [key for key in algorithm.sizes if sizes.get(key) is None]
    if missing:
        raise ValueError(f"{name} needs {', '.join(f'{key}=...' for key in missing)} besides num_classes.")
    settings = algorithm.hyperparameters_class(**hyperparameters)
    return algorithm(settings, num_classes=num_classes, **{key: sizes[key] for key in algorithm.sizes})
