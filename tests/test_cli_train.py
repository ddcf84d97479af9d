"""The whole `ccssl-hf` command: quick help, shell completion, and training in one and two processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from datasets import config as datasets_config
from typer.testing import CliRunner

import ccssl_hf
from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.cli import app
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments, build_trainer
from test_recipes import ROOT, assert_is_published, changed, environment, launch, place, results

COMMAND = str(Path(sys.executable).with_name("ccssl-hf"))
__all__ = ["place"]  # a fixture


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("words", ["--help", "--version", "predict --help"])
def test_it_answers_without_importing_what_takes_seconds(words: str) -> None:
    done = run(sys.executable, "-X", "importtime", COMMAND, *words.split())
    assert done.returncode == 0, done.stderr[-3000:]
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "ccssl_hf.cli" in imported
    assert not imported & {"torch", "transformers", "timm", "datasets", "numpy", "huggingface_hub"}
    assert ccssl_hf.__version__ in done.stdout if words == "--version" else "Usage" in done.stdout


def test_bash_completes_verbs_and_flags() -> None:
    def completed(line: str, word: int) -> list[str]:
        variables = {"_CCSSL_HF_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
        return run(COMMAND, **variables).stdout.split()

    assert completed("ccssl-hf p", 1)[0].startswith("p") and "predict" in completed("ccssl-hf p", 1)
    assert {"train", "predict", "convert"} <= set(completed("ccssl-hf ", 1))
    assert completed("ccssl-hf predict --emb", 2) == ["--embedding"]


def test_it_shows_how_completion_is_installed() -> None:
    done = run(COMMAND, "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and "_CCSSL_HF_COMPLETE=complete_bash" in done.stdout


def test_every_verb_has_a_line_of_help_and_a_panel() -> None:
    for command in app.registered_commands:
        assert command.callback is not None and command.callback.__doc__
        assert isinstance(command.rich_help_panel, str), command.callback.__name__
    assert all(isinstance(group.rich_help_panel, str) for group in app.registered_groups)


def test_public_names_are_there_and_imported_when_asked_for() -> None:
    assert set(ccssl_hf.__all__) <= set(dir(ccssl_hf))
    for name in ccssl_hf.__all__:
        assert getattr(ccssl_hf, name).__name__ == name
    assert isinstance(ccssl_hf.trainer, ModuleType)
    with pytest.raises(AttributeError, match="'ccssl_hf' has no attribute 'CCSSLTraner'"):
        _ = ccssl_hf.CCSSLTraner  # type: ignore[attr-defined]


def test_importing_the_package_is_enough_for_plain_loading_of_our_wide_resnets() -> None:
    done = run(sys.executable, "-c", "import ccssl_hf, timm; print(timm.is_model('wide_resnet28_2_cifar'))")
    assert done.stdout == "True\n", done.stderr


def test_the_command_loads_them_too(tmp_path: Path, place: Path) -> None:
    """The command imports them only when a verb runs."""
    model = CCSSLForImageClassification.from_timm("wide_resnet10_1_cifar", labels=["a", "b"])
    model.save_pretrained(tmp_path / "model")
    images = str(place / "photos" / "test" / "red")
    done = run(COMMAND, "predict", str(tmp_path / "model"), images, str(tmp_path / "out.parquet"))
    assert done.returncode == 0 and done.stdout.startswith("4 images"), done.stderr


# ---------------------------------------------------------------------------------------------------------------- train


def flags(**others: str) -> list[str]:
    return changed(["--data_dir", "photos", "--pretrained"], image_size="32", max_steps="2", **others)


def test_train_is_the_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", place / "cache")
    done = CliRunner().invoke(app, ["train", *flags(output_dir="outputs/train")])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("Step 2: model, card and metrics are in outputs/train.\n")
    assert_is_published(place / "outputs" / "train", ["blue", "red"])
    assert 0 <= results(place / "outputs" / "train")["test_top1"] <= 1


def test_training_goes_on_from_a_published_folder(place: Path, tmp_path: Path) -> None:
    start = CCSSLForImageClassification.from_timm("test_resnet", labels=["red", "blue"], image_size=32)
    start.save_pretrained(tmp_path / "start")

    def build(*flags: str) -> CCSSLTrainer:
        given = [
            "--data_dir",
            str(place / "photos"),
            "--model",
            str(tmp_path / "start"),
            "--output_dir",
            str(tmp_path),
        ]
        arguments = [*given, "--use_cpu", "true", *flags]
        recipe, args = parse_recipe(FolderArguments, CCSSLTrainingArguments, config=OWN_IMAGES, arguments=arguments)
        return build_trainer(recipe, args)[0]

    trainer = build("--per_device_train_batch_size", "2", "--mu", "2")
    assert trainer.class_names == ["red", "blue"] and trainer.labels[:6].tolist() == [1] * 6  # of the folder blue/
    assert all(tensor.equal(start.state_dict()[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.base_model == str(tmp_path / "start")
    for wrong in (["--pretrained"], ["--image_size", "64"]):
        with pytest.raises(ValueError, match="its own weights and image size: leave out pretrained and image_size"):
            build(*wrong)


def test_two_processes_train_by_it(place: Path) -> None:
    start = "accelerate launch --config_file recipes/accelerate_configs/two_cpu_processes.yaml -m ccssl_hf.cli train"
    done = launch(place, [*shlex.split(start), *flags(output_dir="outputs/train_two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in assert_is_published(place / "outputs" / "train_two", ["blue", "red"])
    assert done.stdout.count("model, card and metrics are in outputs/train_two.") == 1


def test_help_of_train_shows_every_flag_by_its_class_with_the_defaults_of_the_file() -> None:
    done = CliRunner().invoke(app, ["train", "--help"])
    assert done.exit_code == 0 and done.stdout.startswith("usage: ")
    sections = ["FolderArguments", "RecipeArguments", "CCSSLTrainingArguments", "HyperparameterArguments"]
    positions = [done.stdout.index(f"\n{name}:\n") for name in [*sections, "TrainingArguments"]]
    assert positions == sorted(positions)
    text = " ".join(done.stdout.split())
    assert "--max_steps VALUE Length of the run in optimizer steps. (default: 20000)" in text
    assert "--nesterov [VALUE]" in text and "--no_nesterov" not in text
    assert OWN_IMAGES.is_file()


def test_a_wrong_flag_of_train_is_an_error_in_one_line(place: Path) -> None:
    arguments = [COMMAND, "train", "--data_dir", "photos", "--lamda_u", "1"]
    done = subprocess.run(arguments, cwd=place, env=environment(place), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: Unknown argument --lamda_u. Did you mean 'lambda_u'")
