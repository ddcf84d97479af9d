"""Which arguments a run accepts: ranges, contradictions, and arguments of transformers that are not supported.

The functions take `CCSSLTrainingArguments` before transformers has changed any value.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from .algorithms import ALGORITHMS, hyperparameter_errors
from .errors import near_misses
from .record import DIRECTIONS, greater_is_better

# Every argument of transformers is in one of the next four tables: one that a later release adds is refused.
_NAMES = """
    output_dir per_device_train_batch_size per_device_eval_batch_size max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2
    adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing gradient_checkpointing torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node
    save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
    full_determinism seed use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context ddp_bucket_cap_mb
    ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics do_eval resume_from_checkpoint local_rank
"""
_SUPPORTED = frozenset(_NAMES.split())
# Arguments that have no effect here, or would break reproducibility: only their defaults are allowed.
_OF_TEXT = "is for language models: leave it out"
_TRAINING_STOPS = "has no effect on a run, which always trains: leave it out"
_WITHOUT_EFFECT = {
    "num_train_epochs": "has no effect, because each split has its own epochs: set max_steps alone",
    "auto_find_batch_size": "would change the images of every step: set per_device_train_batch_size",
    "label_smoothing_factor": "has no effect on the algorithms' losses: leave it out",
    "data_seed": "would be a second seed, and one seed decides every step: set seed",
    "ignore_data_skip": "would repeat images that the run has already seen: leave it out",
    "logging_nan_inf_filter": "would hide that a run diverges: leave it out",
    "prediction_loss_only": "would leave out all metrics: leave it out",
    "eval_do_concat_batches": "would leave metrics without the images of other batches: leave it out",
    "eval_use_gather_object": "has no effect, because outputs are tensors: leave it out",
    "enable_jit_checkpoint": "has no effect: a run that is told to stop saves a checkpoint by itself",
    "dataloader_drop_last": "has no effect: training batches are always full, and evaluation needs every image",
    "dataloader_in_order": "would change the order of images: leave it out",
    "train_sampling_strategy": "has no effect, because seed and step decide the images: leave it out",
    "activation_checkpointing_kwargs": "has no effect on timm's backbones: leave it out",
    "gradient_checkpointing_kwargs": "has no effect on timm's backbones: leave it out",
    "parallelism_config": "is not supported: launch with plain data parallelism (DDP)",
    "fsdp_config": "is not supported: launch with plain data parallelism (DDP)",
    **dict.fromkeys(("do_train", "do_predict"), _TRAINING_STOPS),
    **dict.fromkeys(("length_column_name", "average_tokens_across_devices", "include_num_input_tokens_seen"), _OF_TEXT),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config", "use_cache", "neftune_noise_alpha"), _OF_TEXT),
}
_REFUSED_BELOW = frozenset(("fsdp", "deepspeed"))  # with a message of their own
# Arguments with a value that the package needs.
SET_HERE: dict[str, Any] = {
    "remove_unused_columns": False,  # forward does not take the image column, and it must not be dropped
    "label_names": ["labels"],
    "ddp_find_unused_parameters": False,  # one forward reaches every parameter that is trained
    "ddp_broadcast_buffers": False,  # BatchNorm statistics are averaged before they are read
}
# Entries of accelerator_config that must keep their defaults.
_ACCELERATOR = {
    "split_batches": "would split the pairs of labeled and unlabeled images",
    "dispatch_batches": "would mix up the random numbers of the images",
    "even_batches": "would let processes wait for each other for ever in an evaluation",
    "use_seedable_sampler": "has no effect, because seed and step decide the images",
}
# The least whole number of an argument (None: any), which may be None where that is its default.
_WHOLE: dict[str, int | None] = {
    **dict.fromkeys(
        ("mu", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "max_image_pixels"), 1
    ),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit", "ddp_timeout"), 1),
    **dict.fromkeys(("dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_bucket_cap_mb"), 1),
    "dataloader_num_workers": -1,
    **dict.fromkeys(("randaugment_ops", "randaugment_magnitude", "cutout_size"), None),  # `ViewSettings` has ranges
}
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "eval_delay", "warmup_steps")
_BELOW_ONE = ("ema_decay", "sgd_momentum", "adam_beta1", "adam_beta2")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
ON_METRIC = ("reduce_lr_on_plateau", "greedy")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def raise_all(errors: Iterable[str]) -> None:
    """Raises one ValueError with a line for each error."""
    if lines := [f"{error.rstrip('.')}." for error in dict.fromkeys(errors)]:
        raise ValueError("\n".join(lines))


def _default(args: Any, name: str) -> Any:
    return getattr(type(args), name)


def argument_errors(args: Any) -> Iterator[str]:
    """All problems, each with its fix."""
    found = [*_range_errors(args), *_choice_errors(args)]
    yield from found
    if not found:  # these need values of the right types
        yield from _view_errors(args)
        yield from _contradictions(args)
        yield from _step_errors(args)
    yield from _errors_of_transformers(args)
    yield from _metric_errors(args)


def _range_errors(args: Any) -> Iterator[str]:
    defaults = {f.name: f.default for f in fields(args)}
    for name, least in _WHOLE.items():
        value = getattr(args, name)
        if value is None and defaults[name] is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            yield f"{name} is {value!r}: give a whole number"
        elif least is not None and int(value) < least:
            yield f"{name} is {value}: set it to {least} or more"
    for name in _NOT_NEGATIVE:
        value = getattr(args, name)
        if not _is_number(value) or value < 0:
            yield f"{name} is {value!r}: set it to a finite number of 0 or more"
    for name in _BELOW_ONE:
        value = getattr(args, name)
        if not _is_number(value) or not 0 <= value < 1:
            note = " (no averaging)" if name == "ema_decay" else ""
            yield f"{name} is {value!r}: choose a value from 0{note} to below 1"
    if not isinstance(args.seed, Integral) or isinstance(args.seed, bool) or not 0 <= int(args.seed) < 2**32:
        yield f"seed is {args.seed!r}: choose a whole number from 0 to {2**32 - 1}"


def _choice_errors(args: Any) -> Iterator[str]:
    options = {name: get_args(h) for name, h in get_type_hints(type(args)).items() if get_origin(h) is Literal}
    enums: dict[str, Any] = {
        "optim": OptimizerNames,
        "lr_scheduler_type": SchedulerType,
        "hub_strategy": HubStrategy,
    }
    options |= {name: tuple(each.value for each in enum) for name, enum in enums.items()}
    options |= {"logging_strategy": ("no", "steps"), "eval_strategy": ("no", "steps")}
    options |= {"save_strategy": ("no", "steps", "best")}
    for name, allowed in options.items():
        value = getattr(args, name)
        if name.endswith("_strategy") and value == "epoch":
            steps = name.replace("strategy", "steps")
            yield f"{name}='epoch' would act once, because a run is one long epoch: set {steps} and {name}='steps'"
        elif value not in allowed:
            near = near_misses(str(value), allowed) if len(allowed) > 6 else ""
            yield f"{name} is {str(value)!r}: choose one of {', '.join(map(str, allowed))}.{near}"


def _view_errors(args: Any) -> Iterator[str]:
    try:
        args.view_settings({"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    except ValueError as error:
        yield from str(error).splitlines()


def _contradictions(args: Any) -> Iterator[str]:
    if args.schedule != "lr_scheduler_type":
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
            if getattr(args, name) not in (_default(args, name), {}):
                yield f"{name} has no effect with another schedule: set schedule='lr_scheduler_type' instead"
    elif args.warmup_steps and args.lr_scheduler_type in _WITHOUT_WARMUP:
        yield f"warmup_steps has no effect with lr_scheduler_type={str(args.lr_scheduler_type)!r}: leave it out"
    if args.warmup_steps > args.max_steps or (args.warmup_steps > 1 and args.warmup_steps % 1):
        yield (
            f"warmup_steps is {args.warmup_steps}: set it to a whole number up to max_steps ({args.max_steps}), or "
            "to a share of max_steps below 1"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim == "sgd" and args.nesterov and args.sgd_momentum == 0:
        yield "nesterov needs momentum: set sgd_momentum above 0, or nesterov=False"
    if optim != "sgd" and (not args.nesterov or args.sgd_momentum != _default(args, "sgd_momentum")):
        yield f"sgd_momentum and nesterov have no effect with optim={optim!r}: leave them out"
    without = {"optim_args": optim == "sgd" or optim in ("adafactor", "adamw_torch", "adamw_torch_fused")}
    without |= {"optim_target_modules": not optim.startswith(("galore", "apollo"))}
    has_no_adam = optim.startswith(("sgd", "adafactor", "rmsprop", "adagrad"))
    without |= dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), has_no_adam)
    for name, ignored in without.items():
        if ignored and getattr(args, name) != _default(args, name):
            yield f"{name} has no effect with optim={optim!r}: leave it out"
    if args.eval_weights == "ema" and args.ema_decay == 0:
        yield "eval_weights='ema' with ema_decay=0: there are no averaged weights; set eval_weights='raw'"
    if args.algorithm not in ALGORITHMS:
        yield f"Unknown algorithm {args.algorithm!r}.{near_misses(args.algorithm, ALGORITHMS)} Choose one of " + (
            ", ".join(ALGORITHMS)
        )
    else:
        yield from hyperparameter_errors(args.algorithm, args.hyperparameters())
    chosen = args.hyperparameters()
    for name in ("push_threshold", "contrast_temperature", "own_pair_weight"):
        if name in chosen and chosen["lambda_contrast"] == 0:
            yield f"{name} is part of CCSSL: set lambda_contrast above 0, or {name} to none"
    if args.hidden_label_column == args.image_column:
        yield "hidden_label_column and image_column name the same column: name a column of labels"


def _step_errors(args: Any) -> Iterator[str]:
    """Problems of when a run logs, evaluates and saves."""
    for what in ("logging", "eval", "save"):
        steps = getattr(args, f"{what}_steps")
        if getattr(args, f"{what}_strategy") != "steps" or (steps is None and what == "eval"):
            continue
        if not _is_number(steps) or steps <= 0 or (steps > 1 and steps % 1):
            yield f"{what}_steps is {steps!r}: set it to a whole number of 1 or more, or to a share of max_steps"
    best = "save_strategy='best'" if args.save_strategy == "best" else "load_best_model_at_end"
    if args.save_strategy == "best" and (args.eval_strategy == "no" or args.metric_for_best_model is None):
        yield f"{best} needs evaluations: set eval_strategy='steps' and metric_for_best_model"
    if args.load_best_model_at_end:
        if args.save_only_model:
            yield f"{best} needs the training state: leave out save_only_model, which does not write it"
        each = args.logging_steps if args.eval_steps is None else args.eval_steps
        if args.eval_strategy == args.save_strategy == "steps" and each != args.save_steps:
            yield (
                f"load_best_model_at_end needs a checkpoint of every evaluation: set save_steps to eval_steps "
                f"({each}), or save_strategy='best'"
            )


def _errors_of_transformers(args: Any) -> Iterator[str]:
    """Arguments of transformers that are not supported."""
    launched = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    if args.fsdp or args.deepspeed or launched:
        yield "FSDP and DeepSpeed are not supported yet: launch with plain data parallelism (DDP)"
    own = {f.name: f for f in fields(args)}
    for name in (f.name for f in fields(TrainingArguments)):
        value, default = getattr(args, name), own[name].default
        if name in _SUPPORTED or name in _REFUSED_BELOW or value == default or default is MISSING:
            continue
        if value is False and isinstance(default, str):  # the command line reads "no" as a boolean
            continue
        if name not in SET_HERE:
            reason = "is an argument of a newer transformers that has not been tried: leave it out"
            yield f"{name}={value!r} {_WITHOUT_EFFECT.get(name, reason)}"
        elif value != SET_HERE[name]:
            yield f"{name}={value!r} would be set to {SET_HERE[name]!r}, which training needs: leave it out"
    if unknown := sorted({*args.include_for_metrics} - {"inputs", "loss"}):
        yield f"include_for_metrics has {', '.join(unknown)}: choose of inputs and loss"
    if args.ddp_backend not in (None, "mpi") and "WORLD_SIZE" not in os.environ:
        yield f"ddp_backend={args.ddp_backend!r} needs several processes: use accelerate launch, or leave it out"
    try:
        given = accelerator_settings(args)
    except (OSError, ValueError) as error:
        yield f"accelerator_config cannot be read ({error}): pass a dictionary, or the path of a JSON file"
        return
    known = AcceleratorConfig().to_dict()
    for name, value in given.items():
        if name not in known and name != "use_configured_state":
            yield f"accelerator_config has no entry {name!r}.{near_misses(name, known)} It has {', '.join(known)}"
        elif name in _ACCELERATOR and bool(value) != bool(known[name]):
            yield f"accelerator_config: {name}={value!r} {_ACCELERATOR[name]}: leave it out"
    if other := sorted({*(given.get("gradient_accumulation_kwargs") or {})} - {"sync_each_batch", "num_steps"}):
        yield f"accelerator_config: {', '.join(other)} has no effect: leave it out"
    if (given.get("gradient_accumulation_kwargs") or {}).get("num_steps", 1) != 1:
        yield "accelerator_config: num_steps would be a second number of steps: set gradient_accumulation_steps"


def accelerator_settings(args: Any) -> dict[str, Any]:
    """What `accelerator_config` sets: a dictionary, JSON, the path of a JSON file, or an object."""
    given: Any = args.accelerator_config
    if isinstance(given, str):
        given = json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))
    return dict(given.to_dict() if isinstance(given, AcceleratorConfig) else given or {})


def _metric_errors(args: Any) -> Iterator[str]:
    """Problems of the metric that chooses the best model, or of the direction in which it is better."""
    name = args.metric_for_best_model
    if name is None:
        return
    known = greater_is_better(name)
    if known is None and args.greater_is_better is None:
        yield (
            f"metric_for_best_model {name!r} is not known.{near_misses(name.removeprefix('eval_'), DIRECTIONS)} "
            f"Choose one of {', '.join(DIRECTIONS)}, or set greater_is_better for one of your own compute_metrics"
        )
    if known is not None and args.greater_is_better not in (None, known):
        better = "higher" if known else "lower"
        yield (
            f"greater_is_better={args.greater_is_better} contradicts metric_for_best_model {name!r}, of which "
            f"{better} values are better: leave greater_is_better out (None)"
        )
    direction = known if known is not None else args.greater_is_better
    mode = (args.lr_scheduler_kwargs or {}).get("mode") if isinstance(args.lr_scheduler_kwargs, dict) else None
    if args.lr_scheduler_type in ON_METRIC and mode not in (None, "max" if direction else "min"):
        yield f"lr_scheduler_kwargs: mode={mode!r} contradicts metric_for_best_model {name!r}: leave mode out"
