"""Published folders, which transformers and timm load by themselves, and the training state of a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import wide_resnet_cifar
from .distributed import all_gather, rank, read_batchnorm_buffers, world_size, write_batchnorm_buffers
from .errors import summary

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HEAD_FILE = "ccssl_head.safetensors"
"""Projection head and further heads, for continued training and the algorithm's own inference."""

TRAINING_STATE = "training_state.safetensors"
"""Raw and averaged weights with all heads, and the buffers of the algorithm."""

_BATCHNORM = "batchnorm_of_processes"
"""Its entry for the BatchNorm statistics of each process, `[processes, n]`."""


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


def save_training_state(folder: str | Path, modules: Mapping[str, nn.Module], *, write: bool) -> None:
    """Writes the state of all modules to one file. Every process must call it; the one with `write=True` writes."""
    together = nn.ModuleDict(modules)
    state = together.state_dict()
    statistics = read_batchnorm_buffers(together)
    if world_size() > 1 and len(statistics):
        state[_BATCHNORM] = all_gather(statistics[None])
    if write:
        save_tensors(Path(folder) / TRAINING_STATE, state)


def load_training_state(folder: str | Path, modules: Mapping[str, nn.Module]) -> None:
    """Loads what `save_training_state` wrote. BatchNorm statistics of another number of processes are averaged.

    Raises ValueError if the checkpoint is incomplete, or of another model or algorithm.
    """
    if not is_complete(folder):
        raise ValueError(
            f"{folder} is incomplete (written with save_only_model, or saving was interrupted): give an earlier "
            "checkpoint-N, or resume_from_checkpoint=True for the last complete one."
        )
    together = nn.ModuleDict(modules)
    state = load_tensors(Path(folder) / TRAINING_STATE)
    statistics = state.pop(_BATCHNORM, None)
    wanted, found = ({name: value.shape for name, value in s.items()} for s in (together.state_dict(), state))
    if other := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ValueError(
            f"{folder} is of a run with another model, dataset, algorithm or ema_decay ({len(other)} entries differ, "
            f"such as {other[0]!r}): resume with the arguments of that run."
        )
    together.load_state_dict(state)
    if statistics is not None:
        own = statistics[rank()] if len(statistics) == world_size() else statistics.mean(0)
        write_batchnorm_buffers(together, own)


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether all files of a checkpoint were written. The Trainer's state is the last one."""
    try:
        json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (Path(folder) / TRAINING_STATE).is_file()


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Returns the last complete checkpoint of a run, or None. A killed run may leave an incomplete one after it."""
    found = [path for path in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_complete(path):
            return str(path)
        logger.warning("%s is incomplete: resuming from an earlier checkpoint.", path)
    return None
