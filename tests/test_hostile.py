"""Configurations, weights, cards and class names that somebody else wrote, to do harm or by mistake."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.card.report import describe
from ccssl_hf.checkpoint import save_tensors

LABELS = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    torch.manual_seed(0)
    model = CCSSLForImageClassification.from_timm("test_vit", labels=LABELS, image_size=32, drop_path_rate=0.1)
    model.add_heads({"open": torch.nn.Linear(model.feature_dim, 4)})
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def change(folder: Path, **entries: Any) -> None:
    """Changes entries of config.json; `model_args` and `pretrained_cfg` are merged, and None removes an entry."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in entries.items():
        merged = key in ("model_args", "pretrained_cfg") and isinstance(value, dict)
        config[key] = config[key] | value if merged else value
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------------- configurations

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a file of weights": ({"model_args": {"checkpoint_path": "/etc/hostname"}}, "no argument 'checkpoint_path'"),
    "weights by pretrained_cfg": (
        {"model_args": {"pretrained": True, "pretrained_cfg": {"file": "/etc/hostname"}}},
        "no argument 'pretrained'; .*no argument 'pretrained_cfg'",
    ),
    "an overlay": ({"model_args": {"pretrained_cfg_overlay": {"url": "http://x"}}}, "'pretrained_cfg_overlay'"),
    "a cache": ({"model_args": {"cache_dir": "/tmp/x"}}, "no argument 'cache_dir'"),
    "a misspelt argument": ({"model_args": {"drop_path_rat": 0.1}}, "Did you mean 'drop_path_rate'"),
    "a path as a layer": ({"model_args": {"norm_layer": "../../x.py"}}, r"norm_layer is '../../x.py', not a number or"),
    "an unknown layer": ({"model_args": {"act_layer": "evil"}}, "can't be built with its model_args"),
    "a model of billions of classes": ({"num_classes": 10**9, "label_names": None}, "num_classes is 1000000000, not a"),
    "too many classes": ({"num_classes": 10**6, "label_names": None}, "no tensor of the weights has more than"),
    "other classes than the weights": (
        {"num_classes": 5, "label_names": list("abcde")},
        r"head.weight is \[3, 64\] and",
    ),
    "a million names": ({"label_names": [str(n) for n in range(10**6)]}, "has 1,000,000 names for num_classes 3"),
    "too few names": ({"label_names": ["ant", "bee"]}, "label_names has 2 names for num_classes 3"),
    "no names": ({"label_names": []}, r"label_names is \[\], not a list of names"),
    "names that are numbers": (
        {"label_names": ["ant", 1, None]},
        "label_names has 1, null or missing, which are no names",
    ),
    "names twice": ({"label_names": ["ant", "ant", "bee"]}, "label_names repeats 'ant'"),
    "a word as names": ({"label_names": "abc"}, "label_names is 'abc', not a list"),
    "a class of -1": ({"num_classes": -1}, "num_classes is -1, not a number"),
    "classes in words": ({"num_classes": "3"}, "num_classes is '3', not a number"),
    "a huge input": ({"pretrained_cfg": {"input_size": [3, 100_000, 100_000]}}, r"input_size is \[3, 100000, 100000\]"),
    "an input of words": ({"pretrained_cfg": {"input_size": "3x32x32"}}, "input_size is '3x32x32', not"),
    "a huge image": ({"model_args": {"img_size": 100_000}}, "pos_embed is"),
    "more than a huge image": ({"model_args": {"img_size": 10**9}}, "img_size is 1000000000, not a number or short"),
    "a wide network": ({"model_args": {"embed_dim": 99_968}}, r"blocks.0.attn.proj.bias is \[64\] and not \[99968\]"),
    "a deep network": ({"model_args": {"depth": 100_000}}, "more parameters than the"),
    "arguments of another type": ({"model_args": {"patch_size": {"a": 1}}}, "can't be built"),
    "a list of arguments": ({"model_args": [1]}, r"model_args is \[1\], not an object"),
    "preprocessing in words": ({"pretrained_cfg": "none"}, "pretrained_cfg is 'none', not an object"),
    "a mean of words": ({"pretrained_cfg": {"mean": ["a"] * 3}}, "mean is .*not a list of numbers"),
    "a mean of two channels": ({"pretrained_cfg": {"mean": [0.5] * 2}}, "mean has 2 numbers for 3 channels"),
    "a spread of zero": ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std is .*not a list of positive numbers"),
    "a crop of nothing": ({"pretrained_cfg": {"crop_pct": 1e-400}}, "crop_pct is 0.0, not a number above 0"),
    "an unknown filter": ({"pretrained_cfg": {"interpolation": ["cubic"]}}, "interpolation is .*such as bicubic"),
    "a classifier that is a path": ({"pretrained_cfg": {"classifier": "/head"}}, "classifier is '/head', not the name"),
    "an unknown task": ({"problem_type": "regret"}, "problem_type is 'regret', not one of"),
    "a repository as network": ({"architecture": "hf-hub:evil/model"}, "'hf-hub:evil/model' is not a timm name"),
    "a URL as network": ({"architecture": "https://evil.example/x"}, "is not a timm name"),
    "a number as network": ({"architecture": 3}, "architecture is 3, not the name of a timm model"),
    "no network": ({"architecture": None}, "architecture is null or missing"),
    "everything at once": (
        {"num_classes": 2.5, "problem_type": 1, "model_args": {"file": "x"}, "pretrained_cfg": {"std": 0}},
        "num_classes is 2.5.*problem_type is 1.*no argument 'file'.*std is 0",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_checked_before_anything_is_opened_or_allocated(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, words = CONFIGS[case]
    change(folder, **entries)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words) as caught:
        CCSSLForImageClassification.from_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a":' * 50_000, "is not JSON"),
        (b"[1, 2]", "holds a list and not an object"),
        (b"null", "holds a NoneType and not an object"),
        (b"{}", "architecture is null or missing.*num_classes is null or missing"),
        (b'{"architecture": "test_vit", "num_classes": NaN}', "num_classes is nan"),
        (b'{"x": "' + bytes(33 << 20) + b'"}', "has more than 32 MiB"),
        (
            b'{"architecture": "test_vit", "num_classes": 3, "model_args": ' + b'{"depth": ' * 400 + b"1" + b"}" * 401,
            "model_args",
        ),
    ],
)
def test_a_file_that_is_no_configuration_gets_a_sentence(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(content)
    for read in (CCSSLForImageClassification.from_pretrained, lambda name: describe(str(name))):
        with pytest.raises(ValueError, match=words) as caught:
            read(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_network_of_the_user_has_the_same_allow_list() -> None:
    with pytest.raises(ValueError, match="'test_vit' has no argument 'features_only'"):
        CCSSLForImageClassification.from_timm("test_vit", labels=LABELS, features_only=True)


def test_every_family_of_timm_has_arguments_and_none_that_opens_a_file() -> None:
    from ccssl_hf.backbones import unknown_arguments

    opening = ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "file", "url", "hf_hub_id"]
    opening += ["cache_dir", "custom_load", "pretrained_filter_fn", "features_only", "feature_cfg", "model_cfg"]
    families = {timm.models.model_entrypoint(name).__module__: name for name in timm.list_models()}
    assert len(families) > 80
    for name in families.values():
        assert len(unknown_arguments(name, opening)) == len(opening), name
        assert unknown_arguments(name, ["in_chans", "global_pool"]) == [], name


def test_entries_that_are_not_used_do_no_harm(folder: Path) -> None:
    """Folders of timm have further entries."""
    change(folder, auto_map={"AutoModel": "evil.Model"}, pretrained_cfg={"file": "/etc/hostname", "url": "http://x"})
    change(folder, id2label={"0": "x"}, torch_dtype="float16", model_args={"num_classes": 3}, num_features=7)
    model = CCSSLForImageClassification.from_pretrained(folder)
    assert model.config.labels == LABELS and not {"file", "url"} & model.backbone.pretrained_cfg.keys()


# -------------------------------------------------------------------------------------------------------------- weights


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def converted(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    save_file({key: change(key, value).contiguous() for key, value in load_file(path).items()}, path)


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: cut(path, 0), "is damaged"),
    "truncated": (lambda path: cut(path, path.stat().st_size - 4), "is damaged"),
    "without its header": (lambda path: cut(path, 20), "is damaged"),
    "a header of exabytes": (lambda path: path.write_bytes(b"\xff" * 7 + b"\x0f" + b"{" * 64), "is damaged"),
    "a pickle": (lambda path: torch.save({"a": torch.zeros(1)}, path), "is damaged"),
    "of integers": (lambda path: converted(path, lambda _, value: value.to(torch.int8)), "is stored as I8"),
    "with another tensor": (
        lambda path: save_file(load_file(path) | {"evil": torch.zeros(1)}, path),
        "1 keys differ .*evil",
    ),
    "without a tensor": (
        lambda path: save_file({key: value for key, value in load_file(path).items() if key != "pos_embed"}, path),
        r"1 keys differ \(backbone.pos_embed\)",
    ),
    "of other shapes": (
        lambda path: converted(path, lambda key, value: value[:-1] if key.startswith("head.") else value),
        r"head.bias is \[2\] and not \[3\].*head.weight is \[2, 64\] and not \[3, 64\]",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_get_a_sentence(case: str, folder: Path) -> None:
    harm, words = WEIGHTS[case]
    harm(folder / "model.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        CCSSLForImageClassification.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_are_loaded_as_transformers_loads_them(dtype: torch.dtype, folder: Path) -> None:
    converted(folder / "model.safetensors", lambda _, value: value.to(dtype))
    model = CCSSLForImageClassification.from_pretrained(folder)
    assert model.dtype == torch.float32
    theirs = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).timm_model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.backbone.state_dict().items())


def heads(**metadata: Any) -> Callable[[Path], Any]:
    return lambda path: save_tensors(path, load_file(path), {"ccssl": json.dumps(metadata)})


LAYERS = [["Linear", 64, 4, True]]
HEADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda path: save_file(load_file(path), path), "is damaged .*no 'ccssl'"),
    "no JSON": (lambda path: save_tensors(path, load_file(path), {"ccssl": "{"}), "is damaged"),
    "a huge projection": (heads(projection_dim=10**9, heads={"open": LAYERS}), "projection_dim or heads is wrong"),
    "a wide projection": (heads(projection_dim=99_999, heads={"open": LAYERS}), "projection.2.bias is"),
    "a huge head": (heads(projection_dim=64, heads={"open": [["Linear", 64, 10**9]]}), "'open' is no list of layers"),
    "a wide head": (heads(projection_dim=64, heads={"open": [["Linear", 64, 10**6]]}), "heads.open.0.bias is"),
    "a foreign layer": (heads(projection_dim=64, heads={"open": [["Embedding", 9, 9]]}), "'open' is no list of layers"),
    "a list of heads": (heads(projection_dim=64, heads=[LAYERS]), "projection_dim or heads is wrong"),
    "a head with a strange name": (heads(projection_dim=64, heads={"a.b": LAYERS}), "'a.b' is no list of layers"),
    "many layers": (heads(projection_dim=64, heads={"open": [["ReLU"]] * 10**5}), "'open' is no list of layers"),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_that_do_not_fit_get_a_sentence(case: str, folder: Path) -> None:
    harm, words = HEADS[case]
    harm(folder / "ccssl_head.safetensors")
    with pytest.raises(ValueError, match=words):
        CCSSLForImageClassification.from_pretrained(folder)
