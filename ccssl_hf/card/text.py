"""Values as text and plain data for a card: names without local paths, table cells, durations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def without_folder(text: str) -> str:
    """The last part of an absolute or `./`-like path; any other text as it is."""
    local = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return _last_part(text) if local or text.startswith(("~", "./", "../")) else text


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def public_name(name: str) -> tuple[str, bool]:
    """The name of a dataset or model on the card, and whether it is a Hub id. A path is cut to its last part."""
    name = re.sub(r"^(hf[-_]hub|local-dir):", "", name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return _last_part(name), False
    if Path(name).exists() or Path(name).suffix in (".parquet", ".csv", ".json", ".zip"):
        return _last_part(name), False
    return name, True


def plain(value: Any) -> Any:
    """A setting as plain data for YAML, without the folders of paths."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        value = value.value
    if value is None or type(value) in (bool, int, float):
        return value
    return value.item() if hasattr(value, "item") else without_folder(str(value))


def cell(value: Any) -> str:
    """A value as a cell of a Markdown table, without the folders of paths."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        value = [f"{key}={cell(item)}" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    if value is None:
        return "none"
    return " ".join(without_folder(str(value)).split()).replace("|", "\\|").replace("<", "&lt;")


def duration(seconds: float) -> str:
    """Seconds as text, such as `1 h 6 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
