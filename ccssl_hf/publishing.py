"""Saving, the card and the Hub: what leaves a run is plain files, and never a pickle or a token."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from .card.facts import run_facts, run_pictures
from .card.model_card import render_card
from .hub import plan_push, upload

logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """The part of `CCSSLTrainer` that publishes.

    Upstream's own writes `training_args.bin`, which holds the Hub token in clear, and uploads all that lies in
    `output_dir`.
    """

    push_in_progress: PushInProgress | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The plain folder and its card; checkpoints of a run go without the card. Pushes where `args.push_to_hub`.

        Call it in every process: the main one writes, but all have a part in BatchNorm's statistics.
        """
        super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            self.create_model_card(folder=output_dir)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(  # upstream's other arguments describe what the card knows by itself
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: list[str] | None = None,
        limits: str | None = None,
        folder: str | None = None,
    ) -> None:
        """Write README.md and its pictures into `folder`, by default `args.output_dir`.

        An error is logged: no run is lost to its card. Results and pictures are of what was evaluated last on each
        split. A card that is there is written anew; `ccssl-hf report` keeps what was written into one by hand.

        Args:
            model_name: Hub id, or a title.
            license: The Hub's identifier, such as `apache-2.0`.
            tags: Further tags.
            limits: Known limits of this model, in words.
            folder: Where to write.
        """
        if not self.is_world_process_zero():
            return
        folder = folder or str(self.args.output_dir)
        try:
            facts = run_facts(self, model_name or self.hub_model_id or Path(folder).name)
            pictures = run_pictures(self, Path(folder))
            card = render_card(replace(facts, pictures=pictures, license=license, limits=limits))
            card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *(tags or [])]))
            card.save(Path(folder) / "README.md")
        except Exception:
            logger.exception("The model card could not be written; the model is saved. Call create_model_card again.")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        with_head: bool = False,
        **card: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves and uploads the plain folder and its card. Call it in every process.

        An error in the upload loses nothing: all is saved by then, and `ccssl-hf push` or another call sends it.

        Args:
            commit_message, blocking, token, revision, private: As in `transformers.Trainer`.
            with_head: Whether to upload the projection head and further heads, too.
            **card: Arguments of `create_model_card`.
        """
        self.save_model(_internal_call=True)
        if private is not None:
            self.args.hub_private_repo = private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        files = plan_push(str(self.args.output_dir), with_head=with_head).files
        return self._upload(files, commit_message, blocking=blocking, token=token, revision=revision)

    def _upload(
        self,
        files: Mapping[str, Path],
        message: str | None,
        *,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> Any:
        """Uploads, in the background where not `blocking`, and ends with a call of `then`."""

        def work() -> CommitInfo:
            try:
                return upload(
                    files,
                    str(self.hub_model_id),
                    message=message,
                    private=self.args.hub_private_repo,
                    revision=revision or self.args.hub_revision,
                    token=token or self.args.hub_token,
                )
            finally:
                then()

        return work() if blocking else run_as_future(work)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint in the background, as `hub_strategy` has it.

        Upstream's also writes and uploads `training_args.bin`.
        """
        args, going_on = self.args, self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if going_on is not None and going_on.is_done():
            self._finish_current_push()
            going_on = None
        if going_on is not None and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        files = plan_push(checkpoint_folder).files
        if args.hub_strategy != HubStrategy.EVERY_SAVE:
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            state = plan_push(checkpoint_folder, with_head=True, with_training_state=True).files
            files |= {f"{name}/{path}": file for path, file in state.items()}
        held = tempfile.TemporaryDirectory(prefix="_push-", dir=str(args.output_dir))
        job = self._upload(
            _hold(files, Path(held.name)),
            f"Training in progress, step {self.state.global_step}",
            blocking=False,
            then=held.cleanup,
        )
        self.push_in_progress = PushInProgress([*(going_on.jobs if going_on else []), job])

    def _finish_current_push(self) -> None:
        """Waits for uploads of checkpoints. One that failed is logged: the checkpoint is here, and training goes on."""
        super()._finish_current_push()
        for job in self.push_in_progress.jobs if self.push_in_progress else []:
            if error := job.exception():
                logger.warning("A checkpoint was not pushed: %s", error)
        self.push_in_progress = None


def _hold(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The same files in a folder of their own, where they stay as they are while the run deletes old checkpoints."""
    held = {path: folder / path for path in files}
    for path, copy in held.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[path], copy)
        except OSError:  # a file system without links
            shutil.copy(files[path], copy)
    return held
