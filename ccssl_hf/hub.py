"""Uploads to the Hub: an allow-list of files, in one commit, without tokens and local paths."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, run_as_future
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_token, validate_repo_id
from PIL import Image
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from . import wide_resnet_cifar
from .checkpoint import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, check_finite, load_tensors
from .errors import listed, summary
from .record import PICTURES
from .resume import MANIFEST, STATE_FILES, portable_state
from .standalone import standalone

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_BACKBONE = Path(wide_resnet_cifar.__file__)
# Files of a published model, besides the pictures of its card. Others may have the Hub token or local paths.
PLAIN_FILES = (
    *(CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, _BACKBONE.name, "preprocessor_config.json"),
    *("handler.py", "requirements.txt", "onnx/*.onnx"),
)
TRAINING_FILES = (*STATE_FILES, MANIFEST)
HEADS, STATE = "heads, for further training", "training state"  # why a file is left out unless asked for
_MISSING = "the file is missing"

MAX_TEXT_MB = 5  # of a card and of code

_SHOWN = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img[^>]*?\ssrc=["']([^"']+)""")
_SECRETS = {
    "an access token": r"\b(?:hf_|api_org_|gh[pousr]_)[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"://[^\s/:@\"'<>]+:[^\s/@\"'<>]+@",
}


class PushPlan(NamedTuple):
    """The files that a push of a folder uploads (path in the repository to file), and why others are left out."""

    files: dict[str, Path]
    left: dict[str, str]


