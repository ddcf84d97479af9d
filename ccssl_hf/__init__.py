"""Semi-supervised image classification with class-aware contrastive learning, for the Hugging Face ecosystem."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithms import SSLBatch, SSLLoss, build_algorithm
    from .configuration import CCSSLConfig
    from .losses import class_aware_contrastive_loss
    from .modeling import CCSSLForImageClassification, CCSSLOutput
    from .trainer import CCSSLTrainer
    from .training_args import CCSSLTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "CCSSLConfig",
    "CCSSLForImageClassification",
    "CCSSLOutput",
    "CCSSLTrainer",
    "CCSSLTrainingArguments",
    "SSLBatch",
    "SSLLoss",
    "build_algorithm",
    "class_aware_contrastive_loss",
]

_MODULES = ("algorithms", "configuration", "losses", "modeling", "trainer", "training_args")

# Our Wide ResNets load by plain `AutoModel` and `timm.create_model` from here on. That takes torch and timm, seconds in
# all, which the command does without where it only shows its help: its verbs import what they need themselves.
if Path(sys.argv[0]).stem != "ccssl-hf":
    from . import wide_resnet_cifar as wide_resnet_cifar


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name in __all__:
        for module in _MODULES:
            if hasattr(found := import_module(f".{module}", __name__), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
