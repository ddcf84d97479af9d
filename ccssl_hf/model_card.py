"""The model card: facts in, `README.md` out. Nothing here touches the network or reads the run's files.

`CardFacts` says what is known, `templates/model_card.md.j2` words it; what is not known is left out. Of a local path
only the last part is written, and of what is called a token nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TAGS = ("image-classification", "semi-supervised-learning", "ccssl", "timm")

METRICS = {
    "top1": ("accuracy", "Top-1 accuracy"),
    "top5": ("top_5_accuracy", "Top-5 accuracy"),
    "macro_f1": ("f1", "Macro F1"),
    "ece": ("expected_calibration_error", "Expected calibration error (lower is better)"),
    "auroc": ("roc_auc", "AUROC, known classes against no known class"),
    "auroc_open_set": ("roc_auc_open_set", "AUROC of the same by the algorithm's open-set score"),
    "precision": ("pseudo_label_precision", "Precision of the pseudo labels that passed"),
    "coverage": ("pseudo_label_coverage", "Share of the unlabeled images that passed"),
    "ood_share_passed": ("pseudo_label_ood_share_passed", "Share of the images of no known class that passed"),
}
"""Names of `ccssl_hf.metrics` as the Hub's metadata and as people call them."""

OPEN_SET_METRICS = ("auroc", "auroc_open_set", "precision", "coverage", "ood_share_passed")


class Paper(NamedTuple):
    """What a citation says."""

    name: str
    key: str
    authors: str
    title: str
    venue: str
    year: int
    arxiv: str


_CVPR, _ICCV, _NEURIPS, _ICLR = (
    "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    "Proceedings of the IEEE/CVF International Conference on Computer Vision",
    "Advances in Neural Information Processing Systems",
    "International Conference on Learning Representations",
)
CCSSL = Paper(
    "CCSSL",
    "yang2022ccssl",
    "Yang, Fan and Wu, Kai and Zhang, Shuyi and Jiang, Guannan and Liu, Yong and Zheng, Feng and Zhang, Wei and "
    "Wang, Chengjie and Zeng, Long",
    "Class-Aware Contrastive Semi-Supervised Learning",
    _CVPR,
    2022,
    "2203.02261",
)
ALGORITHM_PAPERS = {
    "fixmatch": Paper(
        "FixMatch",
        "sohn2020fixmatch",
        "Sohn, Kihyuk and Berthelot, David and Li, Chun-Liang and Zhang, Zizhao and Carlini, Nicholas and "
        "Cubuk, Ekin D. and Kurakin, Alex and Zhang, Han and Raffel, Colin",
        "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
        _NEURIPS,
        2020,
        "2001.07685",
    ),
    "comatch": Paper(
        "CoMatch",
        "li2021comatch",
        "Li, Junnan and Xiong, Caiming and Hoi, Steven C. H.",
        "CoMatch: Semi-supervised Learning with Contrastive Graph Regularization",
        _ICCV,
        2021,
        "2011.11183",
    ),
    "flexmatch": Paper(
        "FlexMatch",
        "zhang2021flexmatch",
        "Zhang, Bowen and Wang, Yidong and Hou, Wenxin and Wu, Hao and Wang, Jindong and Okumura, Manabu and "
        "Shinozaki, Takahiro",
        "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling",
        _NEURIPS,
        2021,
        "2110.08263",
    ),
    "freematch": Paper(
        "FreeMatch",
        "wang2023freematch",
        "Wang, Yidong and Chen, Hao and Heng, Qiang and Hou, Wenxin and Fan, Yue and Wu, Zhen and Wang, Jindong and "
        "Savvides, Marios and Shinozaki, Takahiro and Raj, Bhiksha and Schiele, Bernt and Xie, Xing",
        "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning",
        _ICLR,
        2023,
        "2205.07246",
    ),
    "softmatch": Paper(
        "SoftMatch",
        "chen2023softmatch",
        "Chen, Hao and Tao, Ran and Fan, Yue and Wang, Yidong and Wang, Jindong and Schiele, Bernt and Xie, Xing and "
        "Raj, Bhiksha and Savvides, Marios",
        "SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning",
        _ICLR,
        2023,
        "2301.10921",
    ),
    "simmatch": Paper(
        "SimMatch",
        "zheng2022simmatch",
        "Zheng, Mingkai and You, Shan and Huang, Lang and Wang, Fei and Qian, Chen and Xu, Chang",
        "SimMatch: Semi-Supervised Learning with Similarity Matching",
        _CVPR,
        2022,
        "2203.06915",
    ),
    "iomatch": Paper(
        "IOMatch",
        "li2023iomatch",
        "Li, Zekun and Qi, Lei and Shi, Yinghuan and Gao, Yang",
        "IOMatch: Simplifying Open-Set Semi-Supervised Learning with Joint Inliers and Outliers Utilization",
        _ICCV,
        2023,
        "2308.13168",
    ),
}


