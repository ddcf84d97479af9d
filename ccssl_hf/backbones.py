"""Backbones by their timm names, and the small heads on top of them.

A backbone is typed `Any`: timm's models share an interface (`forward_features`, `forward_head`, `get_classifier`,
`pretrained_cfg`) but no class that has it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from .transforms import MAX_SIDE_UNCROPPED
from .wide_resnet_cifar import LEAKY_RELU_SLOPE, WideResNetCifar, init_weights

_RESNET_HIDDEN = 2048
_INPUT_KEYS = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "first_conv",
    "classifier",
)
_RUNTIME_ARGS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path", "scriptable", "exportable")


def check_backbone(name: str) -> None:
    """Raises ValueError with near misses where timm (and this package) has no architecture `name`."""
    architecture, _, tag = name.partition(".")
    if "/" in name or ":" in name:
        raise ValueError(
            f"'{name}' is not a timm name: pass an architecture such as 'resnet50' and, for weights of your own, "
            "pretrained=True with pretrained_cfg_overlay={'file': PATH} or {'hf_hub_id': 'USER/REPO'}."
        )
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()."
        raise ValueError(f"timm {timm.__version__} has no model '{architecture}': {hint}")
    tags = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tags:
        raise ValueError(
            f"timm {timm.__version__} has no weights '{name}': use one of {', '.join(tags) or architecture}."
        )


def create_backbone(
    name: str, *, num_classes: int, pretrained: bool = False, image_size: int | None = None, **timm_kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """A timm model with a fresh classifier, whose `pretrained_cfg` says how images enter it.

    Args:
        name: timm name, with or without a tag.
        num_classes: Outputs of the classifier.
        pretrained: Whether to load timm's weights.
        image_size: Side of the images in pixels; the backbone's own where None. Sizes up to 96 px are not cropped at
            evaluation, unless `pretrained_cfg_overlay` has a `crop_pct`.
        **timm_kwargs: Further arguments of `timm.create_model`.

    Returns:
        The model, and the arguments that build it again.

    Raises:
        ValueError: The name is unknown, the weights cannot be had, or an argument cannot be written to JSON.
    """
    check_backbone(name)
    cfg = get_pretrained_cfg(name)
    img_size = timm_kwargs.get("img_size")
    if image_size is not None and img_size is not None and to_2tuple(img_size) != to_2tuple(image_size):
        raise ValueError(f"image_size is {image_size} but img_size is {img_size}: give image_size only.")
    size = to_2tuple(image_size or img_size or cfg.input_size[-2:])
    if cfg.fixed_input_size:
        timm_kwargs.setdefault("img_size", size[0] if size[0] == size[1] else size)
    model_args = {key: value for key, value in timm_kwargs.items() if key not in _RUNTIME_ARGS}
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise ValueError(f"A backbone's arguments are saved as JSON, so give layers by their names: {error}.") from None
    backbone = _create(name, pretrained, num_classes=num_classes, **timm_kwargs)
    source = backbone.pretrained_cfg
    crop = {}
    if max(size) <= MAX_SIDE_UNCROPPED and "crop_pct" not in (timm_kwargs.get("pretrained_cfg_overlay") or {}):
        crop["crop_pct"] = 1.0
    set_input(backbone, {**source, **crop, "input_size": (source["input_size"][0], *size)})
    return backbone, model_args


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, HfHubHTTPError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The pretrained weights of '{name}' cannot be had ({reason}): check the network and "
            f"timm.list_pretrained('{name.partition('.')[0]}*'), or use pretrained=False."
        ) from error


def set_input(backbone: Any, pretrained_cfg: Mapping[str, Any]) -> None:
    """Makes `pretrained_cfg` what timm reads from the backbone, reduced to how images enter it.

    What belongs to the weights it came from (their address, labels, test size) would be wrong after training.
    """
    kept = {key: pretrained_cfg[key] for key in _INPUT_KEYS if key in pretrained_cfg}
    architecture = pretrained_cfg.get("architecture") or backbone.pretrained_cfg["architecture"]
    backbone.pretrained_cfg = backbone.default_cfg = {
        "architecture": architecture,
        "num_classes": backbone.num_classes,
        **kept,
    }


def features_and_logits(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """One pass: the features before the classifier `[N, width]`, and the classifier on them, `[N, C]`."""
    features = backbone.forward_head(backbone.forward_features(images), pre_logits=True).flatten(1)
    classifier = backbone.get_classifier()
    # A few backbones classify by a 1x1 convolution.
    logits = (
        classifier(features[:, :, None, None]).flatten(1) if isinstance(classifier, nn.Conv2d) else classifier(features)
    )
    return features, logits


@torch.no_grad()
def feature_width(backbone: Any) -> int:
    """The width of the features before the classifier, found by a dry run in eval mode.

    Raises:
        ValueError: The backbone does not take images of its `input_size`, or its classifier is not one module that maps
            those features `[N, width]` to exactly the logits that the backbone gives.
    """
    name, size = backbone.pretrained_cfg["architecture"], tuple(backbone.pretrained_cfg["input_size"])
    parameter = next(backbone.parameters())
    image = torch.linspace(-1, 1, 2 * size[0] * size[1] * size[2]).view(2, *size).to(parameter)
    was_training = backbone.training
    backbone.eval()
    try:
        logits = backbone(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"'{name}' does not take images of {size[1]}x{size[2]} px; change image_size: {error}"
        ) from error
    try:
        features, own_logits = features_and_logits(backbone, image)
        fits = torch.equal(own_logits, logits)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        fits = False
    backbone.train(was_training)
    if not fits:
        raise ValueError(
            f"'{name}' cannot be used: its logits are not get_classifier() of forward_head(..., pre_logits=True), so "
            "choose another backbone."
        )
    return features.shape[1]


def projection_head(backbone: nn.Module, width: int, projection_dim: int) -> nn.Sequential:
    """Two linear layers to the embeddings: `[N, width]` to `[N, projection_dim]`, before the norm is made one.

    Wide ResNets keep the width and LeakyReLU; ResNets go through 2048; others keep the width.
    """
    if isinstance(backbone, WideResNetCifar):
        layers: list[nn.Module] = [nn.Linear(width, width), nn.LeakyReLU(LEAKY_RELU_SLOPE)]
        return nn.Sequential(*layers, nn.Linear(width, projection_dim)).apply(init_weights)
    hidden = _RESNET_HIDDEN if isinstance(backbone, (ResNet, ResNetV2)) else width
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, projection_dim))


def describe_head(module: nn.Module) -> list[Any]:
    """A head as JSON: a list of `[layer, *arguments]`, from which `build_head` makes it again.

    Raises:
        ValueError: A layer is none of Linear, BatchNorm1d, ReLU, LeakyReLU, or not directly in one Sequential.
    """
    described: list[Any] = []
    for layer in module if isinstance(module, nn.Sequential) else [module]:
        if isinstance(layer, nn.Linear):
            described.append(["Linear", layer.in_features, layer.out_features, layer.bias is not None])
        elif isinstance(layer, nn.BatchNorm1d):
            described.append(["BatchNorm1d", layer.num_features])
        elif isinstance(layer, nn.LeakyReLU):
            described.append(["LeakyReLU", layer.negative_slope])
        elif isinstance(layer, nn.ReLU):
            described.append(["ReLU"])
        else:
            raise ValueError(
                f"A head cannot hold {type(layer).__name__}: build it of Linear, BatchNorm1d, ReLU and LeakyReLU, in "
                "one Sequential, so that it can be saved without code."
            )
    return described


def build_head(description: list[Any]) -> nn.Sequential:
    """The head that `describe_head` described, freshly initialised."""
    kinds: dict[str, type[nn.Module]] = {
        "Linear": nn.Linear,
        "BatchNorm1d": nn.BatchNorm1d,
        "LeakyReLU": nn.LeakyReLU,
        "ReLU": nn.ReLU,
    }
    return nn.Sequential(*(kinds[kind](*arguments) for kind, *arguments in description))


def authors_key(key: str) -> str:
    """The name in `CCSSLForImageClassification` of a tensor of the authors' Wide ResNet with projection head.

    Args:
        key: Such as `block1.layer.0.convShortcut.weight` (`backbone.stages.0.0.shortcut.weight`) or `fc2.bias`.
    """
    if match := re.fullmatch(r"fc([12])\.(weight|bias)", key):
        return f"projection.{2 * (int(match[1]) - 1)}.{match[2]}"
    key = re.sub(r"^block(\d+)\.layer\.", lambda match: f"stages.{int(match[1]) - 1}.", key)
    return "backbone." + key.replace(".convShortcut.", ".shortcut.")
