"""Published folders, which transformers and timm load by themselves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from . import wide_resnet_cifar
from .errors import summary

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HEAD_FILE = "ccssl_head.safetensors"
"""Projection head and further heads, for continued training and the algorithm's own inference."""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors of any device and memory format to a safetensors file. An interrupted write keeps the old file."""
    # safetensors needs contiguous tensors (not channels_last) on the CPU that share no memory.
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    # Not save_file: only the owner could read its file, and published folders are served.
    _write(Path(path), save(plain, metadata={"format": "pt", **(metadata or {})}))


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises a ValueError that names the tensors with a NaN or infinite number. `what` is the start of the sentence."""
    floating = {key: value for key, value in tensors.items() if value.is_floating_point()}
    if wrong := [key for key, value in floating.items() if not value.isfinite().all()]:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"{what} has NaN or infinite numbers in {len(wrong)} of {len(tensors)} tensors "
            f"({', '.join(wrong[:10])}{more}): use an earlier checkpoint."
        )


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file. An interrupted write keeps the old file."""
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"_{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave an empty file under the name
        os.replace(partial, path)
    except BaseException:  # a full disk: make room again
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until the names of the files in a folder are on the disk, where the system can do so."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Loads what `save_tensors` wrote, to the CPU. Raises FileNotFoundError, or ValueError if the file is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}': check the folder, or save to it first.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}): use an earlier checkpoint.") from error


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes `config.json`, with the keys that transformers and timm read, and the code of the package's backbones."""
    config = model.config
    content = {
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "architecture": config.architecture,
        "num_classes": config.num_labels,
        "num_features": model.backbone.num_features,
        "label_names": config.labels,  # for a thousand classes transformers would otherwise use ImageNet's
        "model_args": config.model_args or {},  # not null, which timm does not load
        "pretrained_cfg": {k: v for k, v in model.backbone.pretrained_cfg.items() if k != "architecture"},
    }
    if is_own_backbone(config.architecture):
        content["auto_map"] = {
            "AutoModel": "wide_resnet_cifar.WideResNetCifarModel",
            "AutoModelForImageClassification": "wide_resnet_cifar.WideResNetCifarForImageClassification",
        }
        shutil.copyfile(wide_resnet_cifar.__file__, folder / "wide_resnet_cifar.py")
    save_json(folder / CONFIG_FILE, content)


def is_own_backbone(architecture: str) -> bool:
    """Whether the backbone is from this package, so that a published folder must include its code."""
    return architecture in wide_resnet_cifar.default_cfgs


def find_checkpoint(name: str | Path, *, revision: str | None = None, **hub_kwargs: Any) -> Path:
    """Returns the folder, or downloads the Hub repository `user/name` or `user/name@revision`, without code.

    The further arguments are those of `huggingface_hub.snapshot_download`. Raises FileNotFoundError if there is no such
    folder, and no such repository that can be read.
    """
    if Path(name).is_dir():
        return Path(name)
    repo_id, _, named = str(name).partition("@")
    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE]
        return Path(snapshot_download(repo_id, revision=revision or named or None, allow_patterns=files, **hub_kwargs))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"'{name}' is neither a local folder nor a readable Hub repository ({summary(error)}): pass a folder that "
            "save_pretrained wrote, or a Hub id 'user/name'. A private repository needs `hf auth login`."
        ) from error
