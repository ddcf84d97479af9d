"""The model card: facts in, `README.md` out. Nothing here touches the network or reads the run's files.

`CardFacts` says what is known, `templates/model_card.md.j2` words it; what is not known is left out. Of a local path
only the last part is written, and of what is called a token nothing. Results and their pictures stand between two
marks (`templates/results.md.j2`), and can be renewed there without a word of the rest being touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..algorithms import ALGORITHMS, CCSSL_PAPER
from ..data import FINGERPRINTED_IMAGES
from ..record import PUBLISHED, Provenance, Result, hub_results

TAGS = ("image-classification", "timm")
CCSSL_TAGS = ("semi-supervised-learning", "ccssl")

IMAGES = "images"
"""The folder of a card's pictures, beside it."""

PICTURES = CURVES, CONFUSION_MATRIX, RELIABILITY, CONFIDENCE, EMBEDDINGS = tuple(
    f"{IMAGES}/{name}.png" for name in ("curves", "confusion_matrix", "reliability", "confidence", "embeddings")
)

_RESULTS = re.compile(r"<!-- results of (?P<provenance>[^>]*?);[^>]*-->.*?<!-- /results -->", re.DOTALL)
"""What `render_results` writes, in a card."""

_PICTURE = re.compile(r"!\[(?P<caption>.*?)\]\((?P<file>[^)]*)\)")


@dataclass
class CardFacts:
    """What a card can say. Everything but the first three may be left out, and is then not mentioned.

    Args:
        model_name: Hub id of the model (`user/name`), or a folder.
        backbone: timm name of the network.
        labels: Names of the classes, in order.
        algorithm: Name in `ccssl_hf.algorithms.ALGORITHMS`; None where nothing is known of how it was trained.
        hyperparameters: The algorithm's and CCSSL's, by name; `lambda_contrast` above 0 means CCSSL.
        optimization: Likewise of the optimizer and all else that is no view.
        views: Likewise of the views of an image.
        datasets: Split (`labeled`, `unlabeled`, `validation`, `test`) to Hub id or local path.
        base_model: Hub id or timm name of the weights that training started from; None: random weights.
        license: Identifier of the Hub, such as `apache-2.0`.
        steps: Optimizer steps of the run.
        batch_size: Labeled images in each step, over all processes.
        mu: Unlabeled images for each labeled one.
        seed: The run's seed.
        labeled_per_class: Class name to its number of labeled images.
        num_unlabeled: Unlabeled images.
        split_fingerprints: Split to its `data.fingerprint`.
        versions: Library to version; see `library_versions`.
        device: Kind of device, such as `cuda`; a device number is left out.
        num_processes: Processes that trained.
        run_time: Seconds.
        published: The weights that lie beside the card; None where nothing is known of the run.
        results: Measured numbers.
        pictures: File beside the card, by relative name, to its caption.
        limits: Further limits of this very model, in words.
        remote_code: Whether plain loading needs `trust_remote_code=True`, as our own backbones do.
        weights_kept: Whether there are weights to load; without them the card says so, and not how to use them.
    """

    model_name: str
    backbone: str
    labels: Sequence[str]
    algorithm: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    optimization: Mapping[str, Any] = field(default_factory=dict)
    views: Mapping[str, Any] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    license: str | None = None
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
    published: Provenance | None = None
    results: Sequence[Result] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    limits: str | None = None
    remote_code: bool = False
    weights_kept: bool = True


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


def _settings(facts: CardFacts) -> dict[str, dict[str, Any]]:
    """What was chosen for the run or holds by default, by name, in tables with titles."""
    tables = {
        "Method": {"algorithm": facts.algorithm, "mu": facts.mu, **facts.hyperparameters},
        "Optimization": {
            "steps": facts.steps,
            "batch_size": facts.batch_size,
            "seed": facts.seed,
            **facts.optimization,
        },
        "Views": facts.views,
    }
    own_fields = ("algorithm", "mu", "steps", "batch_size", "seed")
    shown = {
        title: {
            name: value
            for name, value in table.items()
            if "token" not in name.lower() and not (value is None and name in own_fields)
        }
        for title, table in tables.items()
    }
    return {title: table for title, table in shown.items() if table}


def _metadata(facts: CardFacts, model_name: str, base_model: tuple[str, bool] | None) -> ModelCardData:
    names = {split: _public_name(name) for split, name in facts.datasets.items()}
    eval_results = hub_results(facts.results, {split: name for split, (name, _) in names.items()})
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=[*TAGS, *(CCSSL_TAGS if facts.algorithm else ())],
        base_model=base_model[0] if base_model and base_model[1] else None,
        datasets=list(dict.fromkeys(name for name, on_hub in names.values() if on_hub)) or None,
        metrics=sorted({result.metric_type for result in eval_results}) or None,
        model_name=model_name if eval_results else None,
        eval_results=eval_results or None,
    )


