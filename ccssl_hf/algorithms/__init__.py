"""Semi-supervised algorithms. A new one is a file here and a line in `ALGORITHMS`."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from ..errors import near_misses
from .base import CCSSL_PAPER, Algorithm, Paper, SSLBatch, SSLLoss
from .comatch import CoMatch
from .fixmatch import FixMatch
from .flexmatch import FlexMatch
from .freematch import FreeMatch
from .hyperparameters import Hyperparameter
from .iomatch import IOMatch
from .simmatch import SimMatch
from .softmatch import SoftMatch
from .supervised import Supervised

__all__ = [
    "ALGORITHMS",
    "CCSSL_PAPER",
    "Algorithm",
    "Paper",
    "SSLBatch",
    "SSLLoss",
    "algorithm_hyperparameters",
    "algorithm_table",
    "build_algorithm",
]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "supervised": Supervised,
    "fixmatch": FixMatch,
    "comatch": CoMatch,
    "flexmatch": FlexMatch,
    "freematch": FreeMatch,
    "softmatch": SoftMatch,
    "simmatch": SimMatch,
    "iomatch": IOMatch,
}

SIZES = ("num_unlabeled", "embedding_dim", "batch_size", "mu")
"""Facts of a run that some constructors take: images, dimensions, labeled images a batch (over all processes),
unlabeled ones for each."""


def _algorithm_class(name: str) -> type[Algorithm]:
    if name not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"Unknown algorithm {name!r}.{near_misses(name, ALGORITHMS)} Choose one of {known}.")
    return ALGORITHMS[name]


def algorithm_hyperparameters(name: str) -> dict[str, Hyperparameter]:
    """Type, default and help of each hyperparameter of the algorithm `name`.

    Raises:
        ValueError: There is no such algorithm.
    """
    return _algorithm_class(name).hyperparameters_class.table()


def algorithm_table() -> list[dict[str, Any]]:
    """What there is to say of each algorithm, read from its class.

    Returns:
        A row for each, in the order of `ALGORITHMS`: `algorithm`, its name; `paper`, the title, and `arxiv`, the number
        (both None for the baseline); `terms`, the loss terms without CCSSL's; `hyperparameters`, name → default;
        `views` that it reads of unlabeled images without CCSSL, of "weak", "strong" and "contrastive".
    """
    return [
        {
            "algorithm": name,
            "paper": algorithm.paper and algorithm.paper.title,
            "arxiv": algorithm.paper and algorithm.paper.arxiv,
            "terms": list(algorithm.terms),
            "hyperparameters": {key: row.default for key, row in algorithm.hyperparameters_class.table().items()},
            "views": [view.name.lower() for view in algorithm.views],
        }
        for name, algorithm in ALGORITHMS.items()
    ]


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
    accepted = algorithm_hyperparameters(name)
    for key in hyperparameters:
        if key not in accepted:
            raise ValueError(
                f"{name} has no hyperparameter {key!r}.{near_misses(key, accepted)} It takes {', '.join(accepted)}."
            )
    wanted = {key: each.default for key, each in signature(algorithm).parameters.items() if key in SIZES}
    missing = [key for key, default in wanted.items() if default is Parameter.empty and sizes.get(key) is None]
    if missing:
        raise ValueError(f"{name} needs {', '.join(f'{key}=...' for key in missing)} besides num_classes.")
    settings = algorithm.hyperparameters_class(**hyperparameters)
    return algorithm(settings, num_classes=num_classes, **{key: sizes[key] for key in wanted if key in sizes})
