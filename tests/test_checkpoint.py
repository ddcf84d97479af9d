from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from ccssl_hf.checkpoint import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, load_tensors, save_tensors
from ccssl_hf.modeling import CCSSLForImageClassification
from published import found_elsewhere, picture, write_expected

LABELS = ["ant", "bee", "cat"]
BACKBONES = {
    "test_resnet": {"image_size": 32},
    "test_vit": {"image_size": 32, "pretrained_cfg_overlay": {"mean": (0.4, 0.5, 0.6), "crop_pct": 0.9}},
    "test_convnext": {"image_size": 64, "drop_path_rate": 0.1},
    "wide_resnet10_1_cifar": {"image_size": 16},
}
"""Our own is last: without the package, loading its file registers it with timm."""


def trained(name: str, **arguments) -> CCSSLForImageClassification:
    """A model in which every weight and statistic has changed."""
    torch.manual_seed(1)
    model = CCSSLForImageClassification.from_timm(name, labels=LABELS, **arguments)
    model.add_heads({"open": nn.Linear(model.feature_dim, 4)})
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value)
    return model.eval()


def eval_batch(model: CCSSLForImageClassification) -> torch.Tensor:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.backbone))
    return transform(picture())[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One published folder for each backbone, and the model's output for the picture."""
    root = tmp_path_factory.mktemp("published")
    for name, arguments in BACKBONES.items():
        model = trained(name, **arguments)
        model.save_pretrained(root / name)
        write_expected(root, name, model.backbone)
    return root


@pytest.fixture(scope="module")
def found_without_the_package(folders, tmp_path_factory) -> dict:
    environment = {"HF_HOME": str(tmp_path_factory.mktemp("elsewhere")), "HF_HUB_OFFLINE": "1"}
    return found_elsewhere(folders, {name: folders / name for name in BACKBONES}, environment)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folder_loads_everywhere_without_the_package(found_without_the_package, name):
    found = found_without_the_package[name]
    assert found.pop("labels") == LABELS and found.pop("timm_labels") == LABELS
    assert ("not supported in your version of timm" in found.pop("untrusted")) == name.startswith("wide")
    assert found == dict.fromkeys(found, True)


def test_a_wide_resnet_loads_without_trust_once_the_package_is_imported(folders):
    folder = str(folders / "wide_resnet10_1_cifar")
    expected = load_tensors(f"{folder}.safetensors")
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(model(expected["pixels"]).logits, expected["logits"])
        native = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(native(expected["pixels"]), expected["logits"])
    assert torch.equal(AutoImageProcessor.from_pretrained(folder)(picture())["pixel_values"], expected["pixels"])
    best = pipeline("image-classification", model=folder, device="cpu")(picture(), top_k=1)[0]
    assert best["label"] == LABELS[int(expected["logits"].argmax())]


@pytest.mark.parametrize("name", BACKBONES)
def test_from_pretrained_restores_everything(folders, name):
    model, again = trained(name, **BACKBONES[name]), CCSSLForImageClassification.from_pretrained(folders / name)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    pixels = eval_batch(again)
    with torch.no_grad():
        output, expected = again(pixels, return_embeddings=True), model(pixels, return_embeddings=True)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.embeddings, expected.embeddings)
    assert torch.equal(output.heads["open"], expected.heads["open"])
    assert again.config.labels == LABELS and again.config.model_args == model.config.model_args
    assert again.backbone.pretrained_cfg["crop_pct"] == model.backbone.pretrained_cfg["crop_pct"]


def test_saving_again_changes_no_byte(folders, tmp_path):
    for name in BACKBONES:
        CCSSLForImageClassification.from_pretrained(folders / name).save_pretrained(tmp_path / name)
        assert sorted(os.listdir(tmp_path / name)) == sorted(os.listdir(folders / name))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            assert (tmp_path / name / file).read_bytes() == (folders / name / file).read_bytes()


