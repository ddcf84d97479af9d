from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ccssl_hf.modeling import CCSSLForImageClassification

LABELS = ["ant", "bee", "cat"]
BACKBONES = [
    ("test_resnet", {"image_size": 32}),
    ("test_vit", {"image_size": 32}),
    ("test_convnext", {"image_size": 32}),
    ("test_efficientnet", {"image_size": 32}),
    ("wide_resnet10_1_cifar", {}),
    ("wide_resnet10_1_cifar", {"image_size": 16}),
    ("resnet18", {"image_size": 32}),
    ("vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "drop_path_rate": 0.1}),
    ("resnetv2_18", {"image_size": 64}),
]


def tiny(**arguments) -> CCSSLForImageClassification:
    return CCSSLForImageClassification.from_timm("wide_resnet10_1_cifar", labels=LABELS, image_size=16, **arguments)


@pytest.mark.parametrize(("name", "arguments"), BACKBONES)
def test_logits_are_the_backbones_own_and_embeddings_have_unit_norm(name, arguments):
    model = CCSSLForImageClassification.from_timm(name, labels=LABELS, **arguments)
    assert model.training and model.backbone.training
    model.eval()
    images = torch.randn(4, *model.backbone.pretrained_cfg["input_size"])
    with torch.no_grad():
        output = model(images, labels=torch.tensor([0, 1, 2, 0]), return_embeddings=True)
        assert torch.equal(output.logits, model.backbone(images))
    assert output.logits.shape == (4, 3) and output.embeddings.shape == (4, 64)
    torch.testing.assert_close(output.embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 1, 2, 0])))


def test_the_backbone_runs_once():
    model = tiny(heads={"open": nn.Linear(64, 4)})
    passes = []
    model.backbone.conv1.register_forward_hook(lambda *_: passes.append(1))
    model(torch.randn(2, 3, 16, 16), return_embeddings=True)
    assert len(passes) == 1


def test_only_what_is_asked_for_is_computed():
    model = tiny().eval()
    images = torch.randn(2, 3, 16, 16)
    output = model(images)
    assert list(output) == ["logits"]
    (logits,) = model(images, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert set(model.config.keys_to_ignore_at_inference) == {"embeddings", "heads"}


def test_embeddings_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny()(torch.randn(2, 3, 16, 16), return_embeddings=True)
    assert output.logits.dtype == torch.bfloat16 and output.embeddings.dtype == torch.float32
    torch.testing.assert_close(output.embeddings.norm(dim=1), torch.ones(2))


def test_declared_heads_see_the_features_and_learn():
    open_head = nn.Linear(64, 4)
    model = tiny(heads={"open": open_head, "deep": nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))})
    assert model.feature_dim == 64
    output = model(torch.randn(2, 3, 16, 16), return_embeddings=True)
    assert {name: tuple(value.shape) for name, value in output.heads.items()} == {"open": (2, 4), "deep": (2, 2)}
    total = output.logits.sum() + output.embeddings.sum() + sum(value.sum() for value in output.heads.values())
    total.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert model.heads["open"][0] is open_head


def test_a_head_declared_again_keeps_its_weights():
    model = tiny(heads={"open": nn.Linear(64, 4)})
    before = model.heads["open"][0].weight.clone()
    model.add_heads({"open": nn.Linear(64, 4)})
    assert torch.equal(model.heads["open"][0].weight, before)
    with pytest.raises(ValueError, match="another head 'open'"):
        model.add_heads({"open": nn.Linear(64, 5)})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["ant", "bee", "ant"], r"repeated: \['ant'\]"),
        ([], "not empty"),
        ("ant", "list of class names"),
        ([0, 1], "list of class names"),
    ],
)
def test_labels_must_be_distinct_names(labels, message):
    with pytest.raises(ValueError, match=message):
        CCSSLForImageClassification.from_timm("test_resnet", labels=labels)


def test_labels_are_in_the_configuration():
    model = tiny()
    assert model.config.labels == LABELS and model.config.num_labels == 3
    assert model.config.id2label[1] == "bee" and model.config.label2id["bee"] == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("test_resnett", {}, "did you mean test_resnet"),
        ("test_resnet", {"num_classes": 3}, "follows from the labels"),
        ("deit_tiny_distilled_patch16_224", {"image_size": 32}, "Choose another backbone"),
        ("test_vit", {"image_size": 30}, "change image_size"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused_at_once(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        CCSSLForImageClassification.from_timm(name, labels=LABELS, **arguments)


def test_timm_arguments_reach_the_backbone():
    model = CCSSLForImageClassification.from_timm("test_vit", labels=LABELS, image_size=32, drop_path_rate=0.5)
    assert model.backbone.blocks[-1].drop_path1.drop_prob == 0.5
    assert model.config.model_args == {"drop_path_rate": 0.5, "img_size": 32}


def test_the_trainers_hooks():
    model = CCSSLForImageClassification.from_timm("test_vit", labels=LABELS, image_size=32)
    assert model.accepts_loss_kwargs is False and model.main_input_name == "pixel_values"
    model.gradient_checkpointing_enable()
    assert model.backbone.grad_checkpointing
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    model.gradient_checkpointing_disable()
    assert not model.backbone.grad_checkpointing


def test_building_a_model_keeps_the_weights_that_timm_gave():
    torch.manual_seed(0)
    model = CCSSLForImageClassification.from_timm("test_vit", labels=LABELS, image_size=32)
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.backbone.state_dict().items())
