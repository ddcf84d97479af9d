"""Load from the Hub into a new cache: in every way without the package, and for training with it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
from huggingface_hub import HfApi, InferenceClient, SpaceCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.checkpoint import find_checkpoint
from ccssl_hf.cli import app
from ccssl_hf.deploy.predict import Classifier
from hub_server import TOKENS, Hub
from load_elsewhere import at_home
from published import found_elsewhere, picture, write_expected
from test_deploy_serve import PORT_LINE, line_with
from tiny_runs import LABELED, LABELS, UNLABELED, VALIDATION, copy_of, different, model_of, trainer_of

ANNA = TOKENS["anna"]
BACKBONES = ["test_resnet", "test_vit", "wide_resnet10_1_cifar"]
"""Ours is last: in a process without the package, the file in its repository registers it with timm."""


@pytest.fixture(scope="module")
def published(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trainers whose models are in private repositories `anna/<backbone>`; their outputs for the picture are in `root`.

    The Vision Transformer is uploaded without its heads.
    """
    root = tmp_path_factory.mktemp("published")
    made: dict[str, Any] = {"root": root}
    for name in BACKBONES:
        trainer = trainer_of(
            root / name,
            model_of(name),
            max_steps=2,
            hub_model_id=f"anna/{name}",
            hub_token=ANNA,
            hub_private_repo=True,
        )
        trainer.train()
        trainer.push_to_hub(with_head=name != "test_vit", license="apache-2.0")
        write_expected(root, name, trainer.ema.module.backbone)
        made[name] = trainer
    return made


@pytest.fixture(autouse=True)
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ANNA)


# -------------------------------------------------------------------------------------------------- without the package


@pytest.fixture(scope="module")
def found_without_the_package(published, hub, tmp_path_factory) -> dict[str, Any]:
    environment = hub.environment(tmp_path_factory.mktemp("elsewhere"))
    return found_elsewhere(published["root"], {name: f"anna/{name}" for name in BACKBONES}, environment)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_repository_loads_everywhere_without_the_package(found_without_the_package, name):
    found = found_without_the_package[name]
    assert found.pop("labels") == LABELS and found.pop("timm_labels") == LABELS
    assert ("not supported in your version of timm" in found.pop("untrusted")) == name.startswith("wide")
    assert found == dict.fromkeys(found, True)


# ----------------------------------------------------------------------------------------------------- with the package


@torch.no_grad()
def test_a_wide_resnet_loads_without_trust_once_the_package_is_imported(published):
    name = "wide_resnet10_1_cifar"
    expected = {key: tensor.clone() for key, tensor in load_file(published["root"] / f"{name}.safetensors").items()}
    classifier = at_home(AutoModelForImageClassification.from_pretrained(f"anna/{name}"))
    assert torch.equal(classifier(expected["pixels"]).logits, expected["logits"])
    network = at_home(AutoModel.from_pretrained(f"anna/{name}"))
    assert torch.equal(network(expected["pixels"]).pooler_output, expected["features"])
    native = timm.create_model(f"hf-hub:anna/{name}", pretrained=True).eval()
    assert torch.equal(native(expected["pixels"]), expected["logits"])
    best = pipeline("image-classification", model=f"anna/{name}", device="cpu")(picture(), top_k=1)[0]
    assert best["label"] == LABELS[int(expected["logits"].argmax())]


@pytest.mark.parametrize("name", ["test_resnet", "wide_resnet10_1_cifar"])
def test_the_projection_head_comes_back_and_training_goes_on(published, tmp_path, name):
    model = CCSSLForImageClassification.from_pretrained(f"anna/{name}")
    assert different(copy_of(model), copy_of(published[name].ema.module)) == []
    before = copy_of(model.projection)
    trainer_of(tmp_path, model, max_steps=1).train()
    assert different(copy_of(model.projection), before)


def test_without_its_heads_a_model_says_so_and_training_starts_with_fresh_ones(published, tmp_path):
    with pytest.warns(UserWarning, match="'anna/test_vit' has no projection head: a new one is created"):
        model = CCSSLForImageClassification.from_pretrained("anna/test_vit")
    assert different(copy_of(model.backbone), copy_of(published["test_vit"].ema.module.backbone)) == []
    trainer_of(tmp_path, model, max_steps=1).train()


def test_what_is_private_needs_a_token_of_its_owner(published, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, TOKENS["ben"]):
        with pytest.raises(FileNotFoundError, match="'anna/test_resnet' is neither a local folder nor a readable Hub"):
            CCSSLForImageClassification.from_pretrained("anna/test_resnet", token=token, cache_dir=tmp_path)
    CCSSLForImageClassification.from_pretrained("anna/test_resnet", token=ANNA, cache_dir=tmp_path)


