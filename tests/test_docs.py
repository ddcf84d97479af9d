"""Tests of the README, the documentation and the notebook.

Code runs, commands parse, links resolve, numbers match the files that they link to, and generated parts are up to date.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import nbclient
import nbformat
import numpy as np
import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.utils import logging
from typer.testing import CliRunner

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.algorithms import ALGORITHMS, build_algorithm
from ccssl_hf.cli import app
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.cli.help import FLAGS_FILE
from ccssl_hf.deploy.predict import Classifier
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments, RecipeArguments
from hub_server import TOKENS, Hub
from test_deploy_serve import served
from test_recipes import SMALL, changed

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
RECIPES = {"train_imagefolder.py": FolderArguments, "train_semi_inat.py": RecipeArguments}
SIZES = {"num_unlabeled": 1000, "embedding_dim": 64, "batch_size": 16, "mu": 7}
FEW_STEPS = {name: yaml.safe_load(value) for name, value in SMALL.items() if name not in ("pretrained", "backbone")}
FEW_STEPS["max_steps"] = 2
SMALLER = {
    '"resnet50", pretrained=True': '"test_resnet", pretrained=False',
    '"resnet50", labels=labeled.features["label"].names, pretrained=True': (
        '"test_resnet", labels=labeled.features["label"].names, image_size=32'
    ),
    'from_config(output_dir="outputs/photos")': f'from_config(output_dir="outputs/python", **{FEW_STEPS})',
    "user/moths": "anna/moths-of-the-docs",
}
"""Replacements that make the pages' code run in seconds, on the CPU and without the Hub."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def with_blocks(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


# ---------------------------------------------------------------------------------------------------- code and commands


def run_command(words: list[str]) -> None:
    """Run a `ccssl-hf` command in this process; training with few steps and a small network."""
    words = [SMALLER.get(word, word) for word in words]
    words = changed(words, image_size="32", max_steps="2") if words[1] == "train" else words
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, f"{words}: {done.output}"


