from __future__ import annotations

import inspect
import logging
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer
from ccssl_hf.metrics import confidences, out_of_distribution_auroc
from ccssl_hf.optimization import decayed_parameter_names
from conftest import SHARED, needs_shared
from tiny_runs import (
    LABELED,
    LABELS,
    UNLABELED,
    VALIDATION,
    StopAt,
    arguments,
    copy_of,
    different,
    digits,
    everything,
    logs_of_steps,
    model_of,
    trainer_of,
)

# -------------------------------------------------------------------------------------------------------- end to end


LOAD_ELSEWHERE = """
    import sys
    from importlib.abc import MetaPathFinder
    from pathlib import Path

    class NoPackage(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "ccssl_hf":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    sys.meta_path.insert(0, NoPackage())

    import numpy as np, timm, torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    folder = Path(sys.argv[1])
    pictures = [Image.open(path).convert("RGB") for path in sorted((folder / "pictures").iterdir())]
    model = AutoModelForImageClassification.from_pretrained(folder / "run")
    processor = AutoImageProcessor.from_pretrained(folder / "run")
    network = timm.create_model(f"local-dir:{folder / 'run'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    classify = pipeline("image-classification", model=str(folder / "run"))
    with torch.no_grad():
        np.savez(
            folder / "elsewhere.npz",
            transformers=model(**processor(pictures, return_tensors="pt")).logits.numpy(),
            timm=network(torch.stack([transform(picture) for picture in pictures])).numpy(),
            pipeline=[max(classify(picture), key=lambda answer: answer["score"])["label"] for picture in pictures],
        )
"""


