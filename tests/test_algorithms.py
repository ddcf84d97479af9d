"""Common behaviour of all algorithms: registry, errors, state, CCSSL; and tests of FixMatch and the baseline."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccssl_hf.algorithms import ALGORITHMS, CCSSL_PAPER, SSLBatch, algorithm_hyperparameters, build_algorithm
from ccssl_hf.algorithms.state import DistributionAlignment
from ccssl_hf.losses import class_aware_contrastive_loss
from ccssl_hf.transforms import View

CONTRIBUTING = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def example_algorithm() -> str | None:
    """The example of a new algorithm in CONTRIBUTING.md."""
    text = CONTRIBUTING.read_text(encoding="utf-8") if CONTRIBUTING.is_file() else ""
    return next((code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "(Algorithm):" in code), None)


SIZES = {"num_unlabeled": 60, "embedding_dim": 8, "batch_size": 4, "mu": 3}
"""Sizes of the run that `make_batch` belongs to."""


def make_batch(seed: int = 0, num_labeled: int = 4, num_unlabeled: int = 12, num_classes: int = 5) -> SSLBatch:
    """A batch with all parts that an algorithm may read. Some unlabeled images occur twice."""
    generator = torch.Generator().manual_seed(seed)

    def logits(count: int, width: int = num_classes) -> Tensor:
        return (3 * torch.randn(count, width, generator=generator)).requires_grad_()

    def embeddings(count: int) -> Tensor:
        vectors = torch.randn(count, SIZES["embedding_dim"], generator=generator)
        return F.normalize(vectors, dim=1).requires_grad_()

    counts = (num_labeled, num_unlabeled, num_unlabeled)
    return SSLBatch(
        logits_labeled=logits(num_labeled),
        labels=torch.randint(num_classes, (num_labeled,), generator=generator),
        logits_weak=logits(num_unlabeled),
        logits_strong=logits(num_unlabeled),
        embeddings_labeled=embeddings(num_labeled),
        embeddings_weak=embeddings(num_unlabeled),
        embeddings_strong=embeddings(num_unlabeled),
        embeddings_contrast=embeddings(num_unlabeled),
        index=torch.randint(SIZES["num_unlabeled"], (num_unlabeled,), generator=generator),
        heads={
            "one_vs_all": tuple(logits(count, 2 * num_classes) for count in counts),  # type: ignore[dict-item]
            "open": tuple(logits(count, num_classes + 1) for count in counts),  # type: ignore[dict-item]
        },
    )


def cast(batch: SSLBatch, dtype: torch.dtype) -> SSLBatch:
    """The same batch with floating-point tensors converted to `dtype`."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuple(map(one, parts)) for key, parts in value.items()}
        return value.detach().to(dtype) if value.is_floating_point() else value

    return SSLBatch(**{key: one(value) for key, value in vars(batch).items()})


def build(name: str, **hyperparameters: Any) -> Any:
    return build_algorithm(name, num_classes=5, **SIZES, **hyperparameters)


def test_a_confidence_at_the_threshold_counts() -> None:
    batch = make_batch()
    (logits_weak,) = batch.read("logits_weak")
    threshold = logits_weak.softmax(1).amax(1).median().item()
    mask = build_algorithm("fixmatch", num_classes=5, confidence_threshold=threshold)(batch).mask
    assert mask is not None and mask.sum() == 7  # of 12: torch takes the lower of two medians


