"""Other forms of a published model: ONNX, and a handler for Hugging Face's Inference Endpoints."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import CenterCrop, Resize

from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, save_json
from ..data import check_writable
from ..modeling import CCSSLForImageClassification
from . import handler

OPSET = 18
"""The lowest that torch's exporter writes; runtimes from 2023 on read it."""

TOLERANCE = 1e-4
"""How far the file's logits may be from PyTorch's, as a fraction of the largest logit."""

BATCH_SIZES = (1, 2, 5)
"""Batches that a file is checked with."""

HANDLER_FILE, REQUIREMENTS_FILE = "handler.py", "requirements.txt"


# ------------------------------------------------------------------------------------------------------------- handler


def write_handler(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Writes `handler.py` into a published folder, and the `requirements.txt` that its container installs.

    Args:
        folder: What `save_pretrained` wrote.
        out: The folder to write to instead, made if need be.

    Returns:
        The files.

    Raises:
        FileNotFoundError: The folder holds no model.
        ValueError: `out` can't be written to.
    """
    folder = Path(folder)
    out = Path(out or folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' has no {name}: pass a folder that save_pretrained wrote.")
    check_writable(out)
    shutil.copyfile(handler.__file__, out / HANDLER_FILE)
    (out / REQUIREMENTS_FILE).write_text(f"timm>={timm.__version__}\n", encoding="utf-8")
    return [out / HANDLER_FILE, out / REQUIREMENTS_FILE]


# ---------------------------------------------------------------------------------------------------------------- ONNX


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: `onnx/model.onnx`.
        difference: The largest between one of its logits and PyTorch's.
        images: How many were compared.
    """

    file: Path
    difference: float
    images: int


def export_onnx(model: CCSSLForImageClassification, out: str | Path, *, opset: int = OPSET) -> Exported:
    """Writes a folder that transformers.js loads: `onnx/model.onnx`, `config.json` and `preprocessor_config.json`.

    The graph takes `pixel_values` `[N, 3, H, W]` for any `N` and gives `logits` `[N, C]`. onnxruntime runs it beside
    PyTorch on batches of several sizes, and it gets its name only where the two agree. Preprocessing is timm's for
    evaluation, as far as a runtime resizes like PIL.

    Args:
        model: What to export.
        out: The folder, made where it is missing. Not the published one, whose `config.json` is another.
        opset: Version of ONNX's operators, from `OPSET` on.

    Raises:
        ValueError: `out` can't be written to or is a published folder, the preprocessing has no counterpart, the
            network can't be exported, or the file doesn't say what PyTorch says.
    """
    out, network = Path(out), model.backbone.eval()
    if (out / WEIGHTS_FILE).exists():
        raise ValueError(f"{out} holds weights, and ONNX needs another {CONFIG_FILE}: name another folder.")
    if opset < OPSET:
        raise ValueError(f"opset is {opset}, but torch writes {OPSET} and later: use {OPSET}.")
    preprocessing = preprocessor_config(network.pretrained_cfg)
    file = out / "onnx" / "model.onnx"
    check_writable(file.parent)
    partial = file.with_name(f"_{file.name}.partial")
    size = resolve_data_config(pretrained_cfg=network.pretrained_cfg)["input_size"]
    partial.write_bytes(_graph(network, size=size, opset=opset))
    difference = _check(network, partial, size=size)
    save_json(out / CONFIG_FILE, _config(model))
    save_json(out / "preprocessor_config.json", preprocessing)
    os.replace(partial, file)
    return Exported(file, difference, sum(BATCH_SIZES))


def _graph(network: Any, *, size: tuple[int, int, int], opset: int) -> bytes:
    """The network as an ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        try:
            program = torch.onnx.export(
                network,
                (torch.zeros(2, *size),),  # a batch of one would be taken for a constant
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # whatever the tracer stumbles over
            reason = str(error).strip().splitlines()[0]
            name = network.pretrained_cfg["architecture"]
            raise ValueError(f"'{name}' can't be written as ONNX ({reason}): choose another backbone.") from error
    content = program.model_proto  # type: ignore[union-attr]
    if content.opset_import[0].version != opset:  # the exporter only logs that it could not
        raise ValueError(f"The network can't be written with opset {opset}: use {OPSET}.")
    for node in content.graph.node:
        del node.metadata_props[:]  # tracebacks, with the paths of this machine
    return content.SerializeToString()


@torch.no_grad()
def _check(network: nn.Module, file: Path, *, size: tuple[int, int, int]) -> float:
    """The largest difference of logits between PyTorch and onnxruntime.

    Raises:
        ValueError: It is too large, or another class comes first.
    """
    import onnxruntime  # here, so that a handler is written without it

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    furthest = 0.0
    generator = torch.Generator().manual_seed(0)
    for count in BATCH_SIZES:
        # Coarse noise: what a network sees in fine noise is nearly the same in every image.
        coarse = torch.randn(count, size[0], 4, 4, generator=generator)
        images = nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
        expected = network(images)
        logits = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
        difference = (logits - expected).abs().max().item()
        same_classes = torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
        if not (same_classes and difference <= TOLERANCE * expected.abs().max().item()):
            raise ValueError(
                f"The ONNX file doesn't say what PyTorch says: logits of {count} images differ by {difference:.2g}. It "
                f"is left as {file}; try another opset."
            )
        furthest = max(furthest, difference)
    return furthest


def _config(model: CCSSLForImageClassification) -> dict[str, Any]:
    """`config.json` for transformers.js and optimum, which know no timm models."""
    labels = model.config.labels
    return {
        "architectures": ["ResNetForImageClassification"],
        # Whatever the backbone: an image classifier's graph is run the same under any name that they know.
        "model_type": "resnet",
        "architecture": model.config.architecture,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": model.config.problem_type,
        # Browsers would look for a quantized file.
        "transformers.js_config": {"dtype": "fp32"},
    }


def preprocessor_config(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """timm's evaluation transform as `preprocessor_config.json`.

    Raises:
        ValueError: There is no such configuration: images are padded, or cropped to what is no square.
    """
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    resize, crop, *_ = create_transform(**data_config).transforms
    if type(resize) is not Resize or type(crop) is not CenterCrop:
        raise ValueError(
            f"Images are prepared with crop_mode '{data_config['crop_mode']}' for {data_config['input_size'][1:]} px, "
            "which preprocessor_config.json can't say: set crop_mode to center or squash in pretrained_cfg."
        )
    height, width = crop.size
    edges = resize.size if isinstance(resize.size, int) else list(resize.size)
    return {
        "image_processor_type": "ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edges} if isinstance(edges, int) else {"height": edges[0], "width": edges[1]},
        "resample": int(Image.Resampling[resize.interpolation.name]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data_config["mean"]),
        "image_std": list(data_config["std"]),
    }
