"""handler.py in a process without this package, called like the inference toolkit does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from ccssl_hf.cli import app
from small_models import picture, published

BACKBONES = {"test_resnet": 64, "wide_resnet10_1_cifar": 32}

CALL_HANDLERS = """
    import base64, importlib.util, io, json, sys
    from importlib.abc import MetaPathFinder
    from pathlib import Path

    class NoPackage(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "ccssl_hf":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    sys.meta_path.insert(0, NoPackage())

    from PIL import Image
    from transformers import pipeline

    def handler_of(folder):  # as the toolkit does
        sys.path.insert(0, folder)
        spec = importlib.util.spec_from_file_location("handler", Path(folder) / "handler.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.EndpointHandler(folder)

    root, found = Path(sys.argv[1]), {}
    files = sorted(str(path) for path in (root / "pictures").iterdir())
    contents = [Path(file).read_bytes() for file in files]
    texts = [base64.b64encode(content).decode() for content in contents]
    for name in sys.argv[2:]:
        handler = handler_of(str(root / name))
        classify = pipeline("image-classification", model=str(root / name), device="cpu", trust_remote_code=True)
        expected, one = classify(files), contents[0]
        logits = classify(files[0], function_to_apply="none")
        found[name] = {
            "bytes": [handler({"inputs": content}) for content in contents] == expected,
            "base64": [handler({"inputs": text, "parameters": None}) for text in texts] == expected,
            "data": handler({"inputs": "data:image/png;base64," + texts[1]}) == expected[1],
            "images": [handler({"inputs": Image.open(file)}) for file in files] == expected,
            "list": handler({"inputs": [contents[0], texts[1], Image.open(files[2])]}) == expected[:3],
            "list of one": handler({"inputs": texts[:1]}) == expected[:1],
            "top_k": handler({"inputs": one, "parameters": {"top_k": 2}}) == expected[0][:2],
            "json": json.loads(json.dumps(handler({"inputs": texts}))) == expected,
            "function": handler({"inputs": one, "parameters": {"function_to_apply": "none"}}) == logits,
        }
        errors = found[name]["errors"] = []
        for data in (
            {}, {"inputs": []}, {"inputs": files[0]}, {"inputs": "https://localhost/a.png"}, {"inputs": b"no image"},
            {"inputs": one, "parameters": {"topk": 1}}, {"inputs": one, "parameters": {"top_k": 0}},
            {"inputs": {"image": texts[0]}},
        ):
            try:
                errors.append(str(handler(data)))
            except ValueError as error:
                errors.append(str(error))
    print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The handlers' answers, from one process: its imports are slow."""
    root = tmp_path_factory.mktemp("endpoints")
    for name, size in BACKBONES.items():
        published(root / name, name, size)
        result = CliRunner().invoke(app, ["export", "handler", str(root / name)])
        assert result.exit_code == 0, result.output
        assert result.stdout == f"Written to {root / name}: handler.py, requirements.txt.\n"
    (root / "pictures").mkdir()
    picture(50, 30).save(root / "pictures" / "a.png")
    picture(30, 60).convert("CMYK").save(root / "pictures" / "b.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(64, 32).save(root / "pictures" / "c.jpg", exif=exif)
    picture(40, 40).quantize(16).save(root / "pictures" / "d.gif")
    script = root / "call.py"
    script.write_text(textwrap.dedent(CALL_HANDLERS))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(root), *BACKBONES]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.split("FOUND ")[-1])


@pytest.mark.parametrize("name", BACKBONES)
def test_scores_are_exactly_the_pipelines_without_the_package(found, name):
    right = {what: fits for what, fits in found[name].items() if what != "errors"}
    assert right == dict.fromkeys(right, True)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_cannot_be_answered_gets_a_sentence(found, name):
    words = [
        "inputs is missing",
        "inputs is missing",
        "not base64 text",  # a path is never opened
        "URLs are not fetched",
        "not a readable image",
        "did you mean 'top_k'?",
        "top_k must be an integer",
        "is of type dict",
    ]
    assert [word in error for word, error in zip(words, found[name]["errors"], strict=True)] == [True] * len(words)


def test_a_folder_without_a_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "handler", str(tmp_path)])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "config.json" in line and "save_pretrained" in line