def test_fixmatch_trains_on_confident_images_and_averages_over_all() -> None:
    batch = make_batch()
    result = build_algorithm("fixmatch", num_classes=5, confidence_threshold=0.8, sharpen_temperature=0.5)(batch)
    assert batch.logits_weak is not None and batch.logits_strong is not None
    confidences, pseudo_labels = (batch.logits_weak / 0.5).softmax(1).max(1)
    used = confidences >= 0.8
    assert 0 < used.sum() < len(used)
    expected = F.cross_entropy(batch.logits_strong[used], pseudo_labels[used], reduction="sum") / len(used)
    torch.testing.assert_close(result.terms["loss_u"], expected)
    torch.testing.assert_close(result.loss, F.cross_entropy(batch.logits_labeled, batch.labels) + expected)
    assert torch.equal(result.mask, used.float()) and torch.equal(result.pseudo_labels, pseudo_labels)
    result.loss.backward()
    assert batch.logits_weak.grad is None


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_contrast_is_added_to_any_algorithm(name: str) -> None:
    batch = make_batch()
    alone = build(name)(batch)
    options: Any = {"push_threshold": 0.5, "own_pair_weight": "squared"}
    result = build(name, lambda_contrast=2, contrast_temperature=0.1, **options)(batch)
    contrast = class_aware_contrastive_loss(
        embeddings=torch.stack([batch.embeddings_strong, batch.embeddings_contrast], dim=1),  # type: ignore[list-item]
        pseudo_labels=result.pseudo_labels,
        confidences=result.confidences,
        temperature=0.1,
        **options,
    )
    torch.testing.assert_close(result.terms["loss_contrast"], contrast.detach())
    torch.testing.assert_close(result.loss, alone.loss + 2 * contrast)
    assert set(alone.terms) == set(ALGORITHMS[name].terms) == set(result.terms) - {"loss_contrast"}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_terms_are_detached_and_weak_views_get_no_gradient(name: str) -> None:
    batch, algorithm = make_batch(), build(name, lambda_contrast=1)
    result = algorithm(batch)
    weights = {
        "loss_x": 1,
        "loss_u": 1,
        **{
            f"loss_{key.removeprefix('lambda_')}": value
            for key, value in algorithm.hyperparameters.items()
            if key.startswith("lambda_")
        },
    }
    expected = sum(weights[name] * term for name, term in result.terms.items())
    torch.testing.assert_close(result.loss.detach(), expected)
    assert all(term.shape == () and not term.requires_grad for term in result.terms.values())
    result.loss.backward()
    assert batch.logits_weak is not None and batch.embeddings_weak is not None
    assert batch.logits_weak.grad is None and batch.embeddings_weak.grad is None
    assert batch.embeddings_labeled is not None and batch.embeddings_labeled.grad is None
    for each in (result.pseudo_labels, result.confidences, result.mask):
        assert each is None or (len(each) == 12 and not each.requires_grad)
    assert (result.mask is None) == (name == "supervised")


def test_supervised_reads_the_labels_alone() -> None:
    batch = SSLBatch(logits_labeled=torch.randn(4, 5), labels=torch.tensor([0, 1, 2, 3]))
    result = build_algorithm("supervised", num_classes=5)(batch)
    assert result.loss.item() == F.cross_entropy(batch.logits_labeled, batch.labels).item()
    assert list(result.terms) == ["loss_x"] and result.mask is None and result.pseudo_labels is None


def test_supervised_takes_pseudo_labels_from_the_weak_view_for_the_contrast() -> None:
    batch = make_batch()
    result = build("supervised", lambda_contrast=1)(batch)
    assert batch.logits_weak is not None and result.mask is None
    assert torch.equal(result.pseudo_labels, batch.logits_weak.argmax(1))


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("supervised", {}, ""),
        ("supervised", {"lambda_contrast": 1}, "weak strong contrastive embeddings"),
        ("fixmatch", {}, "weak strong"),
        ("fixmatch", {"lambda_contrast": 1}, "weak strong contrastive embeddings"),
        ("comatch", {}, "weak strong contrastive embeddings"),
        ("flexmatch", {}, "weak strong index"),
        ("freematch", {}, "weak strong"),
        ("softmatch", {}, "weak strong"),
        ("simmatch", {}, "weak strong embeddings"),
        ("simmatch", {"lambda_contrast": 1}, "weak strong contrastive embeddings"),
        ("iomatch", {}, "weak strong"),
    ],
)
def test_an_algorithm_declares_what_it_reads(name: str, options: dict[str, Any], needs: str) -> None:
    algorithm = build(name, **options)
    expected = needs.split()
    assert algorithm.views == tuple(view for view in View if view.name.lower() in expected)
    for part in ("embeddings", "index"):
        assert getattr(algorithm, f"needs_{part}") == (part in expected), part
    assert set(algorithm.heads) == ({"one_vs_all", "open"} if name == "iomatch" else set())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_parts_that_an_algorithm_does_not_read_may_be_none(name: str) -> None:
    batch, algorithm = make_batch(), build(name)
    if View.CONTRASTIVE not in algorithm.views:
        batch.embeddings_contrast = None
    if not algorithm.needs_embeddings:
        batch.embeddings_labeled = batch.embeddings_weak = batch.embeddings_strong = None
    if not algorithm.needs_index:
        batch.index = None
    if not algorithm.heads:
        batch.heads = None
    if not algorithm.views:
        batch.logits_weak = batch.logits_strong = None
    assert algorithm(batch).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("fixmatch", "logits_strong"),
        ("comatch", "embeddings_contrast"),
        ("flexmatch", "index"),
        ("freematch", "logits_strong"),
        ("softmatch", "logits_strong"),
        ("simmatch", "embeddings_strong"),
        ("iomatch", "heads"),
    ],
)
@pytest.mark.parametrize("contrast", [0, 1])
def test_a_missing_part_of_the_batch_is_named_before_any_state_changes(name: str, missing: str, contrast: int) -> None:
    batch = make_batch()
    if contrast and name != "iomatch":
        missing = "embeddings_contrast"
    setattr(batch, missing, None)
    options = {"distribution_alignment_window": 2} if name == "fixmatch" else {}
    algorithm = build(name, lambda_contrast=contrast, **options)
    before = {key: value.clone() for key, value in algorithm.state_dict().items()}
    with pytest.raises(ValueError, match=missing):
        algorithm(batch)
    assert before and all(torch.equal(value, before[key]) for key, value in algorithm.state_dict().items())


