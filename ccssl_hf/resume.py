"""What a run resumes from: the training state of a checkpoint, a manifest of its files, and the run's settings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from . import data
from .checkpoint import check_finite, load_tensors, save_json, save_tensors, sync_folder
from .distributed import all_gather, rank, read_batchnorm_buffers, world_size, write_batchnorm_buffers
from .errors import UserError, in_lines, summary
from .record import library_versions
from .training_args import HyperparameterArguments, ViewArguments

logger = logging.getLogger(__name__)

TRAINING_STATE = "training_state.safetensors"
"""Raw and averaged weights with all heads, the buffers of the algorithm, and sums that were not yet logged."""
RUN = "run.json"
"""The settings and the data of the run."""
MANIFEST = "manifest.json"
"""Size and SHA-256 of the other files that resuming reads. It is written last."""
STATE_FILES = (TRAINING_STATE, RUN, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, SCALER_NAME, "rng_state*.pth")
_ALWAYS = STATE_FILES[:5]  # the others depend on the precision and the number of processes

_BATCHNORM = "batchnorm_of_processes"
"""An entry of the training state for the BatchNorm statistics of each process, `[processes, n]`."""
_SUMS = "sums_of_processes."
"""Start of its entries for what each process has summed up since the last log, `[processes, n]`."""


def save_training_state(
    folder: str | Path, modules: Mapping[str, nn.Module], sums: Mapping[str, Tensor], *, write: bool
) -> None:
    """Writes the state of all modules, and the sums of each process, to one file.

    Every process must call it; the one with `write=True` writes.
    """
    together = nn.ModuleDict(modules)
    state = together.state_dict()
    statistics = read_batchnorm_buffers(together)
    if world_size() > 1 and len(statistics):
        state[_BATCHNORM] = all_gather(statistics[None])
    check_finite(state, "The training state")
    device = next(together.parameters()).device
    for name, values in sums.items():
        state[_SUMS + name] = all_gather(values[None].to(device)) if world_size() > 1 else values[None]
    if write:
        save_tensors(Path(folder) / TRAINING_STATE, state)


def load_training_state(folder: str | Path, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Loads what `save_training_state` wrote, and returns the sums of this process.

    BatchNorm statistics and sums of another number of processes are averaged. Raises ValueError if the checkpoint is of
    another model or algorithm.
    """

    def own(values: Tensor) -> Tensor:
        return values[rank()] if len(values) == world_size() else values.mean(0)

    together = nn.ModuleDict(modules)
    state = load_tensors(Path(folder) / TRAINING_STATE)
    statistics = state.pop(_BATCHNORM, None)
    sums = {name.removeprefix(_SUMS): own(state.pop(name)) for name in list(state) if name.startswith(_SUMS)}
    wanted, found = ({name: value.shape for name, value in s.items()} for s in (together.state_dict(), state))
    if other := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise UserError(
            f"{folder} is of a run with another model, dataset, algorithm or ema_decay ({len(other)} entries differ, "
            f"such as {other[0]!r}): resume with the arguments of that run."
        )
    check_finite(state, f"The training state in {folder}")
    together.load_state_dict(state)
    if statistics is not None:
        write_batchnorm_buffers(together, own(statistics))
    return sums


# ---------------------------------------------------------------------------------------------------- whole checkpoints


def portable_state(path: Path) -> bytes:
    """The trainer's state without local paths, as it is uploaded: the best checkpoint has its name alone."""
    state = json.loads(path.read_text(encoding="utf-8"))
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(best).name
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()


