"""Loads published models where this package can't be imported, by every means there is, and says what it finds.

    python load_elsewhere.py ROOT NAME=SOURCE ...

A SOURCE is a folder or a Hub id. ROOT holds `picture.png`, and for each NAME what its model makes of the picture:
`pixels`, `logits` and `features` in `NAME.safetensors`. Prints FOUND and JSON: of each name what is equal bit for bit.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline


class NoPackage(MetaPathFinder):
    """As where it was never installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "ccssl_hf":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def at_home(model: Any) -> Any:
    """The weights in memory of their own: in a mapped file they lie anyhow, and kernels round by that."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval()


@torch.no_grad()
def load(source: str, image: Image.Image, expected: dict[str, torch.Tensor], **trust: bool) -> dict[str, Any]:
    processor = AutoImageProcessor.from_pretrained(source)  # never needs trust
    pixels = processor(image)["pixel_values"]
    classifier = at_home(AutoModelForImageClassification.from_pretrained(source, **trust))
    features = at_home(AutoModel.from_pretrained(source, **trust))(pixels).pooler_output
    pipe = pipeline("image-classification", model=source, device="cpu", **trust)
    logits = classifier(pixels).logits
    native = timm.create_model(f"{'local-dir' if Path(source).is_dir() else 'hf-hub'}:{source}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(native))
    best = pipe(image, top_k=1)[0]
    return {
        "processor": torch.equal(pixels, expected["pixels"]),
        "classifier": torch.equal(logits, expected["logits"]),
        "labels": [classifier.config.id2label[i] for i in range(classifier.config.num_labels)],
        "features": torch.equal(features, expected["features"]),
        "pipeline": best["label"] == classifier.config.id2label[int(logits.argmax())]
        and abs(best["score"] - logits.softmax(-1).max().item()) < 1e-7,
        "timm": torch.equal(native(pixels), expected["logits"]),
        "timm_transform": torch.equal(transform(image)[None], pixels),
        "timm_labels": list(native.pretrained_cfg["label_names"]),
    }


def refusal(source: str, **options: Any) -> str:
    """The error with which transformers ends; empty where there is none."""
    try:
        AutoModelForImageClassification.from_pretrained(source, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    assert not any(module.startswith("ccssl_hf") for module in sys.modules)
    sys.meta_path.insert(0, NoPackage())
    root = Path(sys.argv[1])
    picture = Image.open(root / "picture.png")
    found: dict[str, Any] = {}
    for name, _, source in (word.partition("=") for word in sys.argv[2:]):
        expected = load_file(root / f"{name}.safetensors")
        own = name.startswith("wide")
        untrusted = refusal(source) if own else ""  # before its code has run
        trust = {"trust_remote_code": True} if own else {}
        found[name] = load(source, picture, expected, **trust) | {"untrusted": untrusted}
    print("FOUND " + json.dumps(found))
