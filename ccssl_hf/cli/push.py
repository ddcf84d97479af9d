"""`ccssl-hf push`: a folder becomes a repository on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What a run or save_pretrained wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="Made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a missing repository private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, made where it is missing, or refs/pr/N of a pull request; default: main."),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go and what would stay, and ask nothing of the network.")
    ] = False,
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Send the projection head and further heads, for training on.")
    ] = False,
    with_training_state: Annotated[
        bool, typer.Option("--with-training-state", help="Send checkpoints and what a run goes on from.")
    ] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
) -> None:
    """Publish a folder: weights, config, card with its pictures, preprocessing. All in one commit, or nothing.

    Who you are on the Hub is what `hf auth login` or HF_TOKEN says. A push that broke off can be repeated.
    """
    with errors_in_one_line():
        from ..hub import check_repo_id, check_texts, plan_push, upload

        plan = plan_push(folder, with_head=with_head, with_training_state=with_training_state)
        if dry_run:
            check_repo_id(repo_id)
            sizes = {name: f"{path.stat().st_size / 1000:,.1f} kB" for name, path in plan.files.items()}
            typer.echo(f"Would go to {repo_id}:\n{_table(sizes)}")
            if plan.left:
                typer.echo(f"Would stay here:\n{_table(plan.left)}")
            check_texts(plan.files)
            return
        commit = upload(
            plan.files,
            repo_id,
            message=message,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
        )
    total = sum(path.stat().st_size for path in plan.files.values())
    where = f"{commit.pr_url}, a pull request" if commit.pr_url else commit.commit_url
    typer.echo(f"{len(plan.files)} files ({total / 1000:,.1f} kB) of {folder} are in {where}.")


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {said}" for name, said in rows.items())