def _seal(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, after its bytes have reached the disk. The trainer's state counts without paths."""
    with path.open("rb") as file:
        with suppress(OSError):  # not on every system for a file opened to read
            os.fsync(file.fileno())
        if path.name == TRAINER_STATE_NAME:
            content = portable_state(path)
            return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Marks a checkpoint as whole. Its files and folder are on the disk then, even after a power cut."""
    folder = Path(folder)
    files = sorted({path for pattern in STATE_FILES for path in folder.glob(pattern)})
    sync_folder(folder)
    save_json(folder / MANIFEST, {"files": {path.name: _seal(path) for path in files}})
    sync_folder(folder)
    sync_folder(folder.parent)


def flaws(folder: str | os.PathLike[str]) -> list[str]:
    """Why a run cannot resume from a checkpoint: all files that are missing or damaged. Empty if it is whole."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        if (folder / TRAINER_STATE_NAME).is_file() and not (folder / TRAINING_STATE).is_file():
            return ["it was written with save_only_model, which leaves out the training state"]
        return [f"it has no {MANIFEST}: saving was interrupted"]
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(seal["size"]), str(seal["sha256"])) for name, seal in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is damaged"]
    found = [f"{name} is not listed in {MANIFEST}" for name in _ALWAYS if name not in expected]
    for name, (size, sha256) in sorted(expected.items()):
        if not any(fnmatch(name, pattern) for pattern in STATE_FILES):
            found.append(f"{MANIFEST} lists {name!r}, which is no file of a checkpoint")
            continue
        try:
            path = folder / name
            if name != TRAINER_STATE_NAME and path.stat().st_size != size:
                found.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
            elif _seal(path)["sha256"] != sha256:
                found.append(f"{name} has other content than was saved")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except (OSError, ValueError) as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether all files that resuming reads are there, as they were saved."""
    return not flaws(folder)


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-N` of a run, whole or not, the one of the most steps first."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    found = [path for path in Path(output_dir).glob("*") if name.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Returns the newest whole checkpoint of a run, or None. It logs those that it passes over, and why."""
    for path in checkpoints(output_dir):
        if not (found := flaws(path)):
            return str(path)
        logger.warning("%s is passed over: %s.", path, "; ".join(found))
    return None


def choose_checkpoint(output_dir: str | os.PathLike[str], wanted: str | bool) -> str:
    """The checkpoint `wanted`, or with True the newest whole one. Raises ValueError if it is not there or not whole."""
    if wanted is True:
        if last := last_checkpoint(output_dir):
            return last
        broken = in_lines(f"{path.name}: {'; '.join(flaws(path))}" for path in checkpoints(output_dir))
        raise UserError(f"{output_dir} has no complete checkpoint: leave out resume_from_checkpoint to start.{broken}")
    folder = Path(str(wanted))
    if found := flaws(folder):
        if folder.is_dir() and not checkpoints(folder):
            raise UserError(
                f"{folder} is incomplete: give an earlier checkpoint-N, or resume_from_checkpoint=True for the last "
                f"complete one.{in_lines(found)}"
            )
        near = dict.fromkeys(path for place in (folder, folder.parent, output_dir) for path in checkpoints(place))
        whole = [str(path) for path in near if is_complete(path)]
        there = f"choose one of{in_lines(whole)}" if whole else "there is no complete one near it or in output_dir"
        raise UserError(f"{folder} is no checkpoint: {there}")
    return str(folder)


# -------------------------------------------------------------------------------------------------- settings of the run

# Arguments that may differ between a run and its continuation, by reason. All others are compared.
_MAY_DIFFER = {
    "They are compared as the batch of all processes, as the device, and by content.": """
        per_device_train_batch_size use_cpu local_rank image_column label_column hidden_label_column label_names""",
    "They say where and when something is written, shown, evaluated or uploaded.": """
        output_dir overwrite resume_from_checkpoint allow_changes run_name project report_to trackio_space_id
        trackio_bucket_id trackio_static_space_id disable_tqdm debug log_level log_level_replica log_on_each_node
        logging_strategy logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen
        include_for_metrics skip_memory_metrics eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches
        batch_eval_metrics eval_accumulation_steps eval_use_gather_object per_device_eval_batch_size
        prediction_loss_only bf16_full_eval fp16_full_eval save_strategy save_steps save_total_limit save_only_model
        save_on_each_node enable_jit_checkpoint load_best_model_at_end do_train do_eval do_predict push_to_hub hub_token
        hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        restore_callback_states_from_checkpoint""",
    "They say how batches and gradients travel. Which images a batch holds depends on the seed alone.": """
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order accelerator_config
        remove_unused_columns torch_empty_cache_steps train_sampling_strategy length_column_name ddp_backend
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph ddp_timeout""",
}
NOT_COMPARED = frozenset(name for names in _MAY_DIFFER.values() for name in names.split())


