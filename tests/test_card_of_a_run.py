"""The card of a run: its content, without network, and no error in it loses a run."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ccssl_hf import CCSSLTrainer
from ccssl_hf.algorithms import algorithm_hyperparameters
from ccssl_hf.data import fingerprint
from ccssl_hf.record import CONFIDENCE, CONFUSION_MATRIX, CURVES, PICTURES, RELIABILITY
from test_trainer import with_ood_images
from tiny_runs import LABELED, LABELS, UNLABELED, VALIDATION, trainer_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CCSSLTrainer, Path]:
    """A run with all kinds of results. Its card is written with all sockets blocked."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    trainer = trainer_of(
        folder,
        hidden_label_column="true",
        eval_strategy="steps",
        eval_steps=2,
        max_grad_norm=5.0,
        hub_token="hf_thisIsASecretOfTheUser",
    )
    trainer.train()
    trainer.evaluate(with_ood_images(), metric_key_prefix="test")
    trainer.add_results("unlabeled", {"precision@0.95": 0.5, "coverage@0.95": 0.25, "ood_share_passed@0.95": math.nan})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", _refuse)
        patch.setattr("socket.getaddrinfo", _refuse)
        trainer.save_model()
    return trainer, folder


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the network was touched")


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_results_are_floats_with_provenance(run: tuple[CCSSLTrainer, Path]) -> None:
    trainer, folder = run
    found = card_of(folder).data.eval_results
    assert found and {result.dataset_split for result in found} == {"validation", "test", "unlabeled"}
    for result in found:
        assert isinstance(result.metric_value, float) and math.isfinite(result.metric_value)
        assert re.search(r"\((EMA|raw) weights, last step 6, seed 42\)$", result.metric_name)
    by_name = {(result.dataset_split, result.metric_type): result.metric_value for result in found}
    logged = [entry for entry in trainer.state.log_history if "mask_rate" in entry][-1]
    assert by_name["unlabeled", "mask_rate"] == pytest.approx(logged["mask_rate"], abs=1e-6)
    assert by_name["unlabeled", "pseudo_label_precision@0.95"] == 0.5
    assert by_name["test", "roc_auc"] == pytest.approx(trainer.results["test"][-1].value, abs=1e-6)


def test_it_shows_all_settings_in_effect(run: tuple[CCSSLTrainer, Path]) -> None:
    folder = run[1]
    text = card_of(folder).text
    settings = dict(re.findall(r"^\| (\w+) \| (.*) \|$", text.partition("### Method")[2], re.MULTILINE))
    assert set(algorithm_hyperparameters("fixmatch")) <= set(settings)
    assert {"mu", "learning_rate", "sgd_momentum", "nesterov", "schedule", "ema_decay"} <= set(settings)
    assert {"weak_crop", "randaugment_ops", "cutout_size", "contrastive_view", "jitter"} <= set(settings)
    assert settings["max_grad_norm"] == "5"
    assert settings["mean"].startswith("0.4914, ") and settings["steps"] == "6"
    for name in ("crop_scale", "adam_beta2", "output_dir", "hub_token", "logging_steps", "lr_scheduler_type"):
        assert name not in settings
    assert str(folder.parent) not in text and "Secret" not in text


def test_supervised_training_shows_no_views_that_it_does_not_make(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, algorithm="supervised", lambda_contrast=0, confidence_threshold=None, unlabeled=None)
    trainer.create_model_card()
    text = card_of(tmp_path).text
    assert "weak_crop" in text and "| mu |" not in text
    assert "randaugment_ops" not in text and "jitter" not in text


