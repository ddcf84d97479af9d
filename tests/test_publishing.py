"""What a run uploads to the Hub, and what stays in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

from hub_server import TOKENS, Hub, Repo
from tiny_runs import copy_of, different, everything, model_of, trainer_of

TOKEN = TOKENS["anna"]
CARD = {"README.md", "images/curves.png"}
PLAIN = {*CARD, "config.json", "model.safetensors"}
BACKBONES = {"test_resnet": PLAIN, "wide_resnet10_1_cifar": {*PLAIN, "wide_resnet_cifar.py"}}
STATE = {"ccssl_head.safetensors", "training_state.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
STATE |= {"trainer_state.json", "manifest.json", "run.json"}


def trained(folder: Path, backbone: str = "test_resnet", **changes: Any) -> Any:
    """A run of two steps; its repository is named like the test's folder."""
    changes = {"hub_model_id": f"anna/{folder.parent.name}", "hub_token": TOKEN, "max_steps": 2, **changes}
    trainer = trainer_of(folder, model_of(backbone), **changes)
    trainer.train()
    return trainer


def repo_of(hub: Hub, folder: Path) -> Repo:
    return hub.repo(f"anna/{folder.name}")


def titles(repo: Repo) -> list[str]:
    return [commit.title for commit in repo.history("main")][-2::-1]


def assert_no_secret(repo: Repo, folder: Path) -> None:
    """No token here or in the repository, and no local path in any commit."""
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    pushed = {path: file.content for commit in repo.commits.values() for path, file in commit.files.items()}
    assert not any(TOKEN.encode() in content for content in [*written, *pushed.values()])
    assert not any(str(folder).encode() in content for content in pushed.values())
    assert not any("training_args" in name for name in [*pushed, *(path.name for path in folder.rglob("*"))])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_push_is_the_published_folder(hub, tmp_path, backbone):
    trainer = trained(tmp_path / "run", backbone, save_strategy="steps", save_steps=1)
    assert ("model", f"anna/{tmp_path.name}") not in hub.repos
    trainer.push_to_hub(commit_message="Digits", license="apache-2.0", tags=["digits"])
    repo = repo_of(hub, tmp_path)
    files = repo.files()
    assert titles(repo) == ["Digits"] and files.keys() == BACKBONES[backbone]
    assert_no_secret(repo, tmp_path)

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and "digits" in card.data.tags and f"anna/{tmp_path.name}" in card.text
    # Loaded as any model is, the published weights are the averaged ones.
    state = copy_of(AutoModelForImageClassification.from_pretrained(tmp_path))
    average = {f"timm_model.{name}": tensor for name, tensor in copy_of(trainer.ema.module.backbone).items()}
    assert different(state, average) == []


def test_a_push_uploads_the_heads_when_asked_to_and_deletes_those_of_other_weights(hub, tmp_path):
    trainer = trained(tmp_path / "run")
    trainer.push_to_hub(with_head=True)
    repo = repo_of(hub, tmp_path)
    assert repo.files().keys() == {*PLAIN, "ccssl_head.safetensors"}
    trainer.push_to_hub(license="mit")  # the same weights, so the heads fit
    assert repo.files().keys() == {*PLAIN, "ccssl_head.safetensors"}
    trainer.args.max_steps, trainer.args.overwrite = 3, True
    trainer.train()
    trainer.push_to_hub()
    assert repo.files().keys() == PLAIN


def test_save_model_pushes_with_push_to_hub(hub, tmp_path):
    arguments = {"push_to_hub": True, "hub_strategy": "end", "hub_private_repo": True}
    trainer = trained(tmp_path / "run", **arguments, save_strategy="steps", save_steps=1)
    repo = repo_of(hub, tmp_path)
    assert repo.private and titles(repo) == []
    trainer.save_model()
    assert titles(repo) == ["Model save"] and repo.files().keys() == PLAIN
    assert_no_secret(repo, tmp_path)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_pushed_during_training(hub, tmp_path, strategy, backbone):
    trained(
        tmp_path / "run",
        backbone,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,  # the first checkpoint may be deleted before its upload
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="top1",
        load_best_model_at_end=True,
    )
    repo = repo_of(hub, tmp_path)
    plain = BACKBONES[backbone] - CARD
    folders = {"every_save": [], "checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    state = {f"{folder}/{name}" for folder in folders[strategy] for name in {*plain, *STATE}}
    assert titles(repo) == ["Training in progress, step 1", "Training in progress, step 2"]
    assert repo.files().keys() == plain | state
    assert_no_secret(repo, tmp_path)
    assert list((tmp_path / "run").glob("_*")) == []  # the links for the uploads are gone


def test_a_run_resumes_bit_for_bit_from_a_pushed_checkpoint(hub, tmp_path):
    arguments = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "run", **arguments)
    pushed = {path: file for path, file in repo_of(hub, tmp_path).files().items() if path.startswith("checkpoint-1/")}
    for name, content in pushed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    again = trainer_of(tmp_path / "again", model_of("test_resnet", seed=1), max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2
    assert different(everything(again), everything(whole)) == []


def test_a_failed_push_of_a_checkpoint_is_logged_and_the_run_continues(hub, tmp_path, caplog):
    with hub.failing(f"POST /api/models/anna/{tmp_path.name}/commit/"):
        trainer = trained(
            tmp_path / "run", push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1
        )
        assert trainer.state.global_step == 2
        assert "A checkpoint was not pushed: The push to anna/" in caplog.text
        with pytest.raises(ConnectionError, match="push again"):
            trainer.save_model()
    repo = repo_of(hub, tmp_path)
    assert titles(repo) == [] and (tmp_path / "run" / "README.md").is_file()
    trainer.push_to_hub()
    assert titles(repo) == ["End of training"] and repo.files().keys() == PLAIN