def run_settings(trainer: Any) -> dict[str, Any]:
    """What a `CCSSLTrainer` must share with the run of its checkpoint, as JSON: settings, data, and the environment.

    Every argument is compared unless it is in `NOT_COMPARED`, so that no new one is forgotten.
    """
    args, model = trainer.args, trainer.model
    resolved = {f.name for cls in (HyperparameterArguments, ViewArguments) for f in fields(cls)} | {"decode"}
    settings = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in NOT_COMPARED | resolved}
    settings |= trainer.algorithm.hyperparameters | asdict(trainer.settings) | {"decode": trainer.decode}
    settings |= {
        "labeled images of each batch, over all processes": args.per_device_train_batch_size * args.world_size,
        "backbone": model.config.architecture,
        "model_args": model.config.model_args or {},
        "classes": trainer.class_names,
        "projection_dim": model.config.projection_dim,
        "trained parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "optimizer": trainer.given_optimizer,
    }
    splits = {"labeled": trainer.train_dataset} | (
        {"unlabeled": trainer.unlabeled_dataset} if trainer.algorithm.views else {}
    )
    for role, split in splits.items():
        labels = [trainer.class_names[label] for label in trainer.labels.tolist()] if role == "labeled" else []
        content = data.content_key(split, args.image_column, labels)
        settings[f"{role} data"] = f"{len(split)} images, fingerprint {content}"
    environment = {**library_versions(), "device": args.device.type}
    if args.device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(args.device)
    found = {"settings": settings, "processes": args.world_size, "environment": environment}
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else str(value)


def check_settings(folder: str | Path, now: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Compares `run_settings` with those of a checkpoint, and logs what differs and is allowed.

    Raises ValueError with all settings that differ and both values, unless `allow_changes`.
    """
    before = read_run(folder)
    changes = list(_changes(before["settings"], now["settings"]))
    if changes and not allow_changes:
        raise UserError(
            f"{folder} is of a run with other settings, so that the run would not equal an uninterrupted one: resume "
            f"with the arguments of that run, or set allow_changes=True to go on with the new ones.{in_lines(changes)}"
        )
    if changes:
        logger.warning("%s is of a run with other settings, as allow_changes permits:%s", folder, in_lines(changes))
    if before["processes"] != now["processes"]:
        logger.warning(
            "The checkpoint is of %d processes and this run has %d: steps use the same images. BatchNorm statistics "
            "are averaged and dropout draws other random numbers, so bits may differ from an uninterrupted run.",
            *(before["processes"], now["processes"]),
        )
    if others := list(_changes(before["environment"], now["environment"])):
        logger.warning("Bits may differ from an uninterrupted run, because these differ:%s", in_lines(others))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            yield f"{name}: {old!r} in the checkpoint, {new!r} now"


def read_run(folder: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote about the run: `run_settings`, and `evaluation_due`."""
    return json.loads((Path(folder) / RUN).read_text(encoding="utf-8"))


@contextmanager
def new_rates(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Keeps the rates of an optimizer whose state is loaded in the block: a checkpoint holds those of its run."""
    created = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, new in zip(optimizer.param_groups, created, strict=True):
        group.update(new)
    if hasattr(scheduler, "lr_lambdas"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # it is logged


def save_checkpoint(trainer: Any, write: Callable[[], None], trial: Any) -> None:
    """Has upstream `write` a checkpoint, completes it, and only then uploads it and removes older ones.

    Raises OSError with the last whole checkpoint if the disk is full or the folder cannot be written to.
    """
    args, output = trainer.args, trainer._get_output_dir(trial)
    folder = Path(output, f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
    limit, push, without_state = args.save_total_limit, args.push_to_hub, args.save_only_model
    try:
        if args.should_save and folder.exists():  # of a run that was killed here, or of one that is repeated
            shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()
        args.save_total_limit, args.push_to_hub = None, False
        args.save_only_model = without_state and not trainer.stop.stopped  # else a stopped run would lose its work
        write()
        if args.should_save and not args.save_only_model:
            save_json(folder / RUN, trainer.run_facts | {"evaluation_due": trainer.stop.evaluation_due})
            write_manifest(folder)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        last = last_checkpoint(output)
        raise OSError(
            f"{folder} could not be saved ({summary(error)}): free space or make the folder writable, and resume. "
            + (f"The last complete checkpoint is {last}." if last else "There is no earlier complete checkpoint.")
        ) from error
    finally:
        args.save_total_limit, args.push_to_hub, args.save_only_model = limit, push, without_state
    if push:
        trainer._push_from_checkpoint(str(folder))
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(output, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)
    trainer.accelerator.wait_for_everyone()  # a process that ends early makes the launcher end the others
