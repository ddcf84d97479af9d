"""Types of hyperparameters with help text and range. Each algorithm sets its own defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..losses import OwnPairWeight

_RANGES: dict[str, Callable[[float], bool]] = {
    "": lambda value: True,
    "above 0": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}

# Type, help text and, unless every value is allowed, a key of _RANGES.
LambdaContrast = Annotated[float, "Weight of the class-aware contrastive loss; 0 turns CCSSL off.", "at least 0"]
ContrastTemperature = Annotated[float, "Temperature of the class-aware contrastive loss.", "above 0"]
PushThreshold = Annotated[
    float | None,
    "Minimum confidence for class-wise pairs in the contrastive loss (T_push); None: no threshold.",
    "in [0, 1]",
]
OwnPair = Annotated[
    OwnPairWeight, "Weight of the pair of views of one image: 1 ('one') or its confidence squared ('squared')."
]
ConfidenceThreshold = Annotated[float, "Minimum confidence at which a pseudo label is used.", "in [0, 1]"]
LambdaU = Annotated[float, "Weight of the loss on unlabeled images.", "at least 0"]
SharpenTemperature = Annotated[float, "Temperature that sharpens pseudo labels; 1: no sharpening.", "above 0"]
AlignmentWindow = Annotated[
    int | None, "Number of batches for distribution alignment, including the current one; 0: none.", "at least 0"
]
GraphTemperature = Annotated[float, "Temperature of the similarities between embeddings.", "above 0"]
GraphThreshold = Annotated[float, "Minimum similarity of two pseudo labels for an edge in the graph.", "in [0, 1]"]
LambdaGraph = Annotated[float, "Weight of the loss on the similarities between embeddings.", "at least 0"]
MemoryBatches = Annotated[int, "Number of batches whose embeddings the memory bank holds.", "at least 1"]
SmoothingAlpha = Annotated[
    float,
    "Weight of the classifier in pseudo labels; the rest comes from the memory bank; 1: no smoothing.",
    "in [0, 1]",
]
Momentum = Annotated[
    float, "Momentum of the running pseudo-label statistics (not the optimizer's momentum).", "in [0, 1]"
]
NSigma = Annotated[float, "Divides σ: higher values lower the weight below the mean confidence faster.", "above 0"]
ThresholdWarmup = Annotated[bool, "Lower the thresholds while few unlabeled images have a pseudo label."]
UseQuantile = Annotated[bool, "Follow the 0.8 quantile of the confidences in a batch instead of their mean."]
ClipThreshold = Annotated[bool, "Limit the global threshold to 0.95."]
LambdaFairness = Annotated[float, "Weight of the loss that keeps predictions balanced over classes.", "at least 0"]
OpenThreshold = Annotated[float, "Minimum probability at which an open-set pseudo label is used.", "in [0, 1]"]
LambdaOneVsAll = Annotated[float, "Weight of the one-vs-all loss on labeled images.", "at least 0"]
LambdaOpen = Annotated[float, "Weight of the open-set loss on unlabeled images.", "at least 0"]


class Hyperparameter(NamedTuple):
    """Default, type, help text and range of a hyperparameter of one algorithm."""

    default: Any
    type: Any
    help: str
    range: str = ""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The hyperparameters of CCSSL, which every algorithm has. A subclass adds its own, without a decorator.

    Raises a `ValueError` if a value has the wrong type or is out of range.
    """

    lambda_contrast: LambdaContrast = 0.0
    contrast_temperature: ContrastTemperature = 0.07
    push_threshold: PushThreshold = None
    own_pair_weight: OwnPair = "one"

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, wanted in self.table().items():
            value, kinds = getattr(self, name), get_args(wanted.type) or (wanted.type,)
            if get_origin(wanted.type) is Literal:
                if value not in kinds:
                    raise ValueError(f"{name} is {value!r}: choose one of {', '.join(kinds)}.")
            elif value is not None or NoneType not in kinds:
                number = kinds[0]
                fits = isinstance(value, int | float) and isinstance(value, bool) == (number is bool)
                if not (fits and math.isfinite(value) and number(value) == value):
                    raise ValueError(f"{name} is {value!r}: give a finite {number.__name__}.")
                if not _RANGES[wanted.range](value):
                    raise ValueError(f"{name} is {value!r}: choose a value {wanted.range}.")
                object.__setattr__(self, name, number(value))  # an int where a float is wanted becomes one

    @classmethod
    def table(cls) -> dict[str, Hyperparameter]:
        """Returns the hyperparameters by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {field.name: Hyperparameter(field.default, *get_args(hints[field.name])) for field in fields(cls)}