def test_train_evaluate_save_load_elsewhere_and_predict(tmp_path):
    trainer = trainer_of(tmp_path / "run", model_of("test_resnet"), max_steps=12, learning_rate=0.05, ema_decay=0.5)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    predicted = trainer.predict(VALIDATION)
    assert (predicted.label_ids == VALIDATION["true"]).all()
    assert metrics["eval_top1"] == (predicted.predictions.argmax(1) == predicted.label_ids).mean()
    assert predicted.metrics["test_top1"] == metrics["eval_top1"]

    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(VALIDATION["image"]):
        picture.save(tmp_path / "pictures" / f"{number:03}.png")
    command = [sys.executable, "-c", textwrap.dedent(LOAD_ELSEWHERE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    elsewhere = np.load(tmp_path / "elsewhere.npz")
    # Batches of other sizes and another memory format sum in another order.
    for reader in ("transformers", "timm"):
        np.testing.assert_allclose(elsewhere[reader], predicted.predictions, rtol=1e-4, atol=1e-5)
    assert elsewhere["pipeline"].tolist() == [LABELS[best] for best in predicted.predictions.argmax(1)]

    again = CCSSLForImageClassification.from_pretrained(tmp_path / "run")
    assert different(copy_of(again), copy_of(trainer.ema.module)) == []


def test_training_learns_to_read_digits(tmp_path):
    trainer = trainer_of(
        tmp_path,
        model_of(bn_momentum=0.1),
        labeled=digits(400, 560),  # with 24 images, accuracy is too close to the bound and depends on the processor
        validation=digits(120, 320),
        max_steps=150,
        per_device_train_batch_size=8,
        confidence_threshold=0.9,
        push_threshold=0.9,
        ema_decay=0.9,
        cutout_size=4,
        horizontal_flip=False,
        logging_steps=20,
    )
    assert trainer.evaluate()["eval_top1"] < 0.4
    trainer.train()
    assert trainer.evaluate()["eval_top1"] > 0.9


# ----------------------------------------------------------------------------------------------------------- parameters


HEADS = {"iomatch": {"one_vs_all", "open"}}


@pytest.mark.parametrize("backbone", ["wide_resnet10_1_cifar", "test_resnet", "test_vit"])
@pytest.mark.parametrize("algorithm", ["fixmatch", "iomatch"])
def test_every_parameter_that_is_trained_moves(tmp_path, backbone, algorithm):
    trainer = trainer_of(tmp_path, model_of(backbone), algorithm=algorithm, max_steps=3, confidence_threshold=0.0)
    before = copy_of(trainer.model)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert {name for name in after if name.startswith(("projection.", "heads."))} <= trained
    assert {name.split(".")[1] for name in trained if name.startswith("heads.")} == HEADS.get(algorithm, set())
    assert [name for name in trained if torch.equal(after[name], before[name])] == []


@pytest.mark.parametrize("weak_forward", ["joint", "separate"])
def test_without_ccssl_the_projection_is_frozen_and_all_else_gets_a_gradient(tmp_path, weak_forward):
    """DDP waits for the gradient of every parameter that asks for one."""
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.update({name: parameter.grad is not None for name, parameter in model.named_parameters()})

    trainer = trainer_of(tmp_path, callbacks=[Look()], lambda_contrast=0, weak_forward=weak_forward)
    projection = copy_of(trainer.model.projection)
    trainer.train()
    assert different(projection, copy_of(trainer.model.projection)) == []
    assert seen == {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()}
    assert not any(seen[name] for name in seen if name.startswith("projection"))


def test_a_model_trained_without_ccssl_can_be_trained_with_it(tmp_path):
    model = model_of()
    trainer_of(tmp_path, model, lambda_contrast=0, max_steps=1).train()
    projection = copy_of(model.projection)
    trainer_of(tmp_path, model, max_steps=2).train()
    assert set(different(projection, copy_of(model.projection))) == projection.keys()


def test_heads_of_another_algorithm_are_left_alone(tmp_path):
    model = model_of(heads={"open": nn.Linear(64, 5)})
    trainer = trainer_of(tmp_path, model, max_steps=2)
    heads = copy_of(model.heads)
    trainer.train()
    assert different(heads, copy_of(model.heads)) == []
    assert not any(parameter.requires_grad for parameter in model.heads.parameters())


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_leaves_training_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.model.train()
    before, randomness = everything(trainer), torch.get_rng_state()
    trainer.evaluate()
    trainer.predict(VALIDATION)
    trainer.save_model()
    assert trainer.model.training
    assert different(before, everything(trainer)) == []
    assert torch.equal(randomness, torch.get_rng_state())


def test_evaluations_in_between_change_no_bit_of_a_run_with_dropout(tmp_path):
    model = {"backbone": "test_vit", "drop_rate": 0.3, "drop_path_rate": 0.3}
    runs = [
        trainer_of(tmp_path / "seldom", model_of(**model)),
        trainer_of(tmp_path / "often", model_of(**model), eval_strategy="steps", eval_steps=1, eval_on_start=True),
    ]
    for run in runs:
        run.train()
    assert different(everything(runs[0]), everything(runs[1])) == []


def plain_logits(model: CCSSLForImageClassification) -> np.ndarray:
    """What a network says about the validation split under timm's own transform."""
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config(pretrained_cfg=model.backbone.pretrained_cfg))
    with torch.no_grad():
        return model.eval()(torch.stack([transform(picture) for picture in VALIDATION["image"]])).logits.numpy()


@pytest.mark.parametrize("eval_weights", ["ema", "raw"])
def test_the_chosen_weights_are_evaluated_predicted_with_and_saved(tmp_path, eval_weights):
    trainer = trainer_of(tmp_path, eval_weights=eval_weights, ema_decay=0.9, per_device_eval_batch_size=64)
    trainer.train()
    chosen, other = trainer.ema.module, trainer.model
    if eval_weights == "raw":
        chosen, other = other, chosen
    predicted = trainer.predict(VALIDATION).predictions
    np.testing.assert_allclose(predicted, plain_logits(chosen), rtol=1e-5, atol=1e-6)
    assert np.abs(predicted - plain_logits(other)).max() > 1e-3
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert different(saved, copy_of(chosen.backbone)) == []
    assert trainer.results == {}
    trainer.evaluate()
    assert {result.provenance for result in trainer.results["validation"]} == {trainer.provenance}
    assert trainer.provenance.weights.lower() == eval_weights


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_average_is_taken_once_for_each_optimizer_step(tmp_path, accumulation):
    class Watch(TrainerCallback):
        average = None

        def on_step_end(self, args, state, control, model, **kwargs):
            names = [name for name, _ in model.named_parameters()]
            now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for name in names:
                now[name] = 0.9 * self.average[name] + 0.1 * now[name]
            self.average = now

    watch, model = Watch(), model_of()
    watch.average = copy_of(model)
    trainer = trainer_of(
        tmp_path, model, callbacks=[watch], ema_decay=0.9, gradient_accumulation_steps=accumulation, max_steps=4
    )
    trainer.train()
    found = copy_of(trainer.ema.module)
    for name, tensor in watch.average.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
        if "running" in name:
            assert torch.equal(found[name], tensor)


def with_ood_images() -> datasets.Dataset:
    """`VALIDATION`, and ten of its images again with a label that is not a class of the model."""
    names = [*LABELS, "a stranger"]
    ood = VALIDATION.select(range(10)).remove_columns("label")
    ood = ood.add_column("label", [4] * 10).cast_column("label", datasets.ClassLabel(names=names))
    return datasets.concatenate_datasets([VALIDATION.cast_column("label", datasets.ClassLabel(names=names)), ood])


def test_several_splits_and_ood_images(tmp_path):
    # The OOD images fill batches without any other image, which have no loss.
    trainer = trainer_of(
        tmp_path, validation={"known": VALIDATION, "open": with_ood_images()}, per_device_eval_batch_size=5
    )
    metrics = trainer.evaluate()
    assert metrics["eval_known_top1"] == metrics["eval_open_top1"]
    assert "eval_open_auroc" in metrics and "eval_known_auroc" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    trainer.train()
    trainer.save_model()
    assert "AUROC" in (tmp_path / "README.md").read_text()


def test_an_algorithms_own_open_set_score_is_measured_beside_confidence(tmp_path):
    trainer = trainer_of(tmp_path, algorithm="iomatch", validation=with_ood_images(), per_device_eval_batch_size=5)
    trainer.train()
    metrics = trainer.evaluate()
    predicted = trainer.predict(with_ood_images())
    assert predicted.predictions.shape == (len(VALIDATION) + 10, len(LABELS))  # logits, as of any algorithm

    # In the batches of the evaluation: the OOD images are copies of in-distribution ones, so ten pairs of scores are
    # equal up to rounding, which depends on the size of the batch, and the AUROC counts which of a pair is larger.
    averaged = trainer.ema.module.eval()
    with torch.no_grad():
        outputs = [averaged(pixel_values=batch["pixel_values"]) for batch in trainer.get_eval_dataloader()]
    scores = torch.cat([trainer.algorithm.open_set_score(output.logits, output.heads) for output in outputs])
    assert metrics["eval_auroc_open_set"] == pytest.approx(out_of_distribution_auroc(scores, predicted.label_ids))
    assert metrics["eval_auroc"] == pytest.approx(
        out_of_distribution_auroc(confidences(predicted.predictions), predicted.label_ids)
    )
    trainer.create_model_card()
    assert "OOD AUROC (open-set score) | " in (tmp_path / "README.md").read_text()


def test_metrics_of_the_users_own_get_logits_from_any_algorithm(tmp_path):
    trainer = CCSSLTrainer(
        model_of(),
        arguments(tmp_path, algorithm="iomatch"),
        train_dataset=LABELED,
        unlabeled_dataset=UNLABELED,
        eval_dataset=with_ood_images(),
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
    )
    assert trainer.evaluate()["eval_rows"] == len(VALIDATION) + 10


def test_prediction_needs_no_labels(tmp_path):
    trainer = trainer_of(tmp_path, model_of(heads={"open": nn.Linear(64, 5)}), max_steps=1)
    labeled = trainer.predict(VALIDATION)
    bare = trainer.predict(VALIDATION.select_columns("image"))
    withheld = VALIDATION.remove_columns("label").add_column("label", [-1] * len(VALIDATION))
    for other in (bare, trainer.predict(withheld)):
        assert other.label_ids is None
        assert (other.predictions == labeled.predictions).all()


@pytest.mark.parametrize(("decode", "training"), [("stream", 1), ("memory", 0)])
def test_an_accelerator_need_not_wait_for_decoding(tmp_path, monkeypatch, decode, training):
    def workers(**changes):
        weak_crop = "resized" if decode == "stream" else "auto"
        trainer = trainer_of(tmp_path, model_of(), decode=decode, weak_crop=weak_crop, **changes)
        loaders = (trainer.get_train_dataloader(), trainer.get_eval_dataloader(), trainer.get_test_dataloader(LABELED))
        return [loader.num_workers for loader in loaders]

    assert workers() == [0, 0, 0]
    monkeypatch.setattr("ccssl_hf.data.default_workers", lambda device: 1)  # there may be no accelerator here
    assert workers() == [training, 1, 1]
    assert workers(dataloader_num_workers=0) == [0, 0, 0]
    assert workers(dataloader_num_workers=2, dataloader_prefetch_factor=4) == [2, 2, 2]


def test_without_an_evaluation_split_the_error_names_the_fix(tmp_path):
    with pytest.raises(ValueError, match="pass eval_dataset to CCSSLTrainer or to evaluate"):
        trainer_of(tmp_path, validation=None).evaluate()


# --------------------------------------------------------------------------------------------------------------- a step


def test_a_weak_view_on_its_own_gives_the_joint_losses_where_there_is_no_batchnorm(tmp_path):
    runs = [
        trainer_of(tmp_path / weak, model_of("test_vit"), weak_forward=weak, learning_rate=0.003)
        for weak in ("joint", "separate")
    ]
    for run in runs:
        run.train()
    joint, separate = map(logs_of_steps, runs)
    for left, right in zip(joint, separate, strict=True):
        for name in ("loss", "loss_x", "loss_u", "loss_contrast", "mask_rate"):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-5)


