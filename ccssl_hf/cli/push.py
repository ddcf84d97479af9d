"""`ccssl-hf push`: upload a published folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from ..escape import printable

Folder = typer.Argument(metavar="FOLDER", help="Folder of a published model, from a run or from save_pretrained.")
Repository = typer.Argument(metavar="USER/REPO", help="Repository. It is created if it is missing.")
Revision = typer.Option(help="Branch, created if it is missing, or refs/pr/N for a pull request. Default: main.")
DryRun = typer.Option("--dry_run", help="List the files that would be uploaded, without using the network.")
WithHead = typer.Option("--with_head", help="Upload the projection head and the algorithm's heads, too.")
WithState = typer.Option("--with_training_state", help="Upload checkpoints and training state, to resume elsewhere.")


def push(
    folder: Annotated[Path, Folder],
    repo_id: Annotated[str, Repository],
    private: Annotated[bool, typer.Option("--private", help="Create a missing repository as private.")] = False,
    revision: Annotated[str | None, Revision] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, DryRun] = False,
    with_head: Annotated[bool, WithHead] = False,
    with_training_state: Annotated[bool, WithState] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload model",
) -> None:
    """Upload a published model: weights, config, card with its pictures, and preprocessing, in one commit.

    Log in with `hf auth login`, or set HF_TOKEN. A push that failed can be repeated.
    """
    with errors_in_one_line():
        from ..hub import HEADS, STATE, check_repo_id, check_texts, plan_push, upload

        files, left = plan_push(folder, with_head=with_head, with_training_state=with_training_state)
        if dry_run:
            check_repo_id(repo_id)
            sizes = {name: f"{path.stat().st_size / 1000:,.1f} kB" for name, path in files.items()}
            owner = "" if "/" in repo_id else ", in the account of your access token"
            typer.echo(f"Would be uploaded to {repo_id}{owner}:\n{_table(sizes)}")
            options = {HEADS: " (--with_head uploads them)", STATE: " (--with_training_state uploads it)"}
            if left:
                reasons = {name: why + options.get(why, "") for name, why in left.items()}
                typer.echo(f"Would not be uploaded:\n{_table(reasons)}")
            check_texts(files)
            return
        how: dict[str, Any] = {"private": private or None, "revision": revision, "create_pr": create_pr}
        commit = upload(files, repo_id, message=message, **how)
    total = sum(path.stat().st_size for path in files.values())
    where = f"the pull request {commit.pr_url}" if commit.pr_url else commit.commit_url
    typer.echo(f"Uploaded {len(files)} files ({total / 1000:,.1f} kB) of {folder} to {where}")


def _table(rows: dict[str, str]) -> str:
    rows = {printable(name): printable(text) for name, text in rows.items()}
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
