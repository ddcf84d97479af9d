"""What it takes to build a model again: the backbone's timm name and arguments, the labels, the heads."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import TimmWrapperConfig


class CCSSLConfig(TimmWrapperConfig):
    """The configuration of `CCSSLForImageClassification`: transformers' own for timm models, and the heads.

    Args:
        architecture: timm's name of the backbone, without a tag.
        model_args: Further arguments of `timm.create_model`.
        pretrained_cfg: The backbone's input: `input_size`, `mean`, `std`, `crop_pct`, `interpolation` and so on.
        projection_dim: Size of the embeddings.
        heads: Layers of each further head, as `backbones.describe_head` gives them.
    """

    # So that evaluation gathers the logits only; the Trainer adds a list to it.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["embeddings", "heads"]

    pretrained_cfg: dict[str, Any] | None = None
    projection_dim: int = 64
    heads: dict[str, list[Any]] | None = None

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the logits."""
        return [self.id2label[index] for index in range(len(self.id2label))]