@dataclass(frozen=True)
class Result:
    """One number, and all that it takes to know what it is.

    Args:
        metric: A name of `ccssl_hf.metrics`, such as `top1`, or any other.
        value: As a fraction in [0, 1].
        split: A key of `CardFacts.datasets`, such as `test`.
        weights: `EMA` or `raw` (in any case).
        step: Optimizer steps that these weights were trained for.
        which: `last` or `best`: how that step was chosen.
        seed: The run's seed.

    Raises:
        ValueError: If `weights` or `which` is something else.
    """

    metric: str
    value: float
    split: str
    weights: str
    step: int
    which: str
    seed: int

    def __post_init__(self) -> None:
        if self.weights.lower() not in ("ema", "raw"):
            raise ValueError(f"Result.weights is {self.weights!r}: say 'EMA' or 'raw'.")
        if self.which not in ("last", "best"):
            raise ValueError(f"Result.which is {self.which!r}: say 'last' or 'best'.")

    @property
    def name(self) -> str:
        """The metric in words."""
        return METRICS.get(self.metric, ("", self.metric))[1]

    @property
    def weights_name(self) -> str:
        return {"ema": "EMA", "raw": "raw"}[self.weights.lower()]


@dataclass
class CardFacts:
    """What a card can say. Everything but the first six may be left out, and is then not mentioned.

    Args:
        model_name: Hub id of the model (`user/name`), or a folder.
        backbone: timm name of the network.
        labels: Names of the classes, in order.
        algorithm: Name in `ccssl_hf.algorithms.ALGORITHMS`.
        hyperparameters: Everything that was chosen, by its name; `lambda_contrast` above 0 means CCSSL.
        datasets: Split (`labeled`, `unlabeled`, `validation`, `test`) to Hub id or local path.
        base_model: Hub id or timm name of the weights that training started from; None: random weights.
        license: Identifier of the Hub, such as `apache-2.0`.
        image_size: Side of the input in pixels.
        steps: Optimizer steps of the run.
        batch_size: Labeled images in each step, over all processes.
        mu: Unlabeled images for each labeled one.
        seed: The run's seed.
        labeled_per_class: Class name to its number of labeled images.
        num_unlabeled: Unlabeled images.
        split_fingerprints: Split to the fingerprint of its rows.
        versions: Library to version; see `library_versions`.
        device: Kind of device, such as `cuda`; a device number is left out.
        num_processes: Processes that trained.
        run_time: Seconds.
        results: Measured numbers. Those of `OPEN_SET_METRICS` get a section of their own.
        pictures: File beside the card, by relative name, to its caption.
        limits: Further limits of this very model, in words.
        remote_code: Whether plain loading needs `trust_remote_code=True`, as our own backbones do.
    """

    model_name: str
    backbone: str
    labels: Sequence[str]
    algorithm: str
    hyperparameters: Mapping[str, Any]
    datasets: Mapping[str, str]
    base_model: str | None = None
    license: str | None = None
    image_size: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    mu: int | None = None
    seed: int | None = None
    labeled_per_class: Mapping[str, int] | None = None
    num_unlabeled: int | None = None
    split_fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    num_processes: int = 1
    run_time: float | None = None
    results: Sequence[Result] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    limits: str | None = None
    remote_code: bool = False


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run depends on, as far as they are installed."""
    names = ("ccssl_hf", "torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "huggingface_hub")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _is_path(text: str) -> bool:
    """Whether `text` is written as a path of some machine and no other."""
    return (
        text.startswith(("~", "./", "../")) or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    )


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _public_name(name: str) -> tuple[str, bool]:
    """What the card calls a data set or model, and whether that is an id of the Hub: of a path only the last part."""
    name = re.sub(r"^(hf[-_]hub|local-dir):", "", name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return _last_part(name), False
    if Path(name).exists() or Path(name).suffix in (".parquet", ".csv", ".json", ".zip"):
        return _last_part(name), False
    return name, True


def _cell(value: Any) -> str:
    """A value as text that neither breaks a Markdown table nor tells where files lie."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        value = [f"{key}={_cell(item)}" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    if value is None:
        return "none"
    text = str(value)
    text = _last_part(text) if _is_path(text) else text
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """The results as the Hub's metadata has them; NaN and infinity, which it refuses, are left out."""
    rows = []
    for result in facts.results:
        if not math.isfinite(result.value):
            continue
        dataset = _public_name(facts.datasets.get(result.split, "unknown"))[0]
        how = f"{result.weights_name} weights, {result.which} step {result.step}, seed {result.seed}"
        rows.append(
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=result.split,
                metric_type=METRICS.get(result.metric, (result.metric, ""))[0],
                metric_name=f"{result.name} ({how})",
                metric_value=round(float(result.value), 6),
            )
        )
    return rows