def test_a_missing_head_is_named() -> None:
    batch = make_batch()
    assert batch.heads is not None
    del batch.heads["open"]
    with pytest.raises(ValueError, match=r"lacks open: add algorithm\.heads to the model"):
        build("iomatch")(batch)


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[B, 7\]"):
        build_algorithm("fixmatch", num_classes=7)(make_batch())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_half_precision_is_computed_in_float32_under_autocast(name: str) -> None:
    batch = cast(make_batch(), torch.bfloat16)
    expected = build(name, lambda_contrast=1)(batch.upcast())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = build(name, lambda_contrast=1)(batch)
    assert result.loss.dtype == torch.float32 and result.loss.item() == expected.loss.item()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_double_precision_stays(name: str) -> None:
    batch = make_batch()
    result = build(name, lambda_contrast=1)(cast(batch, torch.float64))
    assert result.loss.dtype == torch.float64
    torch.testing.assert_close(result.loss.float(), build(name, lambda_contrast=1)(batch).loss.detach())


def test_heads_are_brought_to_float32_too() -> None:
    head: Any = tuple(torch.ones(2, 3, dtype=torch.bfloat16) for _ in range(3))
    batch = SSLBatch(
        logits_labeled=torch.ones(2, 3), labels=torch.ones(2, dtype=torch.int64), heads={"open": head}
    ).upcast()
    assert batch.heads is not None and [part.dtype for part in batch.heads["open"]] == 3 * [torch.float32]
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("window", [1, 3])
def test_alignment_divides_by_the_mean_of_the_last_batches(window: int) -> None:
    alignment, history = DistributionAlignment(4, window), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        probabilities = torch.randn(6, 4, generator=generator).softmax(1)
        history.append(probabilities.mean(0))
        expected = probabilities / torch.stack(history[-window:]).mean(0)
        torch.testing.assert_close(alignment(probabilities), expected / expected.sum(1, keepdim=True))


