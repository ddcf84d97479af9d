"""Semi-supervised image classification with class-aware contrastive learning, for the Hugging Face ecosystem."""

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
