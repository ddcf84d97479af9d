"""Arguments of a run: accepted and refused values, help texts, and packaged configs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from transformers import TrainingArguments

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.algorithms import ALGORITHMS, algorithm_hyperparameters, build_algorithm
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
        file.write("push_threshold: none\nown_pair_weight: squared\nmax_steps: 7\n")
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
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, "eval strategy"),
]


@pytest.mark.parametrize(
    ("values", "sentence"), CONTRADICTIONS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_flags_that_contradict_each_other_are_refused(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        arguments(tmp_path, **values)


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
