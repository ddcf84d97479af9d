"""Callbacks of a run: what it logs and shows, and when it stops."""

from .estimate import RunEstimate
from .monitor import StepMonitor
from .nonfinite import FiniteGuard, NonFiniteError
from .progress import ProgressBar, progress_callback
from .stop import EvaluationStopped, StopOnSignal, TimeLimit, end_with_parent
from .unreadable import UnreadableImages

__all__ = [
    "EvaluationStopped",
    "FiniteGuard",
    "NonFiniteError",
    "ProgressBar",
    "RunEstimate",
    "StepMonitor",
    "StopOnSignal",
    "TimeLimit",
    "UnreadableImages",
    "end_with_parent",
    "progress_callback",
]
