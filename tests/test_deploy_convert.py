from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.deploy.convert import convert
from conftest import SHARED, needs_shared

LABELS = [f"class {index}" for index in range(10)]
WIDE = dict(labels=LABELS, backbone="wide_resnet28_2_cifar")
RESNET = dict(labels=LABELS, backbone="resnet18")


def save(path: Path, **entries: object) -> Path:
    torch.save(entries, path)
    return path


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


# --- SemiCLS -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(SHARED / "golden" / "wide_resnet_10_1.npz") as file:
        return dict(file)


@pytest.fixture
def semicls(golden, tmp_path) -> Path:
    """A checkpoint of the authors' code, with the reference weights as averaged weights."""
    prefix = "state_dict/"
    ema = {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in golden if key.startswith(prefix)}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.03, momentum=0.9, nesterov=True)
    return save(
        tmp_path / "checkpoint.pth.tar",
        epoch=512,
        state_dict={key: value + 1 for key, value in ema.items()},
        ema_state_dict=ema,
        acc=90.0,
        best_acc=90.83,
        optimizer=optimizer.state_dict(),
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict(),
        queue_feats=torch.zeros(4, 64),
        queue_probs=torch.zeros(4, 10),
        queue_ptr=0,
    )


@needs_shared
def test_the_authors_weights_give_the_authors_outputs(golden, semicls, tmp_path):
    report = convert("semicls", semicls, tmp_path / "out", labels=LABELS, backbone="wide_resnet10_1_cifar")
    model = CCSSLForImageClassification.from_pretrained(tmp_path / "out")
    images = torch.from_numpy(golden["images"])
    with torch.no_grad():
        output = model(images, return_embeddings=True)
        plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()(images)
    np.testing.assert_allclose(output.logits, golden["logits_eval"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.embeddings, golden["embeddings_eval"], rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.logits, output.logits)
    assert report.source == "ema_state_dict" and not report.unknown and not report.fresh
    assert sorted(report.mapped.values()) == sorted(model.state_dict())
    assert report.left_out["the other set of weights"] == ("state_dict",)
    assert {"optimizer", "queue_feats", "best_acc"} <= set(report.left_out["training state, not weights"])
    assert model.config.labels == LABELS


@needs_shared
def test_raw_weights_without_the_head(semicls, tmp_path):
    out = tmp_path / "out"
    report = convert(
        "semicls", semicls, out, labels=LABELS, backbone="wide_resnet10_1_cifar", weights="raw", with_head=False
    )
    assert not (out / "ccssl_head.safetensors").exists()
    assert report.left_out["the projection head, which was not requested"] == (
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    )
    raw = torch.load(semicls, weights_only=True)["state_dict"]
    plain = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert torch.equal(plain.stages[1][0].shortcut.weight, raw["block2.layer.0.convShortcut.weight"])


@pytest.mark.parametrize("proj", [True, False])
def test_a_resnet_of_the_authors_gives_torchvisions_outputs(tmp_path, proj):
    """Their ResNets are torchvision's; the classifier has another name, and the projection is fc1, ReLU, fc2."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10).eval()
    state = {re.sub(r"^fc\.", "classifier.", key): value for key, value in network.state_dict().items()}
    head = (
        dict(fc1=torch.nn.Linear(512, 2048), fc2=torch.nn.Linear(2048, 32))
        if proj
        else dict(fc=torch.nn.Linear(512, 32))
    )
    for name, layer in head.items():
        state |= prefixed(layer.state_dict(), f"{name}.")
    path = save(tmp_path / "checkpoint.pth.tar", state_dict=prefixed(state, "module."), ema_state_dict=None)
    report = convert("semicls", path, tmp_path / "out", weights="raw", **RESNET)
    assert report.mapped["module.classifier.weight"] == "backbone.fc.weight"
    assert (tmp_path / "out" / "ccssl_head.safetensors").exists() == proj
    images = torch.randn(2, 3, 64, 64)
    if proj:
        model = CCSSLForImageClassification.from_pretrained(tmp_path / "out")
    else:
        assert report.left_out["an unused projection, as the network has no proj"] == (
            "module.fc.weight",
            "module.fc.bias",
        )
        with pytest.warns(UserWarning, match="no projection head"):
            model = CCSSLForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        output = model(images, return_embeddings=True)
        torch.testing.assert_close(output.logits, network(images))
        if proj:
            network.fc = torch.nn.Identity()
            embeddings = F.normalize(head["fc2"](torch.relu(head["fc1"](network(images)))))
            torch.testing.assert_close(output.embeddings, embeddings)


@pytest.mark.parametrize(
    ("backbone", "arguments", "size", "mean", "crop"),
    [
        ("resnet18", {}, 96, 0.4914, 1.0),
        pytest.param("resnet50", {}, 224, 0.4732, 0.875, marks=pytest.mark.slow),
        ("wide_resnet28_2_cifar", {}, 32, 0.4914, 1.0),
        ("wide_resnet28_2_cifar", dict(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)), 32, 0.5071, 1.0),
        ("resnet18", dict(image_size=64), 64, 0.4914, 1.0),
    ],
)
def test_images_enter_as_in_the_authors_configurations(tmp_path, backbone, arguments, size, mean, crop):
    model = CCSSLForImageClassification.from_timm(backbone, labels=["a"]).backbone
    names = {f"stages.{stage}.": f"block{stage + 1}.layer." for stage in range(3)} | {"shortcut": "convShortcut"}
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key if "wide" in backbone else re.sub(r"^fc\.", "classifier.", key)] = value
    path = save(tmp_path / "checkpoint.pth.tar", ema_state_dict=state)
    convert("semicls", path, tmp_path / "out", labels=["a"], backbone=backbone, **arguments)
    cfg = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).pretrained_cfg
    assert (*cfg["input_size"][1:], cfg["mean"][0], cfg["crop_pct"]) == (size, size, mean, crop)


# --- MoCo --------------------------------------------------------------------------------------------------------


def moco_state(architecture: str, prefix: str = "module.") -> dict[str, Tensor]:
    """Both encoders with their MLP heads, and the queue."""
    encoder = getattr(torchvision.models, architecture)(num_classes=16)
    width = encoder.fc.in_features
    encoder.fc = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), encoder.fc)
    state = encoder.state_dict()
    queue = {"queue": torch.zeros(16, 32), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    both = prefixed(state, "encoder_q.") | prefixed({k: state[k] for k in list(state)[:9]}, "encoder_k.")
    return prefixed(both | queue, prefix)


@pytest.mark.parametrize("architecture", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_a_moco_backbone_starts_training(tmp_path, architecture):
    state = moco_state(architecture)
    path = save(tmp_path / "moco.pth.tar", epoch=800, arch=architecture, state_dict=state, optimizer={"state": {}})
    report = convert("moco", path, tmp_path / "out", labels=LABELS[:3], backbone=architecture)
    with pytest.warns(UserWarning, match="no projection head"):
        model = CCSSLForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state["module.encoder_q.layer4.1.conv2.weight"])
    assert model.backbone.fc.out_features == 3 and report.fresh == ("backbone.fc.weight", "backbone.fc.bias")
    assert report.left_out["the queue of negatives"] == ("module.queue", "module.queue_ptr")
    assert len(report.left_out["the key encoder, a moving average of the query encoder"]) == 9
    assert len(report.left_out["the query encoder's head for MoCo's own loss"]) == 4
    accounted = {*report.mapped, *(key for keys in report.left_out.values() for key in keys)}
    assert accounted == {*state, "epoch", "arch", "optimizer"}
    text = str(report)
    assert "module.queue_ptr" in text and f"as {architecture}" in text and "fresh: backbone.fc.weight" in text


def test_moco_needs_a_query_encoder(tmp_path):
    state = {"module.base_encoder.conv1.weight": torch.zeros(64, 3, 7, 7)}
    with pytest.raises(ValueError, match=r"no query encoder.*MoCo v2"):
        convert("moco", save(tmp_path / "moco.pth.tar", state_dict=state), tmp_path / "out", labels=LABELS)


# --- USB ---------------------------------------------------------------------------------------------------------


def usb_state(*, stages: int, block_bias: bool, preactivate_all: bool, classifier: str) -> dict[str, Tensor]:
    """Random weights of a trained-looking Wide ResNet 28-2 under USB's names."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, ins: int, outs: int, size: int, bias: bool) -> None:
        state[f"{name}.weight"] = torch.randn(outs, ins, size, size, generator=generator) * (1 / (ins * size**2)) ** 0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(outs, generator=generator) * 0.3

    def norm(name: str, channels: int, used: bool = True) -> None:
        state[f"{name}.weight"] = 0.5 + torch.rand(channels, generator=generator) if used else torch.ones(channels)
        state[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.3 if used else torch.zeros(channels)
        state[f"{name}.running_mean"] = torch.randn(channels, generator=generator) * 0.1
        state[f"{name}.running_var"] = 0.01 + torch.rand(channels, generator=generator) * 0.1
        state[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    conv("conv1", 3, 16, 3, True)
    ins = 16
    for stage in range(stages):
        outs = 32 * 2**stage
        for block in range(4):
            name = f"block{stage + 1}.layer.{block}"
            norm(f"{name}.bn1", ins, used=preactivate_all or stage == 0 or block > 0)
            conv(f"{name}.conv1", ins, outs, 3, block_bias)
            norm(f"{name}.bn2", outs)
            conv(f"{name}.conv2", outs, outs, 3, block_bias)
            if block == 0:
                conv(f"{name}.convShortcut", ins, outs, 1, block_bias)
            ins = outs
    norm("bn1", ins)
    state[f"{classifier}.weight"] = torch.randn(10, ins, generator=generator) * 0.1
    state[f"{classifier}.bias"] = torch.randn(10, generator=generator)
    return state


def usb_logits(
    state: dict[str, Tensor],
    images: Tensor,
    *,
    stages: int,
    preactivate_all: bool,
    classifier: str,
    eps: float,
    last_eps: float,
    first_stride: int = 1,
) -> Tensor:
    """The forward pass, written out on the tensors of the checkpoint."""

    def conv(name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride, padding=padding)

    def activate(name: str, x: Tensor, eps: float) -> Tensor:
        moments = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        x = F.batch_norm(x, *moments, state[f"{name}.weight"], state[f"{name}.bias"], training=False, eps=eps)
        return F.leaky_relu(x, 0.1)

    x = conv("conv1", images, 1, 1)
    for stage in range(stages):
        for block in range(4):
            name, stride = f"block{stage + 1}.layer.{block}", 1
            if block:
                inner, outer = activate(f"{name}.bn1", x, eps), x
            else:
                stride = 2 if stage else first_stride
                inner = activate(f"{name}.bn1", x, eps) if preactivate_all or stage == 0 else x
                outer = conv(f"{name}.convShortcut", inner, stride, 0)
            inner = activate(f"{name}.bn2", conv(f"{name}.conv1", inner, stride, 1), eps)
            x = outer + conv(f"{name}.conv2", inner, 1, 1)
    features = activate("bn1", x, last_eps).mean((2, 3))
    return features @ state[f"{classifier}.weight"].T + state[f"{classifier}.bias"]


USB_VERSIONS = {
    "TorchSSL": dict(block_bias=True, preactivate_all=False, classifier="fc", eps=1e-3, last_eps=1e-3),
    "USB": dict(block_bias=True, preactivate_all=True, classifier="fc", eps=1e-3, last_eps=1e-3),
    "later USB": dict(block_bias=False, preactivate_all=False, classifier="classifier", eps=1e-5, last_eps=1e-3),
}


@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("version", USB_VERSIONS)
def test_a_usb_network_gives_the_same_logits(tmp_path, version, stages):
    definition = dict(USB_VERSIONS[version])
    shape = {key: definition[key] for key in ("preactivate_all", "classifier")}
    state = usb_state(stages=stages, block_bias=definition.pop("block_bias"), **shape)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    strides = dict(first_stride=2 if stages == 4 else 1, stages=stages)
    expected = usb_logits(state, images, **definition, **strides)
    for change in (
        dict(eps=1e-5 if definition["eps"] == 1e-3 else 1e-3),
        dict(last_eps=1e-5),
        dict(preactivate_all=not definition["preactivate_all"]),
    ):
        other = usb_logits(state, images, **{**definition, **change}, **strides)
        assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-3), f"the test would not see {change}"
    path = save(
        tmp_path / "latest_model.pth", model=state, ema_model=prefixed(state, "module."), it=9, optimizer={}, epoch=1
    )
    backbone = "wide_resnet37_2_cifar" if stages == 4 else "wide_resnet28_2_cifar"
    report = convert("usb", path, tmp_path / "out", labels=LABELS, backbone=backbone)
    assert len(report.mapped) == len(state) and not report.fresh and report.source == "ema_model"
    for model in (
        AutoModelForImageClassification.from_pretrained(tmp_path / "out"),
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
    ):
        with torch.no_grad():
            logits = model.eval()(images)
        torch.testing.assert_close(getattr(logits, "logits", logits), expected, rtol=1e-4, atol=1e-4)


def test_usb_wraps_the_networks_of_some_algorithms(tmp_path):
    state = usb_state(stages=3, block_bias=True, preactivate_all=True, classifier="fc")
    wrapped = prefixed(state, "module.backbone.") | {
        "module.rot_classifier.weight": torch.zeros(4, 128),
        "module.mlp_proj.0.weight": torch.zeros(128, 128),
    }
    path = save(tmp_path / "model_best.pth", model=wrapped, p_model=torch.ones(10), queue_ptr=0, rho_init=1.0)
    report = convert("usb", path, tmp_path / "out", weights="raw", **WIDE)
    assert report.left_out["ReMixMatch's rotation classifier"] == ("module.rot_classifier.weight",)
    assert report.left_out["training state, not weights"] == ("p_model", "queue_ptr", "rho_init")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(model.stages[0][0].conv1.bias, state["block1.layer.0.conv1.bias"])


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usb() -> dict[str, Tensor]:
    return usb_state(stages=3, block_bias=True, preactivate_all=True, classifier="fc")


def test_unknown_keys_are_all_listed(usb, tmp_path):
    more = {**usb, "aux_classifier.weight": torch.zeros(1), "block9.layer.0.bn1.weight": torch.zeros(1)}
    path = save(tmp_path / "model.pth", model=more, projector={})
    with pytest.raises(ValueError, match=r"3 keys .*\(projector, aux_classifier.weight, block9.layer.0.bn1.weight\)"):
        convert("usb", path, tmp_path / "out", weights="raw", **WIDE)
    assert not (tmp_path / "out").exists()
    report = convert("usb", path, tmp_path / "out", weights="raw", allow_unknown=True, **WIDE)
    assert report.unknown == ("projector", "aux_classifier.weight", "block9.layer.0.bn1.weight")
    assert "left out, unknown: projector, aux_classifier.weight" in str(report)


def test_one_tensor_under_two_keys_is_not_dropped_in_silence(usb, tmp_path):
    path = save(tmp_path / "model.pth", model={**usb, "module.fc.bias": usb["fc.bias"] + 1})
    with pytest.raises(ValueError, match=r"1 keys .*module\.fc\.bias"):
        convert("usb", path, tmp_path / "out", weights="raw", **WIDE)


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        (
            "model",
            dict(weights="ema"),
            r"no weights under 'ema_model' \(it has model\): use 'model' with weights='raw'",
        ),
        ("net", dict(weights="raw"), r"no weights under 'model' \(it has net\): pass another file"),
        ("model", dict(weights="EMA"), "use 'ema' or 'raw'"),
        ("model", dict(weights="raw", labels=["cat", "dog"]), "has 10 classes, but 2 labels"),
        (
            "model",
            dict(weights="raw", backbone="wide_resnet28_8_cifar"),
            "choose the backbone that it was trained with",
        ),
        ("model", dict(weights="raw", backbone="wide_resnet37_2_cifar"), "lacks .* choose the backbone"),
        ("model", dict(weights="raw", backbone="wide_resnet10_1_cifar"), "allow_unknown"),
        ("model", dict(weights="raw", backbone="resnet50"), "not a Wide ResNet of USB"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(usb, tmp_path, entry, arguments, message):
    path = save(tmp_path / "model.pth", **{entry: usb})
    with pytest.raises(ValueError, match=message):
        convert("usb", path, tmp_path / "out", **{**WIDE, **arguments})
    assert not (tmp_path / "out").exists()


def test_a_network_without_biases_is_not_of_usb(usb, tmp_path):
    path = save(tmp_path / "model.pth", model={key: value for key, value in usb.items() if key != "conv1.bias"})
    with pytest.raises(ValueError, match="convert it as semicls"):
        convert("usb", path, tmp_path / "out", weights="raw", **WIDE)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_runs_nothing(tmp_path, zipped):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {}, "x": Malicious(tmp_path / "trace")}, path, _use_new_zipfile_serialization=zipped)
    for source, arguments in (("semicls", RESNET), ("usb", WIDE), ("moco", dict(labels=LABELS))):
        with pytest.raises(ValueError, match=r"more than weights \((posix|nt)\.mkdir\)"):
            convert(source, path, tmp_path / "out", **arguments)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.float64(94.9), r"numpy\._?core\.multiarray\.scalar"), (argparse.Namespace(lr=0.03), r"argparse\.Namespace")],
)
def test_objects_in_a_checkpoint_are_named(tmp_path, value, kind):
    path = save(tmp_path / "model.pth", model={"conv1.bias": torch.zeros(1)}, best_eval_acc=value)
    with pytest.raises(ValueError, match=rf"more than weights \({kind}\).*torch\.save only its state dicts"):
        convert("usb", path, tmp_path / "out", **WIDE)


