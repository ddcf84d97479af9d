"""What the recipes share: a command line with every setting, a YAML file behind it, and the run itself."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import yaml
from timm.models import get_pretrained_cfg
from transformers import HfArgumentParser, TrainerCallback, set_seed

from .data import load_split, read_class_names
from .distributed import all_reduce_mean
from .errors import near_misses
from .modeling import CCSSLForImageClassification
from .trainer import CCSSLTrainer
from .training_args import CCSSLTrainingArguments

logger = logging.getLogger(__name__)

ROLES = ("labeled", "unlabeled", "validation", "test")
OWN_IMAGES = Path(__file__).parent / "configs" / "imagefolder.yaml"
"""Settings to start from with images of one's own."""


@dataclass
class RecipeArguments:
    """What a recipe reads and which network it trains. Each split is an image folder (`<class>/<image>`, or any depth
    for the unlabeled one), a folder, file or glob of parquet, or a data set on the Hub, as `user/name` or
    `user/name:split`.
    """

    labeled: str | None = field(default=None, metadata={"help": "Labeled training images."})
    unlabeled: str | None = field(
        default=None, metadata={"help": "Unlabeled training images, of known classes or not."}
    )
    validation: str | None = field(default=None, metadata={"help": "Labeled images to choose hyperparameters on."})
    test: str | None = field(default=None, metadata={"help": "Labeled images that the last evaluation is made on."})
    backbone: str = field(default="resnet50", metadata={"help": "Name of a timm model."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights."})
    model: str | None = field(
        default=None, metadata={"help": "Published folder or Hub id to train on from, in place of a backbone."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; default: the backbone's."}
    )


@dataclass
class FolderArguments(RecipeArguments):
    """A root folder stands for the splits in it: `labeled/<class>/*`, `unlabeled/**`, `validation/<class>/*` and
    `test/<class>/*`, of which only the first must be there. A split elsewhere is named by its own flag.
    """

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with labeled/, unlabeled/, validation/ and test/."}
    )

    def __post_init__(self) -> None:
        if self.data_dir is None:
            return
        for role in ROLES:
            folder = Path(self.data_dir) / role
            if getattr(self, role) is None and folder.is_dir():
                setattr(self, role, str(folder))
        if self.labeled is None:
            raise ValueError(
                f"--data_dir {self.data_dir}: no folder labeled/ in it; make labeled/<class>/ with some images."
            )


class TimeLimit(TrainerCallback):
    """Ends training with a checkpoint, from which it can go on, at the first log after `minutes` of wall time.

    Which images a step sees and which learning rate it has still follow from its number alone: a run that is cut short
    is the beginning of the whole one. Looked at on steps that are logged, as these wait for the device anyway.

    Args:
        minutes: Counted from here on.
    """

    def __init__(self, minutes: float) -> None:
        if minutes <= 0:
            raise ValueError(f"time_limit is {minutes}: give minutes above 0, or none for no limit.")
        self.minutes, self._end = minutes, time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log or state.global_step >= state.max_steps:
            return
        late = torch.tensor(float(time.monotonic() >= self._end), device=args.device)
        if all_reduce_mean(late).item() > 0:  # processes have clocks of their own, and must stop at one step
            control.should_save = control.should_training_stop = True
            logger.warning(
                "Stopped after %d of %d steps by time_limit (%g minutes): resume_from_checkpoint goes on from here.",
                state.global_step,
                state.max_steps,
                self.minutes,
            )


def flags_by_class(*types: type) -> dict[type, list[dataclasses.Field[Any]]]:
    """The fields of dataclasses that become flags, under the class that defines each: special ones before general."""
    return {
        cls: [f for f in fields(t) if f.init and _owner(t, f.name) is cls]
        for t in types
        for cls in t.__mro__
        if dataclasses.is_dataclass(cls)
    }


def _owner(cls: type, name: str) -> type:
    return next(each for each in cls.__mro__ if name in inspect.get_annotations(each))


def first_paragraph(cls: type) -> str:
    """What a class says of itself, in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the lines of the description stay as they are."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The flag once, though `--with-hyphens` will do, too."""
        flag = next(option for option in action.option_strings if option.startswith("--"))
        return f"{flag} {self._format_args(action, 'VALUE')}".rstrip()


class _Parser(HfArgumentParser):
    """Raises a ValueError instead of printing every flag there is, and reads `none` where a value is optional."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        if settings.get("default") is None and settings.get("type", str) is not str:
            settings["type"] = _or_none(settings["type"])
            if "choices" in settings:
                settings["choices"] = [*settings["choices"], None]
        return super().add_argument(*flags, **settings)

    def format_help(self) -> str:
        """Every flag beside those of its class; in upstream's list 200 of them follow one another."""
        formatter = self._get_formatter()
        actions = {
            action.dest: action for action in reversed(self._actions)
        }  # of --nesterov and --no_nesterov the first
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.add_arguments([actions["help"], actions["config"]])
        for cls, members in flags_by_class(*self.dataclass_types).items():
            formatter.start_section(cls.__name__)
            formatter.add_text(textwrap.fill(first_paragraph(cls), 100))
            formatter.add_arguments([actions[f.name] for f in members])
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}.")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # argparse names it in errors
    return read


def parse_recipe(
    *types: type,
    config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file and the command line; a flag overrides the file.

    Args:
        types: Dataclasses whose fields become flags. `--name none` unsets what the file sets.
        config: The YAML file to read where `--config` names none: one `name: value` a line, as on the command line.
        arguments: The command line; default `sys.argv[1:]`.
        description: What `--help` says first.
        prog: What it calls the command; default: the script.

    Raises:
        ValueError: The file can't be read, a key or flag is unknown, or a value is none of its type.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default=config, help="YAML file with defaults for all flags")
    chosen, flags = early.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    parser = _Parser(
        types,
        prog=prog,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description=description,
        parents=[early],
        formatter_class=_Help,
        allow_abbrev=False,
    )
    known = [f.name for t in types for f in fields(t) if f.init]
    if chosen.config is not None:
        plain, structured = _read_yaml(Path(chosen.config), known)
        parser.set_defaults(**plain, **structured)
        flags = [*(f"--{name}={word}" for name, word in plain.items()), *flags]  # read and checked as flags are
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        args=flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(f"Unknown argument {unknown[0]}.{near_misses(name, known)} --help lists all.")
    return tuple(parsed)


def _read_yaml(path: Path, known: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The settings of a file: plain ones as the words of a flag; lists and dictionaries as such."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        words = yaml.load(text, yaml.BaseLoader)  # every value as it is written: `no` is no boolean, 1e-3 is a number
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} can't be read ({error}): check the path and the file.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: write one `name: value` a line.")
    for key in values:
        if key not in known:
            raise ValueError(f"--config {path}: unknown key {key!r}.{near_misses(str(key), known)}")
    structured = {key: value for key, value in values.items() if isinstance(value, (list, dict))}
    plain = {key: words[key] for key, value in values.items() if value is not None and key not in structured}
    return plain, structured


def load_splits(recipe: RecipeArguments) -> dict[str, datasets.Dataset]:
    """The splits that the command line names, by role.

    Raises:
        ValueError: No labeled split is given, or one can't be read.
    """
    if recipe.labeled is None:
        raise ValueError("--labeled is missing: name the labeled images, a folder, parquet files or a Hub data set.")
    sources = {role: getattr(recipe, role) for role in ROLES}
    return {role: load_split(source, role=role) for role, source in sources.items() if source is not None}


def build_trainer(
    recipe: RecipeArguments, args: CCSSLTrainingArguments
) -> tuple[CCSSLTrainer, dict[str, datasets.Dataset]]:
    """Loads the data and builds the network: all that can go wrong before training does so here.

    Args:
        recipe: The data and the backbone. Without a validation split nothing is evaluated during training.
        args: The run.

    Returns:
        The trainer, and the splits by role.

    Raises:
        ValueError: What was given can't be trained on; the sentence names the fix.
    """
    splits = load_splits(recipe)
    if "validation" not in splits:
        args = dataclasses.replace(args, eval_strategy="no")  # type: ignore[call-arg]  # a field of transformers
    set_seed(args.seed)  # the trainer does so too late for the network's initial weights
    trainer = CCSSLTrainer(
        _build_model(recipe, splits["labeled"], args),
        args,
        train_dataset=splits["labeled"],
        unlabeled_dataset=splits.get("unlabeled"),
        eval_dataset=splits.get("validation"),
    )
    # What the card says of them: a Hub data set by its id, a folder by its name.
    trainer.dataset_names = {role: getattr(recipe, role).split(":")[0] for role in splits}
    if recipe.pretrained:
        trainer.base_model = get_pretrained_cfg(recipe.backbone).hf_hub_id or recipe.backbone
    elif recipe.model is not None:
        trainer.base_model = recipe.model
    return trainer, splits


def _build_model(
    recipe: RecipeArguments, labeled: datasets.Dataset, args: CCSSLTrainingArguments
) -> CCSSLForImageClassification:
    if recipe.model is None:
        return CCSSLForImageClassification.from_timm(
            recipe.backbone,
            labels=read_class_names(labeled, args.label_column),
            pretrained=recipe.pretrained,
            image_size=recipe.image_size,
        )
    if recipe.pretrained or recipe.image_size is not None:
        raise ValueError(
            f"--model {recipe.model} has weights and an image size of its own: leave out --pretrained and --image_size."
        )
    return CCSSLForImageClassification.from_pretrained(recipe.model)


def train(trainer: CCSSLTrainer, splits: dict[str, datasets.Dataset]) -> None:
    """Trains, from a checkpoint where `args.resume_from_checkpoint` names one, evaluates, saves and publishes.

    Args:
        trainer: From `build_trainer`.
        splits: Likewise; the published weights are evaluated on `validation` and `test`, where there are such.
    """
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_metrics("train", {**result.metrics, "train_steps": result.global_step})
    for role in ("validation", "test"):
        if role in splits:
            metrics = trainer.evaluate(splits[role], metric_key_prefix=role)
            trainer.log_metrics(role, metrics)
            trainer.save_metrics(role, metrics)
    trainer.save_model()  # with its card, and to the Hub with push_to_hub
    if trainer.is_world_process_zero():
        print(f"Step {trainer.state.global_step}: model, card and metrics are in {trainer.args.output_dir}.")
