"""What README and docs show is true: their code runs, their commands parse, their links lead somewhere, and what is
made from the code is today's.
"""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import config as datasets_config
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.utils import logging
from typer.testing import CliRunner

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.algorithms import ALGORITHMS, build_algorithm
from ccssl_hf.algorithms.__main__ import with_table
from ccssl_hf.cli import app
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.cli.pages import pages
from ccssl_hf.deploy.predict import Classifier
from ccssl_hf.recipe import OWN_IMAGES, FolderArguments, RecipeArguments
from hub_server import TOKENS, Hub
from test_deploy_serve import served
from test_recipes import changed

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
RECIPES = {"train_imagefolder.py": FolderArguments, "train_semi_inat.py": RecipeArguments}
SIZES = {"num_unlabeled": 1000, "embedding_dim": 64, "batch_size": 16, "mu": 7}
SMALLER = {
    '"resnet50"': '"test_resnet"',
    "pretrained=True": "pretrained=False",
    "max_steps=20_000": "max_steps=2, mu=1, use_cpu=True, report_to='none'",
    "per_device_train_batch_size=16": "per_device_train_batch_size=4",
    "user/moths": "anna/moths-of-the-docs",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def with_blocks(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


# ------------------------------------------------------------------------------------------------------- code and words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Path]:
    """A folder in which the pages' code finds what it names: the quick start was run in it."""
    root = tmp_path_factory.mktemp("place")
    images = root / "my_images"
    for label, photograph in zip(("moth", "fly"), load_sample_images().images, strict=True):
        for number in range(14):
            split = "labeled" if number < 4 else "validation" if number < 6 else "unlabeled"
            name = str(number - 4) if split == "validation" else f"{label}_{number}"
            path = images / split / (label if split != "unlabeled" else "all") / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[20 * number : 20 * number + 120, 40 * number : 40 * number + 120]).save(path)
    (root / "photos").symlink_to(images)
    (root / "names.txt").write_text("moth\nfly\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", root / "cache")
        patch.setenv("HF_TOKEN", TOKENS["anna"])
        for words in commands("docs/quickstart.md"):
            if words[0] == "ccssl-hf":
                words = [SMALLER.get(word, word) for word in words]
                words = changed(words, image_size="32", max_steps="2") if words[1] == "train" else words
                done = CliRunner().invoke(app, words[1:])
                assert done.exit_code == 0, f"{words}: {done.output}"
        (root / "converted").symlink_to(root / "outputs" / "mine")
        yield root


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """Where the quick start's model is served."""
    with served(Classifier.from_pretrained(place / "outputs" / "mine", device="cpu")) as url:
        yield url


def test_the_quick_starts_commands_leave_what_it_says(place: Path, hub: Hub) -> None:
    expected = {"config.json", "model.safetensors", "README.md"}
    assert expected <= {path.name for path in (place / "outputs" / "mine").iterdir()}
    assert (place / "predictions.parquet").is_file()
    assert ("model", SMALLER["user/moths"]) in hub.repos


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs(page: str, place: Path, address: str) -> None:
    """All blocks of a page after one another, on small data and with a small network."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        for whole, tiny in {**SMALLER, "http://127.0.0.1:8000": address}.items():
            block = block.replace(whole, tiny)
        assert "max_steps=20" not in block and "resnet50" not in block
        exec(compile(block, page, "exec"), names)
    logging.set_verbosity_warning()
    assert names


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_are_understood(page: str, place: Path) -> None:
    for words in commands(page):
        understand(words)


def understand(words: list[str]) -> None:
    """Reads a command by the parsers that it would meet. Raises where one of them does not take it."""
    if words[0] == "ccssl-hf" and words[1] == "train":
        read_flags(FolderArguments, words[2:])
    elif words[0] == "ccssl-hf":
        command: Any = typer.main.get_command(app)
        rest, context = words[1:], command.context_class(command)
        while hasattr(command, "list_commands"):
            name = rest.pop(0)
            command = command.get_command(context, name)
            assert command is not None, f"there is no verb {name}"
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
        raise AssertionError(f"no parser is known for {shlex.join(words)}")


def read_flags(cls: type, flags: list[str]) -> None:
    _, args = parse_recipe(cls, CCSSLTrainingArguments, config=OWN_IMAGES, arguments=[*flags, "--use_cpu", "true"])
    build_algorithm(args.algorithm, num_classes=2, **SIZES, **args.hyperparameters())


# ------------------------------------------------------------------------------------------------ made from the code


@pytest.mark.parametrize("page", ["README.md", "docs/algorithms.md"])
def test_the_table_of_algorithms_is_todays(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    assert with_table(text) == text, f"write it anew: python -m ccssl_hf.algorithms {page}"


def test_the_pages_of_the_command_are_todays() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "cli").glob("*.md")}
    assert found == pages(), "write them anew: python -m ccssl_hf.cli.pages docs/cli"


def test_every_setting_that_migration_names_is_one() -> None:
    """In the second column of its tables, before a colon or alone."""
    known = {f.name for cls in (FolderArguments, CCSSLTrainingArguments) for f in fields(cls)}
    known |= {*ALGORITHMS, "projection_dim", "from_timm", "separate"}
    rows = re.findall(r"^\| .+? \| (.+?) \|", PAGES["docs/migration.md"].read_text(encoding="utf-8"), re.MULTILINE)
    named = [word for ours in rows for word in re.findall(r"`([a-z_]+)(?:: [^`]*)?`", ours)]
    assert len(named) > 70 and set(named) <= known, set(named) - known


def test_figures_are_small_and_the_weights_they_show_are_the_losss(tmp_path: Path) -> None:
    figures = runpy.run_path(str(DOCS / "figures.py"))
    figures["save"].__globals__["IMAGES"] = tmp_path
    for name in ("weights", "views"):
        figures["FIGURES"][name]()  # `weights` holds its matrix against the loss
        drawn, kept = (np.asarray(Image.open(folder / f"{name}.png")) for folder in (tmp_path, DOCS / "images"))
        assert drawn.shape[2] == kept.shape[2] and min(drawn.shape[:2]) > 300
    for path in (DOCS / "images").glob("*.png"):
        assert path.stat().st_size <= 200_000, path.name
        assert any(f"images/{path.name}" in page.read_text(encoding="utf-8") for page in PAGES.values()), path.name


# ---------------------------------------------------------------------------------------------------------------- links

LINKED = [
    *PAGES.values(),
    *(DOCS / "cli").glob("*.md"),
    *(ROOT / name for name in ("CONTRIBUTING.md", "recipes/README.md")),
]


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{target} has no heading for #{anchor}"
        assert DOCS not in path.parents or DOCS in file.parents, f"{target} lies outside of the site"


def test_the_site_has_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
