"""Compare all algorithms, with and without CCSSL, on small real images with the same network, steps, views and labels.

    python benchmarks/algorithms.py --data cifar10_mini            # all algorithms, seeds 0, 1 and 2
    python benchmarks/algorithms.py --data cifar10_mini --choose pseudo_labels

A finished run is a line in results/algorithms_<data>.jsonl and is not repeated. The tables in results/algorithms.md are
written from these lines.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.algorithms import ALGORITHMS, algorithm_hyperparameters
from ccssl_hf.card.text import format_table
from ccssl_hf.metrics import pseudo_label_quality

NEW_PAGE = """# Algorithms with and without CCSSL

<!-- tables: written by benchmarks/algorithms.py -->
<!-- /tables -->
"""
TABLES = re.compile(r"(<!-- tables.*?-->\n).*?(<!-- /tables -->)", re.DOTALL)
COLUMNS = {
    "top1": "Top-1 accuracy",
    "auroc": "OOD AUROC (confidence)",
    "auroc_open_set": "OOD AUROC (open-set score)",
    "precision": "Pseudo-label precision",
    "coverage": "Pseudo-label coverage",
    "seconds_per_step": "CPU seconds a step",
}
RESULTS = Path(__file__).parent / "results"
BACKBONE = "wide_resnet10_1_cifar"
BN_MOMENTUM = 0.1  # with the published 0.001 the initial statistics would remain after so few steps
IMAGE_SIZES = {"cifar10_mini": 16, "butterfly10_mini": 24}
COMMON = {
    "per_device_train_batch_size": 8,
    "mu": 3,
    "ema_decay": 0.99,
    "weight_decay": 1e-3,
    "lambda_contrast": 1.0,
}
# `CHOSEN` were chosen on validation data with FixMatch, from the values below.
SETTINGS: dict[str, dict[str, Any]] = {
    "cifar10_mini": {
        "max_steps": 900,
        "cutout_size": 8,
        "learning_rate": 0.03,
        "confidence_threshold": 0.95,
        "push_threshold": 0.9,
    },
    "butterfly10_mini": {
        "max_steps": 500,
        "cutout_size": 12,
        "learning_rate": 0.06,
        "confidence_threshold": 0.95,
        "push_threshold": 0.9,
    },
}
# Windows and momentums that are too long for a run of a few hundred steps.
SHORTENED: dict[str, dict[str, Any]] = {
    "freematch": {"momentum": 0.99},
    "softmatch": {"momentum": 0.99},
    "simmatch": {"memory_batches": 8, "distribution_alignment_window": 32},
    "iomatch": {"distribution_alignment_window": 32},
}
CHOSEN = ("learning_rate", "confidence_threshold", "push_threshold")
# Tried: learning rate and confidence threshold without CCSSL, then the push threshold of CCSSL with the best of these.
LEARNING_RATES = (0.03, 0.06)
CONFIDENCE_THRESHOLDS = {"cifar10_mini": (0.8, 0.95), "butterfly10_mini": (0.6, 0.95)}
PUSH_THRESHOLDS = (None, 0.9)


def _parquet(root: Path, pack: str, split: str) -> datasets.Dataset:
    path = root / pack / f"{split}.parquet"
    if not path.is_file():
        raise ValueError(f"{path} is missing: pass the folder of the image packs as --root.")
    return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)


def load_cifar10(root: Path, seed: int) -> tuple[list[str], dict[str, datasets.Dataset]]:
    """Six animals are the classes, with 40 labels each, drawn by seed. Vehicles are the OOD images.

    The unlabeled and the test split have vehicles too.
    """
    train = _parquet(root, "cifar10_mini", "train")
    names = train.features["label"].names
    known = [name for name in names if name not in ("airplane", "automobile", "ship", "truck")]
    lists = json.loads((root / "cifar10_mini" / "splits.json").read_text(encoding="utf-8"))
    labels = train["label"][:]
    taken = {row for key, rows in lists.items() if key.startswith("labeled_400_") for row in rows}
    free = [row for row in range(len(train)) if row not in taken]
    validation = [row for c in range(len(names)) for row in [r for r in free if labels[r] == c][:30]]
    labeled = [row for row in lists[f"labeled_400_seed{seed}"] if names[labels[row]] in known]
    unlabeled = sorted(set(range(len(train))) - set(labeled) - set(validation))
    rows = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation}
    splits = {split: train.select(numbers) for split, numbers in rows.items()}
    return known, {**splits, "test": _parquet(root, "cifar10_mini", "test")}


def load_butterfly10(root: Path, seed: int) -> tuple[list[str], dict[str, datasets.Dataset]]:
    """Ten species with 4 to 13 labels, the same images for every seed. The unlabeled split has eight further species.

    The unlabeled images have no labels, so pseudo-label precision cannot be measured. OOD AUROC compares the ten
    species with ten that are in no split. Both are from the test split of butterfly50_semi.
    """
    pack = "butterfly10_mini"
    splits = {split: _parquet(root, pack, split) for split in ("labeled", "unlabeled", "validation", "test")}
    known = splits["labeled"].features["label"].names
    if (root / "butterfly50_semi").is_dir():
        large = _parquet(root, "butterfly50_semi", "test")
        names = large.features["label"].names
        kept = {*known, *[name for name in names if name not in known][:10]}
        rows = [row for row, label in enumerate(large["label"][:]) if names[label] in kept]
        splits["test_open"] = large.select(rows)
    return known, splits


DATA = {"cifar10_mini": load_cifar10, "butterfly10_mini": load_butterfly10}


class StepTimes(TrainerCallback):
    """Processor time between the ends of steps, in seconds. Other processes hardly change it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    def median(self) -> float:
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return statistics.median([after - before for before, after in pairs] or [float("nan")])


