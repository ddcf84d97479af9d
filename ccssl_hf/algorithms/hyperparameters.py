"""What each hyperparameter means and which values it takes, once for all algorithms; each sets its own defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..losses import OwnPairWeight


@dataclass(frozen=True)
class Spec:
    """The help text and the range of a hyperparameter."""

    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf

    def range(self) -> str:
        """The range in words, empty where every value is allowed."""
        if self.maximum < math.inf:
            return f"in [{self.minimum:g}, {self.maximum:g}]"
        if self.minimum > -math.inf:
            return f"at least {self.minimum:g}"
        return f"above {self.above:g}" if self.above > -math.inf else ""


LambdaContrast = Annotated[float, Spec("Weight of the class-aware contrastive loss; 0 leaves CCSSL out.", minimum=0)]
ContrastTemperature = Annotated[float, Spec("Temperature of the class-aware contrastive loss.", above=0)]
PushThreshold = Annotated[
    float | None,
    Spec(
        "Least confidence at which an image joins its class in the contrastive loss (T_push); None: every image does.",
        minimum=0,
        maximum=1,
    ),
]
OwnPair = Annotated[
    OwnPairWeight,
    Spec("Weight of the two views of one image: one, or squared (its confidence squared, as for the paper's numbers)."),
]
ConfidenceThreshold = Annotated[
    float, Spec("Least confidence at which a pseudo label is trained on.", minimum=0, maximum=1)
]
LambdaU = Annotated[float, Spec("Weight of the loss on unlabeled images.", minimum=0)]
SharpenTemperature = Annotated[
    float, Spec("Temperature that pseudo labels are sharpened with; 1: as they are.", above=0)
]
AlignmentWindow = Annotated[
    int | None,
    Spec(
        "Batches over which the distribution of pseudo labels is aligned, this one included; 0: no alignment.",
        minimum=0,
    ),
]

GraphTemperature = Annotated[float, Spec("Temperature of the similarities between embeddings.", above=0)]
GraphThreshold = Annotated[
    float, Spec("Least agreement of two images' pseudo labels that joins them in the graph.", minimum=0, maximum=1)
]
LambdaGraph = Annotated[float, Spec("Weight of the loss on the similarities between embeddings.", minimum=0)]
MemoryBatches = Annotated[int, Spec("Batches whose embeddings the memory bank holds.", minimum=1)]
SmoothingAlpha = Annotated[
    float,
    Spec(
        "Share of a pseudo label that is the classifier's; the rest comes from the memory bank; 1: no smoothing.",
        minimum=0,
        maximum=1,
    ),
]
Momentum = Annotated[
    float, Spec("Momentum of the running statistics of pseudo labels (not the optimizer's).", minimum=0, maximum=1)
]
NSigma = Annotated[float, Spec("How sharply the weight falls below the mean confidence: σ is divided by it.", above=0)]
ThresholdWarmup = Annotated[bool, Spec("Let the images that are not yet used hold thresholds down in the beginning.")]
UseQuantile = Annotated[bool, Spec("Follow the 0.8 quantile of the batch's confidences instead of their mean.")]
ClipThreshold = Annotated[bool, Spec("Keep the global threshold at 0.95 or below.")]
LambdaFairness = Annotated[float, Spec("Weight of the loss that keeps predictions spread over the classes.", minimum=0)]
OpenThreshold = Annotated[
    float,
    Spec(
        "Least probability of an open-set pseudo label, one of the classes or the outliers, that is trained on.",
        minimum=0,
        maximum=1,
    ),
]
LambdaOneVsAll = Annotated[float, Spec("Weight of the one-vs-all loss on labeled images.", minimum=0)]
LambdaOpen = Annotated[float, Spec("Weight of the open-set loss on unlabeled images.", minimum=0)]


class Hyperparameter(NamedTuple):
    """One row of an algorithm's table."""

    type: Any
    default: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What every algorithm has: CCSSL's part. Each algorithm adds its own fields in a subclass.

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
        """Type, default and help of each hyperparameter by name."""
        hints = get_type_hints(cls, include_extras=True)
        specs = {field.name: (field.default, *get_args(hints[field.name])) for field in fields(cls)}
        return {name: Hyperparameter(kind, default, spec.help) for name, (default, kind, spec) in specs.items()}

    def as_dict(self) -> dict[str, Any]:
        """The values by name, for configs and cards."""
        return asdict(self)


def _checked(name: str, value: Any, kind: Any, spec: Spec) -> Any:
    """`value` as `kind`; an integer where a float is asked for becomes one."""
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
