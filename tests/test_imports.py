"""The modules form layers: no import runs in a circle or upwards. Read from the source, so lazy imports count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ccssl_hf"

# The training core from the bottom up: a module imports only modules that stand before it.
CORE = (
    *("escape", "errors", "distributed", "sampling", "transforms", "data", "standalone"),
    *("losses", "algorithms", "wide_resnet_cifar", "backbones", "checkpoint", "config_file"),
    *("metrics", "record", "argument_checks", "training_args", "resume", "hub", "modeling", "output_folder"),
    *("step", "optimization", "ema", "callbacks", "trainer", "recipe"),
)
# What is built on the core, and what of each other these packages may import.
ON_TOP: dict[str, set[str]] = {"card": set(), "deploy": {"card"}, "cli": {"card", "deploy"}}
# The one way from the core to what is built on it: the trainer hands its record to the card.
HANDOVER = {("trainer", "card")}
# The file that offers the public names.
ROOT = "ccssl_hf"


def modules() -> dict[str, Path]:
    """Dotted name below the package to file; a package has the name of its folder."""
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    files[ROOT] = files.pop("__init__")
    return {name.removesuffix("/__init__").replace("/", "."): path for name, path in files.items()}


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top, within functions and for type checkers alone."""
    path, found = MODULES[name], set()
    package = [] if name == ROOT else name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["ccssl_hf", *package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "ccssl_hf":
                full, parent = ".".join(target[1:]), ".".join(target[1:-1]) or ROOT
                found.add(full if full in MODULES else parent)
    return found - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def top(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_place() -> None:
    assert {top(name) for name in MODULES} == {*CORE, *ON_TOP, ROOT}


def test_imports_are_found() -> None:
    assert {"algorithms", "data", "step", "transforms"} <= {top(name) for name in IMPORTS["trainer"]}
    assert "trainer" in IMPORTS[ROOT] and "data" in IMPORTS[ROOT]
    assert "algorithms.base" in IMPORTS["algorithms.fixmatch"] and "losses" in IMPORTS["algorithms.fixmatch"]
    assert sum(map(len, IMPORTS.values())) > 100


def test_no_import_runs_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for each in sorted(IMPORTS[name]):
                visit(each, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name: str) -> None:
    for target in IMPORTS[name]:
        mine, other = top(name), top(target)
        if mine in (other, ROOT) or (mine, other) in HANDOVER:
            continue
        if mine in ON_TOP:
            assert other in ON_TOP[mine] or other in CORE or (mine, other) == ("cli", ROOT), f"{name} imports {target}"
        else:
            assert other in CORE[: CORE.index(mine)], f"{name} imports {target}"
