"""timm backbones, typed `Any` because timm's models have no common base class, and the small heads on top of them."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, model_entrypoint
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from .errors import listed, near_misses
from .escape import short
from .transforms import MAX_SIDE_UNCROPPED
from .wide_resnet_cifar import LEAKY_RELU_SLOPE, WideResNetCifar, init_weights

MAX_SIDE = 4096  # pixels of an image's side: a larger input would fill the memory when the model is built
_RUNTIME_ARGS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path", "scriptable", "exportable")


def check_backbone(name: str) -> None:
    """Raises ValueError, with similar names, if neither timm nor this package has the model `name`."""
    architecture, _, tag = name.partition(".")
    if "/" in name or ":" in name:
        raise ValueError(
            f"'{name}' is not a timm name: pass an architecture such as 'resnet50' and, for your own weights, "
            "pretrained=True with pretrained_cfg_overlay={'file': PATH} or {'hf_hub_id': 'USER/REPO'}."
        )
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()."
        raise ValueError(f"timm {timm.__version__} has no model '{architecture}': {hint}")
    tags = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tags:
        known = ", ".join(tags) or architecture
        raise ValueError(f"timm {timm.__version__} has no weights '{name}': use one of {known}.")


def _numbers(value: Any) -> bool:
    fits = isinstance(value, (list, tuple)) and len(value) == 3
    return fits and all(type(each) in (int, float) and math.isfinite(each) for each in value)


def is_name(value: Any) -> bool:
    """Whether this is a short word, and no path or URL."""
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]{0,64}", value) is not None


def _one_of(*words: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in words, f"one of {', '.join(words)}"


def _are_names(value: Any) -> bool:
    return all(map(is_name, value)) if isinstance(value, (list, tuple)) else is_name(value)


# Entries of `pretrained_cfg` about the input. Others, about the original weights, would be wrong after training.
INPUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (
        lambda v: _numbers(v) and v[0] == 3 and all(type(each) is int and 1 <= each <= MAX_SIDE for each in v),
        f"3 channels (images are read as RGB), height and width from 1 to {MAX_SIDE}",
    ),
    "fixed_input_size": (lambda v: type(v) is bool, "true or false"),
    "interpolation": _one_of("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"),
    "crop_pct": (lambda v: type(v) in (int, float) and 0 < v <= 2, "a number above 0, at most 2"),
    "crop_mode": _one_of("center", "squash", "border"),
    "mean": (_numbers, "three numbers, one for each channel"),
    "std": (lambda v: _numbers(v) and min(v) > 0, "three positive numbers, one for each channel"),
    "first_conv": (_are_names, "the name of a layer"),
    "classifier": (_are_names, "the name of a layer"),
}
"""For each entry a check, and what is allowed."""


def input_problems(pretrained_cfg: Mapping[str, Any]) -> list[str]:
    """The entries about the input that are not allowed, as phrases."""
    given = {key: pretrained_cfg[key] for key in INPUT if pretrained_cfg.get(key) is not None}
    return [f"{key} is {short(value)}, not {INPUT[key][1]}" for key, value in given.items() if not INPUT[key][0](value)]


def check_input(pretrained_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError if entries of `pretrained_cfg` about the input are not allowed."""
    if problems := input_problems(pretrained_cfg):
        raise ValueError(f"The input of the model can't be used: {'; '.join(problems)}.")


def unknown_arguments(name: str, arguments: Iterable[str]) -> list[str]:
    """The arguments that are none of a network's constructor, as phrases with similar names.

    timm passes others on to the code that loads weights, which opens files and URLs.
    """
    module = sys.modules[model_entrypoint(name.partition(".")[0]).__module__]
    families = {module.__name__, *(getattr(each, "__module__", None) or "" for each in vars(module).values())}
    names = re.compile(rf"timm\.models\.[^_]\w*|{re.escape(module.__name__)}")  # not timm.models._*, its own machinery
    modules = [sys.modules[each] for each in families if names.fullmatch(each)]
    known = {"bn_momentum", "bn_eps"}  # timm's EfficientNets pass these on by another name
    for each in (value for module in modules for value in vars(module).values() if inspect.isclass(value)):
        if is_dataclass(each):  # the settings of a family
            known |= {field.name for field in fields(each)}
        elif issubclass(each, nn.Module):
            signatures = (inspect.signature(base).parameters for base in each.__mro__ if issubclass(base, nn.Module))
            known |= {key for signature in signatures if "num_classes" in signature for key in signature}
    known -= {"num_classes", "device", "dtype", "args", "kwargs", *_RUNTIME_ARGS}
    return [f"'{name}' has no argument {each!r}{near_misses(each, known)}" for each in arguments if each not in known]


