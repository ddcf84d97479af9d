"""Uploads to the Hub: an allow-list of files, in one commit, without tokens and local paths.

Other files stay: `training_args.bin` contains the Hub token, logs and metrics contain local paths, and a user may keep
anything else beside a model.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import wide_resnet_cifar
from .checkpoint import CONFIG_FILE, HEAD_FILE, TRAINING_STATE, WEIGHTS_FILE
from .errors import summary

CARD_FILE = "README.md"
PLAIN_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CARD_FILE,
    Path(wide_resnet_cifar.__file__).name,
    "preprocessor_config.json",
    "handler.py",
    "requirements.txt",
    "onnx/*.onnx",
)
"""Files of a published model, other than the pictures of its card."""

TRAINING_FILES = (TRAINING_STATE, OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, "rng_state*.pth", TRAINER_STATE_NAME)
"""Files of the training state, from which a run resumes."""

HEADS, STATE = "heads, for further training", "training state"
"""Why a file is left out that can be uploaded on request."""

PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".webp", ".gif")
TEXTS = (".json", ".md", ".py", ".txt")

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SHOWN = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img[^>]*?\ssrc=["']([^"']+)""")


@dataclass(frozen=True)
class PushPlan:
    """The files that a push of a folder uploads (path in the repository to file), and why others are left out."""

    files: dict[str, Path]
    left: dict[str, str]


def plan_push(folder: str | Path, *, with_head: bool = False, with_training_state: bool = False) -> PushPlan:
    """Which files of a folder are uploaded. Nothing is uploaded yet, and the network is not used.

    Args:
        folder: A run's output folder, a checkpoint, or a folder from `save_pretrained`.
        with_head: Whether to upload the projection head and the algorithm's heads.
        with_training_state: Whether to upload the training state, here and in the folders `checkpoint-N`.

    Raises:
        FileNotFoundError: The folder has no model.
    """
    folder = Path(folder)
    exported = any(folder.glob("onnx/*.onnx"))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file() and not (name == WEIGHTS_FILE and exported):
            raise FileNotFoundError(f"'{folder}' has no {name}: pass a folder from save_model or export.")
    card = folder / CARD_FILE
    pictures = set(_pictures(card.read_text(encoding="utf-8"))) if card.is_file() else set()
    here = (*PLAIN_FILES, *([HEAD_FILE] if with_head else []), *(TRAINING_FILES if with_training_state else []))
    in_checkpoint = (*PLAIN_FILES, HEAD_FILE, *TRAINING_FILES)  # its state does not fit a model without the heads
    files = {}
    left = {name: f"{CARD_FILE} shows it, but the file is missing" for name in sorted(pictures)}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        left.pop(name, None)
        top, _, rest = name.partition("/")
        is_checkpoint = rest != "" and top.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        allowed = name in pictures or _listed(name, here)
        if allowed or (is_checkpoint and with_training_state and _listed(rest, in_checkpoint)):
            files[name] = path
        else:
            left[name] = _why_not(name, is_checkpoint)
    uploaded = {name.split("/")[0] for name in files}
    folded: dict[str, str] = {}  # one entry for a folder of which nothing is uploaded
    for name, reason in left.items():
        top, slash, _ = name.partition("/")
        folded.setdefault(f"{top}/" if slash and top not in uploaded else name, reason)
    return PushPlan(files, folded)


def _listed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _pictures(card: str) -> Iterator[str]:
    """The pictures in the folder that a card shows, by their path in it."""
    for match in _SHOWN.finditer(card):
        path = PurePosixPath(unquote(match[1] or match[2]))
        inside = ":" not in str(path) and not path.is_absolute() and ".." not in path.parts
        if inside and path.suffix.lower() in PICTURES:
            yield str(path)


def _why_not(name: str, is_checkpoint: bool) -> str:
    last = PurePosixPath(name).name
    if last == TRAINING_ARGS_NAME:
        return "contains the Hub token"
    if last == HEAD_FILE and not is_checkpoint:
        return HEADS
    if is_checkpoint or _listed(last, TRAINING_FILES):
        return STATE
    return "not part of a published model"