def test_a_weak_view_on_its_own_is_normalised_apart_where_there_is_batchnorm(tmp_path):
    runs = [trainer_of(tmp_path / weak, weak_forward=weak) for weak in ("joint", "separate")]
    for run in runs:
        run.train()
    assert logs_of_steps(runs[0])[0]["loss_x"] != logs_of_steps(runs[1])[0]["loss_x"]


def test_compute_loss_has_the_signature_of_upstream():
    ours, theirs = (inspect.signature(cls.compute_loss).parameters for cls in (CCSSLTrainer, Trainer))
    assert list(ours) == list(theirs)
    assert {name: parameter.default for name, parameter in ours.items()} == {
        name: parameter.default for name, parameter in theirs.items()
    }


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "save_model", "log", "create_scheduler"])
def test_overridden_methods_take_what_upstream_takes(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (CCSSLTrainer, Trainer))
    assert list(ours) == list(theirs)


def test_accumulated_batches_are_averaged(tmp_path):
    """The mean over micro-batches is logged and stepped with, not their sum."""
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    for entry in logs_of_steps(trainer):
        assert entry["loss"] == pytest.approx(entry["loss_x"] + entry["loss_u"] + entry["loss_contrast"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_network_trains_is_evaluated_and_resumes(tmp_path):
    changes = {"torch_compile": True, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer_of(tmp_path / "whole", model_of("test_vit"), **changes)
    whole.train()
    trainer_of(tmp_path / "parts", model_of("test_vit"), callbacks=[StopAt(2)], **changes).train()
    resumed = trainer_of(tmp_path / "parts", model_of("test_vit", seed=1), **changes)
    resumed.train(resume_from_checkpoint=True)
    assert different(everything(whole), everything(resumed)) == []


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, backbone):
    runs = [trainer_of(tmp_path / str(on), model_of(backbone), gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    for left, right in zip(*map(logs_of_steps, runs), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_bfloat16_trains(tmp_path):
    trainer = trainer_of(tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in logs_of_steps(trainer))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------------- logging


def test_the_log_names_its_terms(tmp_path):
    trainer = trainer_of(tmp_path, hidden_label_column="true", confidence_threshold=0.0)
    trainer.train()
    for entry in logs_of_steps(trainer):
        histogram = [entry[f"pseudo_labels/{label}"] for label in LABELS]
        assert sum(histogram) == pytest.approx(1)
        assert entry["mask_rate"] == 1
        assert 0 <= entry["pseudo_label_precision"] <= 1
        assert entry["loss"] == pytest.approx(entry["loss_x"] + entry["loss_u"] + entry["loss_contrast"], rel=1e-5)
        assert entry["learning_rate"] > 0
    assert "loss_contrast" in entry and "loss_graph" not in entry


def test_the_supervised_baseline_logs_one_term(tmp_path):
    trainer = trainer_of(tmp_path, algorithm="supervised", confidence_threshold=None, lambda_contrast=0, unlabeled=None)
    trainer.train()
    entry = logs_of_steps(trainer)[-1]
    assert entry["loss"] == pytest.approx(entry["loss_x"], rel=1e-5)
    assert not {"loss_u", "loss_contrast", "mask_rate"} & entry.keys()


def test_logs_are_means_over_the_steps_between_them(tmp_path):
    each, every_third = trainer_of(tmp_path / "1", logging_steps=1), trainer_of(tmp_path / "3", logging_steps=3)
    each.train()
    every_third.train()
    steps, means = logs_of_steps(each), logs_of_steps(every_third)
    for name in ("loss", "loss_u", "mask_rate"):
        assert means[0][name] == pytest.approx(np.mean([entry[name] for entry in steps[:3]]), rel=1e-5)
        assert means[1][name] == pytest.approx(np.mean([entry[name] for entry in steps[3:]]), rel=1e-5)


def test_a_diverged_loss_stops_the_run_and_is_not_in_the_log(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=1e20)
    with pytest.raises(ValueError, match=r"Step 2: loss_x, .* are NaN or infinite"):
        trainer.train()
    assert [entry["step"] for entry in logs_of_steps(trainer)] == [1]
    assert all(math.isfinite(entry["loss"]) for entry in logs_of_steps(trainer))


def test_tensorboard_gets_the_terms(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer_of(tmp_path, report_to=["tensorboard"], eval_strategy="steps", eval_steps=3).train()
    [file] = (tmp_path / "logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    wanted = {"train/loss", "train/loss_x", "train/loss_contrast", "train/mask_rate", "train/pseudo_labels/one"}
    assert wanted | {"eval/top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss_u")] == [1, 2, 3, 4, 5, 6]


# ----------------------------------------------------------------------------------------------- optimizer and schedule


@needs_shared
def test_a_run_takes_the_reference_rates(tmp_path):
    golden = np.load(SHARED / "golden" / "lr_schedule.npz")
    total, warmup = int(golden["total_steps"]), int(golden["warmup_steps"])
    trainer = trainer_of(
        tmp_path, max_steps=total, warmup_steps=warmup, learning_rate=float(golden["base_lr"]), callbacks=[StopAt(30)]
    )
    trainer.train()
    found = [entry["learning_rate"] for entry in logs_of_steps(trainer)]
    np.testing.assert_allclose(found, golden["lr"][:30], rtol=1e-6)


def test_the_paper_sgd_by_default(tmp_path):
    trainer = trainer_of(tmp_path, model_of("test_resnet"), max_steps=1)
    trainer.train()
    decayed, plain = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-3, 0)
    assert (decayed["momentum"], decayed["nesterov"], decayed["initial_lr"]) == (0.9, True, 0.03)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert decayed_names == set(decayed_parameter_names(trainer.model))
    assert "projection.0.weight" in decayed_names and "backbone.fc.weight" in decayed_names
    assert not any(".bn" in name or name.endswith("bias") for name in decayed_names)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_a_step_is_nesterov_sgd_with_decay(tmp_path):
    """Redone by hand on one weight, over two steps."""
    gradients, weights, name = [], [], "backbone.fc.weight"

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            parameter = dict(model.named_parameters())[name]
            gradients.append(parameter.grad.clone())
            weights.append(parameter.detach().clone())

    trainer = trainer_of(tmp_path, model_of("test_resnet"), callbacks=[Record()], max_steps=2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in logs_of_steps(trainer)]
    weight, velocity = weights[0], torch.zeros_like(weights[0])
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + 1e-3 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - rate * (gradient + 0.9 * velocity)
    torch.testing.assert_close(dict(trainer.model.named_parameters())[name].detach(), weight)


def test_other_optimizers_and_schedules_of_transformers(tmp_path):
    trainer = trainer_of(
        tmp_path,
        optim="adamw_torch",
        learning_rate=1e-3,
        schedule="lr_scheduler_type",
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_steps=6,
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    found = [entry["learning_rate"] for entry in logs_of_steps(trainer)]
    np.testing.assert_allclose(found, [0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


# -------------------------------------------------------------------------------------------------------------- folders


def test_the_best_step_comes_back_at_the_end(tmp_path):
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept[state.global_step] = everything(trainer)

    trainer = trainer_of(
        tmp_path,
        callbacks=[Keep()],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_top1",  # the first of equal values is the best, so not the last
        save_total_limit=2,
    )
    trainer.train()
    best = trainer.state.best_global_step
    found = {entry["step"]: entry["eval_top1"] for entry in trainer.state.log_history if "eval_top1" in entry}
    assert best == max(found, key=found.get) and best < 6
    now = everything(trainer)
    weights = [name for name in now if not name.startswith("optimizer")]
    assert [name for name in weights if not torch.equal(now[name], kept[best][name])] == []
    from_the_log = trainer.results["validation"]
    assert {(result.provenance.which, result.provenance.step) for result in from_the_log} == {("best", best)}
    assert trainer.predictions == {}
    metrics = trainer.evaluate()
    assert metrics["eval_top1"] == found[best]
    assert trainer.results["validation"] == from_the_log
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-6"}


def best_of(tmp_path, values, **changes):
    """A run of four steps whose own metrics take `values`, one for each step; its best step and its warnings."""
    found = iter(values)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    args = arguments(tmp_path, load_best_model_at_end=True, **{**steps, **changes})
    name = args.metric_for_best_model
    trainer = CCSSLTrainer(model_of(), args, LABELED, UNLABELED, VALIDATION, lambda _: {name: next(found)})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("ece", [0.3, 0.1, 0.2, 0.4], 2),
        ("top1", [0.3, 0.1, 0.5, 0.4], 3),
        ("top1", [math.nan, 0.1, 0.5, math.nan], 3),
        ("ece", [math.nan, 0.2, -math.inf, 0.4], 2),
    ],
)
def test_the_best_model_is_that_of_the_best_finite_value(metric, values, best, tmp_path):
    trainer = best_of(tmp_path, values, metric_for_best_model=metric)
    assert trainer.state.best_global_step == best and trainer.provenance.step == best


def test_no_finite_value_is_no_best_model_and_is_said(tmp_path, caplog):
    trainer = best_of(tmp_path, [math.nan] * 4, metric_for_best_model="top1")
    assert trainer.provenance.which == "last"
    assert "No evaluation gave a finite 'top1'" in caplog.text


def test_a_run_stops_early_in_the_direction_of_its_metric(tmp_path):
    early = EarlyStoppingCallback(early_stopping_patience=2)
    args = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": True,
    }
    values = iter([0.3, 0.2, 0.4, 0.5, 0.6, 0.7])
    args = arguments(tmp_path, metric_for_best_model="ece", **args)
    trainer = CCSSLTrainer(
        model_of(), args, LABELED, UNLABELED, VALIDATION, lambda _: {"ece": next(values)}, callbacks=[early]
    )
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_needs_no_training_in_it(name, tmp_path):
    trainer, whole = trainer_of(tmp_path, max_steps=1, **{name: True}), trainer_of(tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=0.05)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


def test_save_total_limit_keeps_the_last(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


def test_load_best_model_at_end_needs_what_save_only_model_leaves_out(tmp_path):
    with pytest.raises(ValueError, match="save_only_model"):
        arguments(
            tmp_path,
            save_only_model=True,
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
        )


def test_no_pickled_arguments_and_no_token_reach_the_disk(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    token = "hf_thisIsASecretOfTheUser"
    trainer = trainer_of(
        tmp_path,
        hub_token=token,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        report_to=["tensorboard"],
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "model.safetensors", "ccssl_head.safetensors"} <= {path.name for path in files}
    assert "training_args.bin" not in {path.name for path in files}
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_a_saved_model_has_a_card_with_its_numbers(tmp_path):
    trainer = trainer_of(tmp_path / "digits")
    trainer.train()
    top1 = trainer.evaluate()["eval_top1"]
    trainer.save_model()
    card = (tmp_path / "digits" / "README.md").read_text()
    assert "confidence_threshold" in card and f"{top1:.4f}"[:5] in card and "FixMatch" in card
    assert str(tmp_path) not in card
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "README.md").is_file()


def test_a_card_that_can_not_be_written_loses_no_model(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    (tmp_path / "README.md").mkdir()
    with caplog.at_level(logging.ERROR):
        trainer.save_model()
    assert "The model card could not be written" in caplog.text
    assert (tmp_path / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_the_wrong_class_of_arguments_or_model_is_named(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match=r"pass ccssl_hf\.CCSSLTrainingArguments"):
        CCSSLTrainer(model_of(), TrainingArguments(output_dir=str(tmp_path)), LABELED, UNLABELED)
    with pytest.raises(TypeError, match="from_timm"):
        CCSSLTrainer(nn.Linear(2, 2), arguments(tmp_path), LABELED, UNLABELED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlabeled": None}, "pass unlabeled_dataset, or set algorithm='supervised'"),
        ({"per_device_train_batch_size": 32, "mu": 1}, "repeat_labeled=True"),
        ({"mu": 50}, "lower mu"),
        ({"hidden_label_column": "truth"}, "hidden_label_column"),
        ({"image_column": "picture"}, "image_column"),
        ({"algorithm": "fixmatsch"}, "fixmatch"),
        ({"n_sigma": 2.0}, "n_sigma"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_an_output_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="choose another folder"):
        trainer_of(tmp_path / "file" / "run")


def test_unlabeled_images_that_nothing_reads_are_mentioned(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(
            tmp_path, algorithm="supervised", lambda_contrast=0, confidence_threshold=None, max_steps=1
        )
    assert "uses no unlabeled images" in caplog.text
    trainer.train()


def test_few_labels_repeat_in_a_batch_when_asked_to(tmp_path):
    trainer = CCSSLTrainer(
        model_of(),
        arguments(tmp_path, per_device_train_batch_size=8, repeat_labeled=True, max_steps=2),
        train_dataset=LABELED.select(range(5)),
        unlabeled_dataset=UNLABELED,
    )
    trainer.train()
    assert Path(tmp_path).is_dir() and len(logs_of_steps(trainer)) == 2
