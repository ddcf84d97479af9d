"""The training state of a checkpoint, and which checkpoint a run resumes from."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from .checkpoint import check_finite, load_tensors, save_tensors
from .distributed import all_gather, rank, read_batchnorm_buffers, world_size, write_batchnorm_buffers

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state.safetensors"
"""Raw and averaged weights with all heads, and the buffers of the algorithm."""

_BATCHNORM = "batchnorm_of_processes"
"""Its entry for the BatchNorm statistics of each process, `[processes, n]`."""


def save_training_state(folder: str | Path, modules: Mapping[str, nn.Module], *, write: bool) -> None:
    """Writes the state of all modules to one file. Every process must call it; the one with `write=True` writes."""
    together = nn.ModuleDict(modules)
    state = together.state_dict()
    statistics = read_batchnorm_buffers(together)
    if world_size() > 1 and len(statistics):
        state[_BATCHNORM] = all_gather(statistics[None])
    check_finite(state, "The training state")
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
    check_finite(state, f"The training state in {folder}")
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
