"""Help text and range of each hyperparameter, shared by all algorithms; each algorithm sets its own defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..losses import OwnPairWeight


@dataclass(frozen=True)
class Spec:
    """Help text and range of a hyperparameter; a value must be greater than `above`."""

    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf

    def range(self) -> str:
        """Describes the range; empty if every value is allowed."""
        if self.maximum < math.inf:
            return f"in [{self.minimum:g}, {self.maximum:g}]"
        if self.minimum > -math.inf:
            return f"at least {self.minimum:g}"
        return f"above {self.above:g}" if self.above > -math.inf else ""


def _share(text: str) -> Spec:
    return Spec(text, minimum=0, maximum=1)


LambdaContrast = Annotated[float, Spec("Weight of the class-aware contrastive loss; 0 turns CCSSL off.", minimum=0)]
ContrastTemperature = Annotated[float, Spec("Temperature of the class-aware contrastive loss.", above=0)]
PushThreshold = Annotated[
    float | None,
    _share("Minimum confidence for class-wise pairs in the contrastive loss (T_push); None: no threshold."),
]
OwnPair = Annotated[
    OwnPairWeight, Spec("Weight of the pair of views of one image: 1 ('one') or its confidence squared ('squared').")
]
ConfidenceThreshold = Annotated[float, _share("Minimum confidence at which a pseudo label is used.")]
LambdaU = Annotated[float, Spec("Weight of the loss on unlabeled images.", minimum=0)]
SharpenTemperature = Annotated[float, Spec("Temperature that sharpens pseudo labels; 1: no sharpening.", above=0)]
AlignmentWindow = Annotated[
    int | None, Spec("Number of batches for distribution alignment, including the current one; 0: none.", minimum=0)
]
GraphTemperature = Annotated[float, Spec("Temperature of the similarities between embeddings.", above=0)]
GraphThreshold = Annotated[float, _share("Minimum similarity of two pseudo labels for an edge in the graph.")]
LambdaGraph = Annotated[float, Spec("Weight of the loss on the similarities between embeddings.", minimum=0)]
MemoryBatches = Annotated[int, Spec("Number of batches whose embeddings the memory bank holds.", minimum=1)]
SmoothingAlpha = Annotated[
    float, _share("Weight of the classifier in pseudo labels; the rest comes from the memory bank; 1: no smoothing.")
]
Momentum = Annotated[float, _share("Momentum of the running pseudo-label statistics (not the optimizer's momentum).")]
NSigma = Annotated[float, Spec("Divides σ: higher values lower the weight below the mean confidence faster.", above=0)]
ThresholdWarmup = Annotated[bool, Spec("Lower the thresholds while few unlabeled images have a pseudo label.")]
UseQuantile = Annotated[bool, Spec("Follow the 0.8 quantile of the confidences in a batch instead of their mean.")]
ClipThreshold = Annotated[bool, Spec("Limit the global threshold to 0.95.")]
LambdaFairness = Annotated[float, Spec("Weight of the loss that keeps predictions balanced over classes.", minimum=0)]
OpenThreshold = Annotated[float, _share("Minimum probability at which an open-set pseudo label is used.")]
LambdaOneVsAll = Annotated[float, Spec("Weight of the one-vs-all loss on labeled images.", minimum=0)]
LambdaOpen = Annotated[float, Spec("Weight of the open-set loss on unlabeled images.", minimum=0)]


class Hyperparameter(NamedTuple):
    """Type, default and help text of a hyperparameter of one algorithm."""

    type: Any
    default: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The hyperparameters of CCSSL, which every algorithm has. A subclass adds those of an algorithm.

    Raises:
        ValueError: A value has the wrong type or is out of range.
    """

    lambda_contrast: LambdaContrast = 0.0
    contrast_temperature: ContrastTemperature = 0.07
    push_threshold: PushThreshold = None
    own_pair_weight: OwnPair = "one"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            kind, spec = get_args(hint)
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind, spec))

    @classmethod
    def table(cls) -> dict[str, Hyperparameter]:
        """Returns type, default and help text of each hyperparameter by name."""
        hints = get_type_hints(cls, include_extras=True)
        specs = {field.name: (field.default, *get_args(hints[field.name])) for field in fields(cls)}
        return {name: Hyperparameter(kind, default, spec.help) for name, (default, kind, spec) in specs.items()}


def _checked(name: str, value: Any, kind: Any, spec: Spec) -> Any:
    """Returns `value` converted to `kind`, as an int where a float is expected."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(get_args(kind))}.")
        return value
    kinds = set(get_args(kind)) or {kind}  # the members of `float | None`, or `float` alone
    if value is None and NoneType in kinds:
        return None
    number = next(iter(kinds - {NoneType}))
    if number is bool or isinstance(value, bool):
        fits = number is bool and isinstance(value, bool)
    else:
        fits = isinstance(value, int | float) and math.isfinite(value) and number(value) == value
    if not fits:
        raise ValueError(f"{name} is {value!r}: give a finite {number.__name__}.")
    if not (spec.minimum <= value <= spec.maximum and value > spec.above):
        raise ValueError(f"{name} is {value!r}: choose a value {spec.range()}.")
    return number(value)
