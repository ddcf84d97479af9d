"""The published folder, which transformers and timm load by themselves, and safe files for everything else.

AutoModel, AutoModelForImageClassification, AutoImageProcessor, `pipeline` and timm need `config.json` and
`model.safetensors` (with timm's keys) only. The projection head and further heads are in a separate file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file. An interrupted write keeps the old file."""
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"_{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Loads what `save_tensors` wrote, to the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged.
    """
    return _load(Path(path))[0]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}': check the folder, or save to it first.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}): use an earlier checkpoint.") from error


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the content of `config.json`: the keys that transformers' timm wrapper and timm read, and no others.

    `model_args` is never null (timm fails) and has no `num_classes` (transformers fails). The labels are always there
    (for a thousand classes transformers would otherwise use ImageNet's).
    """
    config = model.config
    cfg = {key: value for key, value in model.backbone.pretrained_cfg.items() if key != "architecture"}
    content = {
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "architecture": config.architecture,
        "num_classes": config.num_labels,
        "num_features": model.backbone.num_features,
        "label_names": config.labels,
        "model_args": config.model_args or {},
        "pretrained_cfg": cfg,
    }
    if is_own_backbone(config.architecture):
        module = Path(wide_resnet_cifar.__file__).stem
        content["auto_map"] = {
            "AutoModel": f"{module}.WideResNetCifarModel",
            "AutoModelForImageClassification": f"{module}.WideResNetCifarForImageClassification",
        }
    return content


def is_own_backbone(architecture: str) -> bool:
    """Whether the backbone is from this package, so that a published folder must include its code."""
    return architecture in wide_resnet_cifar.default_cfgs


def save_checkpoint(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    with_head: bool = True,
) -> None:
    """Writes a published folder; see `CCSSLForImageClassification.save_pretrained`."""
    own = model.state_dict()
    state = own if state_dict is None else state_dict
    if state.keys() != own.keys():
        different = sorted(state.keys() ^ own.keys())
        raise ValueError(
            f"state_dict must have the keys of model.state_dict(): {len(different)} differ, such as '{different[0]}'."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "backbone."
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    save_tensors(folder / WEIGHTS_FILE, backbone)
    save_json(folder / CONFIG_FILE, plain_config(model))
    if is_own_backbone(model.config.architecture):
        source = Path(wide_resnet_cifar.__file__)
        shutil.copyfile(source, folder / source.name)
    if with_head:
        heads = {key: value for key, value in state.items() if not key.startswith(prefix)}
        shape = {"projection_dim": model.config.projection_dim, "heads": model.config.heads or {}}
        save_tensors(folder / HEAD_FILE, heads, metadata={"ccssl": json.dumps(shape)})
    else:
        (folder / HEAD_FILE).unlink(missing_ok=True)  # a head from an earlier save belongs to other weights


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Loads a folder that `save_checkpoint` wrote, or that timm wrote with `model.safetensors`.

    Returns:
        The content of `config.json`; the weights under the keys of `CCSSLForImageClassification`; and `projection_dim`
        and `heads` for `CCSSLConfig`, or None if the folder has no heads.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' has no {CONFIG_FILE}: pass a folder that save_pretrained wrote, or a Hub id 'user/name'."
        )
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["model_args"] = config.get("model_args") or {}
    config["model_args"].pop("num_classes", None)  # timm writes it there
    state = {f"backbone.{key}": value for key, value in load_tensors(folder / WEIGHTS_FILE).items()}
    if not (folder / HEAD_FILE).is_file():
        return config, state, None
    heads, metadata = _load(folder / HEAD_FILE)
    return config, state | heads, json.loads(metadata["ccssl"])


def find_checkpoint(name: str | Path, *, revision: str | None = None, **hub_kwargs: Any) -> Path:
    """Returns the folder, or downloads the Hub repository (without code) and returns its folder.

    Args:
        name: A folder, or a Hub id: `user/name` or `user/name@revision`.
        revision: Branch, tag, commit, or `refs/pr/N` for a pull request; default: main.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only` of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: There is no such folder, and no such repository that can be read.
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
