"""The whole `ccssl-hf` command: quick help, shell completion, and training in one and two processes."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from datasets import config as datasets_config
from typer.testing import CliRunner

import ccssl_hf
from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.cli import app
from ccssl_hf.cli.flags import parse_own_images, parse_recipe, sections_of
from ccssl_hf.cli.help import OWN_IMAGES as OWN_IMAGES_OF_THE_COMMAND
from ccssl_hf.cli.help import packaged_sections
from ccssl_hf.recipe import CPU_DEFAULTS, OWN_IMAGES, FolderArguments, RecipeArguments, build_trainer
from ccssl_hf.transforms import MAX_SIDE_HELD
from test_recipes import ROOT, assert_is_published, changed, environment, launch, place, results

COMMAND = str(Path(sys.executable).with_name("ccssl-hf"))
__all__ = ["place"]  # a fixture


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------------------------------------------- the command


VERBS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
ANSWERED = [
    *("--version", "--help", *(f"{verb} --help" for verb in VERBS), "train --help_all", "check --help-all"),
    *("export --help", "export onnx --help", "export handler --help"),
]
REFUSED = {
    "": "Usage: ccssl-hf",
    "trian": "error: No such command 'trian'. Did you mean 'train'?",
    "--versoin": "error: No such option: --versoin",
    "predict --embeding": "error: No such option: --embeding",
    "predict": "error: Missing argument 'MODEL'. See `ccssl-hf predict --help`.",
    "serve model --port high": "error: Invalid value for '--port':",
    "export onx model": "error: No such command 'onx'. Did you mean 'onnx'?",
    "train --lamda_u 1": "error: Unknown argument --lamda_u. Did you mean 'lambda_u'",
    "check --lamda-u 1": "error: Unknown argument --lamda-u. Did you mean 'lambda_u'",
}


@pytest.mark.parametrize("words", [*ANSWERED, *REFUSED, "-m predict --help"])
def test_it_answers_without_importing_what_takes_seconds(words: str) -> None:
    start = ["-m", "ccssl_hf.cli"] if words.startswith("-m ") else [COMMAND]
    done = run(sys.executable, "-X", "importtime", *start, *words.removeprefix("-m ").split())
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if line.strip() and not line.startswith("import time:")]
    assert {"ccssl_hf.cli", "typer"} <= imported
    assert not imported & {"torch", "transformers", "timm", "datasets", "numpy", "huggingface_hub"}
    assert done.returncode == (2 if words in REFUSED else 0), done.stderr[-3000:]
    if words in REFUSED:
        assert (done.stdout + "\n".join(said)).lstrip().startswith(REFUSED[words])
        assert len(said) == 1 or not words  # without words it shows its help
    else:
        assert not said and (ccssl_hf.__version__ in done.stdout or "usage: ccssl-hf" in done.stdout.lower())


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


def test_options_are_shown_with_underscores() -> None:
    root: Any = typer.main.get_command(app)
    commands = [*root.commands.values(), *root.commands["export"].commands.values()]
    options = {name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts)}
    assert {"--batch_size", "--no_with_head", "--dry_run"} <= options
    assert not [name for name in options if "-" in name.lstrip("-")]


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


def test_importing_the_package_imports_nothing_beyond_timm_and_torch() -> None:
    code = "import sys, timm, torch; before = set(sys.modules); import ccssl_hf; print(*set(sys.modules) - before)"
    done = run(sys.executable, "-c", code)
    added = {name.split(".")[0] for name in done.stdout.split()}
    assert "ccssl_hf" in added and added <= {"ccssl_hf", *sys.stdlib_module_names}, done.stderr


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


@pytest.mark.parametrize(
    ("error", "others"),
    [
        ("error: Step 2: loss_x, loss_u, ", {"learning_rate": "1e20"}),
        ("error: 2 of 13 unlabeled images can't be decoded, more than 5%", {}),
    ],
    ids=["NaN", "too_many_unreadable"],
)
def test_what_ends_training_and_explains_itself_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, others: dict[str, str]
) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(place / "photos", tmp_path / "photos")
    if "Step" not in error:
        for name in ("alone.png", "red/deep/1.jpg"):
            path = tmp_path / "photos" / "unlabeled" / name
            path.write_bytes(path.read_bytes()[:-30])  # the survey reads headers alone
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", *flags(**others)])
    assert done.exit_code == 2 and "Traceback" not in done.output
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(error)


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
    assert "| device | 2 x cpu |" in assert_is_published(place / "outputs" / "train_two", ["blue", "red"])
    assert done.stdout.count("model, card and metrics are in outputs/train_two.") == 1


def test_on_a_cpu_without_a_backbone_the_defaults_are_smaller_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(*flags: str) -> tuple[Any, ...]:
        recipe, args = parse_own_images(["--use_cpu", "true", "--labeled", "photos", *flags])
        return recipe.backbone, recipe.image_size, args.mu, args.max_steps

    assert chosen() == ("resnet18", 64, 3, 5000)
    text = capsys.readouterr().err
    assert "this run trains resnet18 at 64 px, with mu 3, for 5,000 steps. --backbone" in text and text.count("\n") == 1
    assert chosen("--mu", "7", "--image_size", "96") == ("resnet18", 96, 7, 5000)  # what is given is kept
    assert "resnet18 at 96 px, with mu 7" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("mu: 5\nalgorithm: comatch")
    assert chosen("--config", str(tmp_path / "mine.yaml")) == ("resnet18", 64, 5, 5000)
    capsys.readouterr()
    for flags in (["--backbone", "resnet50"], ["--model", "outputs/photos"]):
        assert chosen(*flags)[1:] == (None, 7, 20000)
    assert capsys.readouterr().err == ""
    assert RecipeArguments().backbone is None and CPU_DEFAULTS["image_size"] <= MAX_SIDE_HELD


def test_help_of_train_fits_a_screen_or_two_and_help_all_has_every_flag_by_its_class() -> None:
    done = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0 and done.stdout.startswith("usage: ccssl-hf train [--config FILE]")
    rows = done.stdout.partition("\nData:\n")[2].splitlines()
    shown = [line for line in rows if line.startswith("  --")]
    assert 25 <= len(shown) <= 40 and len(rows) - len(shown) < 20 and max(map(len, rows[:-3])) <= 80
    assert "--max_steps Length of the run in optimizer steps. [20000]" in [" ".join(line.split()) for line in shown]
    known = {f.name for cls in (FolderArguments, CCSSLTrainingArguments) for f in dataclasses.fields(cls) if f.init}
    assert {line.split()[0][2:] for line in shown} <= known
    assert f"--help_all describes all {len(known)} flags." in done.stdout

    done = CliRunner().invoke(app, ["train", "--help_all"])
    assert done.exit_code == 0 and done.stdout.startswith("usage: ")
    sections = ["FolderArguments", "RecipeArguments", "CCSSLTrainingArguments", "HyperparameterArguments"]
    positions = [done.stdout.index(f"\n{name}:\n") for name in [*sections, "TrainingArguments"]]
    assert positions == sorted(positions)
    text = " ".join(done.stdout.split())
    assert "--max_steps VALUE Length of the run in optimizer steps. [20000]" in text
    assert "--nesterov Use Nesterov momentum in SGD. [on]" in text and "--no_nesterov" not in text
    assert all(f" --{name} " in text for name in known)
    assert OWN_IMAGES == OWN_IMAGES_OF_THE_COMMAND and OWN_IMAGES.is_file()


def test_help_shows_the_defaults_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("max_steps: 77")
    done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "mine.yaml"), "--help"])
    assert "optimizer steps. [77]" in done.stdout and "[0.03]" in done.stdout  # else the defaults of the dataclass
    (tmp_path / "mine.yaml").write_text("max_steps: [")
    done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "mine.yaml"), "--help"])
    assert done.exit_code == 2 and done.stderr.startswith("error: The config ") and done.stderr.count("\n") == 1


def test_the_flags_of_transformers_are_those_of_the_installed_release() -> None:
    types = (FolderArguments, CCSSLTrainingArguments)
    expected, found = sections_of(*types), packaged_sections()
    assert list(found) == list(expected)
    for name, (flag, read) in {
        name: (flag, found["TrainingArguments"].flags[name])
        for name, flag in expected["TrainingArguments"].flags.items()
    }.items():
        assert (read.value == "") == (flag.value == "") and read.help in ("", flag.help), name
    assert found["TrainingArguments"].flags.keys() == expected["TrainingArguments"].flags.keys()


def test_a_wrong_flag_of_train_is_an_error_in_one_line(place: Path) -> None:
    arguments = [COMMAND, "train", "--data_dir", "photos", "--lamda_u", "1"]
    done = subprocess.run(arguments, cwd=place, env=environment(place), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: Unknown argument --lamda_u. Did you mean 'lambda_u'")
