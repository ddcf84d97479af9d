"""Cards as they are rendered and as the Hub's client reads them back, without any network."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard

from ccssl_hf.algorithms import ALGORITHMS, Algorithm, Paper
from ccssl_hf.card.facts import KEY, read_facts, upgrade
from ccssl_hf.card.model_card import render_card, renew_results
from ccssl_hf.metrics import classification_metrics, pseudo_label_quality
from ccssl_hf.record import CONFIDENCE, CURVES, METRICS, Provenance, Result, RunRecord, Split, library_versions

LAST, BEST = Provenance("EMA", 800, "last", 3), Provenance("raw", 700, "best", 3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


ABOUT_THE_CARD = ("model_name", "license", "tags", "limits", "pictures")


def small_card(**changes) -> ModelCard:
    """The card of a record with little in it; `changes` are fields of the record or arguments of `render_card`."""
    record = {
        "backbone": "resnet18",
        "class_names": ["Danaus", "Vanessa", "Morpho"],
        "algorithm": "fixmatch",
        "hyperparameters": {"lambda_contrast": 1.0, "confidence_threshold": 0.6},
    }
    values = {"model_name": "anna/butterflies", **record, **changes}
    about = {name: values.pop(name) for name in ABOUT_THE_CARD if name in values}
    return render_card(RunRecord(**values), **about)


RESULTS = [
    Result("top1", 0.655, "test", LAST),
    Result("top1", np.float32(0.645), "validation", BEST),
    Result("auroc", 0.56, "test", LAST),
    Result("coverage@0.95", float("nan"), "unlabeled", LAST),
]
FULL = {
    "splits": {
        "labeled": Split("anna/butterfly10", 7, "aaa111"),
        "unlabeled": Split("anna/heap", 880),
        "validation": Split("anna/butterfly10", 30),
        "test": Split("anna/butterfly10", 60, "bbb222"),
    },
    "base_model": "resnet18.a1_in1k",
    "license": "apache-2.0",
    "optimization": {"learning_rate": 0.03},
    "views": {"image_size": 224},
    "steps": 800,
    "batch_size": 8,
    "mu": 7,
    "seed": 3,
    "labeled_per_class": {"Danaus": 4, "Vanessa": 2, "Morpho": 1},
    "versions": library_versions(),
    "device": "cuda:0",
    "num_processes": 2,
    "run_time": 4000.2,
    "provenance": LAST,
    "results": RESULTS,
    "pictures": {"confusion matrix.png": "Confusions on the test split, EMA weights, step 800, seed 3"},
    "limits": "Made from museum specimens.",
}


def full_card(**changes) -> ModelCard:
    return small_card(**{**FULL, **changes})


def sections(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.*)$", card.text, re.MULTILINE)


def test_a_full_card_reads_back_from_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper"}))
    full_card().save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert data.tags == ["image-classification", "timm", "semi-supervised-learning", "ccssl"]
    assert data.base_model == "timm/resnet18.a1_in1k"
    assert data.datasets == ["anna/butterfly10", "anna/heap"]
    assert data.model_name == "anna/butterflies"
    found = [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split, r.metric_name) for r in data.eval_results]
    assert found == [
        ("accuracy", 0.655, "anna/butterfly10", "test", "Top-1 accuracy (EMA weights, last step 800, seed 3)"),
        ("roc_auc", 0.56, "anna/butterfly10", "test", found[1][4]),
        ("accuracy", 0.645, "anna/butterfly10", "validation", "Top-1 accuracy (raw weights, best step 700, seed 3)"),
    ]
    assert "(EMA weights, last step 800, seed 3)" in found[1][4]


def test_every_result_has_its_provenance():
    text = full_card().text
    assert "| Top-1 accuracy | 0.6550 | test | EMA | 800 (last) | 3 |" in text
    assert "| Top-1 accuracy | 0.6450 | validation | raw | 700 (best) | 3 |" in text
    assert "| OOD AUROC (confidence) | 0.5600 | test | EMA | 800 (last) | 3 |" in text
    assert "| not defined | unlabeled | EMA | 800 (last) | 3 |" in text
    assert "its result is too optimistic" in text
    assert "The published weights are those of step 800" in text


def test_a_full_card_describes_the_training():
    card = full_card()
    for expected in (
        "from 7 labeled and 880 unlabeled images",
        "| Vanessa | 2 |",
        "| test | [anna/butterfly10](https://huggingface.co/datasets/anna/butterfly10) | 60 | bbb222 |",
        "| unlabeled | [anna/heap](https://huggingface.co/datasets/anna/heap) | 880 | – |",
        "| confidence_threshold | 0.6 |",
        "| learning_rate | 0.03 |",
        "| image_size | 224 |",
        "| mu | 7 |",
        "| device | 2 x cuda |\n| run_time | 1 h 6 min |",
        "(confusion%20matrix.png)",
        "- Made from museum specimens.",
        f"| torch | {library_versions()['torch']} |",
        "[timm/resnet18.a1_in1k](https://huggingface.co/timm/resnet18.a1_in1k)",
    ):
        assert expected in card.text
    assert sections(card) == [
        "Results",
        "Pseudo labels",
        "Out-of-distribution images",
        "How to use",
        "Intended use",
        "Classes",
        "Training",
        "Citation",
    ]


def test_what_is_not_known_is_not_mentioned():
    card = small_card()
    assert sections(card) == ["How to use", "Intended use", "Classes", "Training", "Citation"]
    assert "None" not in str(card) and "\n\n\n" not in str(card)
    assert not {"license", "base_model", "datasets", "model-index", "model_name", "metrics"} & set(card.data.to_dict())
    assert "Training started from random weights" in card.text
    assert "was not measured" in card.text
    assert "optimistic" not in small_card(results=[Result("top1", 0.5, "test", LAST)]).text


@pytest.mark.parametrize("changes", [{}, FULL, {**FULL, "backbone": "wide_resnet10_1_cifar"}])
def test_the_code_to_copy_is_python(changes):
    code = re.search(r"```python\n(.*?)```", small_card(**changes).text, re.DOTALL).group(1)
    ast.parse(code)
    assert len(code.splitlines()) == 5
    assert code.count('"anna/butterflies"') == 2
    assert code.count("trust_remote_code=True") == (2 if "wide_resnet" in changes.get("backbone", "") else 0)


def test_tables_stay_whole_whatever_a_class_is_called():
    odd = ["a|b", "two\nlines", "<script>", "50 % off", "{{ 7 * 7 }}"]
    text = small_card(class_names=odd, labeled_per_class={"a|b": 1, "two\nlines": 2}).text
    for row in ("| a\\|b | 1 |", "| two lines | 2 |", "| &lt;script> | 0 |", "| 50 % off | 0 |", "| {{ 7 * 7 }} | 0 |"):
        assert row in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_no_local_path_and_no_token_reaches_the_card(tmp_path):
    folder = tmp_path / "heap"
    folder.mkdir()
    paths = [str(folder), "C:\\Users\\anna\\heap", "../data/val.parquet", "data/test.parquet"]
    fingerprints = ["aaa111", None, None, None]
    roles = ("labeled", "unlabeled", "validation", "test")
    card = full_card(
        model_name=str(tmp_path / "my-run"),
        base_model=str(folder),
        splits={role: Split(path, 5, known) for role, path, known in zip(roles, paths, fingerprints, strict=True)},
        hyperparameters={"output_dir": str(tmp_path), "hub_token": "hf_secret", "files": [str(folder / "x.csv")]},
        pictures={str(folder / "picture.png"): "Calibration"},
    )
    content = str(card)
    for private in (str(tmp_path), str(tmp_path.parent), "Users", "hf_secret", "hub_token", "data/"):
        assert private not in content
    assert "| labeled | heap (local) | 5 | aaa111 |" in content
    assert "| files | x.csv |" in content and "![Calibration](picture.png)" in content
    assert "datasets" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert card.data.eval_results[0].dataset_name == "test.parquet"
    assert 'timm.create_model("local-dir:my-run"' in content


def test_a_folder_of_the_same_name_is_taken_as_local_as_loading_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anna" / "butterfly10").mkdir(parents=True)
    card = full_card()
    assert card.data.datasets == ["anna/heap"]
    assert "| labeled | butterfly10 (local) |" in card.text


@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"supervised"}))
def test_ccssl_and_the_algorithm_are_cited(algorithm):
    text = small_card(algorithm=algorithm).text
    paper = ALGORITHMS[algorithm].paper
    bibtex = re.search(r"```bibtex\n(.*?)```", text, re.DOTALL).group(1)
    assert bibtex.count("@inproceedings{") == 2 and bibtex.count("{") == bibtex.count("}")
    assert "Yang, Fan and Wu, Kai and Zhang, Shuyi" in bibtex and paper.authors in bibtex and paper.title in bibtex
    assert f"[{paper.name}](https://arxiv.org/abs/{paper.arxiv}) and the class-aware contrastive loss" in text


def test_an_algorithm_that_is_registered_later_is_cited(monkeypatch):
    class Later(Algorithm):
        paper = Paper("Later", "Doe, Jane", "Later: A Title", "A Venue", 2027, "2701.00001")

    monkeypatch.setitem(ALGORITHMS, "later", Later)
    text = small_card(algorithm="later").text
    assert "doe2027later" in text and "[Later](https://arxiv.org/abs/2701.00001)" in text


def test_every_algorithm_and_metric_has_a_name():
    assert [name for name, algorithm in ALGORITHMS.items() if algorithm.paper is None] == ["supervised"]
    measured = classification_metrics(np.eye(3), np.array([0, 1, -1]), open_set_scores=np.ones(3))
    quality = pseudo_label_quality(pseudo_labels=[0], mask=[1], hidden_labels=[0])
    assert set(measured) | set(quality) | {"mask_rate", "training_precision"} == set(METRICS)


def test_a_model_without_ccssl_does_not_claim_it():
    text = small_card(algorithm="supervised", hyperparameters={"lambda_contrast": 0.0}).text
    assert "trained on labeled images only." in text
    assert "The class-aware contrastive loss was off for this model" in text
    assert "pseudo labels for the unlabeled images" not in text


def test_own_algorithms_and_metrics_keep_their_names():
    card = small_card(algorithm="mymatch", results=[Result("kappa", 0.5, "test", LAST)])
    assert "trained with mymatch and" in card.text and "| kappa | 0.5000 | test | EMA | 800 (last) | 3 |" in card.text
    assert card.data.eval_results[0].metric_type == "kappa"


def test_many_classes_are_folded():
    text = small_card(class_names=[f"class {i}" for i in range(200)]).text
    assert "<details><summary>All 200 classes</summary>" in text and text.count("</details>") == 1


@pytest.mark.parametrize(("change", "hint"), [({"weights": "swa"}, "'EMA' or 'raw'"), ({"which": "first"}, "'best'")])
def test_a_wrong_provenance_is_refused(change, hint):
    with pytest.raises(ValueError, match=hint):
        Provenance(**{"weights": "EMA", "step": 1, "which": "last", "seed": 0, **change})


def test_facts_come_back_from_the_metadata_as_fields():
    results = [*RESULTS, Result("precision@0.95", 0.5, "heap"), Result("f", 1.0, "x")]
    facts = read_facts(ModelCard(str(full_card(results=results))))
    finite = [result for result in results if np.isfinite(result.value)]
    assert facts.results == [
        Result(result.metric, pytest.approx(float(result.value)), result.split, result.provenance) for result in finite
    ]
    assert facts.provenance == LAST and facts.splits == FULL["splits"] and facts.pictures == FULL["pictures"]
    assert facts.settings["Method"] == {
        "algorithm": "fixmatch",
        "mu": 7,
        "lambda_contrast": 1.0,
        "confidence_threshold": 0.6,
    }
    assert facts.settings["Optimization"] == {"steps": 800, "batch_size": 8, "seed": 3, "learning_rate": 0.03}


def test_what_is_undefined_stays_out_of_the_metadata_and_none_is_a_value():
    card = full_card(hyperparameters={"lambda_contrast": np.float64(1), "push_threshold": None, "sizes": (1, 2)})
    method = read_facts(ModelCard(str(card))).settings["Method"]
    assert method == {"algorithm": "fixmatch", "mu": 7, "lambda_contrast": 1.0, "push_threshold": None, "sizes": [1, 2]}
    assert ".nan" not in str(card.data).lower()


def test_the_card_explains_pseudo_labels_and_ood_images():
    raw = Provenance("raw", 800, "last", 3)
    text = full_card(
        results=[
            Result("mask_rate", 0.7, "unlabeled", raw),
            Result("training_precision", 0.6, "unlabeled", raw),
            Result("ood_share_passed@0.95", 0.4, "unlabeled", LAST),
        ],
        pictures={CURVES: "How it went", CONFIDENCE: "How sure it is"},
    ).text
    results, training = text.split("<!-- /results -->")
    assert "| Mask rate (training) | 0.7000 | unlabeled | raw | 800 (last) | 3 |" in results
    assert "| Pseudo-label precision (training) | 0.6000 | unlabeled | raw | 800 (last) | 3 |" in results
    assert "| Share of OOD images above the threshold (threshold 0.95) | 0.4000 |" in results
    assert f"## Out-of-distribution images\n\n![How sure it is]({CONFIDENCE})" in results
    assert f"![How it went]({CURVES})" in training and CURVES not in results


HAND_WRITTEN = "---\nlicense: mit\nanything: 3\n---\n# Mine\n\nBy   hand.\n\n\n\n```\n\n\n\n```\n"
FOREIGN = EvalResult(
    task_type="image-classification",
    dataset_type="imagenet-1k",
    dataset_name="ImageNet",
    metric_type="accuracy",
    metric_value=76.1,
    dataset_split="test",
)


def renew(card, results, **pictures):
    renew_results(card, results, datasets={"test": "anna/new"}, pictures=pictures, model_name="mine")
    return ModelCard(str(card))  # as it is read from a file


def test_renewed_results_take_the_place_of_their_splits_and_leave_the_rest():
    pictures = {"images/reliability.png": "Old reliability", "images/confusion_matrix.png": "Old"}
    card = full_card(pictures=pictures)
    card = ModelCard(str(card).replace("## Intended use", "## Notes\n\nBy   hand.\n\n\n\n## Intended use"))
    before = card.text
    new = [Result("top1", 0.7, "test", read_facts(card).provenance)]
    card = renew(card, new, **{"images/confusion_matrix.png": "New"})
    facts = read_facts(card)
    assert facts.results == [Result("top1", 0.645, "validation", BEST), Result("top1", 0.7, "test", LAST)]
    assert {(r.dataset_split, r.metric_value) for r in card.data.eval_results} == {("validation", 0.645), ("test", 0.7)}
    assert facts.pictures == {"images/reliability.png": "Old reliability", "images/confusion_matrix.png": "New"}
    start, end = "<!-- results:", "<!-- /results -->"
    section = card.text[card.text.index(start) : card.text.index(end)]
    assert "0.6450" in section and "0.7000" in section and "0.6550" not in section
    assert "![New](images/confusion_matrix.png)" in section and "![Old reliability]" in section
    assert card.text.split(start)[0] == before.split(start)[0]
    assert card.text.split(end)[1] == before.split(end)[1]
    assert str(renew(card, new)) == str(card)


def test_a_card_written_by_hand_gets_its_results_at_the_end():
    card = ModelCard(HAND_WRITTEN)
    card.data.eval_results, card.data.model_name = [FOREIGN], "theirs"
    card = renew(card, [Result("top1", 0.7, "test")])
    assert card.text.startswith(HAND_WRITTEN.split("---\n")[2])
    assert "| Top-1 accuracy | 0.7000 | test | published | – | – |" in card.text and "76.1" not in card.text
    assert card.data.license == "mit" and card.data["anything"] == 3 and card.data.model_name == "theirs"
    assert [result.metric_value for result in card.data.eval_results] == [76.1, 0.7]
    again = renew(card, [Result("top1", 0.8, "test")])
    assert again.text.count("<!-- results:") == 1 and "0.7000" not in again.text


def test_unknown_training_is_not_mentioned():
    card = render_card(RunRecord("resnet18", ["a", "b"]), model_name="anna/old")
    assert sections(card) == ["How to use", "Intended use", "Classes"]
    assert ": `resnet18`.\n" in card.text and "CCSSL" not in card.text
    assert card.data.tags == ["image-classification", "timm"] and KEY not in card.data.to_dict()


# -------------------------------------------------------------------------------------------------------- earlier cards


@pytest.fixture
def old_card():
    """A real card from before the machine-readable block, and an entry of its model index that somebody else wrote."""
    card = ModelCard((Path(__file__).parent / "cards" / "before_fields.md").read_text(encoding="utf-8"))
    card.data.eval_results.append(FOREIGN)
    upgrade(card)
    return card


def test_an_earlier_card_is_read(old_card):
    facts, weights = read_facts(old_card), Provenance("EMA", 600, "last", 0)
    assert facts.provenance == weights
    assert len(facts.results) == 15
    for result in (
        Result("top1", 0.970833, "test", weights),
        Result("auroc", 0.652109, "validation", weights),
        Result("precision@0.95", 0.598901, "unlabeled", weights),
        Result("mask_rate", 0.886429, "unlabeled", Provenance("raw", 600, "last", 0)),
    ):
        assert result in facts.results
    assert set(facts.pictures) == {f"images/{name}.png" for name in ("confusion_matrix", "reliability", "confidence")}
    assert facts.pictures["images/reliability.png"].endswith("; test split, EMA weights, last step 600, seed 0.")
    assert facts.splits["test"].data == "digits of scikit-learn, test split of train_digits.py"
    assert facts.settings["Method"]["push_threshold"] == "0.9" and facts.settings["Views"]["cutout_size"] == "4"
    assert [r for r in old_card.data.eval_results if r.metric_value == 76.1] == [FOREIGN]
    assert len(old_card.data.eval_results) == 16
    before = str(old_card)
    upgrade(old_card)
    assert str(old_card) == before


def test_an_earlier_card_is_renewed(old_card):
    before = old_card.text
    card = renew(old_card, [Result("top1", 0.5, "test", read_facts(old_card).provenance)])
    assert card.text.split("<!-- results")[0] == before.split("<!-- results")[0]
    assert card.text.split("<!-- /results -->")[1] == before.split("<!-- /results -->")[1]
    assert "| Top-1 accuracy | 0.5000 | test | EMA | 600 (last) | 0 |" in card.text and "0.9708" not in card.text
    assert "| Pseudo-label precision (threshold 0.95) | 0.5989 | unlabeled | EMA | 600 (last) | 0 |" in card.text
    values = [(r.metric_type, r.metric_value) for r in card.data.eval_results if r.dataset_split == "test"]
    assert values == [("accuracy", 76.1), ("accuracy", 0.5)]
    assert card.data.model_name == "digits_fixmatch_ccssl_seed0"


def test_the_weights_of_an_earlier_card_without_a_known_run_stay_unknown():
    entry = EvalResult(
        "image-classification", "x", "x", "accuracy", 0.5, metric_name="Top-1 accuracy (published weights)"
    )
    card = ModelCard(HAND_WRITTEN)
    card.data.eval_results, card.data.model_name = [entry], "theirs"
    upgrade(card)
    assert read_facts(card).results == [Result("top1", 0.5, "", None)]