def create_backbone(
    name: str, *, num_classes: int, pretrained: bool = False, image_size: int | None = None, **timm_kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Creates a timm model for `from_timm`, and returns it with the arguments that create it again."""
    check_backbone(name)
    cfg = get_pretrained_cfg(name)
    img_size, overlay = timm_kwargs.get("img_size"), timm_kwargs.get("pretrained_cfg_overlay") or {}
    if timm_kwargs.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans is {timm_kwargs['in_chans']}, but all images are read as RGB: leave it out.")
    if "input_size" in overlay:
        raise ValueError("input_size in pretrained_cfg_overlay has no effect: give image_size.")
    if image_size is not None and img_size is not None and to_2tuple(img_size) != to_2tuple(image_size):
        raise ValueError(f"image_size is {image_size} but img_size is {img_size}: give image_size only.")
    size = to_2tuple(next(each for each in (image_size, img_size, cfg.input_size[-2:]) if each is not None))
    if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"image_size is {image_size if img_size is None else img_size!r}: use 1 to {MAX_SIDE} pixels.")
    check_input(overlay)
    if size[0] != size[1]:
        fix = "give one image_size for both sides, such as" if image_size or img_size else "choose image_size, such as"
        raise ValueError(f"Images of {size[0]} x {size[1]} pixels cannot be trained: {fix} {max(size)}.")
    if cfg.fixed_input_size:
        timm_kwargs.setdefault("img_size", size[0])
    model_args = {key: value for key, value in timm_kwargs.items() if key not in _RUNTIME_ARGS}
    if unknown := unknown_arguments(name, model_args):
        raise ValueError(f"{listed(unknown, separator='; ')}.")
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise ValueError(f"The arguments are saved as JSON, so pass layers by name: {error}.") from None
    try:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **timm_kwargs)
    except (OSError, HfHubHTTPError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"The pretrained weights of '{name}' cannot be loaded ({str(error).splitlines()[0]}): check the network "
            f"and timm.list_pretrained('{name.partition('.')[0]}*'), or use pretrained=False."
        ) from error
    embedding = getattr(backbone, "patch_embed", getattr(backbone, "stem", None))
    patch = to_2tuple(getattr(embedding, "patch_size", None) or 1)
    # Some models drop pixels at their own size, 384 with patches of 14.
    if size != cfg.input_size[-2:] and size[0] % patch[0] and not getattr(embedding, "dynamic_img_pad", False):
        raise ValueError(
            f"'{name}' has patches of {patch[0]} px, which do not fill images of {size[0]} x {size[0]} px; change "
            f"image_size to a multiple, such as {max(1, size[0] // patch[0]) * patch[0]}."
        )
    source = {**backbone.pretrained_cfg, "input_size": (backbone.pretrained_cfg["input_size"][0], *size)}
    if max(size) <= MAX_SIDE_UNCROPPED and "crop_pct" not in overlay:
        source["crop_pct"] = 1.0
    set_input(backbone, source)
    return backbone, model_args


def set_input(backbone: Any, pretrained_cfg: Mapping[str, Any]) -> None:
    """Sets the backbone's `pretrained_cfg`, reduced to the entries about its input. See `check_input` for errors."""
    check_input(pretrained_cfg)
    architecture = pretrained_cfg.get("architecture") or backbone.pretrained_cfg["architecture"]
    cfg = {"architecture": architecture, "num_classes": backbone.num_classes}
    cfg |= {key: pretrained_cfg[key] for key in INPUT if key in pretrained_cfg}
    backbone.pretrained_cfg = backbone.default_cfg = cfg


def features_and_logits(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the features before the classifier, `[N, width]`, and the logits, `[N, C]`, in one pass."""
    features = backbone.forward_head(backbone.forward_features(images), pre_logits=True).flatten(1)
    classifier = backbone.get_classifier()
    if isinstance(classifier, nn.Conv2d):  # a few backbones classify by a 1x1 convolution
        return features, classifier(features[:, :, None, None]).flatten(1)
    return features, classifier(features)


@torch.no_grad()
def feature_width(backbone: Any) -> int:
    """Returns the width of the features, and checks by a forward pass that the backbone can be used.

    The backbone must accept images of its `input_size`, and its classifier must be a single module on the features. On
    the meta device only the shapes are compared.
    """
    name, size = backbone.pretrained_cfg["architecture"], tuple(backbone.pretrained_cfg["input_size"])
    parameter = next(backbone.parameters())
    image = torch.linspace(-1, 1, 2 * math.prod(size), device=parameter.device).view(2, *size).to(parameter)
    was_training = backbone.training
    backbone.eval()
    try:
        logits = backbone(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"'{name}' does not accept images of {size[1]}x{size[2]} px; change image_size: {error}"
        ) from error
    try:
        features, own_logits = features_and_logits(backbone, image)
        fits = own_logits.shape == logits.shape and (parameter.is_meta or torch.equal(own_logits, logits))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        fits = False
    backbone.train(was_training)
    if not fits:
        raise ValueError(
            f"'{name}' is not supported: its logits are not get_classifier() applied to forward_head(..., "
            "pre_logits=True). Choose another backbone."
        )
    return features.shape[1]


def projection_head(backbone: nn.Module, width: int, projection_dim: int) -> nn.Sequential:
    """Two linear layers from `[N, width]` to `[N, projection_dim]`, without the norm of the embeddings."""
    if isinstance(backbone, WideResNetCifar):
        activation = nn.LeakyReLU(LEAKY_RELU_SLOPE)
        head = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, projection_dim))
        return head.apply(init_weights)
    hidden = 2048 if isinstance(backbone, (ResNet, ResNetV2)) else width
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, projection_dim))


_LAYERS: dict[type[nn.Module], Callable[[Any], list[Any]]] = {
    nn.Linear: lambda layer: [layer.in_features, layer.out_features, layer.bias is not None],
    nn.BatchNorm1d: lambda layer: [layer.num_features],
    nn.LeakyReLU: lambda layer: [layer.negative_slope],
    nn.ReLU: lambda layer: [],
}
"""Layers that a head may have, and their arguments."""
_KINDS = {kind.__name__: kind for kind in _LAYERS}


def describe_head(module: nn.Module) -> list[Any]:
    """Describes a head as JSON for `build_head`: a list of `[layer, *arguments]`. Other layers raise ValueError."""
    described = []
    for layer in module if isinstance(module, nn.Sequential) else [module]:
        kind = next((kind for kind in _LAYERS if isinstance(layer, kind)), None)
        if kind is None:
            raise ValueError(
                f"A head cannot contain {type(layer).__name__}: use a Sequential of Linear, BatchNorm1d, ReLU and "
                "LeakyReLU, so that it can be saved without code."
            )
        described.append([kind.__name__, *_LAYERS[kind](layer)])
    return described


def is_layer(description: Any) -> bool:
    """Whether this is `[layer, *arguments]` as in `describe_head`, with arguments of a sensible size."""
    if not isinstance(description, list) or not 1 <= len(description) <= 4 or description[0] not in _KINDS:
        return False
    return all(type(each) in (bool, int, float) and 0 <= each <= 1_000_000 for each in description[1:])


def build_head(description: list[Any]) -> nn.Sequential:
    """Builds a new head from what `describe_head` returned."""
    return nn.Sequential(*(_KINDS[name](*arguments) for name, *arguments in description))


def authors_key(key: str) -> str:
    """Maps a key of the authors' Wide ResNet with projection head to the key in `CCSSLForImageClassification`.

    Example: `block1.layer.0.convShortcut.weight` → `backbone.stages.0.0.shortcut.weight`.
    """
    if match := re.fullmatch(r"fc([12])\.(weight|bias)", key):
        return f"projection.{2 * (int(match[1]) - 1)}.{match[2]}"
    key = re.sub(r"^block(\d+)\.layer\.", lambda match: f"stages.{int(match[1]) - 1}.", key)
    return "backbone." + key.replace(".convShortcut.", ".shortcut.")