def check_texts(files: Mapping[str, Path]) -> None:
    """Check all text files of a push for tokens and local paths.

    Raises:
        ValueError: A line contains an access token, or a path below the user's home, the working folder, or the folder
            that is pushed.
    """
    private = {Path.home(), Path.cwd(), *(path.absolute().parent for path in files.values())}
    paths = "|".join(re.escape(str(path)) for path in private if len(path.parts) > 1)
    local = re.compile(rf"(?<![\w.~-])(?:{paths})(?![\w.-])") if paths else None
    for name, path in files.items():
        if path.suffix not in TEXTS:
            continue
        for number, line in enumerate(_content(path).decode(errors="replace").splitlines(), 1):
            if token := _TOKEN.search(line):
                raise ValueError(
                    f"{name}, line {number}, contains an access token ({token[0][:6]}…): remove it, and revoke it at "
                    "https://huggingface.co/settings/tokens if others may have seen it."
                )
            if local and (found := local.search(line)):
                raise ValueError(
                    f"{name}, line {number}, contains a local path ({found[0]}): remove it, or make it relative."
                )


def _content(path: Path) -> bytes:
    """A file as it is uploaded: in the trainer's state, the best checkpoint has its name without its folder."""
    if path.name != TRAINER_STATE_NAME:
        return path.read_bytes()
    state = json.loads(path.read_text(encoding="utf-8"))
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(best).name
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()


def check_card(card: Path) -> None:
    """Validate a card by the Hub's own check.

    Raises:
        ValueError: The Hub refuses the card.
    """
    try:
        ModelCard.load(card).validate()
    except HfHubHTTPError:
        raise  # some of them are ValueErrors, too
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{card.name} has metadata that the Hub refuses ({summary(error)}): correct the lines between the lines of "
            "---, or call create_model_card."
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
    """Upload files in one commit. If it fails, nothing is committed, and another call uploads only what is missing.

    Heads in the repository are deleted if the weights change and no heads are uploaded: they would not fit.

    Args:
        files: Path in the repository to the file here, from `plan_push`.
        repo_id: `user/name`, or the name alone. It is created if it is missing.
        message: Message of the commit.
        private: Whether to create a missing repository as private; None for the default of the user or organization.
        revision: A branch, created from main if it is missing, or `refs/pr/N` for a pull request; default main.
        create_pr: Whether to open a pull request instead of a commit to the branch.
        token: Default: the token of `hf auth login` or HF_TOKEN.

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
            check_card(files[CARD_FILE])
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or leave out private.")
        if revision and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(name, _content(path) if path.name == TRAINER_STATE_NAME else path)
            for name, path in files.items()
        ]
        return api.create_commit(
            repo_id,
            [*operations, *_stale_heads(api, repo_id, revision, operations)],
            commit_message=message or "Upload model",
            revision=revision,
            create_pr=create_pr,
        )
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision '{revision}': use a branch or an open pull request.") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub refuses the push to {repo_id} ({summary(error)}): check the name, and whether the account of "
                "`hf auth whoami` may write there."
            ) from error
        raise _failed(repo_id, error) from error
    except (OSError, RuntimeError, HTTPError) as error:  # the client raises RuntimeError where an upload failed
        raise _failed(repo_id, error.__cause__ or error) from error


def _failed(repo_id: str, error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"The push to {repo_id} failed ({summary(error)}). Nothing was committed, and nothing changed here: push again "
        "to upload what is missing."
    )


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError if this is not a valid name on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"'{repo_id}' is not a Hub id: use USER/REPO with letters, digits, '-', '_' and '.'."
        ) from error


def _stale_heads(
    api: HfApi, repo_id: str, revision: str | None, operations: list[CommitOperationAdd]
) -> list[CommitOperationDelete]:
    new = {operation.path_in_repo: operation for operation in operations}
    if HEAD_FILE in new or WEIGHTS_FILE not in new:
        return []
    there = {file.path: file for file in api.get_paths_info(repo_id, [WEIGHTS_FILE, HEAD_FILE], revision=revision)}
    if HEAD_FILE not in there:
        return []
    weights = getattr(there.get(WEIGHTS_FILE), "lfs", None)
    same = weights is not None and weights.sha256 == new[WEIGHTS_FILE].upload_info.sha256.hex()
    return [] if same else [CommitOperationDelete(HEAD_FILE)]