def test_every_split_has_the_fingerprint_of_its_content(run: tuple[CCSSLTrainer, Path]) -> None:
    text = card_of(run[1]).text
    found = dict(re.findall(r"^\| (\w+) \| .* \(local\) \| \d+ \| ([0-9a-f]{16}) \|$", text, re.MULTILINE))
    names = [LABELS[label] for label in VALIDATION["label"]]
    assert found == {
        "labeled": fingerprint(LABELED, "image", [LABELS[label] for label in LABELED["label"]]),
        "unlabeled": fingerprint(UNLABELED, "image"),
        "validation": fingerprint(VALIDATION, "image", names),
        "test": fingerprint(with_ood_images(), "image", [*names, *[""] * 10]),
    }


def test_its_pictures_show_the_test_split(run: tuple[CCSSLTrainer, Path]) -> None:
    text = card_of(run[1]).text
    linked = dict(re.findall(r"!\[(.*?)\]\((.*?)\)", text))
    assert sorted(linked.values()) == sorted([CURVES, CONFUSION_MATRIX, RELIABILITY, CONFIDENCE])
    for caption, file in linked.items():
        expected = "seed 42" if file == CURVES else "test split, EMA weights, last step 6, seed 42."
        assert expected in caption
        with Image.open(run[1] / file) as picture:
            assert min(picture.size) > 500


def test_each_picture_shows_a_split_that_has_the_data(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, validation={"open": with_ood_images(), "known": VALIDATION})
    trainer.evaluate()
    assert set(trainer.results) == set(trainer.predictions) == {"open", "known"}
    trainer.create_model_card()
    captions = re.findall(r"!\[(\w+).*?; (\w+) split", card_of(tmp_path).text)
    assert captions == [("Confusion", "known"), ("Reliability", "known"), ("Confidence", "open")]


def test_pictures_of_earlier_weights_do_not_stay(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.evaluate()
    trainer.create_model_card()
    assert (tmp_path / CONFUSION_MATRIX).is_file()
    trainer.predictions.clear()
    trainer.create_model_card()
    assert not any((tmp_path / file).exists() for file in PICTURES) and "![" not in card_of(tmp_path).text


def test_a_picture_that_can_not_be_drawn_loses_no_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.evaluate()
    (tmp_path / RELIABILITY).mkdir(parents=True)
    (tmp_path / RELIABILITY / "in the way").touch()
    with caplog.at_level(logging.ERROR):
        trainer.save_model()
    assert f"{RELIABILITY} could not be drawn" in caplog.text and "Traceback" in caplog.text
    text = card_of(tmp_path).text
    assert CONFUSION_MATRIX in text and RELIABILITY not in text and "Top-1 accuracy" in text


def test_a_users_own_metrics_need_no_logits(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    trainer.compute_metrics = lambda prediction: {
        "top1": float((prediction.predictions == prediction.label_ids).mean())
    }
    trainer.evaluate()
    assert trainer.predictions == {}
    trainer.create_model_card()
    assert "| Top-1 accuracy |" in card_of(tmp_path).text


def test_predictions_are_no_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.predict(VALIDATION)
    assert trainer.predictions == {} and trainer.results == {}
    trainer.evaluate()
    kept = trainer.predictions["validation"]
    assert kept.logits.dtype == np.float32 and kept.labels.tolist() == VALIDATION["label"]


def test_the_hub_accepts_it(run: tuple[CCSSLTrainer, Path], hub: Any) -> None:
    asked = len(hub.requests)
    card_of(run[1]).validate(repo_type="model")
    assert hub.requests[asked:] == ["POST /api/validate-yaml 200"]


def test_a_split_on_the_hub_is_linked_and_its_numbers_belong_to_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.dataset_names = {"validation": "anna/digits"}
    trainer.evaluate()
    trainer.create_model_card("anna/reader", license="mit", tags=["digits"], limits="None known.")
    card = card_of(tmp_path)
    assert card.data.datasets == ["anna/digits"] and {r.dataset_type for r in card.data.eval_results} == {"anna/digits"}
    assert (card.data.license, card.data.model_name) == ("mit", "anna/reader") and "digits" in card.data.tags
    assert "- None known." in card.text and isinstance(trainer.eval_dataset, datasets.Dataset)