def _template(name: str) -> str:
    return resources.files(__package__).joinpath(f"templates/{name}.md.j2").read_text(encoding="utf-8")


def _tidy(text: str) -> str:
    """Without the blank lines that sections leave behind which were left out."""
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _links(pictures: Mapping[str, str]) -> dict[str, str]:
    return {quote(_last_part(file) if _is_path(file) else file): caption for file, caption in pictures.items()}


def render_results(results: Sequence[Result], pictures: Mapping[str, str], published: Provenance | None) -> str:
    """The part of a card that `renew_results` replaces: numbers and pictures between two marks.

    Args:
        results: Measured numbers.
        pictures: File beside the card, by relative name, to its caption; `CURVES` is left out.
        published: The weights that lie beside the card; the first mark keeps it for later measurements.
    """
    pictures = _links(pictures)
    metrics = {result.metric.partition("@")[0] for result in results}
    text = jinja2.Template(_template("results")).render(
        known=[result for result in results if result.section == "known classes"],
        pseudo=[result for result in results if result.section == "pseudo labels"],
        open_set=[result for result in results if result.section == "open set"],
        metrics=metrics,
        judged=not metrics.isdisjoint(("precision", "coverage", "ood_share_passed")),
        pictures={file: caption for file, caption in pictures.items() if file not in (CURVES, CONFIDENCE)},
        confidence=pictures.get(CONFIDENCE),
        confidence_file=CONFIDENCE,
        on_the_way=any(r.provenance and published and r.provenance.step != published.step for r in results),
        published=published,
        unknown=PUBLISHED,
        cell=_cell,
    )
    return _tidy(text)


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
    paper = ALGORITHMS[facts.algorithm].paper if facts.algorithm in ALGORITHMS else None
    card = ModelCard.from_template(
        _metadata(facts, model_name, base_model),
        template_str=_template("model_card"),
        facts=facts,
        name=model_name,
        results=render_results(facts.results, facts.pictures, facts.published),
        initial_weights=base_model,
        algorithm=paper.name if paper else facts.algorithm,
        paper=paper,
        ccssl=CCSSL_PAPER,
        contrastive=float(facts.hyperparameters.get("lambda_contrast") or 0) > 0,
        papers=[CCSSL_PAPER, *([paper] if paper else [])],
        data={split: _public_name(name) for split, name in facts.datasets.items()},
        num_labeled=sum((facts.labeled_per_class or {}).values()),
        has_auroc=any(result.metric == "auroc" for result in facts.results),
        settings=_settings(facts),
        fingerprinted=FINGERPRINTED_IMAGES,
        curves=facts.pictures.get(CURVES),
        curves_file=CURVES,
        device=facts.device.split(":")[0] if facts.device else None,
        run_time=None if facts.run_time is None else _duration(facts.run_time),
        cell=_cell,
    )
    card.text = _tidy(card.text)
    return card


def published_provenance(card: ModelCard) -> Provenance | None:
    """The weights beside a card, as its mark names them; None of a card that was not written here."""
    mark = _RESULTS.search(card.text)
    return Provenance.parse(mark["provenance"]) if mark else None


def results_of(card: ModelCard) -> list[Result]:
    """The numbers in a card's metadata that were written there by `render_card` or `renew_results`."""
    found = (Result.from_hub(each) for each in card.data.get("eval_results") or ())
    return [result for result in found if result is not None]


def renew_results(
    card: ModelCard,
    results: Iterable[Result],
    *,
    datasets: Mapping[str, str],
    pictures: Mapping[str, str],
    model_name: str,
) -> None:
    """Put new numbers and pictures onto a card, in its metadata and between its marks; the rest stays as it is.

    Args:
        card: Any model card. One without marks gets them at its end.
        results: They replace what the card says of their splits.
        datasets: Their splits, to Hub id or local path.
        pictures: File beside the card to its caption; they replace those of the same file.
        model_name: What the metadata calls the model, where it has no results yet.
    """
    results = list(results)
    renewed = {result.split for result in results}
    names = {split: _public_name(name)[0] for split, name in datasets.items()}
    kept = [
        found
        for found in card.data.get("eval_results") or ()
        if not ((old := Result.from_hub(found)) and old.split in renewed)
    ]
    card.data["eval_results"] = now = [*kept, *hub_results(results, names)]
    card.data["metrics"] = sorted({*card.data.get("metrics", ()), *(each.metric_type for each in now)})
    card.data["model_name"] = card.data.get("model_name") or model_name
    mark, published = _RESULTS.search(card.text), published_provenance(card)
    old_pictures = {found["file"]: found["caption"] for found in _PICTURE.finditer(mark[0])} if mark else {}
    section = render_results(results_of(card), old_pictures | dict(pictures), published)
    if mark:
        card.text = f"{card.text[: mark.start()]}{section.strip()}{card.text[mark.end() :]}"
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
