from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import nn

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.backbones import (
    authors_key,
    build_head,
    check_backbone,
    check_input,
    create_backbone,
    describe_head,
    projection_head,
)
from conftest import SHARED, needs_shared

WIDE_RESNETS = ["wide_resnet10_1_cifar", "wide_resnet28_2_cifar", "wide_resnet28_8_cifar", "wide_resnet37_2_cifar"]


def container(name: str) -> nn.ModuleDict:
    """Backbone and projection head with the keys of `CCSSLForImageClassification`."""
    backbone, _ = create_backbone(name, num_classes=10)
    return nn.ModuleDict({"backbone": backbone, "projection": projection_head(backbone, backbone.num_features, 64)})


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(SHARED / "golden" / name) as file:
        return dict(file)


@needs_shared
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_wide_resnet_gives_the_authors_outputs_with_the_authors_weights(mode):
    values = golden("wide_resnet_10_1.npz")
    prefix = "state_dict/"
    weights = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in values.items() if k.startswith(prefix)}
    model = container("wide_resnet10_1_cifar")
    model.load_state_dict({authors_key(key): value for key, value in weights.items()})
    model.train(mode == "train")
    backbone = model["backbone"]
    features = backbone.forward_head(backbone.forward_features(torch.from_numpy(values["images"])), pre_logits=True)
    embeddings = F.normalize(model["projection"](features))
    np.testing.assert_allclose(backbone.fc(features).detach(), values[f"logits_{mode}"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embeddings.detach(), values[f"embeddings_{mode}"], rtol=1e-4, atol=1e-5)


@needs_shared
@pytest.mark.parametrize("depth_width", ["10_1", "28_2"])
def test_wide_resnet_has_the_authors_parameters(depth_width):
    values = golden(f"wide_resnet_{depth_width}.npz")
    model = container(f"wide_resnet{depth_width}_cifar")
    ours = {f"{key}:{tuple(value.shape)}" for key, value in model.state_dict().items()}
    theirs = (entry.split(":") for entry in values["state_dict_keys"].tolist())
    assert ours == {f"{authors_key(key)}:{shape}" for key, shape in theirs}
    assert sum(parameter.numel() for parameter in model.parameters()) == int(values["num_parameters"])


@pytest.mark.parametrize(("name", "millions"), list(zip(WIDE_RESNETS, [0.08, 1.47, 23.35, 5.93], strict=True)))
def test_wide_resnet_sizes(name, millions):
    model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert model.default_cfg["input_size"] == (3, 32, 32) and model.default_cfg["crop_pct"] == 1.0
    for module in model.modules():
        assert not isinstance(module, nn.BatchNorm2d) or module.momentum == 0.001
        assert not isinstance(module, nn.LeakyReLU) or module.negative_slope == 0.1


@pytest.mark.parametrize("name", ["wide_resnet10_1_cifar", "wide_resnet37_2_cifar"])
@pytest.mark.parametrize("side", [16, 32, 96])
def test_wide_resnet_speaks_timms_interface(name, side):
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, side, side)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (2, model.num_features) and model.head_hidden_size == model.num_features
    assert torch.equal(model.get_classifier()(features), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    assert torch.equal(timm.create_model(name, num_classes=0).eval().fc(features), features)
    maps = timm.create_model(name, features_only=True)
    for info, feature_map in zip(maps.feature_info.get_dicts(), maps(images), strict=True):
        assert feature_map.shape[1:] == (info["num_chs"], side // info["reduction"], side // info["reduction"])


@pytest.mark.parametrize("name", ["wide_resnet28_2_cifar", "wide_resnet37_2_cifar"])
def test_every_parameter_that_asks_for_a_gradient_gets_one(name):
    """DistributedDataParallel waits for every such parameter; widening blocks do not use their first norm."""
    model = timm.create_model(name)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(key.split(".")[2:3] == ["bn1"] or ".0.bn1." in key for key in frozen)


def test_a_depth_that_does_not_fit_is_refused():
    from ccssl_hf.wide_resnet_cifar import WideResNetCifar

    with pytest.raises(ValueError, match="depth 27"):
        WideResNetCifar(depth=27)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet5O", "resnet50"),
        ("wide_resnet28_2", "wide_resnet28_2_cifar"),
        ("resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "pretrained_cfg_overlay"),
        ("qqqqq", "list_models"),
    ],
)
def test_an_unknown_name_is_met_with_near_ones(name, hint):
    with pytest.raises(ValueError, match=hint):
        check_backbone(name)


def test_pretrained_weights_that_cannot_be_had_give_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"wide_resnet10_1_cifar.*No pretrained weights exist.*pretrained=False"):
        create_backbone("wide_resnet10_1_cifar", num_classes=3, pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"test_resnet.*check the network"):
        create_backbone("test_resnet", num_classes=3, pretrained=True, cache_dir="nowhere")


