"""The commands of recipes/README.md, with small networks, a few steps and small data of the same form."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.recipe import OWN_IMAGES, RecipeArguments, build_trainer
from conftest import SHARED, needs_shared
from test_bad_input import rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
]
SMALL = {
    "use_cpu": "true",
    "pretrained": "false",  # weights would come from the Hub
    "backbone": "test_resnet",
    "per_device_train_batch_size": "2",
    "mu": "2",
    "per_device_eval_batch_size": "64",
    "dataloader_num_workers": "0",
    "max_steps": "3",
    "warmup_steps": "0",
    "save_steps": "2",
    "eval_steps": "2",
    "logging_steps": "1",
    "confidence_threshold": "0.1",
    "disable_tqdm": "true",
}


def command(*words: str) -> list[str]:
    """The command of the README that has all these words."""
    [found] = [line for line in COMMANDS if all(any(word in part for part in line) for word in words)]
    return found


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = (250, 20 + number, 10) if "red" in name else (10, 20 + number, 250)
        Image.new("RGB", (36 + number % 3, 34), colour).save(folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands name."""
    root = tmp_path_factory.mktemp("place")
    (root / "recipes").symlink_to(ROOT / "recipes")
    for split, count in (("labeled", 6), ("validation", 3), ("test", 4)):
        write_images(root / "photos" / split, *(f"{c}/{i}.png" for c in ("red", "blue") for i in range(count)))
    heap = [f"test/{i}.PNG" for i in range(6)] + [f"red/deep/{i}.jpg" for i in range(6)] + ["alone.png"]
    write_images(root / "photos" / "unlabeled", *heap)
    (root / "photos" / "unlabeled" / "Thumbs.db").write_bytes(b"not an image")
    return root


def changed(words: list[str], **flags: str) -> list[str]:
    """The command with more flags, which override earlier ones."""
    return [*words, *(f"--{name}={value}" for name, value in {**SMALL, **flags}.items())]


def environment(place: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline}


def launch(place: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in new processes."""
    assert words[:2] == ["accelerate", "launch"]
    real = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return subprocess.run(real, cwd=place, env=environment(place), capture_output=True, text=True, timeout=500)


def run_here(place: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the recipe of a command in this process, which has imported everything."""
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", words[start:])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    runpy.run_path(words[start], run_name="__main__")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def assert_is_published(folder: Path, classes: list[str]) -> str:
    """Check for a published model, its card and its metrics; return the card."""
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "all_results.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert [model.config.id2label[i] for i in range(len(classes))] == classes
    return (folder / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- the README


def test_the_readme_has_a_command_for_every_recipe_and_names_every_file_of_settings() -> None:
    for script in (ROOT / "recipes").glob("train_*.py"):
        assert any(f"recipes/{script.name}" in words for words in COMMANDS), script.name
    for file in (ROOT / "recipes").glob("*configs/*.yaml"):
        assert f"{file.parent.name}/{file.name}" in README, file.name
    for words in COMMANDS:
        assert words[:2] == ["accelerate", "launch"]
        assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))


def test_the_readmes_table_says_what_the_files_say() -> None:
    for file in [OWN_IMAGES, *(ROOT / "recipes" / "configs").glob("*.yaml")]:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        [row] = [line for line in README.splitlines() if f"{file.name}`" in line.partition(" |")[0]]
        batch = settings["per_device_train_batch_size"]
        assert f"{batch} + {batch * settings['mu']}" in row and f"{settings['max_steps']:,} |" in row


@pytest.mark.parametrize("name", ["single_process", "two_cpu_processes", "multi_gpu"])
def test_accelerate_reads_its_files(name: str) -> None:
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == {"single_process": 1, "two_cpu_processes": 2, "multi_gpu": 4}[name]
    assert config.use_cpu == (name == "two_cpu_processes")


# -------------------------------------------------------------------------------------------------------- image folders


