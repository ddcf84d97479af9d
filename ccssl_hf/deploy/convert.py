"""Convert checkpoints of other code to published folders. Files are read with `weights_only=True`: no code is run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones import authors_key
from ..checkpoint import check_finite, is_own_backbone
from ..errors import listed
from ..modeling import CCSSLForImageClassification


@dataclass(frozen=True)
class _Source:
    ema: str  # key of the averaged weights
    raw: str  # key of the raw weights
    training_state: str  # pattern of the keys that are not weights
    left_out: dict[str, str] = field(default_factory=dict)  # pattern of keys of the weights to the reason
    may_lack: tuple[str, ...] = ("projection.",)  # prefixes of our keys that may all be missing


_SOURCES = {
    "semicls": _Source(
        "ema_state_dict", "state_dict", r"epoch|acc|best_acc|optimizer|scheduler|queue_(feats|probs|ptr)"
    ),
    "moco": _Source(
        "state_dict",
        "state_dict",
        r"epoch|arch|optimizer",
        {
            r"encoder_q\.fc\..*": "the query encoder's head for MoCo's own loss",
            r"encoder_k\..*": "the key encoder, a moving average of the query encoder",
            r"queue(_ptr)?": "the queue of negatives",
        },
        may_lack=("projection.", "backbone.fc."),
    ),
    "usb": _Source(
        "ema_model",
        "model",
        r"optimizer|scheduler|loss_scaler|it|epoch|best_it|best_eval_acc|p_(model|target)(_ptr)?|time_p|label_hist"
        r"|classwise_acc|selected_label|prob_max_(mu|var)_t|queue_(feats|probs|size|ptr)|(mem|labels)_bank"
        r"|rho(_init|_update_cnt)?|warmup_stage",
        {
            r"rot_classifier\..*": "ReMixMatch's rotation classifier",
            r"mlp_proj\..*": "a projection head with ReLU, where these networks have LeakyReLU here",
        },
    ),
}

_OTHER_FILES = (
    ("a safetensors file", rb".{8}\{\"", "load it with safetensors.torch.load_file, and torch.save its state dict"),
    ("a pointer of Git LFS", rb"version https://git-lfs", "get the file itself with `git lfs pull`"),
    ("a web page", rb"\s*<(!DOCTYPE|html)", "download the file itself"),
)
"""What people pass instead of a checkpoint: its name, a pattern of its first bytes, and what to do."""

_PHOTOS: dict[str, Any] = dict(image_size=224, crop_pct=0.875, interpolation="bilinear")
_IMAGENET = dict(_PHOTOS, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# The preprocessing in the authors' configurations: resnet18 for STL-10, resnet50 for Semi-iNat 2021.
_SEMICLS: dict[str, dict[str, Any]] = {
    "resnet18": dict(image_size=96, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)),
    "resnet50": dict(_PHOTOS, mean=(0.4732, 0.4828, 0.3779), std=(0.2348, 0.2243, 0.2408)),
}


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion. `str(report)` is a summary."""

    folder: Path  # that was written
    architecture: str  # timm's name of the backbone
    source: str  # key of the checkpoint with the converted weights
    mapped: dict[str, str]  # key in the checkpoint to key in `CCSSLForImageClassification`
    left_out: dict[str, tuple[str, ...]]  # reason to the keys that were left out for it
    unknown: tuple[str, ...]  # other keys that were left out
    fresh: tuple[str, ...]  # keys of the folder that the checkpoint lacks, with random weights

    def __str__(self) -> str:
        def name(keys: Sequence[str]) -> str:
            return ", ".join(keys) if len(keys) <= 12 else f"{keys[0]} and {len(keys) - 1} more like it"

        lines = [f"{self.folder}: {len(self.mapped)} tensors of '{self.source}' as {self.architecture}"]
        lines += [f"left out, {reason}: {name(keys)}" for reason, keys in self.left_out.items()]
        lines += [f"left out, unknown: {', '.join(self.unknown)}"] if self.unknown else []
        lines += [f"not in the checkpoint, fresh: {name(self.fresh)}"] if self.fresh else []
        return "\n".join(lines)


