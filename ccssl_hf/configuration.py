"""The model's configuration."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import TimmWrapperConfig


class CCSSLConfig(TimmWrapperConfig):
    """Configuration of `CCSSLForImageClassification`: the one that transformers has for timm models, and the heads.

    Args:
        architecture: timm name of the backbone, without a tag.
        model_args: Further arguments of `timm.create_model`.
        pretrained_cfg: Input of the backbone: `input_size`, `mean`, `std`, `crop_pct`, `interpolation` and so on.
        projection_dim: Size of the embeddings.
        heads: Layers of each further head, from `backbones.describe_head`.
    """

    # Evaluation gathers only the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["embeddings", "heads"]

    pretrained_cfg: dict[str, Any] | None = None
    projection_dim: int = 64
    heads: dict[str, list[Any]] | None = None

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.id2label[index] for index in range(len(self.id2label))]