def run_python(page: str, address: str = "") -> dict[str, Any]:
    """Run all Python blocks of a page in one namespace, which is returned."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        for original, replacement in {**SMALLER, "http://127.0.0.1:8000": address}.items():
            block = block.replace(original, replacement)
        assert "resnet50" not in block and 'load_dataset("imagefolder"' not in block
        exec(compile(block, page, "exec"), names)
    logging.set_verbosity_warning()
    return names


def write_photos(root: Path) -> None:
    """The folders of the README: crops of two photographs."""
    for label, photograph in zip(("moth", "fly"), load_sample_images().images, strict=True):
        for number in range(14):
            split = "labeled" if number < 4 else "validation" if number < 6 else "unlabeled"
            name = str(number - 4) if split == "validation" else f"{label}_{number}"
            path = root / "photos" / split / (label if split != "unlabeled" else "all") / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[20 * number : 20 * number + 120, 40 * number : 40 * number + 120]).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Path]:
    """A working directory with the files that the pages name, in which the quick start's commands have run."""
    root = tmp_path_factory.mktemp("place")
    write_photos(root)
    (root / "names.txt").write_text("moth\nfly\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setenv("HF_TOKEN", TOKENS["anna"])
        for words in commands("docs/quickstart.md"):
            if words[0] == "ccssl-hf":
                run_command(words)
        (root / "converted").symlink_to(root / "outputs" / "photos")
        yield root


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """The address of a server with the quick start's model."""
    with served(Classifier.from_pretrained(place / "outputs" / "photos", device="cpu")) as url:
        yield url


def test_the_quick_starts_commands_write_the_files_that_it_names(place: Path, hub: Hub) -> None:
    expected = {"config.json", "model.safetensors", "README.md"}
    assert expected <= {path.name for path in (place / "outputs" / "photos").iterdir()}
    assert (place / "predictions.parquet").is_file()
    assert ("model", SMALLER["user/moths"]) in hub.repos


def test_the_readmes_command_and_its_python_lines_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal weights, bit for bit, and equal metrics."""
    write_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    [command] = [words for words in commands("README.md") if words[:2] == ["ccssl-hf", "train"]]
    run_command(command)
    trainer = run_python("README.md")["trainer"]

    files = [tmp_path / "outputs" / name / "model.safetensors" for name in ("photos", "python")]
    assert files[0].read_bytes() == files[1].read_bytes()
    expected = json.loads((tmp_path / "outputs" / "photos" / "validation_results.json").read_text())
    [measured] = [entry for entry in trainer.state.log_history[-1:] if "eval_top1" in entry]
    compared = [name.removeprefix("eval_") for name in measured if name.startswith("eval_")]
    compared = [name for name in compared if "per_second" not in name and "runtime" not in name]
    assert {"loss", "top1", "macro_f1", "ece"} <= set(compared)
    for name in compared:
        assert measured[f"eval_{name}"] == expected[f"validation_{name}"], name


def test_the_readmes_command_and_its_python_lines_have_the_same_settings() -> None:
    """At full size: all fields of `CCSSLTrainingArguments`, the backbone, and its weights."""
    [command] = [words for words in commands("README.md") if words[:2] == ["ccssl-hf", "train"]]
    flags = [word for word in command[2:] if word not in ("--data_dir", "photos")]
    recipe, args = parse_recipe(FolderArguments, CCSSLTrainingArguments, config=OWN_IMAGES, arguments=flags)
    python = CCSSLTrainingArguments.from_config(output_dir="outputs/photos")
    assert args.to_dict() == python.to_dict()
    [block] = [block for block in blocks("README.md", "python") if "CCSSLTrainer(" in block]
    assert 'from_config(output_dir="outputs/photos")' in block and "set_seed(args.seed)" in block
    assert (recipe.backbone, recipe.pretrained, recipe.image_size) == ("resnet50", True, None)
    assert 'from_timm("resnet50", labels=labeled.features["label"].names, pretrained=True)' in block
    [quickstart] = [block for block in blocks("docs/quickstart.md", "python") if "CCSSLTrainer(" in block]
    assert quickstart.splitlines() == [line.partition("  # config.json")[0] for line in block.splitlines()]


@pytest.mark.parametrize("page", [page for page in with_blocks("python") if page != "README.md"])
def test_python_runs(page: str, place: Path, address: str) -> None:
    assert run_python(page, address)


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_are_understood(page: str, place: Path) -> None:
    for words in commands(page):
        understand(words)


def understand(words: list[str]) -> None:
    """Read a command with the parsers that it would meet. Raises if one of them refuses it."""
    if words[0] == "ccssl-hf" and words[1] == "train":
        read_flags(FolderArguments, words[2:])
    elif words[0] == "ccssl-hf":
        command: Any = typer.main.get_command(app)
        rest, context = words[1:], command.context_class(command)
        while hasattr(command, "list_commands"):
            name = rest.pop(0)
            command = command.get_command(context, name)
            assert command is not None, f"there is no command {name}"
        command.make_context(words[1], rest)
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        if launch.module:
            assert launch.training_script == "ccssl_hf.cli"
            understand(["ccssl-hf", *launch.training_script_args])
        else:
            assert (ROOT / launch.training_script).is_file()
            read_flags(RECIPES[Path(launch.training_script).name], launch.training_script_args)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = ",".join(re.findall(r"\[(.*?)\]", " ".join(words)))
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras.split(",") if extra)
    else:
        raise AssertionError(f"no parser reads {shlex.join(words)}")


def read_flags(cls: type, flags: list[str]) -> None:
    _, args = parse_recipe(cls, CCSSLTrainingArguments, config=OWN_IMAGES, arguments=[*flags, "--use_cpu", "true"])
    build_algorithm(args.algorithm, num_classes=2, **SIZES, **args.hyperparameters())


# -------------------------------------------------------------------------------------------------------------- numbers


def table_after(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading; an empty cell repeats the one above."""
    lines = text.partition(f"\n{heading}\n")[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| "))
    rows: list[list[str]] = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.append([cell or rows[-1][column] for column, cell in enumerate(cells)])
    return rows


def runs_of(data: str, method: str) -> list[dict[str, Any]]:
    """The runs of a method in the file with the results of a dataset."""
    if data == "digits":
        name = method.lower().replace(" + ", "_")
        return [row for row in json.loads((RESULTS / "demo.json").read_text())["rows"] if row["method"] == name]
    lines = (RESULTS / f"algorithms_{data}.jsonl").read_text(encoding="utf-8").splitlines()
    algorithm, _, contrast = method.lower().partition(" + ")
    return [
        row
        for row in map(json.loads, lines)
        if not row["validation_only"]
        and row["settings"]["algorithm"] == algorithm
        and bool(row["settings"]["lambda_contrast"]) == bool(contrast)
    ]


def test_the_readmes_results_are_those_of_the_files() -> None:
    rows = table_after(PAGES["README.md"].read_text(encoding="utf-8"), "## Results")
    assert len(rows) == 9
    for data, method, top1, auroc, link in rows:
        name = data.partition(",")[0]
        runs = runs_of(name, method)
        assert len({run["seed"] for run in runs}) == len(runs) == 3
        for key, cell in (("top1", top1), ("auroc", auroc)):
            values = [run[key] for run in runs]
            assert cell == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}", (data, method, key)
        steps = {run.get("step") or run["settings"]["max_steps"] for run in runs}
        assert f"{steps.pop()} steps" in data and not steps
        file = "demo.json" if name == "digits" else "algorithms.md"
        assert f"](benchmarks/results/{file}" in link


SPEED = {  # first words of a row in the README -> file and row that hold its number
    "training step": ("step", "Step, defaults"),
    "the same with `weak_forward: separate`": ("step", "Step, weak_forward='separate', 176"),
    "three views of 32 px": ("augmentation", "weak, strong, contrastive of 448 CIFAR-10"),
    "three views of 224 px": ("views_224", "weak, strong, contrastive of 32 JPEG"),
    "contrastive loss of 8,192 images": ("contrastive", "contrastive loss, N = 8,192, D"),
    "start of training": ("start", 'start, decode="memory", 1,000,000 unlabeled images against 1,000, time'),
    "`ccssl-hf predict`, ResNet-18": ("predict", "predict 256 JPEGs of 500 px, resnet18"),
}


def test_the_readmes_speed_is_that_of_the_files() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    rows = table_after(text, "## Speed")
    assert len(rows) == len(SPEED)
    for what, measured, _ in rows:
        [(file, start)] = [value for key, value in SPEED.items() if what.startswith(key)]
        content = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        row = next(row for row in content["rows"] if row["what"].startswith(start))
        [number] = re.findall(rf"\[([\d.]+)(?:x| s)\]\(benchmarks/results/{file}\.json\)", measured)
        decimals = len(number.partition(".")[2])
        assert number == f"{row['figure']:.{decimals}f}", what
        if file == "step":
            assert measured.startswith(f"{row['ours']}, ")
        assert content["machine"]["processor"] in text and f"torch {content['machine']['versions']['torch']}" in text
    contrastive = json.loads((RESULTS / "contrastive.json").read_text(encoding="utf-8"))["rows"]
    memory = next(row for row in contrastive if row["what"] == "contrastive loss, N = 8,192, memory")
    assert f"[{memory['ours']}](" in text and memory["baseline"] in text


def test_the_printed_table_of_the_demo_is_that_of_its_results() -> None:
    script = runpy.run_path(str(ROOT / "recipes" / "train_digits.py"))
    rows = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["rows"]
    table = [
        {"method": title}
        | {column: [row[key] for row in rows if row["method"] == method] for key, column in script["COLUMNS"].items()}
        for method, title in script["TITLES"].items()
    ]
    expected = script["format_table"](table, ["method", *script["COLUMNS"].values()])
    assert f"\n\n{expected}\n\n" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ generated parts


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "reference.py"))


