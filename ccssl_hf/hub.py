"""What goes to the Hub from a folder, and how: one commit of what is known to be public, all of it or nothing.

What may go is listed here by name, and all else stays: `training_args.bin` holds the Hub token in clear, logs and
metrics hold paths of this machine, and what a user keeps beside a model is none of ours.
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
from .checkpoint import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from .errors import summary
from .resume import TRAINING_STATE

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
"""What a published folder is made of, besides the pictures that its card shows."""

TRAINING_FILES = (TRAINING_STATE, OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, "rng_state*.pth", TRAINER_STATE_NAME)
"""What a run goes on from."""

PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".webp", ".gif")
TEXTS = (".json", ".md", ".py", ".txt")

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SHOWN = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)>\s]+)|<img[^>]*?\ssrc=["']([^"']+)""")


@dataclass(frozen=True)
class PushPlan:
    """What a push of a folder sends.

    Attributes:
        files: Path in the repository to the file here.
        left: What stays behind, and why.
    """

    files: dict[str, Path]
    left: dict[str, str]


def plan_push(folder: str | Path, *, with_head: bool = False, with_training_state: bool = False) -> PushPlan:
    """What goes to the Hub of a folder. Nothing is sent, and nothing asked of the network.

    Args:
        folder: A run's output folder, a checkpoint, or what `save_pretrained` wrote.
        with_head: Whether to send the projection head and further heads.
        with_training_state: Whether to send what a run goes on from: here and in the folders `checkpoint-N`.

    Raises:
        FileNotFoundError: It holds no model.
    """
    folder = Path(folder)
    for name, others in ((CONFIG_FILE, ""), (WEIGHTS_FILE, "onnx/*.onnx")):
        if not (folder / name).is_file() and not (others and any(folder.glob(others))):
            raise FileNotFoundError(f"'{folder}' has no {name}: give a folder that save_model or an export wrote.")
    card = folder / CARD_FILE
    pictures = set(_pictures(card.read_text(encoding="utf-8"))) if card.is_file() else set()
    here = (*PLAIN_FILES, *([HEAD_FILE] if with_head else []), *(TRAINING_FILES if with_training_state else []))
    # A checkpoint is whole with the heads only: without them, its state fits no model.
    below = (*PLAIN_FILES, HEAD_FILE, *TRAINING_FILES)
    files = {}
    left = {name: f"{CARD_FILE} shows it, but there is no such file" for name in sorted(pictures)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        left.pop(name, None)
        if not path.is_file():
            continue
        top, _, rest = name.partition("/")
        is_checkpoint = rest != "" and top.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        allowed = name in pictures or _listed(name, here)
        if allowed or (is_checkpoint and with_training_state and _listed(rest, below)):
            files[name] = path
        else:
            left[name] = _why_not(name, is_checkpoint)
    return PushPlan(files, _by_folder(left, files))


def _listed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _pictures(card: str) -> Iterator[str]:
    """The pictures of the folder that a card shows, by their path in it."""
    for match in _SHOWN.finditer(card):
        path = PurePosixPath(unquote(match[1] or match[2]))
        if (
            path.suffix.lower() in PICTURES
            and ":" not in str(path)
            and not path.is_absolute()
            and ".." not in path.parts
        ):
            yield str(path)


def _why_not(name: str, is_checkpoint: bool) -> str:
    last = PurePosixPath(name).name
    if last == TRAINING_ARGS_NAME:
        return "holds the Hub token in clear"
    if last == HEAD_FILE and not is_checkpoint:
        return "heads, for training on: --with-head sends them"
    if is_checkpoint or _listed(last, TRAINING_FILES):
        return "training state: --with-training-state sends it"
    return "not part of a published model"


def _by_folder(left: dict[str, str], files: Mapping[str, Path]) -> dict[str, str]:
    """One entry for a folder that stays whole."""
    sent = {path.split("/")[0] for path in files}
    folded: dict[str, str] = {}
    for name, reason in left.items():
        top, slash, _ = name.partition("/")
        folded.setdefault(f"{top}/" if slash and top not in sent else name, reason)
    return folded


def check_texts(files: Mapping[str, Path]) -> None:
    """Looks for what must not leave this machine in all text files of a push.

    Raises:
        ValueError: A line holds an access token, or a path of this machine: one below the user's home, the working
            folder, or the folder that is pushed. The sentence names file and line.
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
                    f"{name}, line {number}, holds an access token ({token[0][:6]}…): take it out, and revoke it at "
                    "https://huggingface.co/settings/tokens if others may have seen it."
                )
            if local and (found := local.search(line)):
                raise ValueError(
                    f"{name}, line {number}, holds a path of this machine ({found[0]}): take it out, or write it "
                    "relative to the folder."
                )


def _content(path: Path) -> bytes:
    """A file as it is sent; of the run's best checkpoint its name, and not where it lay here."""
    if path.name != TRAINER_STATE_NAME:
        return path.read_bytes()
    state = json.loads(path.read_text(encoding="utf-8"))
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(best).name
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()


def check_card(card: Path) -> None:
    """Asks the Hub whether it takes the card, by its client's own check.

    Raises:
        ValueError: It does not; the sentence says why.
    """
    try:
        ModelCard.load(card).validate()
    except HfHubHTTPError:
        raise  # some of them are ValueErrors, too
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{card.name} has metadata that the Hub does not take ({summary(error)}): mend what lies between its "
            "lines of ---, or have create_model_card write it anew."
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
    """Sends files in one commit. Whatever fails, the files here are as they were and no half of them is there.

    A second try sends only what is missing. Where the weights change and no heads come with them, heads that are there
    are deleted: they would belong to other weights.

    Args:
        files: Path in the repository to the file here, as of `plan_push`.
        repo_id: `user/name`, or the name alone. Made where it is missing.
        message: Of the commit.
        private: Whether to make a missing repository private; where None, as the organisation or user has set it.
        revision: A branch, made from main where it is missing, or a pull request's `refs/pr/N`; default main.
        create_pr: Whether to open a pull request instead of committing to the branch.
        token: Default: what `hf auth login` or HF_TOKEN set.

    Raises:
        ValueError: A text holds a token or local path, the Hub refuses the card, or the repository is there and is
            public though `private` was asked for. Nothing was sent.
        PermissionError: There is no token, or the Hub does not take it.
        ConnectionError: The Hub can't be reached, or broke off.
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
            raise ValueError(f"{repo_id} is there, and public: make it private in its settings, or leave out private.")
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
        raise ValueError(
            f"{repo_id} has no revision '{revision}': name a branch, or a pull request that is open."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub does not let you push to {repo_id} ({summary(error)}): check the name, and that "
                "`hf auth whoami` names an account with a token that may write there."
            ) from error
        raise _broke_off(repo_id, error) from error
    except (OSError, RuntimeError, HTTPError) as error:  # the client raises RuntimeError where an upload failed
        raise _broke_off(repo_id, error.__cause__ or error) from error


def _broke_off(repo_id: str, error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"The push to {repo_id} broke off ({summary(error)}). Nothing was committed and nothing here has changed: "
        "push again, and only what is missing is sent."
    )


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError where the Hub would not take this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is no Hub id: write USER/REPO, of letters, digits, '-', '_' and '.'.") from error


def _stale_heads(
    api: HfApi, repo_id: str, revision: str | None, operations: list[CommitOperationAdd]
) -> list[CommitOperationDelete]:
    sent = {operation.path_in_repo: operation for operation in operations}
    if HEAD_FILE in sent or WEIGHTS_FILE not in sent:
        return []
    there = {file.path: file for file in api.get_paths_info(repo_id, [WEIGHTS_FILE, HEAD_FILE], revision=revision)}
    if HEAD_FILE not in there:
        return []
    weights = getattr(there.get(WEIGHTS_FILE), "lfs", None)
    same = weights is not None and weights.sha256 == sent[WEIGHTS_FILE].upload_info.sha256.hex()
    return [] if same else [CommitOperationDelete(HEAD_FILE)]