def convert(
    source: Literal["semicls", "moco", "usb"],
    checkpoint: str | Path,
    out: str | Path,
    *,
    labels: Sequence[str],
    backbone: str | None = None,
    weights: Literal["ema", "raw"] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    with_head: bool | None = None,
    allow_unknown: bool = False,
) -> ConversionReport:
    """Convert a checkpoint to a published folder. Its report accounts for every key.

    - `semicls`: a `.pth.tar` of the CCSSL authors' code, for a Wide ResNet, resnet18 or resnet50.
    - `moco`: the query encoder of MoCo v2, a ResNet, with a new classifier to start training from.
    - `usb`: a Wide ResNet of USB (semilearn) or TorchSSL. The logits are the same.

    Args:
        labels: The class names, in the order of the label numbers.
        backbone: timm's name of the network, such as "wide_resnet28_2_cifar". Only MoCo has a default: "resnet50".
        weights: Averaged ("ema", the default) or raw weights. MoCo has only one set.
        image_size: Side of the input in pixels; where None, that of the source for this backbone.
        mean, std: Normalization per channel; where None, that of the source: CIFAR-10 for a Wide ResNet. For CIFAR-100
            pass (0.5071, 0.4867, 0.4408) and (0.2675, 0.2565, 0.2761).
        with_head: Whether to write the projection head of a SemiCLS checkpoint, if it has one; default: yes.
        allow_unknown: Whether to leave out unknown keys.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or holds more than weights, a key is unknown, missing or of another shape, or an
            argument does not apply to the source.
    """
    if source == "moco" and weights is not None:
        raise ValueError("MoCo has one set of weights: leave out weights.")
    if source != "semicls" and with_head is not None:
        raise ValueError(f"A checkpoint of {source} has no projection head to write: leave out with_head.")
    if backbone is None and source != "moco":
        raise ValueError(
            f"The backbone of a {source} checkpoint is unknown: pass backbone, timm's name of its network."
        )
    backbone, weights = backbone or "resnet50", weights or "ema"
    form, architecture = _SOURCES[source], backbone.partition(".")[0]
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is '{weights}': use 'ema' or 'raw'.")
    if source == "usb" and not is_own_backbone(architecture):
        raise ValueError(f"'{backbone}' is not a Wide ResNet of USB: use wide_resnet28_2_cifar, 28_8 or 37_2.")
    entry, other = (form.ema, form.raw) if weights == "ema" else (form.raw, form.ema)
    content = _read(checkpoint, entry, other)
    state = {key.removeprefix("module."): value for key, value in content[entry].items()}  # of DataParallel

    reasons, arguments = dict(form.left_out), dict(_IMAGENET)
    if source == "semicls":
        arguments = _SEMICLS.get(architecture, {}) | dict(projection_dim=len(state.get("fc2.weight", range(64))))
        if with_head is False:
            reasons[r"fc[12]\.(weight|bias)"] = "the projection head, which was not requested"
        if not is_own_backbone(architecture):
            reasons[r"fc\.(weight|bias)"] = "an unused projection, as the network has no proj"
    elif source == "usb":
        arguments = _usb_arguments(state, checkpoint)
    elif not any(key.startswith("encoder_q.") for key in state):
        raise ValueError(f"'{checkpoint}' has no query encoder (encoder_q.conv1.weight, ...): pass one of MoCo v2.")
    given = dict(image_size=image_size, mean=mean, std=std).items()
    arguments |= {key: value for key, value in given if value is not None}
    if overlay := {key: arguments.pop(key) for key in ("mean", "std", "crop_pct", "interpolation") if key in arguments}:
        arguments["pretrained_cfg_overlay"] = overlay
    model = CCSSLForImageClassification.from_timm(backbone, labels=labels, **arguments)

    own = model.state_dict()
    mapped: dict[str, str] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    unknown: list[str] = []
    entries = {other: "the other set of weights", form.training_state: "training state, not weights"}
    keys = [(str(key), entries) for key in content if key != entry] + [(key, reasons) for key in content[entry]]
    for key, patterns in keys:
        name = key.removeprefix("module.")
        if reason := next((patterns[pattern] for pattern in patterns if re.fullmatch(pattern, name)), None):
            left_out[reason] = (*left_out.get(reason, ()), key)
        elif patterns is reasons and (target := _our_key(name)) in own and target not in mapped.values():
            mapped[key] = target
        else:
            unknown.append(key)
    if unknown and not allow_unknown:
        raise ValueError(
            f"'{checkpoint}' has {len(unknown)} keys that a {architecture} does not ({listed(unknown)}): choose the "
            "backbone that it was trained with, or leave them out with allow_unknown."
        )
    new = {target: content[entry][key] for key, target in mapped.items()}
    absent = tuple(prefix for prefix in form.may_lack if not any(key.startswith(prefix) for key in new))
    _check_fit(new, model, absent, checkpoint)
    check_finite(new, f"'{checkpoint}'")
    model.load_state_dict({**own, **new})
    model.save_pretrained(out, with_head="projection." not in absent)
    fresh = tuple(key for key in own if key not in new and key.startswith("backbone."))
    return ConversionReport(Path(out), architecture, entry, mapped, left_out, tuple(unknown), fresh)


