"""Arguments of a run: accepted and refused values, help texts, and packaged configs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from transformers import TrainingArguments

from ccssl_hf import CCSSLTrainingArguments, argument_checks
from ccssl_hf.algorithms import ALGORITHMS, algorithm_hyperparameters, build_algorithm
from ccssl_hf.argument_checks import _REFUSED_BELOW, _SUPPORTED, _WITHOUT_EFFECT, SET_HERE
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments
from ccssl_hf.training_args import HyperparameterArguments


def arguments(folder: Path, **values: Any) -> CCSSLTrainingArguments:
    return CCSSLTrainingArguments(output_dir=str(folder), use_cpu=True, **values)


def test_the_defaults_are_the_papers_for_cifar10(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert (args.max_steps, args.per_device_train_batch_size, args.mu) == (512 * 1024, 64, 7)
    assert (args.learning_rate, args.weight_decay, args.sgd_momentum, args.nesterov) == (0.03, 1e-3, 0.9, True)
    assert (args.optim, args.schedule, args.warmup_steps) == ("sgd", "cosine_7_16", 0)
    assert (args.ema_decay, args.eval_weights, args.weak_forward) == (0.999, "ema", "joint")
    assert (args.randaugment_ops, args.randaugment_magnitude, args.cutout_size) == (2, 10, 16)
    assert args.hyperparameters() == {"lambda_contrast": 1.0}
    settings = build_algorithm(args.algorithm, num_classes=10, **args.hyperparameters()).hyperparameters
    assert settings["confidence_threshold"] == 0.95 and settings["push_threshold"] is None
    assert (settings["lambda_u"], settings["contrast_temperature"], settings["own_pair_weight"]) == (1, 0.07, "one")


def test_settings_of_upstream_that_would_break_training_are_changed(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert not args.remove_unused_columns  # it would drop the images
    assert not args.logging_nan_inf_filter  # it would hide a diverged loss
    assert not args.ddp_find_unused_parameters and not args.ddp_broadcast_buffers


def test_every_hyperparameter_of_every_algorithm_is_an_argument_with_its_type_and_help() -> None:
    tables = [algorithm_hyperparameters(name) for name in ALGORITHMS]
    named = {f.name: f for f in dataclasses.fields(HyperparameterArguments)}
    assert named.keys() == {name for table in tables for name in table}
    hints = get_type_hints(HyperparameterArguments)
    for table in tables:
        for name, row in table.items():
            assert hints[name] == row.type | None and named[name].default is None
            assert named[name].metadata["help"].startswith(row.help)


def test_every_argument_has_a_help_text_and_no_default_of_upstreams_is_changed_silently() -> None:
    upstream = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    for f in dataclasses.fields(CCSSLTrainingArguments):
        if f.name not in upstream or f.default != upstream[f.name]:
            assert f.metadata.get("help"), f.name


def test_supervised_leaves_ccssl_out_until_it_is_asked_for(tmp_path: Path) -> None:
    assert arguments(tmp_path, algorithm="supervised").hyperparameters() == {"lambda_contrast": 0.0}
    assert arguments(tmp_path, algorithm="supervised", lambda_contrast=0.5).hyperparameters() == {
        "lambda_contrast": 0.5
    }
    assert arguments(tmp_path, lambda_contrast=0, lambda_u=2).hyperparameters() == {"lambda_contrast": 0, "lambda_u": 2}


def test_a_copy_with_another_value_is_checked_again(tmp_path: Path) -> None:
    args = arguments(tmp_path, push_threshold=0.9)
    assert dataclasses.replace(args, seed=7).seed == 7
    with pytest.raises(ValueError, match="push_threshold"):
        dataclasses.replace(args, lambda_contrast=0.0)


def test_a_packaged_config_gives_the_arguments_of_the_command_line() -> None:
    args = CCSSLTrainingArguments.from_config(use_cpu=True, mu=3)
    _, parsed = parse_recipe(
        FolderArguments, CCSSLTrainingArguments, config=OWN_IMAGES, arguments=["--use_cpu", "true", "--mu", "3"]
    )
    for f in dataclasses.fields(CCSSLTrainingArguments):
        assert getattr(args, f.name) == getattr(parsed, f.name), f.name
    assert (args.confidence_threshold, args.max_steps, args.mu) == (0.8, 20_000, 3)


def test_a_config_is_read_as_the_command_line_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "learning_rate: 1e-3\nsave_strategy: no\nnesterov: no\nlr_scheduler_kwargs: {num_cycles: 2}\nmu: null\n"
    )
    with path.open("a") as file:
        file.write("push_threshold: none\nown_pair_weight: squared\nmax_steps: 7\nschedule: lr_scheduler_type\n")
    args = CCSSLTrainingArguments.from_config(path, output_dir=str(tmp_path), use_cpu=True, max_steps=9)
    assert (args.learning_rate, args.save_strategy, args.nesterov, args.mu) == (1e-3, "no", False, 7)
    assert (args.push_threshold, args.own_pair_weight, args.max_steps) == (None, "squared", 9)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("backbone: resnet50\n", "unknown key 'backbone'"),
        ("lambda_contrst: 1\n", "unknown key 'lambda_contrst'. Did you mean 'lambda_contrast'"),
        ("mu: seven\n", "argument --mu: invalid int value: 'seven'"),
        ("mu\n", "one `name: value` per line"),
        ("mu: [1\n", "cannot be read"),
    ],
)
def test_a_wrong_config_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        CCSSLTrainingArguments.from_config(path)
    with pytest.raises(ValueError, match=r"cannot be read .*a packaged name \(imagefolder\)"):
        CCSSLTrainingArguments.from_config("imagefodler")


def test_views_follow_the_size_of_the_network_and_the_arguments(tmp_path: Path) -> None:
    own = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": [0.25] * 3}
    args = arguments(tmp_path, contrastive_view="randaugment", cutout_size=4)
    settings = args.view_settings(own)
    assert (settings.image_size, settings.mean, settings.std) == (64, (0.5,) * 3, (0.25,) * 3)
    assert (settings.weak_crop, settings.contrastive_view, settings.cutout_size) == ("pad", "randaugment", 4)
    assert args.view_settings({**own, "input_size": (3, 65, 65)}).weak_crop == "resized"
    with pytest.raises(ValueError, match=r"64 x 128 pixels, and only square ones can be trained: .* one image_size"):
        args.view_settings({**own, "input_size": (3, 64, 128)})


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mu": 0}, "mu is 0: set it to 1 or more"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: set it to 1 or more"),
    ({"max_image_pixels": 0}, "max_image_pixels is 0: set it to 1 or more"),
    ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore': choose one of skip, stop"),
    ({"max_steps": -1}, "max_steps is -1: set it to 1 or more"),
    ({"dataloader_num_workers": -2}, "dataloader_num_workers is -2: set it to -1"),
    ({"num_train_epochs": 10}, "num_train_epochs=10 .*set max_steps alone"),
    ({"ema_decay": 1.0}, "ema_decay is 1.0: choose"),
    ({"ema_decay": 0.0}, "eval_weights='ema' with ema_decay=0.*set eval_weights='raw'"),
    ({"weak_forward": "seperate"}, "weak_forward is 'seperate': choose one of joint, separate"),
    ({"eval_weights": "best"}, "eval_weights is 'best': choose one of ema, raw"),
    ({"decode": "lazily"}, "decode is 'lazily': choose one of auto, memory, stream"),
    ({"weak_crop": "centre"}, "weak_crop is 'centre': choose one of auto, pad, resized"),
    ({"contrastive_view": "moco"}, "contrastive_view is 'moco': choose one of simclr, randaugment"),
    ({"schedule": "linear"}, "schedule is 'linear': choose one of cosine_7_16, lr_scheduler_type"),
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type has no effect .* set schedule='lr_scheduler_type' instead"),
    ({"sgd_momentum": 0.0}, "nesterov needs momentum: set sgd_momentum above 0, or nesterov=False"),
    ({"optim": "adamw_torch", "sgd_momentum": 0.8}, "sgd_momentum and nesterov have no effect with optim="),
    ({"lambda_contrast": 0.0, "push_threshold": 0.9}, "push_threshold is part of CCSSL.*or push_threshold to none"),
    ({"lambda_contrast": 0.0, "own_pair_weight": "squared"}, "own_pair_weight is part of CCSSL"),
    ({"algorithm": "supervised", "contrast_temperature": 0.1}, "contrast_temperature is part of CCSSL"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True .*set per_device_train_batch_size"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 .*leave it out"),
    ({"data_seed": 3}, "data_seed=3 .*set seed"),
    ({"hidden_label_column": "image"}, "hidden_label_column and image_column name the same column"),
    ({"bf16": True, "fp16": True}, "[fb][fp]16"),
    ({"fp16": True}, "fp16 has no effect on a CPU: set bf16"),
    ({"num_train_epochs": 3}, "num_train_epochs=3 .*set max_steps alone"),
    ({"num_train_epochs": 0}, "num_train_epochs=0 .*set max_steps alone"),
    ({"eval_strategy": "epoch"}, "eval_strategy='epoch' would act once.*set eval_steps and eval_strategy='steps'"),
    ({"save_strategy": "epoch"}, "save_strategy='epoch' would act once"),
    ({"logging_strategy": "epoch"}, "logging_strategy='epoch' would act once"),
    ({"eval_strategy": "stpes"}, "eval_strategy is 'stpes': choose one of no, steps"),
    ({"optim": "adamw_troch"}, "optim is 'adamw_troch'.*Did you mean 'adamw_torch'"),
    ({"learning_rate": -0.1}, "learning_rate is -0.1: set it to a finite number of 0 or more"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"learning_rate": "0.1"}, "learning_rate is '0.1'"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
    ({"warmup_steps": 10, "max_steps": 5}, r"warmup_steps is 10: set it to a whole number up to max_steps \(5\)"),
    ({"warmup_steps": 2.5}, "warmup_steps is 2.5"),
    (
        {"warmup_steps": 2, "schedule": "lr_scheduler_type", "lr_scheduler_type": "constant"},
        "warmup_steps has no effect with lr_scheduler_type='constant'",
    ),
    (
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        "lr_scheduler_kwargs has no effect .*set schedule=",
    ),
    ({"logging_steps": 0}, "logging_steps is 0: set it to a whole number of 1 or more"),
    ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps is 0"),
    ({"save_steps": -5}, "save_steps is -5"),
    ({"save_total_limit": 0}, "save_total_limit is 0: set it to 1 or more"),
    ({"seed": -1}, "seed is -1: choose a whole number from 0 to 4294967295"),
    ({"seed": 2**40}, "seed is 1099511627776"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: set it to 1 or more"),
    ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps is 1.5: give a whole number"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0: set it to 1 or more"),
    ({"confidence_threshold": float("nan")}, "confidence_threshold is nan: give a finite float"),
    ({"lambda_u": float("inf")}, "lambda_u is inf: give a finite float"),
    ({"n_sigma": 2.0}, "fixmatch has no hyperparameter 'n_sigma'"),
    ({"cutout_size": -1}, "cutout_size=-1: use 0"),
    ({"randaugment_ops": -1}, "randaugment_ops=-1: use 0 or more"),
    ({"randaugment_ops": 1.5}, "randaugment_ops is 1.5: give a whole number"),
    ({"randaugment_magnitude": 0}, "randaugment_magnitude=0: use between 2 and 11"),
    ({"randaugment_magnitude": 31}, "randaugment_magnitude=31: use between 2 and 11"),
    ({"adam_beta1": 0.8}, "adam_beta1 has no effect with optim='sgd'"),
    ({"optim_args": "momentum=0.8"}, "optim_args has no effect with optim='sgd'"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches=True would split the pairs"),
    ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would mix up"),
    ({"accelerator_config": {"even_batches": False}}, "even_batches=False would let processes wait"),
    ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler=False has no effect"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "set gradient_accumulation_steps"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_with_dataloader": False}}}, "sync_with_dataloader"),
    ({"accelerator_config": {"split_batch": True}}, "no entry 'split_batch'. Did you mean 'split_batches'"),
    ({"accelerator_config": "nowhere.json"}, "accelerator_config cannot be read"),
    ({"label_names": ["target"]}, "label_names=.* would be set to"),
    ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters=True would be set to False"),
    ({"metric_for_best_model": "accuracy"}, "metric_for_best_model 'accuracy' is not known"),
    ({"metric_for_best_model": "eval_topp1"}, "'eval_topp1' is not known. Did you mean 'top1'"),
    (
        {"metric_for_best_model": "ece", "greater_is_better": True},
        "greater_is_better=True contradicts metric_for_best_model 'ece', of which lower values are better",
    ),
    ({"metric_for_best_model": "eval_near_top1", "greater_is_better": False}, "of which higher values are better"),
    ({"save_strategy": "best"}, "save_strategy='best' needs evaluations"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2},
        r"needs a checkpoint of every evaluation: set save_steps to eval_steps \(1\)",
    ),
    (
        {
            "schedule": "lr_scheduler_type",
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"mode": "min"},
            "metric_for_best_model": "top1",
            "eval_strategy": "steps",
        },
        "mode='min' contradicts metric_for_best_model 'top1'",
    ),
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, "eval strategy"),
]


@pytest.mark.parametrize(
    ("values", "sentence"), CONTRADICTIONS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_flags_that_contradict_each_other_are_refused(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        arguments(tmp_path, **values)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        arguments(
            tmp_path, mu=0, learning_rate=-1.0, num_train_epochs=3, metric_for_best_model="acc", save_strategy="x"
        )
    lines = str(caught.value).splitlines()
    assert [line.split()[0].split("=")[0] for line in lines] == [
        *("mu", "learning_rate", "save_strategy", "num_train_epochs", "metric_for_best_model")
    ]
    assert all(line.endswith(".") for line in lines)


def test_every_argument_of_transformers_is_supported_or_refused() -> None:
    """A future release cannot add an argument that does nothing here."""
    tables = [set(_SUPPORTED), set(_WITHOUT_EFFECT), set(_REFUSED_BELOW), set(SET_HERE)]
    named = [name for table in tables for name in table]
    assert len(named) == len(set(named))
    upstream = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert upstream - set(named) == set(), "try each in a run, and add it to a table of argument_checks.py"
    # Of newer releases than the one that is installed.
    assert set(named) - upstream <= {"activation_checkpointing", "activation_checkpointing_kwargs"}


REFUSED = {
    **dict.fromkeys(("num_train_epochs", "label_smoothing_factor", "neftune_noise_alpha"), 0.1),
    **dict.fromkeys(("data_seed", "fsdp_config", "parallelism_config", "liger_kernel_config"), "{}"),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), "{}"),
    **dict.fromkeys(("eval_do_concat_batches", "dataloader_in_order", "average_tokens_across_devices"), False),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name", "include_num_input_tokens_seen"), "all"),
}


@pytest.mark.parametrize("name", sorted(_WITHOUT_EFFECT))
def test_what_would_do_nothing_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    if name not in {f.name for f in dataclasses.fields(TrainingArguments)}:
        pytest.skip("not in this release of transformers")
    with pytest.raises(ValueError, match=rf"{name}=.*{re.escape(_WITHOUT_EFFECT[name])}"):
        arguments(tmp_path, **{name: REFUSED.get(name, True)})


def test_an_argument_of_a_later_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_checks, "_SUPPORTED", _SUPPORTED - {"torch_empty_cache_steps"})
    arguments(tmp_path)
    with pytest.raises(ValueError, match="torch_empty_cache_steps=5 is an argument of a newer transformers"):
        arguments(tmp_path, torch_empty_cache_steps=5)


def test_arguments_survive_a_copy_and_a_dictionary(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "ece"}
    args = arguments(tmp_path, gradient_accumulation_steps=2, **changes)
    assert dataclasses.replace(args).greater_is_better is False
    known = {f.name for f in dataclasses.fields(args)}
    again = CCSSLTrainingArguments(**{name: value for name, value in args.to_dict().items() if name in known})
    assert (again.eval_steps, again.num_train_epochs, again.greater_is_better) == (2, args.num_train_epochs, False)
    assert dataclasses.replace(args, eval_strategy="no").eval_strategy == "no"  # as the recipe does


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        *(("top1", True), ("eval_top1", True), ("ece", False), ("eval_ece", False), ("loss", False)),
        *(("eval_near_loss", False), ("near_auroc_open_set", True), ("precision@0.95", True)),
        *(("eval_ood_share_passed@0.95", False), ("eval_far_macro_f1", True)),
    ],
)
def test_the_direction_comes_with_the_metric(metric: str, greater: bool, tmp_path: Path) -> None:
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=greater).greater_is_better is greater


def test_a_metric_of_ones_own_needs_a_direction(tmp_path: Path) -> None:
    args = arguments(tmp_path, metric_for_best_model="eval_cost", greater_is_better=False)
    assert args.greater_is_better is False


def test_a_schedule_that_follows_a_metric_knows_its_direction(tmp_path: Path) -> None:
    plateau: dict[str, Any] = {"schedule": "lr_scheduler_type", "lr_scheduler_type": "reduce_lr_on_plateau"}
    for metric, mode in (("top1", "max"), ("ece", "min")):
        args = arguments(tmp_path, metric_for_best_model=metric, eval_strategy="steps", eval_steps=1, **plateau)
        assert dataclasses.replace(args).lr_scheduler_kwargs == {"mode": mode}


@pytest.mark.parametrize("names", [{"sync_each_batch": True}, {}])
def test_entries_of_accelerator_config_that_work(names: dict[str, Any], tmp_path: Path) -> None:
    given = {
        "non_blocking": True,
        "even_batches": True,
        "gradient_accumulation_kwargs": names,
        "dispatch_batches": False,
    }
    config = arguments(tmp_path, accelerator_config=given).accelerator_config
    assert config.non_blocking and not config.dispatch_batches  # type: ignore[union-attr]
    path = tmp_path / "config.json"
    path.write_text('{"non_blocking": true}')
    assert arguments(tmp_path, accelerator_config=str(path)).accelerator_config.non_blocking  # type: ignore[union-attr]


@pytest.mark.parametrize("values", [{"fsdp": "full_shard"}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_launchers_that_are_not_supported_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not supported yet: launch with plain data parallelism"):
        arguments(tmp_path, **values)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_accelerates_launcher_is_asked_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="not supported yet"):
        arguments(tmp_path)


def test_compiling_on_a_cpu_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the arguments set it for good
    monkeypatch.setenv("CXX", "g++-of-another-machine -O2")
    with pytest.raises(ValueError, match=r"g\+\+-of-another-machine -O2' is not found: install g\+\+, set CXX"):
        arguments(tmp_path, torch_compile=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="torch_compile needs a C\\+\\+ compiler on a CPU"):
        arguments(tmp_path, torch_compile=True)
    assert arguments(tmp_path, torch_compile_backend="aot_eager").torch_compile  # makes no C++
