"""Export a published model to ONNX, or add a request handler for Hugging Face Inference Endpoints."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import CenterCrop, Resize

from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, check_finite, load_tensors, save_json
from ..modeling import CCSSLForImageClassification
from ..output_folder import check_writable
from ..standalone import standalone
from . import handler

OPSET = 18  # the lowest that torch's exporter writes; runtimes since 2023 read it
TOLERANCE = 1e-4  # maximum difference from PyTorch's logits, as a fraction of the largest logit
BATCH_SIZES = (1, 2, 5)  # of the comparison with PyTorch


def write_handler(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write `handler.py` and its `requirements.txt` to a published folder, or to `out`, and return their paths.

    Raises FileNotFoundError if the folder has no model, and ValueError if `out` cannot be written.
    """
    folder, out = Path(folder), Path(out or folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' has no {name}: pass a folder written by save_pretrained.")
    check_finite(load_tensors(folder / WEIGHTS_FILE), f"The model in '{folder}'")
    check_writable(out)
    code, requirements = out / "handler.py", out / "requirements.txt"
    code.write_text(standalone(Path(handler.__file__)), encoding="utf-8")
    requirements.write_text(f"timm>={timm.__version__}\n", encoding="utf-8")
    return [code, requirements]


def export_onnx(model: CCSSLForImageClassification, out: str | Path, *, opset: int = OPSET) -> float:
    """Write a folder that transformers.js loads: `onnx/model.onnx`, `config.json` and `preprocessor_config.json`.

    The graph maps `pixel_values` `[N, 3, H, W]` to `logits` `[N, C]` for any `N`. The pixels are timm's if the runtime
    resizes like Pillow. The file gets its name only if the logits of onnxruntime and of PyTorch are the same. Returns
    the largest difference between them, on batches of `BATCH_SIZES`.

    Raises:
        ValueError: `out` cannot be written or is a published folder (that needs another `config.json`), `opset` is
            below `OPSET`, the preprocessing or the network cannot be exported, or the logits differ from PyTorch's.
    """
    out, network = Path(out), model.backbone.eval()
    if (out / WEIGHTS_FILE).exists():
        raise ValueError(f"{out} is a published folder, and ONNX needs another {CONFIG_FILE}: name another folder.")
    if opset < OPSET:
        raise ValueError(f"opset is {opset}, but must be at least {OPSET}: use {OPSET}.")
    check_finite(network.state_dict(), "The model")
    preprocessing = preprocessor_config(network.pretrained_cfg)
    file = out / "onnx" / "model.onnx"
    check_writable(file.parent)
    partial = file.with_name(f"_{file.name}.partial")
    size = resolve_data_config(pretrained_cfg=network.pretrained_cfg)["input_size"]
    partial.write_bytes(_graph(network, size=size, opset=opset))
    difference = _check(network, partial, size=size)
    config = {
        "architectures": ["ResNetForImageClassification"],
        # transformers.js and optimum lack timm models. They run any image classifier the same under any name they know.
        "model_type": "resnet",
        "architecture": model.config.architecture,
        "id2label": {str(number): label for number, label in enumerate(model.config.labels)},
        "label2id": {label: number for number, label in enumerate(model.config.labels)},
        "problem_type": model.config.problem_type,
        "transformers.js_config": {"dtype": "fp32"},  # in browsers the default is a quantized file
    }
    save_json(out / CONFIG_FILE, config)
    save_json(out / "preprocessor_config.json", preprocessing)
    os.replace(partial, file)
    return difference


def _graph(network: Any, *, size: tuple[int, int, int], opset: int) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        try:
            program = torch.onnx.export(
                network,
                (torch.zeros(2, *size),),  # a batch size of one would become a constant
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # the tracer raises many types
            reason = str(error).strip().splitlines()[0]
            name = network.pretrained_cfg["architecture"]
            raise ValueError(f"'{name}' can't be exported to ONNX ({reason}): choose another backbone.") from error
    content = program.model_proto  # type: ignore[union-attr]
    if content.opset_import[0].version != opset:  # the exporter only logs a failed conversion
        raise ValueError(f"The network can't be exported with opset {opset}: use {OPSET}.")
    for node in content.graph.node:
        del node.metadata_props[:]  # tracebacks with local paths
    return content.SerializeToString()


@torch.no_grad()
def _check(network: nn.Module, file: Path, *, size: tuple[int, int, int]) -> float:
    """The largest difference between the logits of PyTorch and onnxruntime. Raises ValueError if it is too large."""
    import onnxruntime  # optional: write_handler does not need it

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    furthest, generator = 0.0, torch.Generator().manual_seed(0)
    for count in BATCH_SIZES:
        # Coarse noise: a network's features of fine noise are nearly the same for every image.
        coarse = torch.randn(count, size[0], 4, 4, generator=generator)
        images = nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
        expected = network(images)
        logits = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
        difference = (logits - expected).abs().max().item()
        same = torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
        if not (same and difference <= TOLERANCE * expected.abs().max().item()):
            raise ValueError(
                f"The logits of the ONNX file and of PyTorch differ by {difference:.2g} on {count} images. The file is "
                f"kept as {file}: try another opset."
            )
        furthest = max(furthest, difference)
    return furthest


def preprocessor_config(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """timm's evaluation transform as `preprocessor_config.json`.

    Raises ValueError if the file cannot express it: it pads images, or does not crop a square.
    """
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    resize, crop, *_ = create_transform(**data_config).transforms
    if type(resize) is not Resize or type(crop) is not CenterCrop:
        raise ValueError(
            f"preprocessor_config.json does not support crop_mode '{data_config['crop_mode']}' with input size "
            f"{data_config['input_size'][1:]}: set crop_mode to center or squash in pretrained_cfg."
        )
    one_edge, sides = isinstance(resize.size, int), ("height", "width")
    return {
        "image_processor_type": "ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize.size} if one_edge else dict(zip(sides, resize.size, strict=True)),
        "resample": int(Image.Resampling[resize.interpolation.name]),
        "do_center_crop": True,
        "crop_size": dict(zip(sides, crop.size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data_config["mean"]),
        "image_std": list(data_config["std"]),
    }