def plan_push(folder: str | Path, *, with_head: bool = False, with_training_state: bool = False) -> PushPlan:
    """Which files of a run's folder, a checkpoint or a saved model are uploaded. Nothing is uploaded yet.

    The heads are the projection head and those of the algorithm; the training state includes folders `checkpoint-N`. Of
    the pictures that the card shows, those that this package draws are uploaded.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: A file to upload is a link that leads out of the folder, or is no regular file.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        exported = name == WEIGHTS_FILE and any(folder.glob("onnx/*.onnx"))
        if not (folder / name).is_file() and not exported:
            raise FileNotFoundError(f"'{folder}' has no {name}: pass a folder from save_model or export.")
    for name in (WEIGHTS_FILE, *([HEAD_FILE] if with_head else [])):
        tensors: dict[str, Tensor] = {}
        with suppress(ValueError, FileNotFoundError):  # a damaged file, or none beside an export
            tensors = load_tensors(folder / name)
        check_finite(tensors, f"'{folder / name}'")
    foreign = "only pictures that ccssl-hf drew are uploaded"
    reasons = {name: why_not_pushed(folder, name) for name in sorted(_pictures(folder / CARD_FILE))}
    reasons = {name: why if name in PICTURES or why == _MISSING else foreign for name, why in reasons.items()}
    drawn = [name for name, reason in reasons.items() if reason is None]
    patterns = [*PLAIN_FILES, *drawn, *([HEAD_FILE] if with_head else [])]
    if with_training_state:  # a checkpoint's state does not fit a model without the heads
        state = [f"{PREFIX_CHECKPOINT_DIR}-*/{name}" for name in (*PLAIN_FILES, HEAD_FILE, *TRAINING_FILES)]
        patterns += [*TRAINING_FILES, *state]
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()})
    files = {path.relative_to(folder).as_posix(): path for path in found}
    refused = {name: reason for name in files if (reason := why_not_pushed(folder, name))}
    if refused:
        problems = listed([f"{name}: {reason}" for name, reason in refused.items()], separator="; ")
        raise ValueError(f"'{folder}' can't be pushed ({problems}): replace them by files of the folder.")
    if other := [name for name in files if not _is_own_code(name.rpartition("/")[2], files[name])]:
        logger.warning(
            "%s: not as this version of ccssl-hf writes it. Others may run it: read it, or export the model again, "
            "before you push '%s'.",
            listed(other),
            folder,
        )
    left = {name: f"{CARD_FILE} shows it, but {reason}" for name, reason in reasons.items() if reason}
    folders = {name.split("/")[0] for name in files}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in files and name not in left:
            top, slash, _ = name.partition("/")  # one entry for a folder of which nothing is uploaded
            left.setdefault(f"{top}/" if slash and top not in folders else name, _why_not(name))
    return PushPlan(files, left)


def why_not_pushed(folder: Path, name: str) -> str | None:
    """Why a file must not leave the machine: it lies elsewhere, is no regular file, or is a picture that is no PNG.

    A folder in the Hub's cache has links to the blobs of its own repository.
    """
    path, root = folder / name, folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not os.path.lexists(path):
        return _MISSING
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # Python < 3.13 raises RuntimeError for links in a circle
        return "it is a broken link"
    if not (real.is_relative_to(root) or real.parent == blobs):
        return "it is a link that leads out of the folder"
    if not real.is_file():
        return "it is no regular file"
    if name in PICTURES:
        if real not in (root / name, blobs / real.name):
            return "it is a link"
        try:
            with Image.open(real, formats=["PNG"]) as image:
                image.verify()
        except Exception:  # Pillow raises nearly any type
            return "it is not a valid PNG"
    return None


def _is_own_code(name: str, path: Path) -> bool:
    """Whether a file that others may run or install is one that this package writes. True for all other files."""
    if name == "requirements.txt":
        return re.fullmatch(r"timm>=[\d.]+\n", path.read_text(encoding="utf-8", errors="replace")) is not None
    own = {"handler.py": Path(__file__).with_name("deploy") / name, _BACKBONE.name: _BACKBONE}
    return name not in own or path.read_bytes() == standalone(own[name]).encode()


def _pictures(card: Path) -> set[str]:
    """The pictures in its folder that a card shows."""
    small = card.is_file() and card.stat().st_size <= MAX_TEXT_MB * 1e6
    text = card.read_text(encoding="utf-8", errors="replace") if small else ""
    paths = [PurePosixPath(unquote(match[1] or match[2])) for match in _SHOWN.finditer(text)]
    inside = [path for path in paths if ":" not in str(path) and not path.is_absolute() and ".." not in path.parts]
    return {str(path) for path in inside if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".svg", ".webp", ".gif")}


def _why_not(name: str) -> str:
    path = PurePosixPath(name)
    in_checkpoint = len(path.parts) > 1 and name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    if path.name == TRAINING_ARGS_NAME:
        return "contains the Hub token"
    if path.name == HEAD_FILE and not in_checkpoint:
        return HEADS
    if in_checkpoint or any(path.match(pattern) for pattern in TRAINING_FILES):
        return STATE
    return "not part of a published model"


def check_texts(files: Mapping[str, Path]) -> None:
    """Raise a ValueError if a text contains a token, or a path in the user's home, the working or the pushed folder.

    Also if a card or code is larger than `MAX_TEXT_MB`.
    """
    private = {Path.home(), Path.cwd(), *(path.absolute().parent for path in files.values())}
    paths = "|".join(re.escape(str(path)) for path in private if len(path.parts) > 1)
    local = re.compile(rf"(?<![\w.~-])(?:{paths})(?![\w.-])" if paths else r"(?!)")
    for name, path in files.items():
        if path.suffix not in (".json", ".md", ".py", ".txt"):
            continue
        if path.suffix != ".json" and path.stat().st_size > MAX_TEXT_MB * 1e6:
            raise ValueError(
                f"{name} has {path.stat().st_size / 1e6:.1f} MB of text, at most {MAX_TEXT_MB}: shorten it."
            )
        for number, line in enumerate(_content(path).decode(errors="replace").splitlines(), 1):
            for kind, pattern in _SECRETS.items():
                if secret := re.search(pattern, line):
                    raise ValueError(
                        f"{name}, line {number}, contains {kind} ({secret[0][:6]}…): remove it, and revoke it if "
                        "others may have seen it (tokens of the Hub at https://huggingface.co/settings/tokens)."
                    )
            if found := local.search(line):
                raise ValueError(f"{name}, line {number}, contains a local path ({found[0]}): make it relative.")


def _content(path: Path) -> bytes:
    """A file as it is uploaded."""
    return portable_state(path) if path.name == TRAINER_STATE_NAME else path.read_bytes()


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError if this is not a valid name on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is not a Hub id: use USER/REPO of letters, digits, '-', '_' and '.'.") from error


def _check_card(card: Path) -> None:
    """Validate a card by the Hub's own check."""
    try:
        ModelCard.load(card).validate()
    except HfHubHTTPError:
        raise  # some of them are ValueErrors, too
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{card.name} has metadata that the Hub refuses ({summary(error)}): correct it between the lines of ---."
        ) from error


