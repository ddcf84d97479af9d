"""What lets a run go on bit for bit: its state beside a checkpoint's plain folder, and which checkpoint is whole."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint import load_tensors, save_tensors
from .distributed import all_gather, rank, read_batchnorm_buffers, world_size, write_batchnorm_buffers

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state.safetensors"
"""Raw and averaged weights of the whole model, and the algorithm's statistics."""

_BATCHNORM = "batchnorm_of_processes"
"""Its entry for what differs from process to process: BatchNorm's running statistics, `[processes, n]`."""


def save_training_state(folder: str | Path, modules: Mapping[str, nn.Module], *, write: bool) -> None:
    """Writes the state of all modules to one file. Every process calls it; one of them writes.

    Args:
        folder: The checkpoint.
        modules: The modules by name.
        write: Whether this process is the one that writes.
    """
    together = nn.ModuleDict(modules)
    state = together.state_dict()
    statistics = read_batchnorm_buffers(together)
    if world_size() > 1 and len(statistics):
        state[_BATCHNORM] = all_gather(statistics[None])
    if write:
        save_tensors(Path(folder) / TRAINING_STATE, state)


def load_training_state(folder: str | Path, modules: Mapping[str, nn.Module]) -> None:
    """Reads what `save_training_state` wrote. With another number of processes, BatchNorm starts from their mean.

    Raises:
        ValueError: The checkpoint is not whole, or of another model or algorithm.
    """
    if not is_whole(folder):
        raise ValueError(
            f"The run can't go on from {folder}: it was written with save_only_model, or its writing was cut short; "
            "give an earlier checkpoint-N, or resume_from_checkpoint=True for the last one that is whole."
        )
    together = nn.ModuleDict(modules)
    state = load_tensors(Path(folder) / TRAINING_STATE)
    statistics = state.pop(_BATCHNORM, None)
    wanted, found = ({name: value.shape for name, value in s.items()} for s in (together.state_dict(), state))
    other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if other:
        raise ValueError(
            f"{folder} is of a run with another model, data set, algorithm or ema_decay ({len(other)} entries differ, "
            f"such as {other[0]!r}): resume with the arguments that it was written with."
        )
    together.load_state_dict(state)
    if statistics is not None:
        own = statistics[rank()] if len(statistics) == world_size() else statistics.mean(0)
        write_batchnorm_buffers(together, own)


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state comes last, after every process's part."""
    try:
        json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (Path(folder) / TRAINING_STATE).is_file()


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The last checkpoint of a run that is whole; a killed run may have left a later one that is not."""
    found = [path for path in Path(output_dir).iterdir() if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning("%s was not written to its end: going on from an earlier checkpoint.", path)
    return None