def test_pretrained_weights_pass_through_and_leave_a_fresh_classifier(tmp_path):
    source = timm.create_model("test_resnet", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "mean": (0.5, 0.5, 0.5)}
    backbone, args = create_backbone("test_resnet", num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(backbone.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert backbone.fc.out_features == 5 and args == {}
    assert backbone.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) and "file" not in backbone.pretrained_cfg


def test_image_size_reaches_the_network_and_its_input_description():
    vit, args = create_backbone("test_vit", num_classes=3, image_size=32)
    assert args == {"img_size": 32} and vit.patch_embed.img_size == (32, 32)
    resnet, args = create_backbone("test_resnet", num_classes=3, image_size=128)
    assert args == {} and resnet.pretrained_cfg["input_size"] == (3, 128, 128)
    assert "test_input_size" not in resnet.pretrained_cfg
    assert (vit.pretrained_cfg["crop_pct"], resnet.pretrained_cfg["crop_pct"]) == (1.0, 0.95)
    cropped, _ = create_backbone("test_vit", num_classes=3, image_size=32, pretrained_cfg_overlay={"crop_pct": 0.9})
    assert cropped.pretrained_cfg["crop_pct"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 32, "img_size": 48}, "give image_size only"),
        ({"act_layer": nn.ReLU}, "by name"),
    ],
)
def test_arguments_that_contradict_or_cannot_be_saved_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("test_vit", num_classes=3, **arguments)


def overlay(**entries):
    return {"pretrained_cfg_overlay": entries}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *(("test_resnet", {"image_size": size}, "use 1 to 4096 pixels") for size in (0, -32, 10**6, 32.5, "64", True)),
        *((name, {"image_size": (64, 128)}, "one image_size for both sides") for name in ("test_resnet", "test_vit")),
        ("test_vit", {"img_size": (64, 128)}, "one image_size for both sides"),
        ("test_vit", {"image_size": 40}, r"patches of 16 px.*image_size to a multiple, such as 32"),
        ("vit_tiny_patch16_224", {"image_size": 230}, "such as 224"),
        ("mixer_s32_224", {"image_size": 100}, "such as 96"),
        *((name, {"in_chans": 1}, "read as RGB") for name in ("test_resnet", "test_vit", "wide_resnet10_1_cifar")),
        ("test_resnet", overlay(input_size=(3, 64, 64)), "give image_size"),
        *(("test_resnet", overlay(mean=mean), "mean is .*three numbers") for mean in ((0.5,), 0.5, (0.5, 0.5, "a"))),
        *(("test_resnet", overlay(std=(std,) * 3), "three positive numbers") for std in (0, -1.0, float("nan"))),
        *(("test_resnet", overlay(crop_pct=pct), "crop_pct is .*above 0, at most 2") for pct in (0, -1, 2.5, "x")),
        *(("test_resnet", overlay(interpolation=word), "bilinear, bicubic") for word in ("random", "cubic")),
        ("test_resnet", overlay(crop_mode="middle"), "center, squash, border"),
    ],
)
def test_inputs_that_cannot_be_trained_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, num_classes=3, **arguments)


def test_a_published_folder_for_grey_images_is_refused(tmp_path):
    model = CCSSLForImageClassification.from_timm("test_resnet", labels=["a", "b"], image_size=32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [1, 32, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"input_size is \[1, 32, 32\], not 3 channels"):
        CCSSLForImageClassification.from_pretrained(tmp_path)


def test_the_inputs_of_all_timm_models_are_accepted():
    for name in timm.list_pretrained():
        check_input(get_pretrained_cfg(name).to_dict())


@pytest.mark.parametrize(
    ("name", "hidden", "activation"),
    [("wide_resnet10_1_cifar", 64, nn.LeakyReLU), ("test_resnet", 2048, nn.ReLU), ("test_vit", 64, nn.ReLU)],
)
def test_projection_heads(name, hidden, activation):
    backbone, _ = create_backbone(name, num_classes=3)
    first, act, last = projection_head(backbone, backbone.head_hidden_size, 48)
    assert (first.in_features, first.out_features) == (backbone.head_hidden_size, hidden)
    assert type(act) is activation and (last.in_features, last.out_features) == (hidden, 48)


def test_a_head_survives_json():
    head = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4), nn.LeakyReLU(0.2), nn.ReLU(), nn.Linear(4, 2))
    again = build_head(json.loads(json.dumps(describe_head(head))))
    again.load_state_dict(head.state_dict())
    features = torch.randn(5, 8)
    assert torch.equal(again(features), head(features))
    with pytest.raises(ValueError, match="Conv2d"):
        describe_head(nn.Sequential(nn.Conv2d(1, 1, 1)))