def upload(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload the files of a `plan_push` in one commit, or nothing. Another call uploads only what is missing.

    A missing repository is created, `private` or as is the default of its owner. `revision` is a branch, created from
    main if it is missing, or `refs/pr/N` for a pull request. Heads in the repository are deleted if the weights change
    and no heads are uploaded: they would not fit.

    Raises:
        ValueError: A text contains a token or local path, the Hub refuses the card, or the repository exists and is
            public although `private` is set.
        PermissionError: There is no token, or the Hub refuses it.
        ConnectionError: The Hub cannot be reached, or the connection broke.
    """
    check_texts(files)
    check_repo_id(repo_id)
    if not (token or get_token()):
        raise PermissionError("There is no access token: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    try:
        if CARD_FILE in files:
            _check_card(files[CARD_FILE])
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or leave out private.")
        if revision and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        contents = {name: _content(path) if path.name == TRAINER_STATE_NAME else path for name, path in files.items()}
        added = {name: CommitOperationAdd(name, content) for name, content in contents.items()}
        deleted = [CommitOperationDelete(HEAD_FILE)] if _has_stale_heads(api, repo_id, revision, added) else []
        return api.create_commit(
            repo_id,
            [*added.values(), *deleted],
            commit_message=message or "Upload model",
            revision=revision,
            create_pr=create_pr,
        )
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision '{revision}': use a branch or an open pull request.") from error
    except (HfHubHTTPError, OSError, RuntimeError, HTTPError) as error:  # the client raises RuntimeError, too
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub refuses the push to {repo_id} ({summary(error)}): check the name, and whether the account of "
                "`hf auth whoami` may write there."
            ) from error
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        raise ConnectionError(
            f"The push to {repo_id} failed ({summary(cause)}). Nothing was committed: push again to upload what is "
            "missing."
        ) from cause


def _has_stale_heads(api: HfApi, repo_id: str, revision: str | None, added: Mapping[str, CommitOperationAdd]) -> bool:
    if HEAD_FILE in added or WEIGHTS_FILE not in added:
        return False
    there = {file.path: file for file in api.get_paths_info(repo_id, [WEIGHTS_FILE, HEAD_FILE], revision=revision)}
    weights = getattr(there.get(WEIGHTS_FILE), "lfs", None)
    same = weights is not None and weights.sha256 == added[WEIGHTS_FILE].upload_info.sha256.hex()
    return HEAD_FILE in there and not same


def upload_checkpoint(folder: Path, repo_id: str, *, strategy: HubStrategy, **options: Any) -> Future[CommitInfo]:
    """`upload` the model of a checkpoint in the background, and its training state as `hub_strategy` asks."""
    files = plan_push(folder).files
    if strategy != HubStrategy.EVERY_SAVE:
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        state = plan_push(folder, with_head=True, with_training_state=True).files
        files |= {f"{name}/{path}": file for path, file in state.items()}
    kept = tempfile.TemporaryDirectory(prefix="_push-", dir=folder.parent)
    links = {name: Path(kept.name, name) for name in files}  # training may delete the files meanwhile
    for name, link in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[name], link)
        except OSError:  # a file system without links
            shutil.copy(files[name], link)

    def work() -> CommitInfo:
        with kept:
            return upload(links, repo_id, **options)

    return run_as_future(work)
