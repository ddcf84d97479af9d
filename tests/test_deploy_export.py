"""ONNX files against PyTorch, transformers' pipeline and transformers.js."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.cli import app
from ccssl_hf.deploy import export
from ccssl_hf.deploy.export import export_onnx, preprocessor_config
from small_models import LABELS, picture, published

BACKBONES = {"test_resnet": 96, "test_vit": 64, "wide_resnet10_1_cifar": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published folders and the ONNX folders of the command next to them."""
    root = tmp_path_factory.mktemp("onnx")
    for name, size in BACKBONES.items():
        published(root / name, name, size)
        result = CliRunner().invoke(app, ["export", "onnx", str(root / name)])
        assert result.exit_code == 0, result.output
        file = root / f"{name}-ONNX" / "onnx" / "model.onnx"
        assert result.stdout.startswith(f"{file}: logits of 8 images are PyTorch's within ")
    return root


@pytest.mark.parametrize("name", BACKBONES)
def test_the_file_says_what_the_pipeline_says_in_batches_of_any_size(exported, name):
    pipeline = transformers.pipeline("image-classification", model=str(exported / name), device="cpu")
    images = [picture(100, 80), picture(70, 120), picture(64, 64)]
    session = onnxruntime.InferenceSession(exported / f"{name}-ONNX" / "onnx" / "model.onnx")
    pixels = pipeline.image_processor(images)["pixel_values"].numpy()
    for count in (1, 3):
        [logits] = session.run(["logits"], {"pixel_values": pixels[:count]})
        for row, answer in zip(logits, pipeline(images[:count], function_to_apply="none"), strict=True):
            scores = {one["label"]: one["score"] for one in answer}
            np.testing.assert_allclose(row, [scores[label] for label in LABELS], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_folder_is_plain_and_names_no_path(exported, name):
    folder = exported / f"{name}-ONNX"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["config.json", "onnx/model.onnx", "preprocessor_config.json"]
    content = (folder / "onnx" / "model.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content and str(Path.home()).encode() not in content
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    [given], [result] = graph.input, graph.output
    assert (given.name, result.name) == ("pixel_values", "logits")
    size = BACKBONES[name]
    shape = [dim.dim_value or dim.dim_param for dim in given.type.tensor_type.shape.dim]
    assert shape == ["batch", 3, size, size]
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == LABELS and config["transformers.js_config"] == {"dtype": "fp32"}
    assert transformers.AutoConfig.from_pretrained(folder).id2label == dict(enumerate(LABELS))  # as optimum reads it


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        ({"crop_pct": 0.8, "interpolation": "bicubic"}, {"shortest_edge": 80}),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, {"shortest_edge": 64}),
        ({"crop_pct": 0.8, "interpolation": "bicubic", "crop_mode": "squash"}, {"height": 80, "width": 80}),
    ],
)
def test_preprocessing_is_timms(cfg, size):
    """Compare a processor that reads such files with timm's transform."""
    cfg |= {"input_size": (3, 64, 64), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    config = preprocessor_config(cfg)
    assert config["size"] == size and config["crop_size"] == {"height": 64, "width": 64}
    image = picture(150, 100)
    pixels = transformers.CLIPImageProcessor(**config)(image, return_tensors="pt")["pixel_values"][0]
    expected = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))(image)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.01 / 255 / 0.2)  # a grey level, as one may round


def test_preprocessing_without_counterpart_is_an_error_before_any_work(tmp_path):
    model = CCSSLForImageClassification.from_timm(
        "test_resnet", labels=LABELS, pretrained_cfg_overlay={"crop_mode": "border"}
    )
    with pytest.raises(ValueError, match=r"crop_mode 'border' .* set crop_mode to center or squash"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_says_something_else_gets_no_name(exported, tmp_path, monkeypatch):
    model = CCSSLForImageClassification.from_pretrained(exported / "wide_resnet10_1_cifar")
    other = (exported / "wide_resnet10_1_cifar-ONNX" / "onnx" / "model.onnx").read_bytes()
    with torch.no_grad():
        model.backbone.fc.bias[0] += 0.01
    monkeypatch.setattr(export, "_graph", lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match=r"differ by 0\.01 on 1 images"):
        export_onnx(model, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["_model.onnx.partial"]


def test_what_a_user_can_get_wrong(exported, tmp_path):
    folder = exported / "wide_resnet10_1_cifar"
    for arguments, words in (
        ([str(folder), "--out", str(folder)], "is a published folder, and ONNX needs another config.json"),
        ([str(tmp_path)], "config.json"),
    ):
        result = CliRunner().invoke(app, ["export", "onnx", *arguments])
        assert result.exit_code == 2
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert words in line
    with pytest.raises(ValueError, match="opset is 9, but must be at least 18"):
        export_onnx(CCSSLForImageClassification.from_pretrained(folder), tmp_path, opset=9)


CLASSIFY = """
    const { env, pipeline } = require("@huggingface/transformers");
    const [root, name, ...images] = process.argv.slice(1);
    env.allowRemoteModels = false;
    env.localModelPath = root;
    (async () => {
      const classify = await pipeline("image-classification", name);
      console.log(JSON.stringify(await classify(images, { top_k: null })));
    })();
"""


def has_transformers_js() -> bool:
    if shutil.which("node") is None:
        return False
    return not subprocess.run(["node", "-e", 'require("@huggingface/transformers")'], capture_output=True).returncode


@pytest.mark.skipif(
    not has_transformers_js(), reason="needs node, and NODE_PATH with the npm package @huggingface/transformers"
)
@pytest.mark.parametrize("name", BACKBONES)
def test_transformers_js_gives_the_pipelines_scores(exported, name):
    """Images need no resizing here: only Python resizes like Pillow."""
    files = []
    for number in range(3):
        files.append(str(exported / f"{name}_{number}.png"))
        picture(BACKBONES[name], BACKBONES[name]).save(files[-1])
    run = subprocess.run(
        ["node", "-e", CLASSIFY, str(exported), f"{name}-ONNX", *files], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    answers: list[Any] = json.loads(run.stdout)
    expected = transformers.pipeline("image-classification", model=str(exported / name), device="cpu")(files)
    for answer, scores in zip(answers, expected, strict=True):
        assert [one["label"] for one in answer] == [one["label"] for one in scores]
        np.testing.assert_allclose(
            [one["score"] for one in answer], [one["score"] for one in scores], rtol=0, atol=1e-5
        )
