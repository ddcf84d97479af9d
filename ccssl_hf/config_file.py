"""Reads `config.json` and the heads of a published folder, which anyone may have written.

Only known entries are used, and their values are checked against the weights before a network is built.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from . import backbones
from .checkpoint import CONFIG_FILE, WEIGHTS_FILE
from .errors import listed
from .escape import short

MAX_BYTES = 32 << 20  # of config.json; the 21,000 class names of ImageNet take 1 MB
MAX_INTEGER = 100_000  # in model_args
MAX_BUFFERS = 1 << 28  # elements of tables that a network computes for its input size, 1 GiB

_FLOATS, _INTEGERS = {"F16", "BF16", "F32", "F64"}, {"I64", "I32", "U8", "BOOL"}
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def _is_int(value: Any, most: int = MAX_INTEGER) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_INTEGER


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value of model_args is a number, a short name (no path or URL), or a short list or mapping of these."""
    if isinstance(value, (list, dict)) and depth < 4:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return len(items) <= 1000 and all(_plain(item, depth + 1) for item in items)
    return value is None or type(value) is bool or _is_number(value) or backbones.is_name(value)


def read_config(folder: Path) -> dict[str, Any]:
    """The checked entries of `config.json`: architecture, num_classes, label_names, model_args, pretrained_cfg, ...

    Raises:
        FileNotFoundError: The folder has no such file, or no weights.
        ValueError: The file is damaged. Names each entry that is missing, wrong, or does not fit the weights.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no {CONFIG_FILE}: pass a folder that save_pretrained wrote, or a Hub id 'user/name'."
        )
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"'{path}' has more than {MAX_BYTES >> 20} MiB and cannot be the configuration of a model.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({error}): save or download the folder again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__} and not an object: save the folder again.")
    config, problems = _checked(content)
    rows = max((shape[0] for shape, _ in tensors_in(folder / WEIGHTS_FILE).values() if shape), default=0)
    if not problems and config["num_classes"] > rows:
        problems = [f"num_classes is {config['num_classes']}, but no tensor of the weights has more than {rows} rows"]
    if problems:
        raise ValueError(
            f"'{path}' can't be used: {listed(problems, separator='; ')}. Save the folder again, or correct it."
        )
    return config


def _checked(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The known entries, and what is wrong with them."""
    name, labels = content.get("architecture"), content.get("label_names")
    unusable = _architecture_problems(name)
    problems = unusable + ([] if labels is None else _label_problems(labels))
    known = len(labels) if isinstance(labels, list) else None
    num_classes, problem_type = content.get("num_classes", known), content.get("problem_type")
    if not _is_int(num_classes, MAX_BYTES):
        problems.append(f"num_classes is {short(num_classes)}, not a number of classes")
    elif known not in (None, num_classes):
        problems.append(f"label_names has {known:,} names for num_classes {num_classes:,}")
    if problem_type not in (None, *_PROBLEMS):
        problems.append(f"problem_type is {short(problem_type)}, not one of {', '.join(_PROBLEMS)}")

    arguments, entries = content.get("model_args") or {}, content.get("pretrained_cfg") or {}
    for key, value in (("model_args", arguments), ("pretrained_cfg", entries)):
        if not isinstance(value, dict):
            problems.append(f"{key} is {short(value)}, not an object")
            arguments, entries = {}, {}
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}  # timm writes it there
    entries = {key: entries[key] for key in backbones.INPUT if entries.get(key) is not None}
    strange = [key for key, value in arguments.items() if not _plain(value)]
    problems += [f"model_args.{key} is {short(arguments[key])}, not a number or short name" for key in strange]
    if isinstance(name, str) and not unusable:
        problems += backbones.unknown_arguments(name, arguments)
    problems += [f"pretrained_cfg.{problem}" for problem in backbones.input_problems(entries)]
    checked = dict(model_args=arguments, pretrained_cfg=entries or None, problem_type=problem_type)
    return dict(architecture=name, num_classes=num_classes, label_names=labels, **checked), problems


def _architecture_problems(name: Any) -> list[str]:
    if not isinstance(name, str):
        return [f"architecture is {short(name)}, not the name of a timm model"]
    try:
        backbones.check_backbone(name)
    except ValueError as error:
        return [str(error).rstrip(".")]
    return []


def _label_problems(labels: Any) -> list[str]:
    if not isinstance(labels, list) or not labels:
        return [f"label_names is {short(labels)}, not a list of names"]
    if strange := [short(label) for label in labels if not is_text(label)]:
        return [f"label_names has {listed(strange)}, which are no names"]
    repeated = [repr(label) for label, number in Counter(labels).items() if number > 1]
    return [f"label_names repeats {listed(repeated)}"] if repeated else []


def is_text(label: Any) -> bool:
    """Whether a class name is text that files can hold; names of damaged files can have parts of characters."""
    return isinstance(label, str) and re.search("[\ud800-\udfff]", label) is None


def read_heads(path: Path) -> dict[str, Any]:
    """`projection_dim` and `heads` of a file of heads. Raises ValueError if they are damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["ccssl"])
        heads, size = content["heads"], content["projection_dim"]
        if not _is_int(size) or not isinstance(heads, dict) or len(heads) > 100:
            raise ValueError("projection_dim or heads is wrong")
        for name, layers in heads.items():
            plain = isinstance(layers, list) and 0 < len(layers) <= 100
            if not (name.isidentifier() and plain and all(map(backbones.is_layer, layers))):
                raise ValueError(f"head {short(name)} is no list of layers")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"'{path}' is damaged ({reason}): delete it, or save the folder again.") from error
    return {"projection_dim": size, "heads": heads}


def tensors_in(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of the tensors in a safetensors file by name, without reading them."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}': check the folder, or save to it first.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (each.get_shape(), each.get_dtype()) for key, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): use an earlier checkpoint, or download it again.") from error


@contextmanager
def few_parameters(tensors: int) -> Iterator[None]:
    """Raises a ValueError as soon as a network in this block has far more parameters than there are tensors."""
    thread, number = threading.get_ident(), count(1)

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if threading.get_ident() == thread and next(number) > 2 * tensors + 1000:
            raise ValueError(f"the network has many more parameters than the {tensors} tensors of the weights")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def check_fit(model: nn.Module, tensors: Mapping[str, tuple[Sequence[int], str]], *, partial: bool, what: str) -> None:
    """Raises a ValueError unless the tensors of files fit a model on the meta device; `partial`: its backbone only."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith("backbone.") or not partial}
    if other := sorted(tensors.keys() ^ own.keys()):
        raise ValueError(f"{what}: {len(other)} keys differ ({listed(other)}). Save the folder again.")
    wrong = []
    for key, (shape, dtype) in tensors.items():
        if list(own[key].shape) != list(shape):
            wrong.append(f"{key} is {list(shape)} and not {list(own[key].shape)}")
        elif dtype not in (_FLOATS if own[key].is_floating_point() else _INTEGERS):
            wrong.append(f"{key} is stored as {dtype}")
    if wrong:
        raise ValueError(f"{what}: {listed(wrong, separator='; ')}. Save the folder again.")
    if (elements := sum(buffer.numel() for buffer in model.buffers())) > MAX_BUFFERS:
        raise ValueError(f"{what}: its tables for this input size have {elements:,} numbers. Use a smaller input_size.")
