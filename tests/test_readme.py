"""What the README shows is true: its code runs, its table is today's, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sklearn.datasets import load_sample_images

from ccssl_hf.algorithms.__main__ import with_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def photos(folder: Path) -> None:
    """A small image folder of two classes, cut from two photographs."""
    from PIL import Image

    for label, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for number in range(14):
            split = "labeled" if number < 4 else "validation" if number < 6 else "unlabeled"
            path = folder / split / (label if split != "unlabeled" else "all") / f"{label}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[20 * number : 20 * number + 120, 40 * number : 40 * number + 120]).save(path)


def test_the_first_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    smaller = {
        '"resnet50"': '"test_resnet"',
        "pretrained=True": "pretrained=False",
        "max_steps=20_000": "max_steps=2, mu=1, use_cpu=True, report_to='none'",
        "per_device_train_batch_size=16": "per_device_train_batch_size=4",
    }
    for whole, tiny in smaller.items():
        assert whole in code
        code = code.replace(whole, tiny)
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    written = {path.name for path in (tmp_path / "outputs/photos").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= written


def test_the_table_of_algorithms_is_todays() -> None:
    assert with_table(README) == README, "write it anew: python -m ccssl_hf.algorithms README.md"


def test_every_file_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
