"""Every algorithm learns, with and without CCSSL: a short run on four digits ends far above chance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ccssl_hf import CCSSLTrainer
from ccssl_hf.algorithms import ALGORITHMS
from tiny_runs import LABELED, LABELS, arguments, digits, model_of

UNLABELED, VALIDATION = digits(24, 320), digits(320, 720)
CHANCE = 1 / len(LABELS)


@pytest.mark.parametrize("ccssl", [False, True], ids=["alone", "with CCSSL"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns(algorithm: str, ccssl: bool, tmp_path: Path) -> None:
    unlabeled = None if algorithm == "supervised" and not ccssl else UNLABELED
    trainer = CCSSLTrainer(
        model_of(bn_momentum=0.1),  # the published 0.001 would still hold what it started from
        arguments(
            tmp_path,
            algorithm=algorithm,
            lambda_contrast=float(ccssl),
            confidence_threshold=None,
            push_threshold=None,
            max_steps=80,
            per_device_train_batch_size=8,
            learning_rate=0.06,
            ema_decay=0.9,
            horizontal_flip=False,
            cutout_size=4,
            logging_steps=10,
        ),
        train_dataset=LABELED,
        unlabeled_dataset=unlabeled,
        eval_dataset=VALIDATION,
    )
    trainer.train()
    assert trainer.evaluate()["eval_top1"] > 2.5 * CHANCE
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in (*ALGORITHMS[algorithm].terms, *(["loss_contrast"] if ccssl else [])):
        assert all(math.isfinite(entry[name]) for entry in logs)
    if algorithm != "supervised":
        assert logs[-1]["mask_rate"] > 0.1  # pseudo labels are trained on by then
