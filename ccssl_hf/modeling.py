"""The model: a timm classifier, a projection head, and the further heads of an algorithm."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig
from transformers.utils import ModelOutput

from . import backbones
from .checkpoint import (
    CONFIG_FILE,
    HEAD_FILE,
    WEIGHTS_FILE,
    check_finite,
    find_checkpoint,
    load_tensors,
    save_tensors,
    write_config,
)
from .config_file import check_fit, few_parameters, is_text, read_config, read_heads, tensors_in
from .errors import summary
from .hub import plan_push, upload


class CCSSLConfig(TimmWrapperConfig):
    """Configuration of `CCSSLForImageClassification`: the one that transformers has for timm models, and the heads.

    `pretrained_cfg` describes the input (`input_size`, `mean`, `std`, ...), `projection_dim` is the size of the
    embeddings, and `heads` has the layers of each further head from `backbones.describe_head`.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["embeddings", "heads"]  # evaluation gathers only the logits

    pretrained_cfg: dict[str, Any] | None = None
    projection_dim: int = 64
    heads: dict[str, list[Any]] | None = None

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.id2label[index] for index in range(len(self.id2label))]


@dataclass
class CCSSLOutput(ModelOutput):
    """`N` images, `C` classes, `D` projection size.

    Attributes:
        loss: Cross-entropy, a scalar; None without labels.
        logits: `[N, C]`.
        embeddings: `[N, D]` in float32, unit norm; None unless requested.
        heads: Outputs `[N, ...]` of the further heads by name; None if the model has none.
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]  # always set, but ModelOutput needs a default
    embeddings: Tensor | None = None
    heads: dict[str, Tensor] | None = None


class CCSSLForImageClassification(PreTrainedModel):
    """A timm backbone with its classifier, a projection head and further heads. Create it with `from_timm`.

    Attributes:
        backbone: The timm model.
        projection: Maps features `[N, feature_dim]` to embeddings.
        heads: Further modules on the features, by name.
        feature_dim: Width of the features before the classifier.
    """

    config_class = CCSSLConfig
    config: CCSSLConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # otherwise the Trainer passes num_items_in_batch to forward
    _supports_sdpa = True  # used by timm's attention

    def __init__(self, config: CCSSLConfig, backbone: Any = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbones.check_backbone(config.architecture)
            model_args = config.model_args or {}
            backbone = timm.create_model(config.architecture, num_classes=config.num_labels, **model_args)
            backbones.set_input(backbone, config.pretrained_cfg or backbone.pretrained_cfg)
        self.backbone: Any = backbone
        self.feature_dim = backbones.feature_width(backbone)
        self.projection = backbones.projection_head(backbone, self.feature_dim, config.projection_dim)
        heads = (config.heads or {}).items()
        self.heads = nn.ModuleDict({name: backbones.build_head(layers) for name, layers in heads})
        self.supports_gradient_checkpointing = hasattr(backbone, "set_grad_checkpointing")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: timm and the heads initialise themselves."""

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.backbone.set_grad_checkpointing(enable)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        labels: Sequence[str],
        pretrained: bool = False,
        projection_dim: int = 64,
        image_size: int | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        **timm_kwargs: Any,
    ) -> CCSSLForImageClassification:
        """Creates a model for training.

        Args:
            name: timm name of the backbone, such as "resnet50" or "wide_resnet28_2_cifar", with or without a tag.
            labels: Class names in the order of the label numbers.
            image_size: Side of the images in pixels; None: the default of the backbone. Images up to 96 px are not
                cropped at evaluation, unless `pretrained_cfg_overlay` has a `crop_pct`.
            heads: See `add_heads`.
            **timm_kwargs: Further arguments of `timm.create_model`, such as `drop_path_rate`, or
                `pretrained_cfg_overlay={"mean": ..., "std": ..., "crop_pct": ...}` to change the preprocessing.

        Raises:
            ValueError: The labels are not distinct names, timm has no such model or weights, or the backbone has no
                classifier on pooled features.
        """
        if isinstance(labels, str) or not all(map(is_text, labels)):
            raise ValueError("labels must be a list of class names, such as dataset.features['label'].names.")
        repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
        if repeated or not labels:
            raise ValueError(f"labels must be distinct and not empty; repeated: {repeated}.")
        if "num_classes" in timm_kwargs:
            raise ValueError("num_classes follows from the labels: leave it out.")
        backbone, model_args = backbones.create_backbone(
            name, num_classes=len(labels), pretrained=pretrained, image_size=image_size, **timm_kwargs
        )
        config = CCSSLConfig(
            architecture=backbone.pretrained_cfg["architecture"],
            model_args=model_args,
            pretrained_cfg=backbone.pretrained_cfg,
            projection_dim=projection_dim,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        model = cls(config, backbone=backbone)
        model.add_heads(heads or {})
        return model

    def add_heads(self, heads: Mapping[str, nn.Module]) -> None:
        """Adds heads on the features `[N, feature_dim]`. A head that the model already has keeps its weights.

        Raises:
            ValueError: A head is neither a Linear nor a Sequential of Linear, BatchNorm1d, ReLU and LeakyReLU, or the
                model has another head of this name.
        """
        described = {name: backbones.describe_head(module) for name, module in heads.items()}
        known = dict(self.config.heads or {})
        for name, layers in described.items():
            if known.get(name, layers) != layers:
                raise ValueError(f"The model has another head '{name}' ({known[name]}): use another name.")
        for name, module in heads.items():
            if name not in known:
                self.heads[name] = module if isinstance(module, nn.Sequential) else nn.Sequential(module)
        self.config.heads = known | described

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_embeddings: bool = False,
        return_dict: bool | None = None,
    ) -> CCSSLOutput | tuple[Any, ...]:
        """Computes the logits and the outputs of all heads for normalised images `[N, 3, H, W]`, in one pass.

        `labels` are class numbers `[N]`. With `return_dict=False` returns a tuple of the outputs that are not None.
        """
        features, logits = backbones.features_and_logits(self.backbone, pixel_values)
        output = CCSSLOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            # float32 also under autocast: the contrastive loss needs unit norm.
            embeddings=F.normalize(self.projection(features).float(), dim=1) if return_embeddings else None,
            heads={name: head(features) for name, head in self.heads.items()} or None,
        )
        return output.to_tuple() if return_dict is False else output

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        with_head: bool = True,
        is_main_process: bool = True,
    ) -> None:
        """Writes a folder that transformers and timm load without this package.

        Args:
            state_dict: Weights to save instead of the model's own, such as the averaged weights.
            with_head: Whether to write the projection head and further heads (`ccssl_head.safetensors`).
            is_main_process: False: write nothing.

        Raises:
            ValueError: `state_dict` has other keys than the model, or a number is NaN or infinite.
        """
        if not is_main_process:
            return
        own = self.state_dict()
        state = own if state_dict is None else state_dict
        if other := sorted(state.keys() ^ own.keys()):
            raise ValueError(f"state_dict must have the model's keys: {len(other)} differ, such as '{other[0]}'.")
        check_finite(state, "The model")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "backbone."
        backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        save_tensors(folder / WEIGHTS_FILE, backbone)
        write_config(self, folder)
        if with_head:
            heads = {key: value for key, value in state.items() if not key.startswith(prefix)}
            shape = {"projection_dim": self.config.projection_dim, "heads": self.config.heads or {}}
            save_tensors(folder / HEAD_FILE, heads, metadata={"ccssl": json.dumps(shape)})
        else:
            (folder / HEAD_FILE).unlink(missing_ok=True)  # a head from an earlier save belongs to other weights

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> CCSSLForImageClassification:
        """Loads a folder or Hub repository in eval mode, without running code from there.

        Also loads a folder that timm wrote. Without heads in the folder, the model gets a new projection head.

        Raises:
            FileNotFoundError: There is no such folder or repository.
            ValueError: A file is damaged, a weight is NaN or infinite, timm does not know the backbone, or entries of
                the configuration are not allowed or do not fit the weights. Nothing large is allocated before.
        """
        folder = find_checkpoint(
            name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        content = read_config(folder)
        files = {"backbone.": folder / WEIGHTS_FILE}  # by the prefix of their keys in the model
        if has_head := (folder / HEAD_FILE).is_file():
            files[""] = folder / HEAD_FILE
            content |= read_heads(folder / HEAD_FILE)
        else:
            warnings.warn(f"'{name}' has no projection head: a new one is created.", stacklevel=2)
        stored = {prefix + key: value for prefix, path in files.items() for key, value in tensors_in(path).items()}
        try:
            with torch.device("meta"), few_parameters(len(stored)):  # allocates nothing
                plan = cls(CCSSLConfig.from_dict(content))
        except Exception as error:  # timm's networks raise nearly any type for arguments of other networks
            reason = f"'{content['architecture']}' can't be built with its model_args and input_size"
            raise ValueError(f"'{folder / CONFIG_FILE}' can't be used: {reason} ({summary(error)}).") from error
        what = f"The weights in '{name}' do not fit '{content['architecture']}'"
        check_fit(plan, stored, partial=not has_head, what=what)
        model = cls(CCSSLConfig.from_dict(content))
        state = {prefix + key: value for prefix, path in files.items() for key, value in load_tensors(path).items()}
        check_finite(state, f"The model in '{name}'")
        model.load_state_dict(state, strict=has_head)
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        with_head: bool = False,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Uploads the files of `save_pretrained`; the heads only with `with_head=True`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, with_head=with_head)
            return upload(
                plan_push(folder, with_head=with_head).files,
                repo_id,
                message=commit_message,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )
