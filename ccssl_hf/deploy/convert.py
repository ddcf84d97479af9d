"""Convert checkpoints of other code to published folders: the CCSSL authors' (SemiCLS), MoCo v2's, and USB's.

SemiCLS saves a `.pth.tar` with `state_dict` and `ema_state_dict`; MoCo one with `state_dict`, which has both encoders;
USB and TorchSSL a `.pth` with `model` and `ema_model`. Files are read with `weights_only=True`, so no code in them
runs. The report accounts for every key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones import authors_key
from ..checkpoint import is_own_backbone
from ..modeling import CCSSLForImageClassification

Weights = Literal["ema", "raw"]

_SEMICLS_STATE = r"epoch|acc|best_acc|optimizer|scheduler|queue_(feats|probs|ptr)"
_MOCO_STATE = r"epoch|arch|optimizer"
_USB_STATE = (
    r"optimizer|scheduler|loss_scaler|it|epoch|best_it|best_eval_acc|p_(model|target)(_ptr)?|time_p|label_hist"
    r"|classwise_acc|selected_label|prob_max_(mu|var)_t|queue_(feats|probs|size|ptr)|(mem|labels)_bank"
    r"|rho(_init|_update_cnt)?|warmup_stage"
)

# The preprocessing in the authors' configurations: resnet18 for STL-10, resnet50 for Semi-iNat 2021.
_SEMICLS_INPUT: dict[str, dict[str, Any]] = {
    "resnet18": dict(image_size=96, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)),
    "resnet50": dict(
        image_size=224,
        mean=(0.4732, 0.4828, 0.3779),
        std=(0.2348, 0.2243, 0.2408),
        crop_pct=0.875,
        interpolation="bilinear",
    ),
}
_IMAGENET_INPUT: dict[str, Any] = dict(
    image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875, interpolation="bilinear"
)
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion. `str(report)` is a summary.

    Attributes:
        folder: The folder that was written.
        architecture: timm's name of the backbone.
        source: The entry of the checkpoint with the converted weights.
        mapped: Key in the checkpoint to key in `CCSSLForImageClassification`.
        left_out: Reason to the keys that were left out for it.
        unknown: Unknown keys that were left out.
        fresh: Keys of the folder that the checkpoint lacks, with random weights.
    """

    folder: Path
    architecture: str
    source: str
    mapped: dict[str, str]
    left_out: dict[str, tuple[str, ...]]
    unknown: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        def name(keys: Sequence[str]) -> str:
            return ", ".join(keys) if len(keys) <= 12 else f"{keys[0]} and {len(keys) - 1} more like it"

        lines = [f"{self.folder}: {len(self.mapped)} tensors of '{self.source}' as {self.architecture}"]
        lines += [f"left out, {reason}: {name(keys)}" for reason, keys in self.left_out.items()]
        lines += [f"left out, unknown: {', '.join(self.unknown)}"] if self.unknown else []
        lines += [f"not in the checkpoint, fresh: {name(self.fresh)}"] if self.fresh else []
        return "\n".join(lines)


def convert_semicls(
    checkpoint: str | Path,
    out: str | Path,
    *,
    labels: Sequence[str],
    backbone: str,
    weights: Weights = "ema",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    with_head: bool = True,
    allow_unknown: bool = False,
) -> ConversionReport:
    """Convert a `.pth.tar` of the CCSSL authors' code.

    Args:
        checkpoint: The file.
        out: The folder to write. Created if missing.
        labels: The class names, in the order of the label numbers.
        backbone: "wide_resnet28_2_cifar", "wide_resnet28_8_cifar", "resnet18" or "resnet50".
        weights: Averaged ("ema") or raw weights.
        image_size: Side of the input in pixels; that of the authors' configuration for the backbone where None.
        mean, std: Normalisation per channel; where None, that of the authors' configuration for the backbone
            (CIFAR-10, STL-10, Semi-iNat). For CIFAR-100 pass (0.5071, 0.4867, 0.4408) and (0.2675, 0.2565, 0.2761).
        with_head: Whether to write the projection head, if the checkpoint has one.
        allow_unknown: Whether to leave out unknown keys.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or contains more than weights, or a key is unknown, missing or has another
            shape.
    """
    architecture = backbone.partition(".")[0]
    known = {} if with_head else {r"fc[12]\.(weight|bias)": "the projection head, which was not requested"}
    if not is_own_backbone(architecture):
        known[r"fc\.(weight|bias)"] = "an unused projection, as the network has no proj"
    entries = _entries(weights, ema="ema_state_dict", raw="state_dict")
    source = _Checkpoint(checkpoint, *entries, training_state=_SEMICLS_STATE, known=known)
    head = source.weights.get("fc2.weight")
    defaults = _SEMICLS_INPUT.get(architecture, {}) | dict(projection_dim=64 if head is None else len(head))
    model = _build(backbone, labels, defaults, image_size=image_size, mean=mean, std=std)
    return source.convert(model, out, allow_unknown=allow_unknown)


def convert_moco(
    checkpoint: str | Path,
    out: str | Path,
    *,
    labels: Sequence[str],
    backbone: str = "resnet50",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_unknown: bool = False,
) -> ConversionReport:
    """Convert the query encoder of a MoCo v2 checkpoint, with a new classifier, to start training from.

    Args:
        checkpoint, out, labels, allow_unknown: See `convert_semicls`.
        backbone: A ResNet that torchvision has under the same name.
        image_size: Side of the input in pixels; 224 where None.
        mean, std: Normalisation per channel; ImageNet's where None, as in MoCo.

    Raises:
        FileNotFoundError, ValueError: See `convert_semicls`.
    """
    source = _Checkpoint(
        checkpoint,
        "state_dict",
        training_state=_MOCO_STATE,
        name=lambda key: re.sub(r"^encoder_q\.", "backbone.", key),
        known={
            r"encoder_q\.fc\..*": "the query encoder's head for MoCo's own loss",
            r"encoder_k\..*": "the key encoder, a moving average of the query encoder",
            r"queue(_ptr)?": "the queue of negatives",
        },
        may_lack=("projection.", "backbone.fc."),
    )
    if not any(key.startswith("encoder_q.") for key in source.weights):
        raise ValueError(f"'{checkpoint}' has no query encoder (encoder_q.conv1.weight, ...): pass one of MoCo v2.")
    model = _build(backbone, labels, _IMAGENET_INPUT, image_size=image_size, mean=mean, std=std)
    return source.convert(model, out, allow_unknown=allow_unknown)


def convert_usb(
    checkpoint: str | Path,
    out: str | Path,
    *,
    labels: Sequence[str],
    backbone: str,
    weights: Weights = "ema",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_unknown: bool = False,
) -> ConversionReport:
    """Convert a Wide ResNet of USB (semilearn) or TorchSSL. The logits are the same.

    Their versions differ in biases, BatchNorm's epsilon and the order of activations; only the biases show in the keys.
    With biases in the blocks, every epsilon is 0.001; without, only the last one. Where a block that changes the width
    does not apply its first BatchNorm, that layer never received a gradient, so its bias is exactly zero.

    Args:
        checkpoint, out, labels, weights, allow_unknown: See `convert_semicls`.
        backbone: "wide_resnet28_2_cifar", "wide_resnet28_8_cifar" or "wide_resnet37_2_cifar".
        image_size: Side of the input in pixels; 32 where None.
        mean, std: Normalisation per channel; CIFAR-10's where None.

    Raises:
        FileNotFoundError, ValueError: See `convert_semicls`.
    """
    if not is_own_backbone(backbone):
        raise ValueError(f"'{backbone}' is not a Wide ResNet of USB: use wide_resnet28_2_cifar, 28_8 or 37_2.")
    source = _Checkpoint(
        checkpoint,
        *_entries(weights, ema="ema_model", raw="model"),
        training_state=_USB_STATE,
        known={
            r"rot_classifier\..*": "ReMixMatch's rotation classifier",
            r"mlp_proj\..*": "a projection head with ReLU, where these networks have LeakyReLU here",
        },
    )
    arguments = _usb_arguments(source.weights, checkpoint)
    model = _build(backbone, labels, arguments, image_size=image_size, mean=mean, std=std)
    return source.convert(model, out, allow_unknown=allow_unknown)


def _entries(weights: Weights, *, ema: str, raw: str) -> tuple[str, str]:
    """The keys of the requested weights and of the other weights."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is '{weights}': use 'ema' or 'raw'.")
    return (ema, raw) if weights == "ema" else (raw, ema)


def _usb_arguments(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The arguments of `WideResNetCifar` for the network of the checkpoint."""
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    if "conv1.bias" not in state:
        raise ValueError(
            f"'{path}' has no bias in its first convolution, so it is not of USB: convert SemiCLS with convert_semicls."
        )
    arguments: dict[str, Any] = dict(stem_bias=True)
    arguments |= dict(conv_bias=True, bn_eps=1e-3) if "block1.layer.0.conv1.bias" in state else dict(last_bn_eps=1e-3)
    widening = re.compile(r"block[2-9]\.layer\.0\.bn1\.bias")
    if any(bool(value.any()) for key, value in state.items() if widening.fullmatch(key)):
        arguments["preactivate_all"] = True
    return arguments


def _build(
    backbone: str, labels: Sequence[str], defaults: Mapping[str, Any], **given: Any
) -> CCSSLForImageClassification:
    """A new model. `defaults` and `given` are arguments of the model and of its preprocessing; None is not given."""
    arguments = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    overlay = {key: arguments.pop(key) for key in _PREPROCESSING if key in arguments}
    if overlay:
        arguments["pretrained_cfg_overlay"] = overlay
    return CCSSLForImageClassification.from_timm(backbone, labels=labels, **arguments)