def test_the_table_of_algorithms_is_up_to_date(reference: dict[str, Any]) -> None:
    text = PAGES["docs/algorithms.md"].read_text(encoding="utf-8")
    assert reference["with_table"](text) == text, "run: python docs/reference.py"
    for name in ALGORITHMS:
        assert f"\n| `{name}`" in text
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    listed = readme.partition("- **[Algorithms](docs/algorithms.md)**: ")[2].partition(". ")[0]
    assert re.findall(r"`(\w+)`", listed) == list(ALGORITHMS)
    assert "FixMatch and six other pseudo-labeling" in " ".join(readme.split()) and len(ALGORITHMS) == 8


def test_the_pages_of_the_commands_are_up_to_date(reference: dict[str, Any]) -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "cli").glob("*.md")}
    assert found == reference["pages"](), "run: python docs/reference.py"


def test_the_flags_that_the_command_shows_without_importing_torch_are_up_to_date(reference: dict[str, Any]) -> None:
    assert FLAGS_FILE.read_text(encoding="utf-8") == reference["flags_file"](), "run: python docs/reference.py"


def test_every_setting_in_the_second_column_of_migration_exists() -> None:
    known = {f.name for cls in (FolderArguments, CCSSLTrainingArguments) for f in fields(cls)}
    known |= {*ALGORITHMS, "projection_dim", "from_timm", "separate"}
    rows = re.findall(r"^\| .+? \| (.+?) \|", PAGES["docs/migration.md"].read_text(encoding="utf-8"), re.MULTILINE)
    named = [word for ours in rows for word in re.findall(r"`([a-z_]+)(?:: [^`]*)?`", ours)]
    assert len(named) > 70 and set(named) <= known, set(named) - known


