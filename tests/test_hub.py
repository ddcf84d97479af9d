"""Uploads of a folder to the Hub, and errors in the folder or during the upload."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from typer.testing import CliRunner

from ccssl_hf import wide_resnet_cifar
from ccssl_hf.cli import app
from ccssl_hf.deploy.export import write_handler
from ccssl_hf.hub import check_texts, plan_push, upload
from hub_server import TOKENS
from tiny_runs import model_of

ANNA = TOKENS["anna"]
RUN = CliRunner(env={"HF_TOKEN": ANNA})
CARD = """---
license: apache-2.0
tags: [image-classification]
---
# Digits

![Curves](images/%63urves.png) and <img width="300" src="./images/confusion_matrix.png"> but not
![elsewhere](https://example.org/badge.svg), ![above](../above.png), ![a](private/passport.png)
"""
PUBLIC = {"README.md", "config.json", "model.safetensors", "images/curves.png", "images/confusion_matrix.png"}
PUBLIC |= {"preprocessor_config.json", "handler.py", "requirements.txt", "onnx/model.onnx"}
HEAD = {"ccssl_head.safetensors"}
STATE = {f"checkpoint-1/{name}" for name in ("config.json", "model.safetensors", "ccssl_head.safetensors")}
STATE |= {f"checkpoint-1/{name}" for name in ("optimizer.pt", "rng_state_0.pth", "trainer_state.json")}
PRIVATE = {
    "training_args.bin": "contains the Hub token",
    "checkpoint-1/training_args.bin": "contains the Hub token",
    "_model.safetensors.partial": "not part of a published model",
    "train_results.json": "not part of a published model",
    "runs/events.out": "not part of a published model",
    "private/passport.png": "README.md shows it, but only pictures that ccssl-hf drew are uploaded",
    "images/labeled_photo.png": "not part of a published model",
    ".env": "not part of a published model",
    "notes.md": "not part of a published model",
    "other.py": "not part of a published model",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model_of("test_resnet").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    for name in [*PRIVATE, *(PUBLIC | STATE)]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("{}" if path.suffix == ".json" else f"{ANNA}" if name in PRIVATE else "")
    for number, name in enumerate(name for name in PUBLIC if name.endswith(".png")):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(folder / name)
    best = json.dumps({"best_model_checkpoint": str(folder / "checkpoint-1"), "global_step": 1})
    (folder / "checkpoint-1" / "trainer_state.json").write_text(best)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture
def repo_id(tmp_path) -> str:
    return f"anna/{tmp_path.name}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- the files


def test_only_an_allow_list_is_uploaded(folder):
    plan = plan_push(folder)
    assert plan.files == {name: folder / name for name in PUBLIC}
    heads = {"ccssl_head.safetensors": "heads, for further training"}
    whole = {
        "runs/": "not part of a published model",
        "checkpoint-1/": "training state",
    }
    single = {name: why for name, why in PRIVATE.items() if name.split("/")[0] not in ("runs", "checkpoint-1")}
    assert plan.left == {**single, **whole, **heads}


def test_heads_and_training_state_are_uploaded_on_request(folder):
    assert plan_push(folder, with_head=True).files.keys() == PUBLIC | HEAD
    plan = plan_push(folder, with_training_state=True)
    assert plan.files.keys() == PUBLIC | STATE
    assert plan.left["checkpoint-1/training_args.bin"] == PRIVATE["training_args.bin"]
    checkpoint = plan_push(folder / "checkpoint-1", with_training_state=True)
    assert {f"checkpoint-1/{name}" for name in checkpoint.files} == STATE - {"checkpoint-1/ccssl_head.safetensors"}


def test_a_missing_picture_is_listed(folder):
    (folder / "images" / "curves.png").unlink()
    assert plan_push(folder).left["images/curves.png"] == "README.md shows it, but the file is missing"


def linked(file: Path, target: Path) -> None:
    file.unlink()
    file.symlink_to(target)


def test_a_picture_that_is_a_link_or_none_stays_here(folder, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "passport.png")
    for harm, reason in (
        (lambda file: linked(file, tmp_path / "passport.png"), "it is a link that leads out of the folder"),
        (lambda file: linked(file, folder / "images" / "labeled_photo.png"), "it is a link"),
        (lambda file: linked(file, folder / "nowhere.png"), "it is a broken link"),
        (lambda file: (file.unlink(), file.write_text("password")), "it is not a valid PNG"),
        (lambda file: (file.unlink(), Image.new("RGB", (9, 9)).save(file, "JPEG")), "it is not a valid PNG"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "it is no regular file"),
    ):
        harm(folder / "images" / "curves.png")
        plan = plan_push(folder)
        assert plan.files.keys() == PUBLIC - {"images/curves.png"}
        assert plan.left["images/curves.png"] == f"README.md shows it, but {reason}"


def test_a_file_of_the_model_that_leads_out_of_the_folder_stops_the_push(folder, tmp_path):
    (tmp_path / "secret").write_text("password")
    for name in ("handler.py", "onnx/model.onnx", "requirements.txt"):
        linked(folder / name, tmp_path / "secret")
    words = r"handler.py: it is a link that leads out .*; onnx/model.onnx: it.*; requirements.txt: it.*replace"
    with pytest.raises(ValueError, match=words):
        plan_push(folder)
    shutil.rmtree(folder / "onnx")
    for name in ("handler.py", "requirements.txt"):
        (folder / name).unlink()
    os.mkfifo(folder / "handler.py")
    with pytest.raises(ValueError, match=r"handler.py: it is no regular file"):
        plan_push(folder)
    (folder / "handler.py").unlink()
    checkpoint = folder / "checkpoint-1"
    checkpoint.rename(tmp_path / "elsewhere")
    checkpoint.symlink_to(tmp_path / "elsewhere")
    assert plan_push(folder).files
    with pytest.raises(ValueError, match=r"checkpoint-1/config.json: it is a link that leads out of the folder"):
        plan_push(folder, with_training_state=True)


def test_links_within_the_folder_and_of_the_hubs_cache_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert plan_push(folder).files.keys() == PUBLIC
    repository = tmp_path / "models--anna--digits"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(PUBLIC):
        shutil.copy(folder / name, repository / "blobs" / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(repository / "blobs" / str(number))
    assert plan_push(snapshot).files.keys() == PUBLIC
    linked(snapshot / "README.md", folder / "README.md")
    with pytest.raises(ValueError, match=r"README.md: it is a link that leads out"):
        plan_push(snapshot)


def test_an_exported_model_is_uploaded_without_torch_weights(hub, folder, repo_id):
    (folder / "model.safetensors").unlink()
    upload(plan_push(folder).files, repo_id, token=ANNA)
    assert hub.repo(repo_id).files().keys() == PUBLIC - {"model.safetensors"}


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_an_error(folder, missing):
    (folder / missing).unlink()
    shutil.rmtree(folder / "onnx")
    with pytest.raises(FileNotFoundError, match=f"has no {missing}: pass"):
        plan_push(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("README.md", f"see\n{ANNA}", r"README.md, line 2, contains an access token \(hf_ann…\)"),
        ("README.md", "api_org_" + 24 * "aB", "contains an access token"),
        ("handler.py", "key = 'AKIA" + 16 * "A" + "'", "contains a key of AWS"),
        ("requirements.txt", "git+https://anna:secret1@example.org/x", "contains a password in a URL"),
        ("README.md", "-----BEGIN RSA PRIVATE KEY-----", "contains a private key"),
        ("README.md", 6_000_000 * "x", r"README.md has 6.0 MB of text, at most 5: shorten it"),
        ("handler.py", "ROOT = '{folder}'", "handler.py, line 1, contains a local path"),
        ("requirements.txt", "x\n-e file://{home}/code", "requirements.txt, line 2, contains a local path"),
        ("config.json", '{{"file": "{cwd}/weights.pt"}}', "config.json, line 1, contains a local path"),
    ],
)
def test_a_text_with_a_token_or_a_local_path_is_refused(hub, folder, repo_id, name, text, words):
    (folder / name).write_text(text.format(folder=folder, home=Path.home(), cwd=Path.cwd()))
    asked = len(hub.requests)
    with pytest.raises(ValueError, match=words):
        upload(plan_push(folder).files, repo_id, token=ANNA)
    assert hub.requests[asked:] == []


def test_words_like_a_token_or_a_path_are_accepted(folder):
    lines = [
        "hf_hub_download and hf_transfer",
        "hf_hub_url_to_filename_and_more, ghs_identifier_of_a_long_name",
        "https://example.org:8000/anna@example.org, mailto:anna@example.org",
        f"https://example.org{Path.home()}",
        f"x{folder}",
        f"{folder}-2",
        "/mnt",
    ]
    (folder / "README.md").write_text("\n".join(lines))
    check_texts(plan_push(folder).files)


# ------------------------------------------------------------------------------------------------------------ uploads


def test_a_push_is_one_commit_to_main_to_a_branch_or_to_a_pull_request(hub, folder, repo_id):
    upload(plan_push(folder).files, repo_id, private=True, message="First", token=ANNA)
    repo = hub.repo(repo_id)
    assert repo.private and [commit.title for commit in repo.history("main")] == ["First", "initial commit"]
    assert repo.files() == {name: (folder / name).read_bytes() for name in PUBLIC}

    (folder / "README.md").write_text(CARD + "More.")
    upload(plan_push(folder).files, repo_id, revision="next", token=ANNA)
    opened = upload(plan_push(folder).files, repo_id, create_pr=True, token=ANNA)
    assert opened.pr_num == 1 and opened.pr_url.endswith(f"{repo_id}/discussions/1")
    upload(plan_push(folder, with_head=True).files, repo_id, revision="refs/pr/1", token=ANNA)
    assert repo.files()["README.md"] == CARD.encode() and repo.files("next")["README.md"].endswith(b"More.")
    assert repo.files("refs/pr/1").keys() == PUBLIC | HEAD


def test_training_state_is_uploaded_without_local_paths(hub, folder, repo_id):
    upload(plan_push(folder, with_training_state=True).files, repo_id, token=ANNA)
    pushed = hub.repo(repo_id).files()
    assert pushed.keys() == PUBLIC | STATE
    assert json.loads(pushed["checkpoint-1/trainer_state.json"])["best_model_checkpoint"] == "checkpoint-1"
    assert not any(str(folder.parent).encode() in content for content in pushed.values())


@pytest.mark.parametrize(("request_", "after"), [("PUT /_lfs/", 2), ("POST /api/.*/commit/", 0)])
def test_a_failed_push_loses_nothing_and_the_next_uploads_what_is_missing(hub, folder, repo_id, request_, after):
    for number, name in enumerate(["model.safetensors", "images/curves.png", "onnx/model.onnx"]):
        with (folder / name).open("ab") as file:  # no other push has sent these
            file.write(f"{repo_id} {number}".encode())
    before = contents(folder)
    with hub.failing(request_, after=after), pytest.raises(ConnectionError, match=r"failed .* push again"):
        upload(plan_push(folder).files, repo_id, token=ANNA)
    repo = hub.repo(repo_id)
    assert contents(folder) == before and repo.files() == {} and len(repo.commits) == 1

    asked = len(hub.requests)
    upload(plan_push(folder).files, repo_id, token=ANNA)
    sent = [request for request in hub.requests[asked:] if request.startswith("PUT")]
    assert len(sent) == (1 if after else 0)
    assert repo.files() == {name: (folder / name).read_bytes() for name in PUBLIC} and len(repo.commits) == 2


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("license: my own", '"license" must be one of'),
        ("tags: [a", "metadata that the Hub refuses .*correct"),
        ("base_model: ../resnet", '"base_model" with value "../resnet" is not valid'),
        ("model-index:\n- name: x", "model_index"),
    ],
)
def test_a_card_that_the_hub_refuses_stops_the_push_before_anything_is_made(hub, folder, repo_id, metadata, words):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=words):
        upload(plan_push(folder).files, repo_id, token=ANNA)
    assert ("model", repo_id) not in hub.repos


def test_a_private_push_refuses_a_public_repository(hub, folder, repo_id):
    HfApi(token=ANNA).create_repo(repo_id)
    with pytest.raises(ValueError, match="exists and is public"):
        upload(plan_push(folder).files, repo_id, private=True, token=ANNA)
    assert hub.repo(repo_id).files() == {}


def test_errors_name_the_fix(hub, folder, repo_id, monkeypatch):
    files = plan_push(folder).files
    with pytest.raises(PermissionError, match="hf auth login"):
        upload(files, repo_id)
    with pytest.raises(PermissionError, match=r"Invalid credentials .*hf auth whoami"):
        upload(files, repo_id, token="hf_nobody")
    with pytest.raises(PermissionError, match=r"don't have the rights .*hf auth whoami"):
        upload(files, repo_id, token=TOKENS["ben"])
    with pytest.raises(ValueError, match="'a b' is not a Hub id: use USER/REPO"):
        upload(files, "a b", token=ANNA)
    with pytest.raises(ValueError, match="has no revision 'refs/pr/7'"):
        upload(files, repo_id, revision="refs/pr/7", token=ANNA)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(ConnectionError, match=r"failed .*refused"):
            upload(files, repo_id, token=ANNA)


def test_a_model_pushes_itself(hub, repo_id):
    model = model_of("wide_resnet10_1_cifar")
    plain = {"config.json", "model.safetensors", "wide_resnet_cifar.py"}
    model.push_to_hub(repo_id, private=True, token=ANNA)
    assert hub.repo(repo_id).files().keys() == plain and hub.repo(repo_id).private
    model.push_to_hub(repo_id, with_head=True, revision="heads", token=ANNA)
    assert hub.repo(repo_id).files("heads").keys() == plain | HEAD


# ----------------------------------------------------------------------------------------------------- the command line


def test_a_dry_run_lists_files_without_network(folder, repo_id, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run went to the network"))
    result = CliRunner(env={"HF_TOKEN": ""}).invoke(app, ["push", str(folder), repo_id, "--dry-run", "--with-head"])
    assert result.exit_code == 0, result.output
    going, staying = result.stdout.split("Would not be uploaded:\n")
    assert going.splitlines()[0] == f"Would be uploaded to {repo_id}:"
    assert [re.split(" {2,}", line.strip())[0] for line in going.splitlines()[1:]] == sorted(PUBLIC | HEAD)
    size = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"model.safetensors +{size / 1000:,.1f} kB", going)
    assert re.search(r"  training_args.bin +contains the Hub token\n", staying)
    assert re.search(r"  checkpoint-1/ +training state \(--with_training_state uploads it\)\n", staying)
    assert re.search(r"  private/passport.png +README.md shows it, but only pictures", staying)


def test_a_dry_run_says_whose_the_repository_would_be(folder):
    result = RUN.invoke(app, ["push", str(folder), "digits", "--dry-run"])
    assert result.stdout.startswith("Would be uploaded to digits, in the account of your access token:\n")


def test_code_that_is_not_ours_is_told(folder, caplog):
    write_handler(folder)
    plan_push(folder)
    assert not caplog.records
    (folder / wide_resnet_cifar.__file__.rpartition("/")[2]).write_text("import os")
    (folder / "requirements.txt").write_text("timm>=1.0\nsomething-else\n")
    plan_push(folder)
    assert "requirements.txt, wide_resnet_cifar.py: not as this version of ccssl-hf writes it" in caplog.text
    with (folder / "handler.py").open("a") as file:
        file.write("import os\n")
    plan_push(folder)
    assert "handler.py, requirements.txt, wide_resnet_cifar.py: not as" in caplog.text


def test_the_command_pushes_and_prints_where(hub, folder, repo_id):
    result = RUN.invoke(app, ["push", str(folder), repo_id, "--private", "--message", "From the shell"])
    assert result.exit_code == 0, result.output
    repo = hub.repo(repo_id)
    assert repo.private and repo.at("main").title == "From the shell" and repo.files().keys() == PUBLIC
    assert (
        result.stdout.startswith(f"Uploaded {len(PUBLIC)} files (")
        and f"{repo_id}/commit/{repo.at('main').id}" in result.stdout
    )
    (folder / "requirements.txt").write_text("pillow")
    result = RUN.invoke(app, ["push", str(folder), repo_id, "--create-pr"])
    assert f"to the pull request {hub.url}/{repo_id}/discussions/1" in result.stdout


def test_errors_of_the_command_are_one_line(hub, folder, repo_id):
    for arguments, words in (
        ([str(folder / "runs"), repo_id], "has no config.json"),
        ([str(folder), "ben/digits"], "refuses the push to ben/digits"),
        ([str(folder), repo_id, "--revision", "refs/pr/3"], "has no revision"),
    ):
        result = RUN.invoke(app, ["push", *arguments])
        assert result.exit_code == 2
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert words in line


def test_others_do_not_see_a_private_repository(hub, folder, repo_id):
    upload(plan_push(folder).files, repo_id, private=True, token=ANNA)
    for token in (TOKENS["ben"], False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info(repo_id)
