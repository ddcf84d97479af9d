"""Help of commands whose flags are fields of dataclasses: a short page with what people change, a long one with all.

`flags.json` has the flags of this package, written by `docs/reference.py`, and `main_flags.txt` the short page. With
them the command answers in a fraction of a second; the dataclasses need torch and transformers, which take seconds.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import near_misses, summary

FLAGS_FILE = Path(__file__).with_name("flags.json")
MAIN_FLAGS = Path(__file__).with_name("main_flags.txt")
OWN_IMAGES = Path(__file__).parents[1] / "configs" / "imagefolder.yaml"
"""The same as `recipe.OWN_IMAGES`, which takes seconds to import."""


class Flag(NamedTuple):
    """`value` is what follows the name: `VALUE`, `{a,b}`, or nothing for a switch."""

    value: str
    help: str
    default: Any


class Section(NamedTuple):
    """The flags that a dataclass defines, by name; `text` describes the class."""

    text: str
    flags: dict[str, Flag]


def packaged_sections() -> dict[str, Section]:
    """`flags.sections_of` the dataclasses of `ccssl-hf train`, without importing them."""
    table = json.loads(FLAGS_FILE.read_text(encoding="utf-8"))
    found = {
        name: Section(section["text"], {key: Flag(*values) for key, values in section["flags"].items()})
        for name, section in table.items()
    }
    own = {name for section in found.values() for name in section.flags}
    theirs = {name: flag for name, flag in _flags_of_transformers().items() if name not in own}
    return found | {"TrainingArguments": Section("Arguments of transformers.", theirs)}


def _flags_of_transformers() -> dict[str, Flag]:
    """The fields of `TrainingArguments` in the installed release, read from its source."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    found = {}
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        values = {each.arg: _literal(each.value) for each in getattr(node.value, "keywords", ())}
        if values.get("init", True):
            text = (values.get("metadata") or {}).get("help", "")
            value = "" if ast.unparse(node.annotation).startswith("bool") else "VALUE"
            found[node.target.id] = Flag(value, " ".join(text.split()), values.get("default"))
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:  # a name, or a text with a value in it
        return None


def config_of(arguments: Sequence[str], default: str | Path | None) -> tuple[Path | None, list[str]]:
    """The file of `--config`, and the other arguments."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default=default)
    chosen, others = early.parse_known_args(list(arguments))
    return None if chosen.config is None else Path(chosen.config), others


def _name(word: str) -> str:
    return word.lstrip("-").split("=")[0].replace("-", "_")


def unknown_flag(word: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"Unknown argument {word}.{near_misses(_name(word), known)} --help_all lists all.")


def answer(
    sections: Mapping[str, Section],
    arguments: Sequence[str],
    *,
    config: Path | None,
    description: str | None,
    prog: str,
) -> None:
    """Print a page of help and exit if `arguments` ask for it. Raises ValueError if a flag is unknown."""
    flags = {name: flag for section in sections.values() for name, flag in section.flags.items()}
    asked = {_name(word) for word in arguments if word.startswith("-")} & {"h", "help", "help_all"}
    if asked:
        try:
            settings = dict(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"The config {config} cannot be read ({summary(error)}).") from error
        groups = {
            title: Section(
                section.text,
                {name: flag._replace(default=settings.get(name, flag.default)) for name, flag in section.flags.items()},
            )
            for title, section in sections.items()
        }
        notes = ["`--flag none` unsets a value. Flags may be written with hyphens, too."]
        notes += [f"Defaults in brackets are those of {config}."] if config else []
        if "help_all" not in asked:
            groups = _main_flags(groups)
            notes.append(f"--help_all describes all {len(flags)} flags.")
        print(_page(groups, prog=prog, description=description, epilog="\n".join(notes)), end="")
        raise SystemExit(0)
    known = {"config", *flags, *(f"no_{name}" for name, flag in flags.items() if not flag.value)}
    for word in arguments:
        if word.startswith("--") and _name(word) not in known:
            raise unknown_flag(word, known)


def answer_at_once(arguments: Sequence[str], **page: Any) -> None:
    """`answer` for `ccssl-hf train` and `check`, before their dataclasses are imported."""
    config, flags = config_of(arguments, OWN_IMAGES)
    answer(packaged_sections(), flags, config=config, **page)


def _main_flags(sections: Mapping[str, Section]) -> dict[str, Section]:
    """The settings that people change, by title. First those that a recipe defines itself."""
    packaged = packaged_sections()
    flags = {name: flag._replace(value="") for section in sections.values() for name, flag in section.flags.items()}
    own = {name: flags[name] for title, section in sections.items() if title not in packaged for name in section.flags}
    groups = {"This recipe": Section("", own)}
    for paragraph in MAIN_FLAGS.read_text(encoding="utf-8").split("\n\n"):
        title, *lines = paragraph.splitlines()
        texts = {name: text for name, _, text in (line.partition(" ") for line in lines)}
        shown = [name for name in texts if name in flags and name not in own]
        groups[title] = Section("", {name: flags[name]._replace(help=texts[name]) for name in shown})
    return {title: section for title, section in groups.items() if section.flags}


def _page(groups: Mapping[str, Section], *, prog: str, description: str | None, epilog: str) -> str:
    """A page as argparse formats it."""
    width = min(100, shutil.get_terminal_size().columns)

    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)

    usage = f"{prog} [--config FILE] [--FLAG VALUE ...]"
    about: dict[str, Any] = dict(prog=prog, usage=usage, description=description, epilog=epilog)
    parser = argparse.ArgumentParser(**about, formatter_class=layout, add_help=False)
    for title, section in groups.items():
        group = parser.add_argument_group(title, textwrap.fill(section.text, width - 2) or None)
        for name, flag in section.flags.items():
            default = (
                "" if flag.default in (None, False, "") else f" [{'on' if flag.default is True else flag.default}]"
            )
            text = (flag.help + default).strip().replace("%", "%%")
            how: dict[str, Any] = {"metavar": flag.value} if flag.value else {"action": "store_true"}
            group.add_argument(f"--{name}", help=text, **how)
    return parser.format_help()
