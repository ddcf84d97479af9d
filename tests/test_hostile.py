"""Configurations, weights, cards and class names that somebody else wrote, to do harm or by mistake."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.card.facts import KEY, read_facts
from ccssl_hf.card.model_card import render_card, renew_results
from ccssl_hf.card.plots import draw_pictures
from ccssl_hf.card.report import describe, read_card, results_table
from ccssl_hf.checkpoint import save_tensors
from ccssl_hf.cli import app
from ccssl_hf.escape import markdown, plot_text, printable
from ccssl_hf.record import Provenance, Result, RunRecord, Split, SplitPredictions

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
    "a mean of words": ({"pretrained_cfg": {"mean": ["a"] * 3}}, "mean is .*not three numbers"),
    "a mean of two channels": ({"pretrained_cfg": {"mean": [0.5] * 2}}, "mean is .*not three numbers"),
    "a spread of zero": ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std is .*not three positive numbers"),
    "a crop of nothing": ({"pretrained_cfg": {"crop_pct": 1e-400}}, "crop_pct is 0.0, not a number above 0"),
    "an unknown filter": (
        {"pretrained_cfg": {"interpolation": ["cubic"]}},
        "interpolation is .*not one of bilinear, bicubic",
    ),
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
            b'{"architecture": "test_vit", "num_classes": 3, "model_args": ' + b'{"depth": ' * 900 + b"1" + b"}" * 901,
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


# ---------------------------------------------------------------------------------------------------------------- names

NAMES = [
    "](http://x) <img src=x onerror=1> | \n --- # h1 ",
    "![a](private/passport.png)",
    "<!-- /results -->",
    "<script>alert(1)</script>",
    "</details></td>&lt;b&gt;",
    "`code` ```fence",
    "$math$ $$\\frac{1$$",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "---",
    "===",
    "***",
    "**bold** _slanted_ ~~gone~~",
    "[a]: http://x",
    "see https://evil.example/x or www.evil.example",
    "yes",
    "null",
    "1e3",
    "key: value",
    "- a\n---\nlicense: evil",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe",
    "a\tb\u2028c\rd",
    "  spaces  ",
    "x" * 5000,
    "=1+1",
    "@SUM(A1)",
    "日本語 🦋 é",
    " ",
]


def card_of(names: list[str]) -> ModelCard:
    """A card in which each name is a class, and all kinds of other names are one of them, in turn."""

    def name(number: int) -> str:
        return names[number % len(names)]

    record = RunRecord(
        backbone="resnet18",
        class_names=names,
        algorithm="fixmatch",
        hyperparameters={"lambda_contrast": 1.0, **{f"{each} {n}": each for n, each in enumerate(names)}},
        splits={f"{each} {n}": Split(f"./{each}", 3, each) for n, each in enumerate(names)},
        labeled_per_class=dict.fromkeys(names, 1),
        base_model=name(5),
        provenance=Provenance("EMA", 3, "last", 0),
        results=[Result(f"{each}@{each}", 0.5, each, Provenance("EMA", 3, "last", 0)) for each in names],
    )
    card = render_card(record, model_name=name(0), limits="Seen.\n# none", pictures={"images/reliability.png": name(1)})
    renew_results(
        card,
        [Result("top1", 0.5, each) for each in names],
        datasets={each: f"./{each}" for each in names},
        pictures={"images/confusion_matrix.png": name(0)},
        model_name=name(2),
    )
    return card


def blocks(text: str) -> list[str]:
    """The structure of Markdown: what blocks there are in which order, and links, pictures and HTML in them."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        kinds = ("link_open", "image", "html_inline", "em_open", "code_inline")
        inline = [each for each in token.children or () if each.type in kinds]
        links = [str(each.attrs.get("href") or each.attrs.get("src") or each.type) for each in inline]
        found += [token.content if token.type == "html_block" else token.type + token.tag, *links]
    return found


def test_names_change_neither_the_structure_of_a_card_nor_its_metadata(tmp_path: Path) -> None:
    plain = [f"name {number}" for number in range(len(NAMES))]
    cards = []
    for names in (NAMES, plain):
        card_of(names).save(tmp_path / "card.md")
        cards.append(ModelCard.load(tmp_path / "card.md"))
    hostile, ordinary = cards
    assert blocks(hostile.text) == blocks(ordinary.text)
    assert hostile.data.to_dict().keys() == ordinary.data.to_dict().keys()
    assert hostile.data.license is None and list(read_facts(hostile).splits)[-1] == NAMES[-1]
    assert {each.dataset_split for each in hostile.data.eval_results} == {*NAMES}
    for sign in ("\x1b", "\u202e", "\x07", "\u2028"):
        assert sign not in hostile.text