def _our_key(key: str) -> str:
    """The authors' and USB's keys: some name the classifier `classifier`, and USB wraps some networks (`backbone.`)."""
    return authors_key(re.sub(r"^classifier\.", "fc.", key.removeprefix("backbone.")))


def _strip(key: str) -> str:
    """The key without the prefix of DataParallel and DistributedDataParallel."""
    return key.removeprefix("module.")


@dataclass
class _Checkpoint:
    """A checkpoint of other code, and how to read its keys."""

    path: str | Path
    entry: str  # key of the requested weights
    other: str | None = None  # key of the other weights
    training_state: str = ""  # pattern of the keys that are not weights
    name: Callable[[str], str] = _our_key  # a key of the weights, without `module.`, to the key of our model
    known: Mapping[str, str] = field(default_factory=dict)  # pattern of keys that are left out, to the reason
    may_lack: Sequence[str] = ("projection.",)  # prefixes of our keys that may all be missing

    def __post_init__(self) -> None:
        self.content = _read(self.path)
        state = self.content.get(self.entry)
        if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
            choice = "raw" if self.entry.startswith("ema") else "ema"
            hint = f"use '{self.other}' with weights='{choice}'" if self.other in self.content else "pass another file"
            keys = ", ".join(map(str, self.content))
            raise ValueError(f"'{self.path}' has no weights under '{self.entry}' (it has {keys}): {hint}.")
        self.weights = {_strip(key): value for key, value in state.items()}

    def convert(self, model: CCSSLForImageClassification, out: str | Path, *, allow_unknown: bool) -> ConversionReport:
        """Check everything, load the weights into the model and write its folder, without a random projection head."""
        own, architecture = model.state_dict(), model.config.architecture
        mapped, left_out, unknown = self._sort(own)
        if unknown and not allow_unknown:
            raise ValueError(
                f"'{self.path}' has {len(unknown)} keys that a {architecture} does not ({', '.join(unknown)}): choose "
                "the backbone that it was trained with, or leave them out with allow_unknown."
            )
        new = {target: self.content[self.entry][key] for key, target in mapped.items()}
        absent = tuple(prefix for prefix in self.may_lack if not any(key.startswith(prefix) for key in new))
        if missing := [key for key in own if key not in new and not key.startswith(absent)]:
            raise ValueError(
                f"'{self.path}' lacks {len(missing)} tensors of a {architecture}, such as '{missing[0]}': choose the "
                "backbone that it was trained with."
            )
        _check_shapes(new, model, self.path)
        model.load_state_dict({**own, **new})
        model.save_pretrained(out, with_head="projection." not in absent)
        fresh = tuple(key for key in own if key not in new and key.startswith("backbone."))
        return ConversionReport(Path(out), architecture, self.entry, mapped, left_out, unknown, fresh)

    def _sort(self, own: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, tuple[str, ...]], tuple[str, ...]]:
        """Sort all keys of the file: mapped to a key of `own`, left out for a reason, or unknown."""
        mapped: dict[str, str] = {}
        left_out: dict[str, tuple[str, ...]] = {}
        unknown: list[str] = []

        def leave_out(key: str, reason: str) -> None:
            left_out[reason] = (*left_out.get(reason, ()), key)

        for key in map(str, self.content):
            if key == self.other:
                leave_out(key, "the other set of weights")
            elif re.fullmatch(self.training_state, key):
                leave_out(key, "training state, not weights")
            elif key != self.entry:
                unknown.append(key)
        for key in self.content[self.entry]:
            target, bare = self.name(_strip(key)), _strip(key)
            if reason := next((reason for pattern, reason in self.known.items() if re.fullmatch(pattern, bare)), None):
                leave_out(key, reason)
            elif target in own and target not in mapped.values():
                mapped[key] = target
            else:
                unknown.append(key)
        return mapped, left_out, tuple(unknown)


def _read(path: str | Path) -> Mapping[str, Any]:
    """The file's content on the CPU. Only tensors and plain Python values are unpickled."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}': pass the path of a checkpoint.")
    try:
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
    return content


def _check_shapes(new: Mapping[str, Tensor], model: CCSSLForImageClassification, path: str | Path) -> None:
    """Raises ValueError if a tensor has another shape than the model's."""
    own, labels = model.state_dict(), model.config.num_labels
    classifier = new.get(f"backbone.{model.backbone.pretrained_cfg['classifier']}.weight")
    if classifier is not None and len(classifier) != labels:
        raise ValueError(
            f"'{path}' has {len(classifier)} classes, but {labels} labels were given: name every class, in the order "
            "of the label numbers."
        )
    for key, value in new.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"'{path}' has {list(value.shape)} for '{key}', where a {model.config.architecture} has "
                f"{list(own[key].shape)}: choose the backbone that it was trained with."
            )