def test_branches_tags_commits_and_pull_requests_load(published, tmp_path):
    other = model_of("test_resnet", seed=5)
    repo_id = "anna/test_resnet"
    opened = other.push_to_hub(repo_id, create_pr=True, token=ANNA)
    other.push_to_hub(repo_id, revision="next", token=ANNA)
    HfApi(token=ANNA).create_tag(repo_id, tag="v1", revision="next")
    for revision in (opened.pr_revision, "next", "v1", opened.oid):
        theirs = AutoModelForImageClassification.from_pretrained(repo_id, revision=revision)
        assert different(copy_of(theirs.timm_model), copy_of(other.backbone)) == []
    with pytest.warns(UserWarning, match="no projection head"):
        ours = CCSSLForImageClassification.from_pretrained(repo_id, revision=opened.pr_revision)
    assert different(copy_of(ours.backbone), copy_of(other.backbone)) == []
    # What takes a folder or a Hub id takes a revision behind it, too.
    assert find_checkpoint(f"{repo_id}@v1") == find_checkpoint(repo_id, revision="next")
    assert Classifier.from_pretrained(f"{repo_id}@next").embedding == "pre_logits"
    assert Classifier.from_pretrained(repo_id).embedding == "projection"
    with pytest.raises(FileNotFoundError, match="Invalid rev id: v2"):
        find_checkpoint(f"{repo_id}@v2", cache_dir=tmp_path)


# ------------------------------------------------------------------------------------------------------------ datasets


def test_every_verb_takes_a_hub_id(published, tmp_path):
    name = "wide_resnet10_1_cifar"
    images = tmp_path / "images"
    for number, label in enumerate(LABELS):
        (images / label).mkdir(parents=True)
        picture().save(images / label / f"{number}.png")

    def answer(*words: str) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, (words, result.output)
        return result.stdout

    assert answer("report", f"anna/{name}").startswith(f"anna/{name}")
    assert "Top-1" in answer("evaluate", f"anna/{name}", str(images))
    assert "Top-1" in answer("report", f"anna/{name}", str(tmp_path / "card"), "--split", f"test={images}")
    answer("predict", f"anna/{name}", str(images), str(tmp_path / "out.parquet"))
    assert len(datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"))) == len(LABELS)
    answer("export", "onnx", f"anna/{name}", "--out", str(tmp_path / "onnx"))
    answer("export", "handler", f"anna/{name}", "--out", str(tmp_path / "handler"))
    assert {path.name for path in (tmp_path / "handler").iterdir()} == {"handler.py", "requirements.txt"}
    answer("space", f"anna/{name}", str(tmp_path / "space"), "--labeled", str(images))
    assert SpaceCard.load(tmp_path / "space" / "README.md").data.models == [f"anna/{name}"]
    assert not (tmp_path / "space" / "model").exists()

    without = CliRunner().invoke(app, ["export", "handler", f"anna/{name}"])
    assert without.exit_code == 2 and "name one to write to with --out" in without.stderr

    with serving(f"anna/{name}") as url:
        [best, *_] = InferenceClient(model=url).image_classification(str(images / LABELS[0] / "0.png"))
    local = pipeline("image-classification", model=str(published["root"] / name), device="cpu", trust_remote_code=True)
    expected = local(picture(), top_k=1)[0]
    assert (best.label, best.score) == (expected["label"], pytest.approx(expected["score"], abs=1e-5))


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The address of `ccssl-hf serve` in another process."""
    command = [sys.executable, "-m", "ccssl_hf.cli", "serve", model, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{line_with(process, PORT_LINE.search)[1]}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_splits_load_from_the_hub_and_the_run_goes_back_there(hub, tmp_path, monkeypatch):
    splits = {
        "labeled": LABELED.remove_columns("true"),
        # One repository's splits have the same columns: -1 stands for no label.
        "unlabeled": UNLABELED.map(lambda _: {"label": -1}).remove_columns("true"),
        "validation": VALIDATION.remove_columns("true"),
    }
    datasets.DatasetDict(splits).push_to_hub("anna/digits", private=True)
    settings = {
        "backbone": "test_resnet",
        "image_size": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "mu": 2,
        "warmup_steps": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": "anna/digits-resnet",
        "output_dir": tmp_path / "out",
    }
    roles = [f"--{role}=anna/digits:{role}" for role in splits]
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "train_semi_inat.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), *roles, *(f"--{name}={value}" for name, value in settings.items())])
    runpy.run_path(str(recipe), run_name="__main__")
    files = hub.repo("anna/digits-resnet").files()
    pictures = {name for name in files if name.startswith("images/")}
    assert files.keys() - pictures == {"README.md", "config.json", "model.safetensors"}
    assert all(name in files["README.md"].decode() for name in pictures)
    card = HfApi(token=ANNA).model_info("anna/digits-resnet").card_data
    assert card is not None and card.datasets == ["anna/digits"]
    assert card.eval_results is not None and {result.dataset_split for result in card.eval_results} == {"validation"}
