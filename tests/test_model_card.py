"""Cards as they are rendered and as the Hub's client reads them back, without any network."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from ccssl_hf.algorithms import ALGORITHMS
from ccssl_hf.metrics import classification_metrics, pseudo_label_quality
from ccssl_hf.model_card import ALGORITHM_PAPERS, METRICS, CardFacts, Result, library_versions, render_card


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def small_facts(**changes) -> CardFacts:
    facts = {
        "model_name": "anna/butterflies",
        "backbone": "resnet18",
        "labels": ["Danaus", "Vanessa", "Morpho"],
        "algorithm": "fixmatch",
        "hyperparameters": {"lambda_contrast": 1.0, "confidence_threshold": 0.6},
        "datasets": {},
    }
    return CardFacts(**{**facts, **changes})


def full_facts(**changes) -> CardFacts:
    facts = {
        "datasets": {
            "labeled": "anna/butterfly10",
            "unlabeled": "anna/heap",
            "validation": "anna/butterfly10",
            "test": "anna/butterfly10",
        },
        "base_model": "resnet18.a1_in1k",
        "license": "apache-2.0",
        "image_size": 224,
        "steps": 800,
        "batch_size": 8,
        "mu": 7,
        "seed": 3,
        "labeled_per_class": {"Danaus": 4, "Vanessa": 2, "Morpho": 1},
        "num_unlabeled": 880,
        "split_fingerprints": {"labeled": "aaa111", "test": "bbb222"},
        "versions": library_versions(),
        "device": "cuda:0",
        "num_processes": 2,
        "run_time": 4000.2,
        "results": [
            Result("top1", 0.655, "test", "EMA", 800, "last", 3),
            Result("top1", np.float32(0.645), "validation", "raw", 700, "best", 3),
            Result("auroc", 0.56, "test", "ema", 800, "last", 3),
            Result("coverage", float("nan"), "unlabeled", "ema", 800, "last", 3),
        ],
        "pictures": {"confusion matrix.png": "Confusions on the test split, EMA weights, step 800, seed 3"},
        "limits": "Made from museum specimens.",
    }
    return small_facts(**{**facts, **changes})


def sections(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.*)$", card.text, re.MULTILINE)


def test_a_full_card_reads_back_from_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper"}))
    render_card(full_facts()).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert data.tags == ["image-classification", "semi-supervised-learning", "ccssl", "timm"]
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


def test_every_number_of_the_card_says_what_it_is():
    text = render_card(full_facts()).text
    assert "| Top-1 accuracy | 0.6550 | test | EMA | 800 (last) | 3 |" in text
    assert "| Top-1 accuracy | 0.6450 | validation | raw | 700 (best) | 3 |" in text
    assert "| AUROC, known classes against no known class | 0.5600 | test | EMA | 800 (last) | 3 |" in text
    assert "| not defined | unlabeled | EMA | 800 (last) | 3 |" in text
    assert "its number flatters" in text


def test_a_full_card_tells_how_the_model_was_made():
    card = render_card(full_facts())
    for expected in (
        "from 7 labeled and 880 unlabeled images",
        "| Vanessa | 2 |",
        "| test | [anna/butterfly10](https://huggingface.co/datasets/anna/butterfly10) | bbb222 |",
        "| unlabeled | [anna/heap](https://huggingface.co/datasets/anna/heap) | – |",
        "| confidence_threshold | 0.6 |",
        "| mu | 7 |",
        "Trained on 2 cuda devices in 1 h 6 min.",
        "(confusion%20matrix.png)",
        "- Made from museum specimens.",
        f"torch {library_versions()['torch']}",
        "[timm/resnet18.a1_in1k](https://huggingface.co/timm/resnet18.a1_in1k)",
    ):
        assert expected in card.text
    assert sections(card) == [
        "Results",
        "Images of no known class",
        "How to use",
        "Intended use",
        "Classes",
        "Training",
        "Citation",
    ]


def test_what_is_not_known_is_not_mentioned():
    card = render_card(small_facts())
    assert sections(card) == ["How to use", "Intended use", "Classes", "Training", "Citation"]
    assert "None" not in str(card) and "\n\n\n" not in str(card)
    assert not {"license", "base_model", "datasets", "model-index", "model_name", "metrics"} & set(card.data.to_dict())
    assert "Training started from random weights" in card.text
    assert "was not measured" in card.text
    assert "flatters" not in render_card(small_facts(results=[Result("top1", 0.5, "test", "raw", 9, "last", 0)])).text


@pytest.mark.parametrize("facts", [small_facts(), full_facts(), full_facts(remote_code=True)])
def test_the_code_to_copy_is_python(facts):
    code = re.search(r"```python\n(.*?)```", render_card(facts).text, re.DOTALL).group(1)
    ast.parse(code)
    assert len(code.splitlines()) == 5
    assert code.count('"anna/butterflies"') == 2
    assert code.count("trust_remote_code=True") == (2 if facts.remote_code else 0)


def test_tables_stay_whole_whatever_a_class_is_called():
    odd = ["a|b", "two\nlines", "<script>", "50 % off", "{{ 7 * 7 }}"]
    text = render_card(small_facts(labels=odd, labeled_per_class={"a|b": 1, "two\nlines": 2})).text
    for row in ("| a\\|b | 1 |", "| two lines | 2 |", "| &lt;script> | 0 |", "| 50 % off | 0 |", "| {{ 7 * 7 }} | 0 |"):
        assert row in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_no_local_path_and_no_token_reaches_the_card(tmp_path):
    folder = tmp_path / "heap"
    folder.mkdir()
    card = render_card(
        full_facts(
            model_name=str(tmp_path / "my-run"),
            base_model=str(folder),
            datasets={
                "labeled": str(folder),
                "unlabeled": "C:\\Users\\anna\\heap",
                "validation": "../data/val.parquet",
                "test": "data/test.parquet",
            },
            hyperparameters={"output_dir": str(tmp_path), "hub_token": "hf_secret", "files": [str(folder / "x.csv")]},
            pictures={str(folder / "picture.png"): "Calibration"},
        )
    )
    content = str(card)
    for private in (str(tmp_path), str(tmp_path.parent), "Users", "hf_secret", "hub_token", "data/"):
        assert private not in content
    assert "| labeled | heap (local) | aaa111 |" in content
    assert "| files | x.csv |" in content and "![Calibration](picture.png)" in content
    assert "datasets" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert card.data.eval_results[0].dataset_name == "test.parquet"
    assert 'timm.create_model("local-dir:my-run"' in content


def test_a_folder_of_the_same_name_is_taken_as_local_as_loading_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anna" / "butterfly10").mkdir(parents=True)
    card = render_card(full_facts())
    assert card.data.datasets == ["anna/heap"]
    assert "| labeled | butterfly10 (local) |" in card.text


@pytest.mark.parametrize("algorithm", sorted(ALGORITHM_PAPERS))
def test_ccssl_and_the_algorithm_are_cited(algorithm):
    text = render_card(small_facts(algorithm=algorithm)).text
    paper = ALGORITHM_PAPERS[algorithm]
    bibtex = re.search(r"```bibtex\n(.*?)```", text, re.DOTALL).group(1)
    assert bibtex.count("@inproceedings{") == 2 and bibtex.count("{") == bibtex.count("}")
    assert "Yang, Fan and Wu, Kai and Zhang, Shuyi" in bibtex and paper.authors in bibtex and paper.title in bibtex
    assert f"[{paper.name}](https://arxiv.org/abs/{paper.arxiv}) and the class-aware contrastive loss" in text


def test_every_algorithm_and_metric_has_its_words():
    assert set(ALGORITHMS) - {"supervised"} <= set(ALGORITHM_PAPERS)
    measured = classification_metrics(np.eye(3), np.array([0, 1, -1]), open_set_scores=np.ones(3))
    quality = pseudo_label_quality(pseudo_labels=[0], mask=[1], hidden_labels=[0])
    assert set(measured) | set(quality) == set(METRICS)


def test_a_model_without_ccssl_does_not_claim_it():
    text = render_card(small_facts(algorithm="supervised", hyperparameters={"lambda_contrast": 0.0})).text
    assert "trained with labels alone." in text
    assert "its class-aware contrastive loss was off for this model" in text
    assert "unlabeled images itself" not in text


def test_own_algorithms_and_metrics_keep_their_names():
    card = render_card(small_facts(algorithm="mymatch", results=[Result("kappa", 0.5, "test", "raw", 9, "last", 0)]))
    assert "trained with mymatch and" in card.text and "| kappa | 0.5000 | test | raw | 9 (last) | 0 |" in card.text
    assert card.data.eval_results[0].metric_type == "kappa"


def test_many_classes_are_folded():
    text = render_card(small_facts(labels=[f"class {i}" for i in range(200)])).text
    assert "<details><summary>All 200 classes</summary>" in text and text.count("</details>") == 1


@pytest.mark.parametrize(("change", "hint"), [({"weights": "swa"}, "'EMA' or 'raw'"), ({"which": "first"}, "'best'")])
def test_a_result_that_does_not_say_what_it_is_is_refused(change, hint):
    arguments = {
        "metric": "top1",
        "value": 0.5,
        "split": "test",
        "weights": "EMA",
        "step": 1,
        "which": "last",
        "seed": 0,
    }
    with pytest.raises(ValueError, match=hint):
        Result(**{**arguments, **change})