def test_figures_are_small_and_their_weights_are_those_of_the_loss(tmp_path: Path) -> None:
    figures = runpy.run_path(str(DOCS / "figures.py"))
    figures["save"].__globals__["IMAGES"] = tmp_path
    for name in ("overview", "weights", "views"):
        figures["FIGURES"][name]()  # `weights` compares its matrix with the loss
        drawn, kept = (np.asarray(Image.open(folder / f"{name}.png")) for folder in (tmp_path, DOCS / "images"))
        assert drawn.shape[2] == kept.shape[2] and min(drawn.shape[:2]) > 300
    for path in (DOCS / "images").glob("*.png"):
        assert path.stat().st_size <= 200_000, path.name
        assert any(f"images/{path.name}" in page.read_text(encoding="utf-8") for page in PAGES.values()), path.name


def test_the_tree_in_contributing_lists_every_module() -> None:
    """A folder without entries below it stands for all of its files."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.partition("\nccssl_hf/\n")[2].partition("```")[0].splitlines()
    listed, parent = set(), Path()
    for line in lines:
        name, _, purpose = line.strip().partition(" ")
        assert purpose.strip(), f"{name} has no description"
        path = Path(name) if line.startswith("  ") and not line.startswith("    ") else parent / name
        parent = path if path == Path(name) else parent
        listed.add(path)
    folders = {path for path in listed if not path.suffix} - {path.parent for path in listed}
    package = ROOT / "ccssl_hf"
    modules = {path.relative_to(package) for path in package.rglob("*.py") if not path.name.startswith("__")}
    missing = {path for path in modules - listed if not folders & set(path.parents)}
    assert not missing and all((package / path).exists() for path in listed), missing


# ------------------------------------------------------------------------------------------------------------- notebook

NOTEBOOK = DOCS / "quickstart.ipynb"


def outputs(notebook: Any) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def assert_looks_right(notebook: Any) -> None:
    """One progress bar, one table of the training with the mask rate, and no warnings.

    A machine on which the run takes more than a minute also says how long.
    """
    estimates = ("Each step: ", "A step takes ")
    shown = [each for each in outputs(notebook) if not "".join(each.get("text", "")).startswith(estimates)]
    assert not [each for each in shown if each["output_type"] == "error" or each.get("name") == "stderr"]
    html = ["".join(each["data"]["text/html"]) for each in shown if "text/html" in each.get("data", {})]
    [training] = [text for text in html if "<progress" in text]
    assert "<th>Mask Rate</th>" in training and "<th>Top1</th>" in training
    assert training.count("<td>") == 6 * training.count("<th>") and "progress value='300' max='300'" in training
    assert sum("image/png" in each.get("data", {}) for each in shown) == 3


def test_the_stored_notebook_has_outputs_and_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 150_000
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(cell["outputs"] or "Path(" in "".join(cell["source"]) for cell in notebook["cells"] if "outputs" in cell)
    assert_looks_right(notebook)


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert_looks_right(notebook)
    assert {"config.json", "model.safetensors", "README.md"} <= {
        p.name for p in (tmp_path / "outputs/digits").iterdir()
    }


# ---------------------------------------------------------------------------------------------------------------- links

LINKED = [
    *PAGES.values(),
    *(DOCS / "cli").glob("*.md"),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")),
]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs form them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no heading for #{anchor}"
        assert DOCS not in path.parents or DOCS in file.parents, f"{target} is not part of the site"


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_uses_the_terms_of_the_field(path: Path) -> None:
    """Out-of-distribution (OOD) images have one name. Titles of papers may have others."""
    prose = re.sub(r"\]\(https?:.*?\)|\[[^\]]*\]\(https://arxiv.*?\)", "", path.read_text(encoding="utf-8"))
    assert not re.findall(r"strangers?\b|known class|outliers?\b", prose)


def test_the_site_lists_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
