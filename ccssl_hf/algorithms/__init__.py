"""Semi-supervised algorithms by name. To add one, add a file here and a line to `ALGORITHMS`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    "build_algorithm",
    "hyperparameter_errors",
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


def algorithm_hyperparameters(name: str) -> dict[str, Hyperparameter]:
    """Returns the hyperparameters of the algorithm `name`. Raises a `ValueError` if it is unknown."""
    if name not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"Unknown algorithm {name!r}.{near_misses(name, ALGORITHMS)} Choose one of {known}.")
    return ALGORITHMS[name].hyperparameters_class.table()


def hyperparameter_errors(name: str, hyperparameters: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence for each hyperparameter that the algorithm `name` does not take, or that is out of range."""
    accepted, settings = algorithm_hyperparameters(name), ALGORITHMS[name].hyperparameters_class
    for key, value in hyperparameters.items():
        if key not in accepted:
            yield f"{name} has no hyperparameter {key!r}.{near_misses(key, accepted)} It takes {', '.join(accepted)}."
            continue
        try:
            settings(**{key: value})
        except ValueError as error:
            yield str(error)


def build_algorithm(name: str, *, num_classes: int, **hyperparameters: Any) -> Algorithm:
    """Builds a module without parameters that maps an `SSLBatch` to an `SSLLoss`.

    `hyperparameters` are those of `algorithm_hyperparameters(name)`; `lambda_contrast` above 0 adds CCSSL. They also
    hold the sizes of the run that the constructor takes, and may hold the other ones: `num_unlabeled` images,
    `embedding_dim`, `batch_size` (labeled images per batch, over all processes), `mu` (unlabeled per labeled image).
    Raises a `ValueError` if a name is unknown, a value is out of range, or a size is missing.
    """
    algorithm_hyperparameters(name)  # raises if the name is unknown
    algorithm = ALGORITHMS[name]
    wanted = {key: each.default for key, each in signature(algorithm).parameters.items() if key in SIZES}
    given = {key: hyperparameters.pop(key, None) for key in SIZES}
    sizes = {key: value for key, value in given.items() if key in wanted and value is not None}
    if errors := list(hyperparameter_errors(name, hyperparameters)):
        raise ValueError("\n".join(errors))
    missing = [f"{key}=..." for key, value in wanted.items() if value is Parameter.empty and key not in sizes]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)} in addition to num_classes.")
    return algorithm(algorithm.hyperparameters_class(**hyperparameters), num_classes=num_classes, **sizes)