def test_the_folder_holds_what_plain_loading_needs_and_no_more(folders):
    plain = [HEAD_FILE, CONFIG_FILE, WEIGHTS_FILE]
    assert sorted(os.listdir(folders / "test_vit")) == plain
    assert sorted(os.listdir(folders / "wide_resnet10_1_cifar")) == [*plain, "wide_resnet_cifar.py"]
    assert load_tensors(folders / "test_vit" / WEIGHTS_FILE).keys() == timm.create_model("test_vit").state_dict().keys()
    config = json.loads((folders / "test_vit" / CONFIG_FILE).read_text())
    assert config["model_type"] == "timm_wrapper" and config["num_classes"] == 3 and config["label_names"] == LABELS
    assert config["model_args"] == {"img_size": 32} and "auto_map" not in config
    assert json.loads((folders / "test_resnet" / CONFIG_FILE).read_text())["model_args"] == {}
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 32, 32] and cfg["mean"] == [0.4, 0.5, 0.6] and cfg["crop_pct"] == 0.9
    assert {"std", "crop_mode", "interpolation", "first_conv", "classifier"} <= cfg.keys()
    assert not {"test_input_size", "test_crop_pct", "hf_hub_id", "url", "file", "label_names"} & cfg.keys()


def test_averaged_weights_can_be_saved_in_place_of_the_models(tmp_path):
    model = trained("wide_resnet10_1_cifar")
    average = {k: v / 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    again = CCSSLForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, average[key]) for key, value in again.state_dict().items())
    del average["backbone.conv1.weight"]
    with pytest.raises(ValueError, match=r"such as 'backbone\.conv1\.weight'"):
        model.save_pretrained(tmp_path, state_dict=average)


def test_a_folder_without_heads_loads_with_fresh_ones_and_says_so(tmp_path):
    model = trained("wide_resnet10_1_cifar")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, with_head=False)  # also removes the heads of the weights before
    assert not (tmp_path / HEAD_FILE).exists()
    with pytest.warns(UserWarning, match="no projection head"):
        again = CCSSLForImageClassification.from_pretrained(tmp_path)
    pixels = eval_batch(model)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again(pixels, return_embeddings=True).embeddings.shape == (1, 64)


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    trained("wide_resnet10_1_cifar").save_pretrained(tmp_path / "run", is_main_process=False)
    assert not (tmp_path / "run").exists()


def test_a_thousand_classes_keep_their_own_names(tmp_path):
    labels = [f"species {number}" for number in range(1000)]
    model = CCSSLForImageClassification.from_timm("wide_resnet10_1_cifar", labels=labels)
    model.save_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label[999] == "species 999"


def test_missing_and_foreign_folders_give_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path / "nothing", "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match=r"pass a folder that save_pretrained wrote, or a Hub id"):
            CCSSLForImageClassification.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        CCSSLForImageClassification.from_pretrained(tmp_path)
    trained("wide_resnet10_1_cifar").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"architecture": "wide_resnet10_2_cifar"}))
    with pytest.raises(ValueError, match="did you mean wide_resnet10_1_cifar"):
        CCSSLForImageClassification.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"architecture": "test_resnet"}))
    with pytest.raises(ValueError, match="keys differ"):
        CCSSLForImageClassification.from_pretrained(tmp_path)


def test_a_folder_that_timm_wrote_can_be_trained_on(tmp_path):
    source = timm.create_model("test_resnet", num_classes=2).eval()
    timm.models.save_for_hf(
        source, str(tmp_path), model_config={"label_names": ["ant", "bee"]}, safe_serialization=True
    )
    with pytest.warns(UserWarning, match="no projection head"):
        model = CCSSLForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(model(images).logits, source(images)) and model.config.labels == ["ant", "bee"]


def test_tensors_of_any_layout_survive(tmp_path):
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    tensors = {"image": image, "a": shared, "b": shared, "view": shared.view(2, 3).T, "step": torch.tensor(7)}
    tensors |= {"half": torch.randn(3).bfloat16(), "mask": torch.tensor([True, False]), "empty": torch.empty(0, 5)}
    tensors["weight"] = nn.Parameter(torch.randn(3, requires_grad=True))
    save_tensors(tmp_path / "state.safetensors", tensors)
    again = load_tensors(tmp_path / "state.safetensors")
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        assert again[key].dtype == value.dtype and torch.equal(again[key], value)
        assert again[key].is_contiguous() and not again[key].requires_grad


def test_a_model_in_channels_last_saves(tmp_path):
    model = trained("wide_resnet10_1_cifar").to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    pixels = eval_batch(model)
    again = CCSSLForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    partial = tmp_path / "_state.safetensors.partial"
    partial.write_bytes(b"half of it")  # what a killed process leaves behind
    assert torch.equal(load_tensors(path)["a"], torch.ones(2))
    save_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(load_tensors(path)["a"], torch.zeros(2)) and not partial.exists()


def test_damaged_and_missing_files_give_a_sentence(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(200)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(path)