def _settings(facts: CardFacts) -> dict[str, Any]:
    """What was chosen for the run, by name."""
    run = {
        "algorithm": facts.algorithm,
        "steps": facts.steps,
        "batch_size": facts.batch_size,
        "mu": facts.mu,
        "seed": facts.seed,
        "image_size": facts.image_size,
    }
    known = {name: value for name, value in run.items() if value is not None}
    return {**known, **{name: value for name, value in facts.hyperparameters.items() if "token" not in name.lower()}}


def _metadata(facts: CardFacts, model_name: str, base_model: tuple[str, bool] | None) -> ModelCardData:
    hub_datasets = [name for name, on_hub in map(_public_name, facts.datasets.values()) if on_hub]
    eval_results = _eval_results(facts)
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(TAGS),
        base_model=base_model[0] if base_model and base_model[1] else None,
        datasets=list(dict.fromkeys(hub_datasets)) or None,
        metrics=sorted({result.metric_type for result in eval_results}) or None,
        model_name=model_name if eval_results else None,
        eval_results=eval_results or None,
    )


def render_card(facts: CardFacts) -> ModelCard:
    """The card, for `card.save(folder / "README.md")`.

    Args:
        facts: What is known. Names that are local paths appear by their last part and stay out of the metadata.

    Returns:
        The card; its `data` holds the metadata with the results as a model index.
    """
    model_name = _last_part(facts.model_name) if _is_path(facts.model_name) else facts.model_name
    base_model = None
    if facts.base_model:
        name, on_hub = _public_name(facts.base_model)
        base_model = (name if "/" in name or not on_hub else f"timm/{name}", on_hub)
    paper = ALGORITHM_PAPERS.get(facts.algorithm)
    contrastive = float(facts.hyperparameters.get("lambda_contrast") or 0) > 0
    card = ModelCard.from_template(
        _metadata(facts, model_name, base_model),
        template_str=resources.files("ccssl_hf").joinpath("templates/model_card.md.j2").read_text(encoding="utf-8"),
        facts=facts,
        name=model_name,
        initial_weights=base_model,
        algorithm=paper.name if paper else facts.algorithm,
        paper=paper,
        ccssl=CCSSL,
        contrastive=contrastive,
        papers=[CCSSL, *([paper] if paper else [])],
        data={split: _public_name(name) for split, name in facts.datasets.items()},
        num_labeled=sum((facts.labeled_per_class or {}).values()),
        has_auroc=any(result.metric == "auroc" for result in facts.results),
        closed_set=[result for result in facts.results if result.metric not in OPEN_SET_METRICS],
        open_set=[result for result in facts.results if result.metric in OPEN_SET_METRICS],
        settings=_settings(facts),
        pictures={quote(_last_part(file) if _is_path(file) else file): text for file, text in facts.pictures.items()},
        device=facts.device.split(":")[0] if facts.device else None,
        run_time=None if facts.run_time is None else _duration(facts.run_time),
        cell=_cell,
    )
    card.text = (
        re.sub(r"\n{3,}", "\n\n", card.text).strip() + "\n"
    )  # sections that are left out leave their blank lines
    return card
