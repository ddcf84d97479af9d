"""Plots are written with the right texts and leave no state behind; tables are aligned."""

from __future__ import annotations

import re
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ccssl_hf.card import plots
from ccssl_hf.card.text import format_table
from ccssl_hf.metrics import expected_calibration_error


def some_logits(num_images: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, num_images)
    return rng.normal(size=(num_images, 6)) + 2 * np.eye(6)[labels], labels


def draw(name: str, path) -> None:
    logits, labels = some_logits()
    if name == "confusion":
        truth = np.concatenate([labels, np.full(9, -1)])
        plots.plot_confusion_matrix(truth, np.resize(logits.argmax(1), len(truth)), list("abcdef"), path)
    elif name == "reliability":
        plots.plot_reliability(logits, labels, path)
    elif name == "embeddings":
        rng = np.random.default_rng(0)
        truth = np.concatenate([labels, np.full(9, -1)])
        plots.plot_embeddings(rng.normal(size=(len(truth), 8)) + truth[:, None], truth, list("abcdef"), path)
    elif name == "training":
        plots.plot_training(log_history(), path)
    else:
        plots.plot_confidence_histogram(np.linspace(0.5, 1, 40), np.linspace(0.1, 0.8, 30), path)


NAMES = ["training", "confusion", "reliability", "histogram", "embeddings"]


def log_history() -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    for step in (100, 200, 300):
        terms = {"loss": 3.0, "loss_x": 1.0, "loss_u": 0.5, "mask_rate": step / 400, "pseudo_label_precision": 0.75}
        history += [{"step": step, "learning_rate": 0.03, **terms}, {"step": step, "eval_top1": 0.875, "eval_ece": 0.1}]
    return [*history, {"step": 300, "train_loss": 3.0, "train_runtime": 9.0}]


