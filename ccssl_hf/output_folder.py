"""One run at a time in an output folder, and what an earlier run left there."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .checkpoint import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from .distributed import on_main_process
from .errors import UserError, in_lines
from .resume import MANIFEST, STATE_FILES, checkpoints, choose_checkpoint

try:
    import fcntl
except ModuleNotFoundError:  # Windows: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "_run.lock"
# What a finished run leaves beside its checkpoints, and `overwrite` removes.
LEFT_BY_A_RUN = (
    *(WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE, "README.md", "wide_resnet_cifar.py", TRAINER_STATE_NAME),
    *("*_results.json", "onnx/*.onnx"),
)


@contextmanager
def one_run_in(folder: str, *, resume: str | bool | None, overwrite: bool) -> Iterator[str | None]:
    """Keeps other runs out of a folder, and yields the checkpoint to resume from, if any. Every process must enter it.

    Raises ValueError if a run is alive in the folder, if it holds the results of an earlier run and this one neither
    resumes nor overwrites, or if there is no such checkpoint.
    """
    named = {"true": True, "false": None, "none": None}  # the command line passes text
    wanted = named.get(str(resume).lower(), resume)
    with ExitStack() as held:

        def enter() -> str | None:
            held.enter_context(_lock(Path(folder)))
            chosen = choose_checkpoint(folder, wanted) if wanted else None
            if chosen is None or Path(chosen).resolve().parent != Path(folder).resolve():
                _clear(Path(folder), overwrite=overwrite)
            return chosen

        yield on_main_process(enter)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends."""
    path = folder / LOCK
    if fcntl is None:
        yield
        return
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = path.read_text(errors="replace").strip()
            file.close()
            raise UserError(
                f"Another run ({owner}) is writing to output_dir {folder}: wait for its end, or choose another folder."
            ) from error
        except OSError:  # a file system without locks
            break
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the other run ended between the two calls, and removed the file
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # another error is on its way if the folder is gone
                path.unlink()


def _clear(folder: Path, *, overwrite: bool) -> None:
    """Removes what an earlier run left: with `overwrite` everything, else only checkpoints that were never finished."""
    found = checkpoints(folder)
    kept = [path for path in found if (path / TRAINER_STATE_NAME).is_file() or _has_other_files(path)]
    model = [path for path in (folder / WEIGHTS_FILE,) if path.is_file()]
    if (kept or model) and not overwrite:
        raise UserError(
            f"output_dir {folder} has results of an earlier run: resume it with resume_from_checkpoint=True, choose "
            "another output_dir, or set overwrite=True to delete them."
            + in_lines(path.name for path in [*kept, *model])
        )
    if kept or model:
        found += sorted(path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern))
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if found:
        names = in_lines(str(path.relative_to(folder)) for path in found)
        logger.warning("Removed from %s, left by an earlier run:%s", folder, names)


def _has_other_files(checkpoint: Path) -> bool:
    """Whether a folder `checkpoint-N` holds files that no run of this package writes there."""
    patterns = (*STATE_FILES, MANIFEST, *LEFT_BY_A_RUN, "_*.partial")
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()]
    return any(not any(fnmatch(name, pattern) for pattern in patterns) for name in names)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless files can be written to `folder`. Creates it if it does not exist."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"The folder {folder} cannot be written to ({error.strerror})"
        raise ValueError(f"{problem}: choose another folder.") from error