def test_an_escaped_name_shows_as_it_is() -> None:
    for name in NAMES:
        tokens = MarkdownIt("commonmark").enable("table").parse(f"| {markdown(name)} | b |\n| --- | --- |")
        inline = next(token for token in tokens if token.type == "inline")
        shown = "".join(each.content for each in inline.children or ())
        assert {each.type for each in inline.children or ()} <= {"text"}, name
        assert shown == " ".join(printable(name).split()), name


def test_names_that_people_use_are_written_as_they_are() -> None:
    for name in (
        "confidence_threshold",
        "0.95",
        "-1",
        "1e-3",
        "Danaus plexippus",
        "AT&T",
        "c++",
        "7 * 7",
        "a (b)",
        "x.y",
    ):
        assert markdown(name) == name


def test_names_are_drawn_without_mathematics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng, names = np.random.default_rng(0), [*NAMES[:7], "_hidden", "x" * 500, "\x1b[31m"]
    labels = np.arange(len(names)).repeat(2)
    split = SplitPredictions("$x$", None, rng.normal(size=(len(labels), len(names))), labels)
    history = [{"step": step, "eval__$a_top1": 0.5, "loss": 1.0} for step in (1, 2)]
    pictures = draw_pictures(RunRecord("resnet18", names, predictions=[split], history=history), tmp_path)
    assert len(pictures) == 3 and not caplog.records
    assert plot_text("x" * 99) == "x" * 39 + "…" and plot_text("_a$") == r" _a\$"


def test_a_terminal_gets_no_control_characters(folder: Path) -> None:
    change(folder, label_names=["\x1b[31mred", "\u202egnp", "a\nb"])
    card_of(NAMES).save(folder / "README.md")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    table = results_table([Result("top1", 0.5, each) for each in NAMES])
    assert len(table.splitlines()) == len(NAMES) + 2
    missing = CliRunner().invoke(app, ["report", "/nowhere/\x1b[31mred"])
    assert missing.exit_code == 2
    for text in (result.stdout, table, missing.stderr):
        assert not {"\x1b", "\x07", "\u202e", "\r", "\u2028"} & {*text}


def test_a_class_name_that_no_file_can_hold_is_refused(folder: Path) -> None:
    change(folder, label_names=["ant", "bee", "\ud800"])
    with pytest.raises(ValueError, match=r"label_names has .*no names"):
        CCSSLForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="labels must be a list of class names"):
        CCSSLForImageClassification.from_timm("test_vit", labels=["ant", "\udcff"])


@pytest.mark.parametrize(
    "block",
    [
        {"provenance": {"weights": "EMA", "step": "<img>", "which": "last", "seed": 0}},
        {"results": [{"metric": "top1", "value": "<img>", "split": "test"}]},
        {"results": [{"metric": "top1"}]},
        {"pictures": ["a"]},
        {"splits": {"test": {"evil": 1}}},
        [1],
    ],
)
def test_facts_of_another_type_get_a_sentence(block: Any, folder: Path) -> None:
    card = card_of(["a", "b", "c"])
    card.data[KEY] = block
    card.save(folder / "README.md")
    with pytest.raises(ValueError, match=r"README.md has metadata that cannot be read"):
        read_card(folder)


def test_pictures_of_a_downloaded_card_are_not_shown_again(folder: Path) -> None:
    card = card_of(["a", "b", "c"])
    card.data[KEY]["pictures"] = {"../private/passport.png": "a", "http://x/y.png": "b", "images/curves.png": "c"}
    renew_results(card, [Result("top1", 0.5, "test")], datasets={}, pictures={}, model_name="a")
    assert "passport" not in card.text and "y.png" not in card.text


def test_a_huge_card_gets_a_sentence(folder: Path) -> None:
    (folder / "README.md").write_text("x" * 6_000_000)
    with pytest.raises(ValueError, match="has more than 5 MB and cannot be a card"):
        read_card(folder)