def test_alignment_survives_a_class_that_is_never_predicted() -> None:
    aligned = DistributionAlignment(3, 2)(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    assert aligned.isfinite().all()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_state_is_buffers_alone_and_resumes_a_run_bit_for_bit(name: str) -> None:
    options: dict[str, Any] = {"lambda_contrast": 1}
    table = algorithm_hyperparameters(name)
    if "distribution_alignment_window" in table:
        options["distribution_alignment_window"] = 3  # shorter than the run: the ring wraps before and after
    if "memory_batches" in table:
        options["memory_batches"] = 2
    if "confidence_threshold" in table:
        options["confidence_threshold"] = 0.7
    run, resumed = build(name, **options), build(name, **options)
    assert not list(run.parameters())

    losses = []
    for step in range(8):
        if step == 5:
            resumed.load_state_dict({key: value.clone() for key, value in run.state_dict().items()})
        losses.append(run(make_batch(step)).loss.item())
    assert [resumed(make_batch(step)).loss.item() for step in (5, 6, 7)] == losses[5:]
    assert resumed.state_dict().keys() == run.state_dict().keys()
    assert all(torch.equal(value, run.state_dict()[key]) for key, value in resumed.state_dict().items())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_losses_of_several_batches_may_wait_for_one_backward_pass(name: str) -> None:
    algorithm = build(name, lambda_contrast=1)
    sum(algorithm(make_batch(step)).loss for step in range(3)).backward()


@pytest.mark.parametrize("window", [None, 0])
def test_alignment_is_off_by_zero_or_none(window: int | None) -> None:
    assert not build_algorithm("fixmatch", num_classes=5, distribution_alignment_window=window).state_dict()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_hyperparameter_has_a_type_a_default_and_help(name: str) -> None:
    table = algorithm_hyperparameters(name)
    assert {"lambda_contrast", "contrast_temperature", "push_threshold", "own_pair_weight"} <= set(table)
    assert build(name).hyperparameters == {key: row.default for key, row in table.items()}
    assert all(row.help.endswith(".") and row.type is not None for row in table.values())


CCSSL = {"lambda_contrast": 0.0, "contrast_temperature": 0.07, "push_threshold": None, "own_pair_weight": "one"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "fixmatch": {
        "confidence_threshold": 0.95,
        "lambda_u": 1.0,
        "sharpen_temperature": 1.0,
        "distribution_alignment_window": 0,
    },
    "comatch": {
        "confidence_threshold": 0.95,
        "lambda_u": 1.0,
        "lambda_graph": 1.0,
        "graph_temperature": 0.2,
        "graph_threshold": 0.8,
        "memory_batches": 5,
        "smoothing_alpha": 0.9,
        "distribution_alignment_window": 32,
    },
    "flexmatch": {"confidence_threshold": 0.95, "lambda_u": 1.0, "threshold_warmup": True},
    "freematch": {
        "lambda_u": 1.0,
        "lambda_fairness": 0.01,
        "momentum": 0.999,
        "use_quantile": False,
        "clip_threshold": False,
    },
    "softmatch": {"lambda_u": 1.0, "momentum": 0.999, "n_sigma": 2.0},
    "simmatch": {
        "confidence_threshold": 0.95,
        "lambda_u": 1.0,
        "lambda_graph": 1.0,
        "graph_temperature": 0.1,
        "memory_batches": 64,
        "smoothing_alpha": 0.9,
        "distribution_alignment_window": 256,
    },
    "iomatch": {
        "confidence_threshold": 0.95,
        "open_threshold": 0.5,
        "lambda_u": 1.0,
        "lambda_one_vs_all": 1.0,
        "lambda_open": 1.0,
        "distribution_alignment_window": 128,
    },
}


def test_each_class_declares_its_paper_views_terms_and_defaults() -> None:
    defaults = {
        name: {key: row.default for key, row in algorithm.hyperparameters_class.table().items()}
        for name, algorithm in ALGORITHMS.items()
    }
    assert defaults == {name: {**CCSSL, **DEFAULTS[name]} for name in ALGORITHMS}
    papers = {name: algorithm.paper for name, algorithm in ALGORITHMS.items()}
    assert {name: paper and paper.arxiv for name, paper in papers.items()} == {
        "supervised": None,
        "fixmatch": "2001.07685",
        "comatch": "2011.11183",
        "flexmatch": "2110.08263",
        "freematch": "2205.07246",
        "softmatch": "2301.10921",
        "simmatch": "2203.06915",
        "iomatch": "2308.13168",
    }
    for name, paper in papers.items():
        if paper is not None:
            assert paper.title.startswith(f"{paper.name}: ") and paper.name.lower() == name
            assert str(paper.year) in paper.key and paper.authors.count(" and ") == paper.authors.count(",") - 1
    assert CCSSL_PAPER.arxiv == "2203.02261"
    assert {name for name, algorithm in ALGORITHMS.items() if algorithm.views == tuple(View)} == {"comatch"}
    assert ALGORITHMS["supervised"].views == () and ALGORITHMS["flexmatch"].views == (View.WEAK, View.STRONG)
    assert ALGORITHMS["freematch"].terms == ("loss_x", "loss_u", "loss_fairness")


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "iomatch"])
def test_the_default_open_set_score_is_the_confidence(name: str) -> None:
    logits = torch.tensor([[3.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(build(name).open_set_score(logits), logits.softmax(1).amax(1))


def test_hyperparameters_include_defaults() -> None:
    algorithm = build_algorithm("fixmatch", num_classes=5, lambda_u=2, push_threshold=0.9)
    assert json.loads(json.dumps(algorithm.hyperparameters))["lambda_u"] == 2.0
    assert isinstance(algorithm.hyperparameters["lambda_u"], float)
    assert algorithm.hyperparameters["push_threshold"] == 0.9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixmach", {}, "Did you mean 'fixmatch'.*supervised, fixmatch"),
        ("zzz", {}, "Unknown algorithm 'zzz'. Choose one of"),
        ("fixmatch", {"confidence_treshold": 0.9}, "fixmatch has no .*Did you mean 'confidence_threshold'.*lambda_u"),
        ("supervised", {"lambda_u": 1}, "supervised has no hyperparameter 'lambda_u'"),
        ("fixmatch", {"confidence_threshold": 1.5}, r"confidence_threshold is 1.5: choose a value in \[0, 1\]"),
        ("fixmatch", {"confidence_threshold": None}, "confidence_threshold is None: give a finite float"),
        ("fixmatch", {"push_threshold": -0.1}, r"push_threshold is -0.1: choose a value in \[0, 1\]"),
        ("fixmatch", {"lambda_u": -1}, "lambda_u is -1: choose a value at least 0"),
        ("fixmatch", {"lambda_u": float("nan")}, "lambda_u is nan: give a finite float"),
        ("fixmatch", {"lambda_u": "1"}, "lambda_u is '1': give a finite float"),
        ("fixmatch", {"lambda_contrast": True}, "lambda_contrast is True"),
        ("fixmatch", {"contrast_temperature": 0}, "contrast_temperature is 0: choose a value above 0"),
        ("fixmatch", {"sharpen_temperature": 0.0}, "sharpen_temperature is 0.0: choose a value above 0"),
        ("fixmatch", {"distribution_alignment_window": 2.5}, "distribution_alignment_window is 2.5: give a finite int"),
        ("fixmatch", {"distribution_alignment_window": -1}, "distribution_alignment_window is -1: choose"),
        ("fixmatch", {"own_pair_weight": "two"}, "own_pair_weight is 'two': choose one of one, squared"),
        ("comatch", {"graph_threshold": 1.1}, r"graph_threshold is 1.1: choose a value in \[0, 1\]"),
        ("comatch", {"smoothing_alpha": 1.1}, r"smoothing_alpha is 1.1: choose a value in \[0, 1\]"),
        ("comatch", {"graph_temperature": 0}, "graph_temperature is 0: choose a value above 0"),
        ("comatch", {"memory_batches": 0}, "memory_batches is 0: choose a value at least 1"),
        (
            "comatch",
            {"memory_batches": 6},
            "memory_batches is 6, but 60 unlabeled images make only 5 batches of 12: choose at most 5",
        ),
        ("comatch", {"lambda_fairness": 1}, "comatch has no hyperparameter 'lambda_fairness'"),
        ("flexmatch", {"confidence_threshold": 95}, r"confidence_threshold is 95: choose a value in \[0, 1\]"),
        ("flexmatch", {"threshold_warmup": 1}, "threshold_warmup is 1: give a finite bool"),
        ("freematch", {"momentum": 1.5}, r"momentum is 1.5: choose a value in \[0, 1\]"),
        ("freematch", {"confidence_threshold": 0.9}, "freematch has no hyperparameter 'confidence_threshold'"),
        ("softmatch", {"n_sigma": 0}, "n_sigma is 0: choose a value above 0"),
        ("simmatch", {"memory_batches": 0}, "memory_batches is 0: choose a value at least 1"),
        ("iomatch", {"open_threshold": 1.5}, r"open_threshold is 1.5: choose a value in \[0, 1\]"),
        ("iomatch", {"lambda_open": -1}, "lambda_open is -1: choose a value at least 0"),
    ],
)
def test_a_wrong_name_or_value_is_an_error_that_names_the_fix(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("flexmatch", {"num_unlabeled"}),
        ("comatch", {"embedding_dim", "batch_size", "mu"}),
        ("simmatch", {"embedding_dim", "batch_size"}),
    ],
)
def test_a_missing_size_of_the_run_is_an_error(name: str, needed: set[str]) -> None:
    facts = {key: SIZES[key] for key in needed}
    assert build_algorithm(name, num_classes=5, **facts)
    for key in needed:
        with pytest.raises(ValueError, match=f"{name} needs {key}=... in addition to num_classes"):
            build_algorithm(name, num_classes=5, **{**facts, key: None})


@pytest.mark.skipif(example_algorithm() is None, reason="needs CONTRIBUTING.md of a checkout")
def test_the_example_of_a_new_algorithm_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uda.py").write_text(example_algorithm() or "", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ccssl_hf.algorithms.uda", tmp_path / "uda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(ALGORITHMS, "uda", module.UDA)
    test_terms_are_detached_and_weak_views_get_no_gradient("uda")
    test_contrast_is_added_to_any_algorithm("uda")
    paper = ALGORITHMS["uda"].paper
    assert paper is not None and paper.arxiv == "1904.12848"
