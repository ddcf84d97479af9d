"""The command line of the recipes: a YAML file, flags that override it, and errors in one line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.errors import errors_in_one_line
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments, RecipeArguments, build_trainer, load_splits
from pictures import write

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def parse(*flags: str, config: Path | None = None) -> tuple[RecipeArguments, CCSSLTrainingArguments]:
    recipe, args = parse_recipe(
        RecipeArguments, CCSSLTrainingArguments, config=config, arguments=["--use_cpu", "true", *flags]
    )
    return recipe, args


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_flag_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "backbone: resnet18\nmu: 3\nlambda_contrast: 2\n")
    recipe, args = parse("--mu", "5", "--output_dir", str(tmp_path), config=file)
    assert (recipe.backbone, args.mu, args.lambda_contrast, args.ema_decay) == ("resnet18", 5, 2.0, 0.999)
    other = tmp_path / "other.yaml"
    other.write_text("mu: 4\n")
    recipe, args = parse(f"--config={other}", config=file)
    assert (recipe.backbone, args.mu) == (None, 4)  # --config replaces the recipe's file


def test_a_value_means_the_same_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    text = """
        learning_rate: 1e-3             # a string to YAML 1.1
        save_strategy: no               # a boolean to it
        nesterov: false
        pretrained: true
        image_size: 64
        push_threshold: 0.9
        own_pair_weight: squared
        max_steps: 7
        report_to: tensorboard
        schedule: lr_scheduler_type
        lr_scheduler_type: cosine_with_restarts
        algorithm: freematch
        include_for_metrics: [loss, inputs]
        lr_scheduler_kwargs: {num_cycles: 2}
        confidence_threshold: null
        use_quantile: yes
        """
    file = written(tmp_path, text.replace("\n        ", "\n"))
    flags = "--learning_rate 1e-3 --save-strategy no --no_nesterov --pretrained --image_size=64 --push_threshold .9"
    more = "--own_pair_weight squared --max_steps 7 --report_to tensorboard --use_quantile yes"
    more += " --include_for_metrics loss inputs --schedule lr_scheduler_type --algorithm freematch"
    more += " --lr_scheduler_type cosine_with_restarts"
    from_flags = parse(*flags.split(), *more.split(), "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    from_file = parse(config=file)
    assert from_file[0] == from_flags[0] and from_file[0].pretrained is True
    for f in dataclasses.fields(CCSSLTrainingArguments):
        assert getattr(from_file[1], f.name) == getattr(from_flags[1], f.name), f.name
    args = from_file[1]
    assert (args.learning_rate, args.save_strategy, args.nesterov, args.use_quantile) == (1e-3, "no", False, True)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2} and args.confidence_threshold is None


@pytest.mark.parametrize("flag", ["push_threshold", "own_pair_weight", "threshold_warmup"])
def test_none_unsets_what_the_file_sets(flag: str, tmp_path: Path) -> None:
    value = {"push_threshold": "0.9", "own_pair_weight": "squared", "threshold_warmup": "true"}[flag]
    algorithm = "flexmatch" if flag == "threshold_warmup" else "fixmatch"
    file = written(tmp_path, f"algorithm: {algorithm}\n{flag}: {value}\n")
    assert getattr(parse(config=file)[1], flag) is not None
    assert getattr(parse(f"--{flag}", "none", config=file)[1], flag) is None


def test_the_paper_s_baseline_is_two_flags_away() -> None:
    flags = ["--lambda_contrast", "0", "--push_threshold", "none"]
    _, args = parse(*flags, config=RECIPES / "configs" / "semi_inat.yaml")
    assert args.hyperparameters() == {"lambda_contrast": 0.0, "lambda_u": 1.0, "confidence_threshold": 0.6}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pusch_threshold", "0.9"], r"Unknown argument --pusch_threshold. Did you mean 'push_threshold'"),
        (["--lamda-contrast=1"], r"Unknown argument --lamda-contrast=1. Did you mean 'lambda_contrast'"),
        (["--push", "0.9"], "Unknown argument --push"),  # an abbreviation that the next flag would make ambiguous
        (["photos"], "Unknown argument photos"),
        (["--mu", "many"], "argument --mu: invalid int value: 'many'"),
        (["--push_threshold", "high"], "push_threshold.*: invalid float value: 'high'"),
        (["--weak_forward", "both"], "weak_forward.*: invalid choice: 'both'"),
        (["--nesterov", "perhaps"], "nesterov"),
        (["--labeled"], "argument --labeled: expected one argument"),
        (["--config", "/nope.yaml"], r"config /nope.yaml cannot be read \(.*No such file.*pass the path"),
        (["--config", "."], r"config . cannot be read"),
    ],
)
def test_a_wrong_flag_is_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(*flags)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lambda_contrst: 1\n", "unknown key 'lambda_contrst'. Did you mean 'lambda_contrast'"),
        ("contrast_with_threshold: 1\n", "unknown key 'contrast_with_threshold'"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("mu\n", "write one `name: value` per line"),
        ("mu: [1\n", "cannot be read"),
        ("mu: seven\n", "argument --mu: invalid int value: 'seven'"),
        ("mu: 7.5\n", "argument --mu: invalid int value: '7.5'"),
        ("1: 2\n", "unknown key 1"),
    ],
)
def test_a_wrong_file_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse(config=written(tmp_path, text))


def test_no_file_is_read_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of transformers reads flags from a file beside the script."""
    (tmp_path / "train.args").write_text("--mu 9")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])
    assert parse()[1].mu == 7