def test_a_file_that_is_no_checkpoint(usb, tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match="no file"):
        convert("moco", path, tmp_path / "out", labels=LABELS)
    whole = save(path, model=usb).read_bytes()
    for content in (b"", b"hello world", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            convert("moco", path, tmp_path / "out", labels=LABELS)
    torch.save(torch.zeros(1), path)
    with pytest.raises(ValueError, match="contains a Tensor"):
        convert("moco", path, tmp_path / "out", labels=LABELS)


def flipped(content: bytes) -> bytes:
    return content[:200] + bytes(50) + content[250:]


def resnet18() -> dict[str, Tensor]:
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    return {re.sub(r"^fc\.", "classifier.", key): value for key, value in state.items()}


STATE = {"state_dict": {"conv1.weight": torch.zeros(3)}}
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(STATE, protocol=4)), "or is damaged"),
    "a pickle of objects in objects": (
        lambda path: path.write_bytes(b"\x80\x02" + b"]" * 10**5 + b"."),
        "or is damaged",
    ),
    "a zip file": (lambda path: shutil.make_archive(str(path)[:-4], "zip", path.parent / "empty"), "or is damaged"),
    "a damaged file": (
        lambda path: (torch.save(STATE, path), path.write_bytes(flipped(path.read_bytes()))),
        "is damaged",
    ),
    "a truncated file of old torch": (
        lambda path: (
            torch.save(STATE, path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:-9]),
        ),
        "or is damaged",
    ),
    "a whole network": (lambda path: torch.save(torch.nn.Linear(2, 2), path), r"more than weights \(torch.nn.modules"),
    "safetensors": (lambda path: save_file({"a": torch.zeros(1)}, path), "is a safetensors file .*load it with"),
    "a pointer of Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS .*git lfs pull",
    ),
    "a page of the Hub": (lambda path: path.write_text("<!DOCTYPE html>\n<html>"), "is a web page .*download"),
    "a list": (lambda path: torch.save([1], path), "contains a list: pass a checkpoint"),
    "numbered tensors": (lambda path: save(path, state_dict={1: torch.zeros(1)}), "no weights under 'state_dict'"),
    "sparse tensors": (lambda path: save(path, state_dict={"a": torch.eye(2).to_sparse()}), "no weights under"),
    "no tensors": (lambda path: save(path, state_dict={}), "no weights under 'state_dict'"),
    "integers": (
        lambda path: save(path, state_dict={key: value.to(torch.int8) for key, value in resnet18().items()}),
        "has torch.int8 for 'backbone.conv1.weight'",
    ),
    "a view of a petabyte": (
        lambda path: save(path, state_dict={"conv1.weight": torch.zeros(1).expand(10**15)}),
        r"lacks \d+ tensors",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_foreign_or_damaged_file_gets_one_sentence(case, tmp_path, recwarn):
    write, words = FILES[case]
    (tmp_path / "empty").mkdir()
    path = tmp_path / "file.zip"
    write(path)
    with pytest.raises(ValueError, match=words) as caught:
        convert("semicls", path, tmp_path / "out", weights="raw", **RESNET)
    assert "\n" not in str(caught.value) and not [each for each in recwarn if "pickle" in str(each.message)]


@pytest.mark.parametrize(
    ("source", "arguments", "sentence"),
    [
        ("moco", dict(weights="raw"), "one set of weights: leave out weights"),
        ("moco", dict(with_head=False), "of moco has no projection head to write: leave out with_head"),
        ("usb", dict(with_head=True, backbone="wide_resnet28_2_cifar"), "of usb has no projection head"),
        ("usb", {}, "backbone of a usb checkpoint is unknown: pass backbone"),
        ("semicls", {}, "backbone of a semicls checkpoint is unknown: pass backbone"),
    ],
)
def test_an_argument_that_does_not_apply_is_refused(tmp_path, source, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(source, tmp_path / "model.pth", tmp_path / "out", labels=LABELS, **arguments)
