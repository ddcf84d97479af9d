"""Properties that hold for any split and any setting, tried on generated examples."""

from __future__ import annotations

import math
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import datasets
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ccssl_hf import CCSSLTrainingArguments
from ccssl_hf.data import OUT_OF_DISTRIBUTION, read_labels
from ccssl_hf.sampling import PairedBatchSampler
from ccssl_hf.training_args import ViewArguments
from ccssl_hf.transforms import View, ViewSettings, crop_boxes

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")

SMALL = st.integers(1, 40)
NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=6, unique=True)


# ------------------------------------------------------------------------------------------------------------ sampling


def sampler(num_labeled: int, num_unlabeled: int, batch: int, mu: int, batches: int, seed: int) -> PairedBatchSampler:
    return PairedBatchSampler(
        num_labeled=num_labeled,
        num_unlabeled=num_unlabeled,
        batch_size=batch,
        mu=mu,
        num_batches=batches,
        seed=seed,
    )


@given(SMALL, SMALL, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**40))
def test_every_epoch_of_each_split_holds_every_image_once(
    num_labeled: int, num_unlabeled: int, batch: int, mu: int, seed: int
) -> None:
    batches = 2 * max(math.ceil(num_labeled / batch), math.ceil(num_unlabeled / (mu * batch)))
    found = list(sampler(num_labeled, num_unlabeled, batch, mu, batches, seed))
    for part, size in (("labeled", num_labeled), ("unlabeled", num_unlabeled)):
        index = np.concatenate([getattr(each, f"{part}_index") for each in found])
        draws = np.concatenate([getattr(each, f"{part}_draw") for each in found])
        assert draws.tolist() == list(range(len(draws)))
        for start in range(0, len(index) - size + 1, size):
            assert sorted(index[start : start + size]) == list(range(size))


@given(SMALL, SMALL, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_any_number_of_processes_draws_the_same_global_batch(
    num_labeled: int, num_unlabeled: int, batch: int, mu: int, processes: int, seed: int
) -> None:
    one = list(sampler(num_labeled, num_unlabeled, batch * processes, mu, 3, seed))
    many = list(sampler(num_labeled, num_unlabeled, batch, mu, 3 * processes, seed))
    for step, whole in enumerate(one):
        parts = many[step * processes : (step + 1) * processes]
        for name in ("labeled_index", "labeled_draw", "unlabeled_index", "unlabeled_draw"):
            assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()


# -------------------------------------------------------------------------------------------------------------- labels


@given(NAMES, st.data())
def test_labels_mean_the_same_names_in_any_order_of_classes(names: list[str], data: st.DataObject) -> None:
    order = data.draw(st.permutations(names))
    words = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12))
    features = datasets.Features({"label": datasets.ClassLabel(names=order)})
    split = datasets.Dataset.from_dict({"label": words}, features=features)
    found = read_labels(split, "label", names, role="validation", allow_ood=True)
    assert [names[number] for number in found] == words


@given(NAMES, st.integers(1, 5), st.data())
def test_names_of_no_class_are_out_of_distribution(names: list[str], known: int, data: st.DataObject) -> None:
    classes = names[: max(1, min(known, len(names) - 1))]
    words = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12)) + classes[:1]
    split = datasets.Dataset.from_dict({"label": words})
    found = read_labels(split, "label", classes, role="validation", allow_ood=True)
    expected = [classes.index(word) if word in classes else OUT_OF_DISTRIBUTION for word in words]
    assert found.tolist() == expected


# --------------------------------------------------------------------------------------------------------------- views


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=8),
    st.integers(0, 2**40),
    st.sampled_from([View.WEAK, View.STRONG, View.CONTRASTIVE]),
)
def test_crops_lie_within_images_of_any_size(sizes: list[tuple[int, int]], seed: int, view: View) -> None:
    heights, widths = torch.tensor(sizes).unbind(1)
    looks = ViewSettings(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, weak_crop="resized")
    draws = torch.arange(len(sizes))
    boxes = crop_boxes(view, looks, seed=seed, stream=1, draws=draws, heights=heights, widths=widths)
    top, left, height, width = boxes.unbind(1)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    again = crop_boxes(view, looks, seed=seed, stream=1, draws=draws[-1:], heights=heights[-1:], widths=widths[-1:])
    assert torch.equal(again[0], boxes[-1])  # a crop does not depend on the other images of its batch


# ------------------------------------------------------------------------------------------------------------- settings

RANGES: dict[str, st.SearchStrategy[Any]] = {
    "max_steps": st.integers(1, 10**6),
    "per_device_train_batch_size": st.integers(1, 512),
    "mu": st.integers(1, 16),
    "learning_rate": st.floats(1e-6, 1.0),
    "weight_decay": st.floats(0, 0.1),
    "ema_decay": st.floats(0.5, 0.9999),
    "seed": st.integers(0, 2**31),
    "confidence_threshold": st.floats(0, 1),
    "push_threshold": st.floats(0, 1),
    "lambda_u": st.floats(0, 10),
    "lambda_contrast": st.floats(0.1, 10),
    "contrast_temperature": st.floats(0.01, 2),
    "cutout_size": st.integers(0, 64),
    "randaugment_ops": st.integers(0, 4),
    "horizontal_flip": st.booleans(),
    "repeat_labeled": st.booleans(),
    "decode": st.sampled_from(["auto", "memory", "stream"]),
    "own_pair_weight": st.sampled_from(["one", "squared"]),
}


@given(st.sets(st.sampled_from(sorted(RANGES)), max_size=8), st.data())
def test_settings_survive_a_yaml_file(names: set[str], data: st.DataObject) -> None:
    chosen = {name: data.draw(RANGES[name], label=name) for name in sorted(names)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump({"output_dir": folder, "use_cpu": True, **chosen}))
        read = CCSSLTrainingArguments.from_config(file)
        given_in_python = CCSSLTrainingArguments(output_dir=folder, use_cpu=True, **chosen)
    assert {name: getattr(read, name) for name in chosen} == chosen
    for part in (read.hyperparameters(), read.optimization_settings()):
        assert part in (given_in_python.hyperparameters(), given_in_python.optimization_settings())


CHOICES = {
    name: get_args(hint)
    for name, hint in get_type_hints(CCSSLTrainingArguments).items()
    if get_origin(hint) is Literal and name in {f.name for f in fields(CCSSLTrainingArguments)}
}


@given(st.sampled_from(sorted(CHOICES)), st.text("abcxyz_", min_size=1, max_size=8))
def test_a_word_that_is_no_choice_is_refused_with_the_choices(name: str, word: str) -> None:
    if word in CHOICES[name]:
        return
    with pytest.raises(ValueError, match=f"{name} is '{word}': choose one of .*{CHOICES[name][0]}"):
        CCSSLTrainingArguments(output_dir="unused", use_cpu=True, **{name: word})


def test_the_generated_settings_are_fields() -> None:
    assert set(RANGES) <= {f.name for f in fields(CCSSLTrainingArguments)}
    assert len(CHOICES) >= 6 and issubclass(CCSSLTrainingArguments, ViewArguments)