def test_help_all_shows_how_to_call_the_recipe_and_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_recipe(
            RecipeArguments,
            CCSSLTrainingArguments,
            arguments=["--help_all"],
            description="Train.\n\n    accelerate launch x.py\n",
        )
    text = capsys.readouterr().out
    assert end.value.code == 0 and "\n    accelerate launch x.py\n" in text
    for cls in (RecipeArguments, CCSSLTrainingArguments):
        assert all(re.search(rf"--{f.name}\s", text) for f in dataclasses.fields(cls) if f.init)
    assert "Temperature of the class-aware contrastive loss" in " ".join(text.split())


FILES = [OWN_IMAGES, *(file for file in (RECIPES / "configs").glob("*.yaml") if not file.stem.startswith("cifar10"))]


@pytest.mark.parametrize("config", FILES, ids=lambda file: file.stem)
def test_every_recipe_s_file_is_read(config: Path) -> None:
    """CIFAR-10's recipe has more flags and its own test."""
    recipe, args = parse(config=config)
    for key, value in yaml.safe_load(config.read_text()).items():
        read = getattr(recipe if hasattr(recipe, key) else args, key)
        assert read == value or (key, read, value) == ("report_to", [], "none"), key


def test_an_error_before_training_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, errors_in_one_line():
        load_splits(RecipeArguments())
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: There is no labeled split: set labeled to") and err.count("\n") == 1 and not out
    with pytest.raises(RuntimeError, match="a bug"), errors_in_one_line():
        raise RuntimeError("a bug")


def test_of_many_processes_one_reports(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end, errors_in_one_line():
        load_splits(RecipeArguments())
    assert end.value.code == 2 and capsys.readouterr().err == ""


def photos(root: Path, *folders: str, images: int = 4) -> Path:
    for folder in folders:
        for name in ("cat", "dog"):
            for number in range(images):
                write(root / folder / name / f"{number}.png", number)
    return root


def test_a_fraction_of_the_labeled_images_is_the_validation_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = photos(tmp_path / "photos", "labeled", "unlabeled")
    flags = ["--backbone", "wide_resnet10_1_cifar", "--image_size", "16", "--per_device_train_batch_size", "4"]
    flags += ["--mu", "2", "--seed", "3", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    flags += ["--data_dir", str(root), "--validation_fraction", "0.25"]
    recipe, args = parse_recipe(FolderArguments, CCSSLTrainingArguments, config=OWN_IMAGES, arguments=flags)
    trainer, splits = build_trainer(recipe, args)
    assert {role: len(split) for role, split in splits.items()} == {"labeled": 6, "unlabeled": 8, "validation": 2}
    assert "2 of the 8 labeled images, drawn by class with seed 3: cat 1 of 4, dog 1 of 4." in caplog.text
    assert trainer.args.eval_strategy != "no" and trainer.eval_dataset is splits["validation"]
    card = trainer._splits()["validation"].data
    assert card.endswith("labeled, a fraction of 0.25 by class with seed 3")


def test_no_validation_split_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_splits(FolderArguments(data_dir=str(photos(tmp_path, "labeled"))))
    assert caplog.messages == [
        "There is no validation split, so training evaluates nothing: set validation or validation_fraction."
    ]


def test_a_validation_split_and_a_fraction_are_refused(tmp_path: Path) -> None:
    recipe = FolderArguments(data_dir=str(photos(tmp_path, "labeled", "validation")), validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"validation is '.*' and validation_fraction is 0.5: leave one out"):
        load_splits(recipe)


def test_folders_of_data_dir_with_other_names_are_not_passed_over(tmp_path: Path) -> None:
    root = photos(tmp_path, "train", "val", "unlabeled", images=1)
    with pytest.raises(ValueError, match="rename train/ to labeled/, val/ to validation/"):
        FolderArguments(data_dir=str(root))
    given = FolderArguments(data_dir=str(root), labeled=str(root / "train"), validation=str(root / "val"))
    assert load_splits(given).keys() == {"labeled", "unlabeled", "validation"}


def test_tables_take_image_root(tmp_path: Path) -> None:
    root, file = photos(tmp_path / "images", "a", images=1), tmp_path / "meta" / "labels.csv"
    file.parent.mkdir()
    file.write_text("file_name,label\na/cat/0.png,cat\na/dog/0.png,dog\n")
    with pytest.raises(
        ValueError, match=r"do not exist in its folder or in image_root \(2\): a/cat/0.png, a/dog/0.png"
    ):
        load_splits(RecipeArguments(labeled=str(file)))
    assert len(load_splits(RecipeArguments(labeled=str(file), image_root=str(root)))["labeled"]) == 2
