"""Semi-supervised image classification with class-aware contrastive learning, for the Hugging Face ecosystem."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithms import SSLBatch, SSLLoss, build_algorithm
    from .data import load_split
    from .losses import class_aware_contrastive_loss
    from .modeling import CCSSLConfig, CCSSLForImageClassification, CCSSLOutput
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
    "load_split",
]

# `import ccssl_hf` registers our Wide ResNets with timm, which takes seconds because it imports torch. The command, as
# `ccssl-hf` or `python -m ccssl_hf.cli`, skips it to show its help quickly; each of its verbs imports what it needs.
if Path(sys.argv[0]).stem != "ccssl-hf" and not (sys.argv[0] == "-m" and f"{__name__}.cli" in sys.orig_argv):
    from . import wide_resnet_cifar as wide_resnet_cifar


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in __all__:
        for module in ("algorithms", "data", "losses", "modeling", "trainer", "training_args"):
            if hasattr(found := import_module(f".{module}", __name__), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
