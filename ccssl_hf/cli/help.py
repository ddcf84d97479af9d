"""Help of commands whose flags are fields of dataclasses: a short page with what people change, a long one with all.

`flags.json` has the flags of this package, written by `docs/reference.py`. With it the command answers in a fraction of
a second; the dataclasses themselves need torch and transformers, which take seconds to import.
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
FEW = 35  # a command with at most so many flags has only one page

# The settings of the short page. Empty: the first sentence of their help.
SHORT: dict[str, dict[str, str]] = {
    "Data": {
        "data_dir": "Folder with labeled/, unlabeled/, validation/, test/.",
        "labeled": "Labeled training images.",
        "unlabeled": "Unlabeled training images.",
        "validation": "Labeled images, evaluated during training.",
        "test": "Labeled images, evaluated at the end.",
        "validation_fraction": "Share of the labeled images to validate on.",
        "hidden_label_column": "True classes of unlabeled images, only logged.",
        "image_column": "",
        "label_column": "",
        "on_bad_image": "What to do with an unreadable image.",
    },
    "Model": {
        "backbone": "",
        "pretrained": "",
        "model": "Published model to start from: a folder or Hub id.",
        "image_size": "Side of the images in pixels.",
    },
    "Method": {
        "algorithm": "Such as comatch, simmatch, supervised.",
        "lambda_contrast": "Weight of CCSSL's contrastive loss; 0: off.",
        "push_threshold": "Minimum confidence for pairs in it (T_push).",
        "confidence_threshold": "Minimum confidence of a pseudo label.",
        "mu": "Unlabeled images for each labeled one.",
        "horizontal_flip": "Mirror images at random.",
    },
    "Training": {
        "max_steps": "",
        "per_device_train_batch_size": "Labeled images in a step.",
        "learning_rate": "",
        "warmup_steps": "Steps in which the learning rate rises.",
        "optim": "Optimizer, such as sgd or adamw_torch.",
        "ema_decay": "Decay of the averaged weights.",
        "weak_forward": "joint, or separate: faster, see --help_all.",
        "decode": "memory: decode once; stream: when drawn.",
        "bf16": "Compute in bfloat16, faster on accelerators.",
        "seed": "Decides all random numbers of the run.",
    },
    "Run": {
        "output_dir": "Folder of model and checkpoints.",
        "overwrite": "Replace an earlier run in output_dir.",
        "resume_from_checkpoint": "true, or the folder of a checkpoint.",
        "eval_steps": "Steps between evaluations.",
        "save_steps": "Steps between checkpoints.",
        "report_to": "Trackers: tensorboard, trackio, wandb.",
        "push_to_hub": "Upload the model at the end.",
        "hub_model_id": "Its name on the Hub, USER/REPO.",
    },
}


class Flag(NamedTuple):
    """`value` is what follows the name: `VALUE`, `{a,b}`, or nothing for a switch."""

    value: str
    help: str
    default: Any


class Section(NamedTuple):
    """The flags that a dataclass defines, by name; `text` describes the class."""

    text: str
    flags: dict[str, Flag]


def packaged_sections(types: Sequence[str]) -> dict[str, Section]:
    """`flags.sections_of` dataclasses of this package that are named, without importing them."""
    table = json.loads(FLAGS_FILE.read_text(encoding="utf-8"))
    found, own = {}, {name for section in table.values() for name in section["flags"]}
    for name in dict.fromkeys(base for each in types for base in (each, *table[each]["bases"])):
        if name in table:
            flags = {key: Flag(*values) for key, values in table[name]["flags"].items()}
            found[name] = Section(table[name]["text"], flags)
        else:
            left = {key: flag for key, flag in _flags_of_transformers().items() if key not in own}
            found[name] = Section("Arguments of transformers.", left)
    return found


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


def unknown_flag(word: str, known: Iterable[str]) -> ValueError:
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    return ValueError(f"Unknown argument {word}.{near_misses(name, known)} --help_all lists all.")


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
    known = {"config", "help", "help_all", *flags, *(f"no_{name}" for name, flag in flags.items() if not flag.value)}
    if asked := {"-h", "--help", "--help_all", "--help-all"} & set(arguments):
        everything = len(flags) <= FEW or asked & {"--help_all", "--help-all"}
        print(_page(sections, everything=bool(everything), config=config, description=description, prog=prog), end="")
        raise SystemExit(0)
    for word in arguments:
        if word.startswith("--") and word.lstrip("-").split("=")[0].replace("-", "_") not in known:
            raise unknown_flag(word, known)


def answer_at_once(types: Sequence[str], arguments: Sequence[str], *, config: Path, **page: Any) -> None:
    """`answer` for dataclasses of this package that are named, before they are imported."""
    chosen, flags = config_of(arguments, config)
    answer(packaged_sections(types), flags, config=chosen, **page)


def _page(
    sections: Mapping[str, Section], *, everything: bool, config: Path | None, description: str | None, prog: str
) -> str:
    try:
        settings = dict(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The config {config} cannot be read ({summary(error)}).") from error
    flags = {name: flag for section in sections.values() for name, flag in section.flags.items()}
    flags = {name: flag._replace(default=settings.get(name, flag.default)) for name, flag in flags.items()}
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: {prog} [--config FILE] [--FLAG VALUE ...]", "", *(description or "").rstrip().splitlines()]
    if everything:
        for name, section in sections.items():
            lines += ["", f"{name}:", *_wrapped(section.text, width, "  "), ""]
            lines += _rows({f"--{each} {flags[each].value}": flags[each] for each in section.flags}, width)
    else:
        packaged = {*json.loads(FLAGS_FILE.read_text(encoding="utf-8")), "TrainingArguments"}
        own = [each for name, section in sections.items() if name not in packaged for each in section.flags]
        for title, texts in ({"This recipe": dict.fromkeys(own, "")} | SHORT).items():
            shown = [name for name in texts if name in flags and (name not in own or title not in SHORT)]
            rows = {f"--{each}": flags[each]._replace(help=texts[each] or _first(flags[each].help)) for each in shown}
            lines += ["", f"{title}:", *_rows(rows, width)] if rows else []
    source = f"Defaults in brackets are those of {config}." if config else ""
    more = "" if everything else f"--help_all describes all {len(flags)} flags."
    return "\n".join([*lines, "", "`--flag none` unsets a value.", *filter(None, (source, more))]) + "\n"


def _first(text: str) -> str:
    """The first sentence."""
    return text.split(". ")[0].rstrip(".") + "." if text else ""


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def _rows(flags: Mapping[str, Flag], width: int) -> list[str]:
    """A line for each flag: its name, help and default."""
    column, rows = min(34, max(map(len, flags), default=0) + 4), []
    for head, flag in flags.items():
        default = "" if flag.default in (None, False, "") else "on" if flag.default is True else flag.default
        lines = _wrapped(f"{flag.help} [{default}]" if default != "" else flag.help, width, " " * column)
        head = f"  {head}".rstrip()
        if lines and len(head) < column - 1:
            head, lines = head.ljust(column) + lines[0].lstrip(), lines[1:]
        rows += [head, *lines]
    return rows