def settings_of(data: str, algorithm: str, ccssl: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run except data and seed, by their names in `CCSSLTrainingArguments`."""
    wanted = {**COMMON, **SETTINGS[data], **SHORTENED.get(algorithm, {}), **changes}
    if not ccssl:
        wanted |= {"lambda_contrast": 0.0, "push_threshold": None}
    table = algorithm_hyperparameters(algorithm)
    hyperparameters = {name for each in ALGORITHMS for name in algorithm_hyperparameters(each)}
    wanted = {name: value for name, value in wanted.items() if name in table or name not in hyperparameters}
    return {"algorithm": algorithm, **wanted}


def run(data: str, root: Path, seed: int, settings: dict[str, Any], *, validation_only: bool) -> dict[str, Any]:
    """Train once, and evaluate the averaged weights of the last step."""
    known, splits = DATA[data](root, seed)
    set_seed(seed)
    model = CCSSLForImageClassification.from_timm(
        BACKBONE, labels=known, image_size=IMAGE_SIZES[data], bn_momentum=BN_MOMENTUM
    )
    reads_unlabeled = settings["algorithm"] != "supervised" or settings["lambda_contrast"] > 0
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = CCSSLTrainingArguments(
            folder,
            seed=seed,
            per_device_eval_batch_size=100,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        unlabeled = splits["unlabeled"] if reads_unlabeled else None
        trainer = CCSSLTrainer(model, args, splits["labeled"], unlabeled, splits["validation"], callbacks=[times])
        trainer.train()
        row: dict[str, float | None] = {"seconds_per_step": round(times.median(), 4)}
        row["validation_top1"] = trainer.evaluate()["eval_top1"]
        return row if validation_only else row | measure(trainer, splits, SETTINGS[data]["confidence_threshold"])


def measure(trainer: CCSSLTrainer, splits: dict[str, datasets.Dataset], threshold: float) -> dict[str, float | None]:
    """Metrics on the test split, and the quality of the pseudo labels that these weights give the unlabeled images."""
    metrics = trainer.evaluate(splits["test"], metric_key_prefix="test")
    if "test_open" in splits:
        open_set = trainer.evaluate(splits["test_open"], metric_key_prefix="test")
        metrics |= {name: value for name, value in open_set.items() if name.startswith("test_auroc")}
    names = ("top1", "auroc", "auroc_open_set")
    row: dict[str, float | None] = {name: metrics[f"test_{name}"] for name in names if f"test_{name}" in metrics}
    unlabeled = trainer.predict(splits["unlabeled"])
    confidences, pseudo_labels = torch.from_numpy(unlabeled.predictions).softmax(-1).max(-1)
    passed = confidences >= threshold
    row["coverage"] = passed.float().mean().item()
    if unlabeled.label_ids is not None:
        quality = pseudo_label_quality(pseudo_labels=pseudo_labels, mask=passed, hidden_labels=unlabeled.label_ids)
        row["precision"] = quality["precision"] if passed.any() else None
    return row


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def identity(row: dict[str, Any]) -> str:
    """Equal for two runs with the same data, seed and settings."""
    return json.dumps([row["data"], row["seed"], row["settings"], row["validation_only"]], sort_keys=True)


def machine(threads: int) -> str:
    """Processor, threads and torch version, as the rows name them."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    threads_text = f"{threads} thread{'s' * (threads > 1)} a run"
    return f"{len(names)} × {names[0] if names else 'CPU'}, {threads_text}, torch {torch.__version__}"


def planned(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs that the flags name: all runs of a seed before those of the next seed."""
    data = options.data
    jobs: list[tuple[str, bool, dict[str, Any]]]
    if options.choose == "pseudo_labels":
        grid = itertools.product(LEARNING_RATES, CONFIDENCE_THRESHOLDS[data])
        jobs = [("fixmatch", False, dict(zip(CHOSEN, values, strict=False))) for values in grid]
    elif options.choose == "contrast":
        jobs = [("fixmatch", True, {"push_threshold": threshold}) for threshold in PUSH_THRESHOLDS]
    else:
        jobs = [(algorithm, ccssl, {}) for algorithm in options.algorithms for ccssl in (False, True)]
    for seed in options.seeds:
        for algorithm, ccssl, changes in jobs:
            if options.steps:
                changes = {**changes, "max_steps": options.steps}
            settings = settings_of(data, algorithm, ccssl, changes)
            yield {"data": data, "seed": seed, "settings": settings, "validation_only": bool(options.choose)}


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each algorithm without and with CCSSL, with mean and standard deviation over seeds."""
    lines = []
    for algorithm in ALGORITHMS:
        mine = [row for row in rows if row["settings"]["algorithm"] == algorithm]
        without = {row["seed"]: row for row in mine if not row["settings"]["lambda_contrast"]}
        with_it = {row["seed"]: row for row in mine if row["settings"]["lambda_contrast"]}
        for name, runs in ((algorithm, without), (f"{algorithm} + CCSSL", with_it)):
            if runs:
                first, *_ = measured = list(runs.values())
                values = {title: [row[key] for row in measured] for key, title in COLUMNS.items() if key in first}
                lines.append({"algorithm": name, "seeds": len(runs), **values})
        both = sorted(without.keys() & with_it.keys())
        if both:
            lines[-1]["Change by CCSSL"] = [with_it[seed]["top1"] - without[seed]["top1"] for seed in both]
    order = ("algorithm", "seeds", "Top-1 accuracy", "Change by CCSSL", *COLUMNS.values())
    return format_table(lines, [t for t in dict.fromkeys(order) if any(t in line for line in lines)], markdown=True)


def choice_table(rows: Sequence[dict[str, Any]]) -> str:
    """The settings that were tried on validation data."""
    tried: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        settings = row["settings"]
        key = tuple(settings.get(name) for name in (*CHOSEN, "lambda_contrast"))
        tried.setdefault(key, []).append(row["validation_top1"])
    lines = [
        {
            "method": "fixmatch + CCSSL" if ccssl else "fixmatch",
            "learning_rate": rate,
            "confidence_threshold": threshold,
            "push_threshold": f"{push or 'none'}" if ccssl else "",
            "Top-1 accuracy (validation)": values,
        }
        for (rate, threshold, push, ccssl), values in tried.items()
    ]
    return format_table(lines, list(lines[0]), digits=3, markdown=True)


def section(data: str, rows: Sequence[dict[str, Any]], steps: int | None) -> str:
    """The part of the page for one dataset: data, settings, results, and how the settings were chosen."""
    changes = {"max_steps": steps} if steps else {}

    def current(row: dict[str, Any]) -> bool:
        settings = row["settings"]
        wanted = settings_of(data, settings["algorithm"], bool(settings["lambda_contrast"]), changes)
        return not row["validation_only"] and settings == wanted

    final, tried = [row for row in rows if current(row)], [row for row in rows if row["validation_only"]]
    if not final:
        return ""
    settings = {**COMMON, **SETTINGS[data], **changes}
    shortened = [f"{name}: {_words(changes)}" for name, changes in SHORTENED.items()]
    parts = [
        f"## {data}",
        inspect.getdoc(DATA[data]) or "",
        f"`{BACKBONE}` from random weights at {IMAGE_SIZES[data]} px with BatchNorm momentum {BN_MOMENTUM}; "
        f"{_words(settings)}. Shortened for so short a run: {'; '.join(shortened)}. Other settings: defaults.",
        "Test split, EMA weights, last step; mean ± standard deviation over seeds. Pseudo labels are those that these "
        f"weights give unlabeled images with confidence {settings['confidence_threshold']} or more; the pseudo label "
        f"of an OOD image counts as wrong. Times are processor times of {final[-1]['machine']}.",
        results_table(final),
    ]
    if tried:
        parts += [
            "Settings were chosen by top-1 accuracy on the validation split (EMA weights, last step):",
            choice_table(tried),
        ]
    return "\n\n".join(parts)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in settings.items())


def write_tables(page: Path, tables: str, *, new_page: str) -> None:
    """Replace the text between the two comments of a page."""
    text = page.read_text(encoding="utf-8") if page.is_file() else new_page
    page.write_text(TABLES.sub(lambda match: f"{match[1]}\n{tables}\n\n{match[2]}", text), encoding="utf-8")


def write_page(folder: Path, steps: int | None) -> None:
    sections = [section(data, read_rows(folder / f"algorithms_{data}.jsonl"), steps) for data in DATA]
    write_tables(folder / "algorithms.md", "\n\n".join(filter(None, sections)), new_page=NEW_PAGE)


def parser_of_runs(description: str | None) -> argparse.ArgumentParser:
    """The flags of this benchmark and of fast_flags.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="folder of the image packs")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps; default: those in SETTINGS")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            algorithm_hyperparameters(name)  # raises an error that lists the names
        return chosen

    parser = parser_of_runs(__doc__)
    parser.add_argument("--algorithms", type=names, default=list(ALGORITHMS), help="separated by commas; default: all")
    parser.add_argument(
        "--choose",
        choices=("pseudo_labels", "contrast"),
        help="try settings on validation data: first those of FixMatch, then the one that CCSSL adds",
    )
    parser.add_argument("--shard", default="0/1", help="i/n: this process does every n-th run, starting with the i-th")
    return parser.parse_args(arguments)


def run_missing(jobs: Sequence[dict[str, Any]], file: Path, *, root: Path, threads: int) -> None:
    """Run the jobs that have no line in `file` yet, and append their lines.

    Args:
        jobs: Data, seed, settings and `validation_only` of each run.
        file: The file of lines; its folder is created.
        root: Folder of the image packs.
        threads: Threads of this process.
    """
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    file.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if identity(job) in map(identity, read_rows(file)):
            continue
        started = time.perf_counter()
        measured = run(job["data"], root, job["seed"], job["settings"], validation_only=job["validation_only"])
        row = {**job, **measured, "seconds": round(time.perf_counter() - started, 1)}
        row["machine"] = machine(threads)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        shown = {name: row[name] for name in ("validation_top1", "top1", "seconds") if name in row}
        print(job["data"], job["seed"], job["settings"], shown, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    first, shards = map(int, options.shard.split("/"))
    file = options.output / f"algorithms_{options.data}.jsonl"
    run_missing(list(planned(options))[first::shards], file, root=options.root, threads=options.threads)
    write_page(options.output, options.steps)


if __name__ == "__main__":
    main()