@pytest.fixture(scope="module")
def folder_run(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(place, changed(command("--data_dir", "--pretrained"), image_size="32"), monkeypatch)
    return place / "outputs" / "imagefolder"


def test_own_folders_become_a_model_with_a_card_and_metrics(folder_run: Path) -> None:
    card = assert_is_published(folder_run, ["blue", "red"])
    metrics = results(folder_run)
    assert 0 <= metrics["validation_top1"] <= 1 and 0 <= metrics["test_top1"] <= 1 and metrics["train_runtime"] > 0
    history = json.loads((folder_run / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_top1" in entry for entry in history) and any("loss_contrast" in entry for entry in history)
    assert "| unlabeled | unlabeled (local) |" in card and "/photos" not in card  # by its name, never by its path


def test_a_flag_overrides_the_file(folder_run: Path) -> None:
    state = json.loads((folder_run / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["max_steps"], state["logging_steps"], state["train_batch_size"]) == (3, 1, 2)


def test_a_run_goes_on_from_a_checkpoint(folder_run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word.replace("checkpoint-1000", "checkpoint-2") for word in command("--resume_from_checkpoint")]
    run_here(place, changed(words, image_size="32", output_dir="outputs/resumed"), monkeypatch)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (folder_run, place / "outputs" / "resumed"))
    assert whole.keys() == resumed.keys() and all(whole[key].equal(resumed[key]) for key in whole)
    assert not (place / "outputs" / "resumed" / "checkpoint-2").exists()  # it did not start over


def test_two_processes_train_together(place: Path) -> None:
    words = changed(command("two_cpu_processes"), image_size="32", max_steps="2", output_dir="outputs/two")
    run = launch(place, words)
    assert run.returncode == 0, run.stderr[-3000:]
    card = assert_is_published(place / "outputs" / "two", ["blue", "red"])
    assert "| device | 2 x cpu |" in card
    assert results(place / "outputs" / "two")["train_samples_per_second"] > 0


# ----------------------------------------------------------------------------------------------------- Semi-iNat's form


@needs_shared
def test_semi_inat_streams_parquet_files_with_workers(place: Path) -> None:
    (place / "semi_inat").symlink_to(SHARED / "data" / "butterfly50_semi")
    words = [word.replace("multi_gpu", "single_process") for word in command("multi_gpu", "--validation")]
    run = launch(place, changed(words, image_size="96", dataloader_num_workers="2"))
    assert run.returncode == 0, run.stderr[-3000:]
    classes = datasets.load_dataset("parquet", data_files=str(place / "semi_inat" / "labeled.parquet"), split="train")
    card = assert_is_published(place / "outputs" / "semi_inat", classes.features["label"].names)
    assert "| device | 1 x cpu |" in card
    assert {"validation_top1", "test_top1", "test_top5"} <= results(place / "outputs" / "semi_inat").keys()


@needs_shared
def test_the_baseline_leaves_ccssl_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (place / "semi_inat").exists():
        (place / "semi_inat").symlink_to(SHARED / "data" / "butterfly50_semi")
    small = {**SMALL, "image_size": "64", "max_steps": "2"}
    run_here(place, changed(command("--push_threshold", "none"), **small), monkeypatch)
    out = place / "outputs" / "semi_inat_fixmatch"
    assert_is_published(out, AutoModelForImageClassification.from_pretrained(out).config.label_names)
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    logged = {name for entry in history for name in entry}
    assert "loss_u" in logged and "loss_contrast" not in logged and "eval_top1" not in logged  # no --validation


def test_the_papers_settings_build_the_papers_run(tmp_path: Path) -> None:
    """ResNet-50 at 224 px, on a CPU; nothing is trained."""
    rows(48).to_parquet(tmp_path / "labeled.parquet")
    rows(200).to_parquet(tmp_path / "unlabeled.parquet")
    flags = [f"--{split}={tmp_path / split}.parquet" for split in ("labeled", "unlabeled")]
    config = ROOT / "recipes" / "configs" / "semi_inat.yaml"
    recipe, args = parse_recipe(
        RecipeArguments,
        CCSSLTrainingArguments,
        config=config,
        arguments=[*flags, "--use_cpu", "true", f"--output_dir={tmp_path / 'out'}"],
    )
    trainer, splits = build_trainer(recipe, args)
    assert splits.keys() == {"labeled", "unlabeled"} and trainer.args.eval_strategy == "no"
    assert (trainer.model.config.architecture, trainer.model.feature_dim) == ("resnet50", 2048)
    assert trainer.model.projection[-1].out_features == 64
    settings = trainer.settings
    assert (settings.image_size, settings.weak_crop, settings.cutout_size) == (224, "resized", 16)
    chosen = trainer.algorithm.hyperparameters
    assert (chosen["confidence_threshold"], chosen["push_threshold"], chosen["lambda_contrast"]) == (0.6, 0.9, 2)
    assert (args.max_steps, args.learning_rate, args.weight_decay, args.mu) == (512 * 1024, 0.03, 1e-3, 7)


# ------------------------------------------------------------------------------------------------------------- CIFAR-10

CIFAR10 = ["plane", "car", "bird"]


@pytest.fixture(scope="module")
def cifar10(place: Path) -> Path:
    """A folder of CIFAR-10's form: 90 training images of three classes, 12 test images."""
    folder = place / "cifar10"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CIFAR10)})
    for split, count in (("train", 90), ("test", 12)):
        pixels = np.random.RandomState(count).randint(0, 256, (count, 32, 32, 3), np.uint8)
        columns = {"image": [Image.fromarray(image) for image in pixels], "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def cifar10_run(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, **flags: str) -> dict[str, Any]:
    """Run one of the README's commands on the small folder and return its metrics."""
    small = {name: value for name, value in SMALL.items() if name not in ("pretrained", "backbone")}
    small |= {"backbone": "wide_resnet10_1_cifar", "data": "cifar10", "num_labels": "6", **flags}
    if "cifar10_speed.yaml" in " ".join(words):
        del small["confidence_threshold"]  # its algorithm has none
    run_here(place, [*words, *(f"--{name}={value}" for name, value in small.items())], monkeypatch)
    return results(place / flags["output_dir"])


@pytest.fixture
def cifar10_recipe() -> dict[str, Any]:
    """The names that the script defines."""
    return runpy.run_path(str(ROOT / "recipes" / "train_cifar10.py"))


def test_cifar10_learns_from_all_training_images_and_is_tested_once(
    place: Path, cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command("train_cifar10", "--split_seed")
    metrics = cifar10_run(words, place, monkeypatch, output_dir="outputs/cifar10")
    assert 0 <= metrics["test_top1"] <= 1 and metrics["train_steps"] == 3 and "validation_top1" not in metrics
    card = assert_is_published(place / "outputs" / "cifar10", CIFAR10)
    assert "(local)" in card and str(place) not in card
    history = json.loads((place / "outputs" / "cifar10" / "checkpoint-3" / "trainer_state.json").read_text())
    assert any("loss_contrast" in entry for entry in history["log_history"])


def test_the_speed_run_trains_compiled_in_bf16(place: Path, cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler only traces here. Generating code for a CPU takes minutes."""
    words = command("cifar10_speed")
    output = "outputs/cifar10_speed"
    metrics = cifar10_run(words, place, monkeypatch, output_dir=output, torch_compile_backend="eager")
    assert 0 <= metrics["test_top1"] <= 1 and metrics["train_steps"] == 3
    assert not list((place / output).glob("checkpoint-*"))
    network = AutoModelForImageClassification.from_pretrained(place / output).timm_model
    assert {module.momentum for name, module in network.named_modules() if "bn" in name} == {0.01}


def test_a_run_out_of_time_stops_with_a_checkpoint_and_goes_on(
    place: Path, cifar10: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = command("cifar10_speed")
    once = {"bf16": "false", "torch_compile": "false", "max_steps": "6", "logging_steps": "2", "save_strategy": "no"}
    whole = cifar10_run(words, place, monkeypatch, output_dir="outputs/whole", **once)
    with caplog.at_level("WARNING", logger="ccssl_hf.callbacks"):
        cut = cifar10_run(words, place, monkeypatch, output_dir="outputs/cut", time_limit="1e-9", **once)
    assert "Stopped after 2 of 6 steps by time_limit" in caplog.text
    assert (whole["train_steps"], cut["train_steps"]) == (6, 2) and 0 <= cut["test_top1"] <= 1
    resumed = {"resume_from_checkpoint": "true", "output_dir": "outputs/cut", "time_limit": "none"}
    assert cifar10_run(words, place, monkeypatch, **once, **resumed)["train_steps"] == 6
    first, second = (load_file(place / "outputs" / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(first[key].equal(second[key]) for key in first)


def test_labeled_images_are_listed_or_drawn_by_the_split_seed(tmp_path: Path, cifar10_recipe: dict[str, Any]) -> None:
    def rows(**changes: Any) -> list[int]:
        recipe = cifar10_recipe["Cifar10Arguments"](**{"data": str(tmp_path), "num_labels": 6, **changes})
        return cifar10_recipe["labeled_rows"](recipe, labels, 3).tolist()

    labels = np.arange(90) % 3
    drawn = rows()
    assert np.bincount(labels[drawn]).tolist() == [2, 2, 2]
    assert drawn == rows() and drawn != rows(split_seed=1)
    for wrong in (7, 0, 93):
        with pytest.raises(ValueError, match="choose a multiple of the 3 classes"):
            rows(num_labels=wrong)
    np.savez(tmp_path / "ssl_splits.npz", labeled_6_seed0=np.array([3, 1, 2], np.uint16))
    assert rows() == [3, 1, 2]
    with pytest.raises(ValueError, match=r"has no labeled_6_seed1: choose .* labeled_6_seed0"):
        rows(split_seed=1)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_speed"])
def test_cifar10s_settings_are_the_papers_but_where_the_file_says_otherwise(
    name: str, tmp_path: Path, cifar10_recipe: dict[str, Any]
) -> None:
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    recipe, args = parse_recipe(
        cifar10_recipe["Cifar10Arguments"],
        CCSSLTrainingArguments,
        config=config,
        arguments=["--use_cpu", "true", f"--output_dir={tmp_path}"],
    )
    for key, value in yaml.safe_load(config.read_text(encoding="utf-8")).items():
        if key not in ("output_dir", "report_to"):  # given above; none is read as an empty list
            assert getattr(recipe if hasattr(recipe, key) else args, key) == value, key
    assert (recipe.backbone, args.per_device_train_batch_size, args.mu) == ("wide_resnet28_2_cifar", 64, 7)
    assert (args.weight_decay, args.ema_decay, args.cutout_size) == (1e-3, 0.999, 16)
    if name == "cifar10":
        chosen = args.hyperparameters()
        assert (args.algorithm, args.learning_rate, args.max_steps) == ("fixmatch", 0.03, 512 * 1024)
        assert (chosen["confidence_threshold"], chosen["lambda_contrast"]) == (0.95, 1)
        assert "push_threshold" not in chosen and recipe.time_limit is None
    else:
        assert args.bf16 and args.torch_compile and args.weak_forward == "separate" and recipe.time_limit < 10


# --------------------------------------------------------------------------------------------------------------- errors


def test_wrong_input_ends_in_one_line_and_no_traceback(place: Path) -> None:
    """A Hub dataset without network."""
    recipe = [sys.executable, "recipes/train_semi_inat.py", "--labeled", "someone/photos:train", "--use_cpu", "true"]
    run = subprocess.run(recipe, cwd=place, env=environment(place), capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: The labeled split 'someone/photos:train' is neither a path nor a dataset on the Hub ("
    )
    assert "check the spelling and the network, or give an image folder or parquet files" in last


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data_dir", "nowhere"], "error: data_dir 'nowhere' has no folder labeled/"),
        (["--data_dir", "photos", "--backbone", "resnet5O"], "error: .*no model 'resnet5O'.*resnet50"),
        (["--data_dir", "photos", "--lamda_u", "1"], "error: Unknown argument --lamda_u. Did you mean 'lambda_u'"),
        (
            ["--data_dir", "photos", "--unlabeled", "none.parquet"],
            "error: The unlabeled split 'none.parquet' does not exist .no such parquet file",
        ),
        (["--data_dir", "photos"], "error: 12 labeled images are fewer than a batch of 16"),
    ],
)
def test_each_recipe_reports_before_it_trains(
    flags: list[str], sentence: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipes/train_imagefolder.py", *flags, "--use_cpu", "true", "--repeat_labeled", "false"]
    with pytest.raises(SystemExit) as end:
        run_here(place, words, monkeypatch)
    assert end.value.code == 2 and re.search(sentence, capsys.readouterr().err)