def words(path) -> list[str]:
    """The texts of an SVG picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


@pytest.fixture
def text_in_svg():
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_sharp_not_empty_and_leave_nothing_open(name, tmp_path):
    path = tmp_path / "figures" / f"{name}.png"
    before = dict(matplotlib.rcParams)
    draw(name, path)
    with Image.open(path) as picture:
        assert min(picture.size) >= 700
        assert picture.info["dpi"][0] == pytest.approx(200, abs=1)
        assert path.stat().st_size < 60_000
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("name", NAMES)
def test_every_axis_has_a_label(name, tmp_path, text_in_svg):
    draw(name, tmp_path / "p.svg")
    expected = {
        "training": {"Optimizer steps", "Top-1 accuracy", "Loss", "Share (training)"},
        "confusion": {"Predicted class", "True class (number of images)"},
        "reliability": {"Confidence (largest softmax probability)", "Accuracy", "Images"},
        "embeddings": {"t-SNE of 309 images, color: true class, gray crosses: 9 OOD images"},  # its axes mean nothing
        "histogram": {"Confidence (largest softmax probability)", "Share of each group"},
    }
    assert expected[name] <= set(words(tmp_path / "p.svg"))


def test_a_legend_is_in_the_order_of_the_last_values(tmp_path, text_in_svg):
    entry = {"loss": 1.0, "loss_x": 0.25, "loss_u": 0.75}
    plots.plot_training([{"step": 1, **entry}, {"step": 2, **entry}], tmp_path / "p.svg")
    names = [text for text in words(tmp_path / "p.svg") if "  " in text]
    assert names == ["total  1", "loss_u  0.75", "loss_x  0.25"]


def test_one_run_is_drawn_from_its_log(tmp_path, text_in_svg):
    assert len(plots.plot_training(log_history(), tmp_path / "p.svg")) == 3
    texts = words(tmp_path / "p.svg")
    lines = ["validation  0.875", "total  3", "loss_x  1", "loss_u  0.5"]
    lines += ["Mask rate  0.75", "Pseudo-label precision  0.75"]
    assert [text for text in texts if "  " in text] == lines
    entry = {"eval_known_top1": 0.5, "eval_open_top1": 0.25, "loss": float("nan"), "loss_x": 1.0}
    two = [{"step": 1, **entry}, {"step": 2, **entry, "mask_rate": 0.5}]
    assert len(plots.plot_training(two, tmp_path / "two.svg")) == 2
    assert {"known  0.5", "open  0.25"} <= set(words(tmp_path / "two.svg"))
    assert plots.plot_training([{"step": 9, "train_runtime": 1.0}], tmp_path / "none.svg") == []
    assert not (tmp_path / "none.svg").exists()


def test_confusion_rows_are_percents_of_the_true_class(tmp_path, text_in_svg):
    labels, predictions = [0, 0, 0, 0, 1, 1, -1], [0, 0, 0, 1, 1, 1, 0]
    plots.plot_confusion_matrix(labels, predictions, ["cat", "dog"], tmp_path / "p.svg")
    texts = words(tmp_path / "p.svg")
    assert {"cat (4)", "dog (2)", "OOD images (1)"} <= set(texts)
    assert sorted(text for text in texts if text.isdigit()) == ["100", "100", "25", "75"]


def test_of_many_classes_a_confusion_matrix_shows_the_most_confused(tmp_path, text_in_svg):
    labels = np.repeat(np.arange(810), 2)
    predictions = labels.copy()
    predictions[[400, 401, 20]] = [777, 777, 11]  # class 200 twice for 777, class 10 once for 11
    labels, predictions = [*labels, -1, -1], [*predictions, 777, 5]
    shown = plots.shown_classes(np.array(labels), np.array(predictions), 810)
    assert shown.tolist()[:4] == [200, 777, 10, 11] and len(shown) == 20
    plots.plot_confusion_matrix(labels, predictions, [f"species {i}" for i in range(810)], tmp_path / "p.svg")
    texts = words(tmp_path / "p.svg")
    assert {"species 200 (2)", "species 777 (2)", "other classes", "OOD images (2)"} <= set(texts)
    assert any("the 20 of 810 classes" in text for text in texts)
    numbers = [text for text in texts if text.isdigit()]
    assert numbers == ["100", "100", "50", "50", *["100"] * 17, "50", "50"]


def test_at_most_a_fixed_number_of_images_is_embedded(tmp_path, text_in_svg, monkeypatch):
    monkeypatch.setattr(plots, "EMBEDDED_IMAGES", 50)
    points = np.random.default_rng(0).normal(size=(120, 4))
    labels = np.arange(120) % 30
    assert plots.plot_embeddings(points, labels, [f"species {i}" for i in range(30)], tmp_path / "p.svg") == 50
    assert words(tmp_path / "p.svg") == ["t-SNE of 50 images, color: true class"]
    with pytest.raises(ValueError, match="N >= 4"):
        plots.plot_embeddings(points[:3], labels[:3], ["a"], tmp_path / "p.svg")


@pytest.mark.parametrize("num_classes", [12, 20, 50])
def test_confusions_of_many_classes_keep_every_name(num_classes, tmp_path, text_in_svg):
    labels = np.arange(num_classes * 2) % num_classes
    names = [f"species {i}" for i in range(num_classes)]
    plots.plot_confusion_matrix(labels, labels, names, tmp_path / "p.svg")
    assert {*names, *(f"{name} (2)" for name in names)} <= set(words(tmp_path / "p.svg"))


@pytest.mark.parametrize(
    ("labels", "predictions"), [([0, 1], [0]), ([], []), ([0, 2], [0, 1]), ([0, -2], [0, 1]), ([0, 1], [0, -1])]
)
def test_confusions_outside_the_classes_are_refused(labels, predictions, tmp_path):
    with pytest.raises(ValueError, match=r"labels and predictions|one of the 2 classes"):
        plots.plot_confusion_matrix(labels, predictions, ["cat", "dog"], tmp_path / "p.png")


def test_reliability_and_histogram_name_their_numbers(tmp_path, text_in_svg):
    logits, labels = some_logits()
    plots.plot_reliability(logits, labels, tmp_path / "r.svg", num_bins=10)
    error = expected_calibration_error(logits, labels, num_bins=10)
    assert f"Expected calibration error {error:.3f} (10 bins)" in words(tmp_path / "r.svg")
    plots.plot_confidence_histogram([0.9, 0.8], [0.1, 0.85], tmp_path / "h.svg")
    texts = words(tmp_path / "h.svg")
    assert "OOD AUROC (confidence) 0.750; 1: perfect separation, 0.5: chance" in texts
    assert "Out-of-distribution (OOD), 2 images" in texts


@pytest.mark.parametrize("bad", [([], [0.5]), ([0.5], [1.5]), ([0.5], [float("nan")])])
def test_confidences_outside_0_to_1_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="confidences in"):
        plots.plot_confidence_histogram(*bad, tmp_path / "p.png")


ROWS = [
    {"method": "FixMatch", "top1": [0.94, 0.95, 0.96], "steps": 600, "ece": 0.0213},
    {"method": "CC|SSL", "top1": np.array([0.9]), "ece": None},
]


def test_a_plain_table_lines_up():
    assert format_table(ROWS, ["method", "top1", "steps", "ece"]).splitlines() == [
        "method             top1  steps    ece",
        "--------  -------------  -----  -----",
        "FixMatch  0.950 ± 0.010    600  0.021",
        "CC|SSL            0.900      –      –",
    ]


def test_a_markdown_table_escapes_bars_and_aligns_numbers():
    assert format_table(ROWS, ["method", "top1"], digits=2, markdown=True).splitlines() == [
        "| method   |        top1 |",
        "| -------- | ----------: |",
        "| FixMatch | 0.95 ± 0.01 |",
        "| CC\\|SSL  |        0.90 |",
    ]


def test_a_table_without_columns_is_refused():
    with pytest.raises(ValueError, match="column"):
        format_table(ROWS, [])