def _read(path: str | Path, entry: str, other: str) -> Mapping[str, Any]:
    """The file's content on the CPU, with weights under `entry`. Only tensors and plain Python values are unpickled."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}': pass the path of a checkpoint.")
    with Path(path).open("rb") as file:
        start = file.read(64)
    for kind, sign, fix in _OTHER_FILES:
        if re.match(sign, start, re.DOTALL):
            raise ValueError(f"'{path}' is {kind} and not a checkpoint of torch.save: {fix}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type depends on where the file is damaged
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"'{path}' contains more than weights ({unsafe[1]}). That could run code, so it is not loaded. If you "
                "trust the file, load it with the code that wrote it, and torch.save only its state dicts, under the "
                "same names, to a new file."
            ) from None
        raise ValueError(f"'{path}' is not a checkpoint of torch.save, or is damaged: get the file again.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"'{path}' contains a {type(content).__name__}: pass a checkpoint, which is a dict.")
    state = content.get(entry)
    if not (isinstance(state, Mapping) and state and all(map(_is_weight, state, state.values()))):
        weights = "raw" if entry.startswith("ema") else "ema"
        hint = f"use '{other}' with weights='{weights}'" if other in {*content} - {entry} else "pass another file"
        raise ValueError(f"'{path}' has no weights under '{entry}' (it has {listed(content)}): {hint}.")
    return content


def _is_weight(key: Any, value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)
    return plain and isinstance(key, str)


def _our_key(key: str) -> str:
    """The key in our model. Some sources name the classifier `classifier` or wrap the network."""
    return authors_key(re.sub(r"^classifier\.", "fc.", re.sub(r"^(backbone|encoder_q)\.", "", key)))


def _usb_arguments(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The arguments of `WideResNetCifar`.

    The versions of USB and TorchSSL differ in biases, BatchNorm's epsilon and the order of activations; only the biases
    show in the keys. With biases in the blocks, every epsilon is 0.001; without, only the last one. Where a block that
    changes the width does not apply its first BatchNorm, that layer never received a gradient, so its bias is zero.
    """
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    if "conv1.bias" not in state:
        raise ValueError(f"'{path}' has no bias in its first convolution, so it is not of USB: convert it as semicls.")
    arguments: dict[str, Any] = dict(stem_bias=True)
    arguments |= dict(conv_bias=True, bn_eps=1e-3) if "block1.layer.0.conv1.bias" in state else dict(last_bn_eps=1e-3)
    widening = (value for key, value in state.items() if re.fullmatch(r"block[2-9]\.layer\.0\.bn1\.bias", key))
    if any(bool(bias.any()) for bias in widening):
        arguments["preactivate_all"] = True
    return arguments


def _check_fit(
    new: Mapping[str, Tensor], model: CCSSLForImageClassification, absent: tuple[str, ...], path: str | Path
) -> None:
    """Raises ValueError if a tensor of the model is missing, except under `absent`, or has another shape."""
    own, architecture, labels = model.state_dict(), model.config.architecture, model.config.num_labels
    classifier = new.get(f"backbone.{model.backbone.pretrained_cfg['classifier']}.weight", range(labels))
    if missing := [key for key in own if key not in new and not key.startswith(absent)]:
        problem = f"lacks {len(missing)} tensors of a {architecture}, such as '{missing[0]}'"
    elif len(classifier) != labels:
        raise ValueError(
            f"'{path}' has {len(classifier)} classes, but {labels} labels were given: name every class, in the order "
            "of the label numbers."
        )
    elif other := next((key for key in new if new[key].is_floating_point() != own[key].is_floating_point()), None):
        problem = f"has {new[other].dtype} for '{other}'"
    elif other := next((key for key, value in new.items() if value.shape != own[key].shape), None):
        theirs, ours = list(new[other].shape), list(own[other].shape)
        problem = f"has {theirs} for '{other}', where a {architecture} has {ours}"
    else:
        return
    raise ValueError(f"'{path}' {problem}: choose the backbone that it was trained with.")
