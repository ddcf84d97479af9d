"""Train supervised, FixMatch and FixMatch + CCSSL on scikit-learn's digits, with unlabeled images of other classes.

    accelerate launch recipes/train_digits.py [any flag]

Six digits are the classes, with four labeled images each. The unlabeled images are of all ten digits, so two fifths of
them are out-of-distribution (OOD). Each method is trained with several seeds. The seed also chooses the labeled images.
The settings in recipes/configs/digits.yaml were chosen with `--report_split validation`.
"""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, pipeline, set_seed
from transformers.utils import logging

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.card.plots import COLORS, plot_confusion_matrix, plot_lines, save, style
from ccssl_hf.card.text import format_table
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.errors import errors_in_one_line, errors_of_a_run
from ccssl_hf.metrics import pseudo_label_quality

CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
KNOWN = [str(digit) for digit in range(6)]
SPLIT_SIZES = {"test": 40, "validation": 40}  # images of each of the ten digits; the others are for training
LABELS_PER_CLASS = 4
# Changes to the settings for each method; None means that a setting is not used.
METHODS = {
    "supervised": {
        "algorithm": "supervised",
        "lambda_contrast": 0.0,
        "push_threshold": None,
        "confidence_threshold": None,
    },
    "fixmatch": {"algorithm": "fixmatch", "lambda_contrast": 0.0, "push_threshold": None},
    "fixmatch_ccssl": {"algorithm": "fixmatch"},
}
TITLES = {"supervised": "Supervised", "fixmatch": "FixMatch", "fixmatch_ccssl": "FixMatch + CCSSL"}
LIMITS = "It was trained to show a method in minutes, on images of 8 by 8 pixels. It does not read other digits."
COLUMNS = {
    "top1": "top-1",
    "pseudo_label_precision": "pseudo-label precision",
    "pseudo_label_coverage": "pseudo-label coverage",
    "auroc": "OOD AUROC",
}


@dataclass
class DemoArguments:
    """Arguments of the demo in addition to `CCSSLTrainingArguments`."""

    backbone: str = field(default="wide_resnet10_1_cifar", metadata={"help": "Name of a timm model."})
    image_size: int = field(default=16, metadata={"help": "Image size in pixels; the originals have 8."})
    seeds: int = field(default=3, metadata={"help": "Number of runs of each method, with seeds from 0."})
    methods: str = field(default=",".join(METHODS), metadata={"help": "Methods to train, separated by commas."})
    report_split: str = field(
        default="test", metadata={"help": "Split to report: test, or validation to choose settings."}
    )


def load_splits(seed: int, size: int) -> dict[str, datasets.Dataset]:
    """Split the digits. Test and validation are the same for all seeds; the seed chooses the labeled images."""
    images, digits = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(digits))
    rows: dict[str, list[int]] = {"test": [], "validation": [], "labeled": [], "unlabeled": []}
    for digit in range(10):
        mine = order[digits[order] == digit]
        for split, count in SPLIT_SIZES.items():
            rows[split] += mine[:count].tolist()
            mine = mine[count:]
        mine = np.random.RandomState(seed).permutation(mine)
        count = LABELS_PER_CLASS if str(digit) in KNOWN else 0
        rows["labeled"] += mine[:count].tolist()
        rows["unlabeled"] += mine[count:].tolist()

    def dataset(indices: list[int]) -> datasets.Dataset:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        pictures = [Image.fromarray((images[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)) for i in indices]
        pictures = [picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
        columns = {"image": pictures, "label": [str(digits[i]) for i in indices]}
        return datasets.Dataset.from_dict(columns, features=features)

    return {split: dataset(indices) for split, indices in rows.items()}


def run(method: str, seed: int, demo: DemoArguments, args: CCSSLTrainingArguments) -> tuple[dict, list, CCSSLTrainer]:
    """Train one method with one seed. Returns its row of the report, its validation curve, and the trainer."""
    started = time.perf_counter()
    splits = load_splits(seed, demo.image_size)
    threshold = args.confidence_threshold
    # The model of the first seed is published. Runs share no folder.
    folder = Path(args.output_dir) / (method if seed == 0 else f"cards/digits_{method}_seed{seed}")
    args = dataclasses.replace(args, seed=seed, output_dir=str(folder), **METHODS[method])
    set_seed(seed)
    # With the published BatchNorm momentum, 0.001, half of the initial statistics would remain after 500 steps.
    model = CCSSLForImageClassification.from_timm(
        demo.backbone, labels=KNOWN, image_size=demo.image_size, bn_momentum=0.1
    )
    trainer = CCSSLTrainer(
        model,
        args,
        train_dataset=splits["labeled"],
        unlabeled_dataset=None if args.algorithm == "supervised" else splits["unlabeled"],
        eval_dataset=splits["validation"],
    )
    trainer.dataset_names = {split: f"digits of scikit-learn, {split} split of train_digits.py" for split in splits}
    trainer.stop.command = "make demo, which starts from the first step"
    trainer.train()

    # Evaluate the averaged weights (EMA) of the last step, and the pseudo labels that they give the unlabeled images.
    metrics = trainer.evaluate(splits[demo.report_split], metric_key_prefix=demo.report_split)
    unlabeled = trainer.predict(splits["unlabeled"])
    probabilities = torch.from_numpy(unlabeled.predictions).softmax(-1)
    confidences, pseudo_labels = probabilities.max(-1)
    quality = pseudo_label_quality(
        pseudo_labels=pseudo_labels, mask=confidences >= threshold, hidden_labels=unlabeled.label_ids
    )
    trainer.add_results("unlabeled", {f"{name}@{threshold:g}": value for name, value in quality.items()})
    row = {
        "method": method,
        "seed": seed,
        "top1": metrics[f"{demo.report_split}_top1"],
        "auroc": metrics[f"{demo.report_split}_auroc"],
        "pseudo_label_precision": quality["precision"],
        "pseudo_label_coverage": quality["coverage"],
        "split": demo.report_split,
        "weights": "EMA",
        "step": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
    }
    curve = [(entry["step"], entry["eval_top1"]) for entry in trainer.state.log_history if "eval_top1" in entry]
    return row, curve, trainer


def shared_steps(seeds: list[list[tuple[int, float]]]) -> pd.DataFrame:
    """One row for each seed and one column for each step that all seeds share."""
    return pd.DataFrame([dict(curve) for curve in seeds]).dropna(axis=1).sort_index(axis=1)


def plot_convergence(histories: dict[str, list], path: Path, ylabel: str) -> None:
    """Plot the mean over seeds against optimizer steps for each method, with a band of one standard deviation.

    Args:
        histories: Method to one curve for each seed, `[(step, value), ...]`.
        path: The picture to write.
        ylabel: Metric, split and weights.
    """
    tables = {method: shared_steps(seeds) for method, seeds in histories.items()}
    if not tables or any(table.empty for table in tables.values()):
        raise ValueError("Nothing to plot: pass at least one method, and measure all of its seeds at the same steps.")
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.add_subplot()
    seeds = max(map(len, tables.values()))
    note = f"Mean of {seeds} seeds, band: ± one standard deviation" if seeds > 1 else "One seed"
    style(ax, xlabel="Optimizer steps", ylabel=ylabel, note=note)
    plot_lines(ax, {method: list(table.mean().items()) for method, table in tables.items()})
    for table, color in zip(tables.values(), COLORS, strict=False):
        mean, spread = table.mean(), table.std()
        ax.fill_between(table.columns, mean - spread, mean + spread, color=color, alpha=0.16, linewidth=0)
    save(figure, path)


def load_back(folder: Path, picture: Image.Image, label: str) -> None:
    """Load the published model with AutoModel, pipeline and timm, and compare their predictions on one image."""
    import timm

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    classify = pipeline("image-classification", model=str(folder))
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    pixels = transform(picture)[None]
    with torch.no_grad():
        predictions = {
            "AutoModelForImageClassification": model(pixel_values=pixels).logits.softmax(-1)[0],
            "timm": network(pixels).softmax(-1)[0],
        }
    names = [model.config.id2label[i] for i in range(len(KNOWN))]
    scores = {row["label"]: row["score"] for row in classify(picture, top_k=len(KNOWN))}
    predictions["pipeline"] = torch.tensor([scores[name] for name in names])
    print(f"\nThe model in {folder}, loaded back, on one test image of a {label}:")
    for name, prediction in predictions.items():
        best = int(prediction.argmax())
        print(f"  {name:32} predicts {names[best]} with confidence {prediction[best]:.6f}")
    reference = predictions["timm"]
    assert all(torch.allclose(each, reference, atol=1e-6) for each in predictions.values()), "the three disagree"
    print("  The three agree.")


def main() -> None:
    with errors_in_one_line():
        demo, args = parse_recipe(DemoArguments, CCSSLTrainingArguments, config=CONFIG, description=__doc__)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights; the training progress bars stay
    datasets.disable_progress_bars()
    output = Path(args.output_dir)
    methods = demo.methods.split(",")
    rows, curves, kept = [], {TITLES[method]: [] for method in methods}, {}
    for number, (seed, method) in enumerate((s, m) for s in range(demo.seeds) for m in methods):
        print(f"[{number + 1}/{demo.seeds * len(methods)}] {TITLES[method]}, seed {seed}", flush=True)
        row, curve, trainer = run(method, seed, demo, args)
        rows.append(row)
        curves[TITLES[method]].append(curve)
        name = f"digits_{method}_seed{seed}"
        trainer.create_model_card(name, license="apache-2.0", limits=LIMITS, folder=str(output / "cards" / name))
        if seed == 0:  # publish the first seed, not the best one
            trainer.save_model()
            kept[method] = trainer

    (output / "report.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    plot_convergence(curves, output / "convergence.png", ylabel="Top-1 accuracy (validation split, EMA weights)")
    print(
        f"\nDigits {', '.join(KNOWN)} with {LABELS_PER_CLASS} labels each, {args.max_steps} steps, {demo.seeds} seeds."
    )
    print(f"EMA weights, last step. Top-1 and OOD AUROC: {demo.report_split} split. Pseudo labels: unlabeled images.\n")
    table = [
        {"method": TITLES[method]}
        | {title: [row[key] for row in rows if row["method"] == method] for key, title in COLUMNS.items()}
        for method in methods
    ]
    print(format_table(table, ["method", *COLUMNS.values()]))

    if "fixmatch_ccssl" in kept:
        splits = load_splits(0, demo.image_size)
        known = splits[demo.report_split].filter(lambda row: row["label"] in KNOWN)
        prediction = kept["fixmatch_ccssl"].predict(known)
        plot_confusion_matrix(
            prediction.label_ids, prediction.predictions.argmax(-1), KNOWN, output / "confusion_matrix.png"
        )
        load_back(output / "fixmatch_ccssl", known[0]["image"], known[0]["label"])
    print(
        f"\nWritten to {output}: report.json, convergence.png, confusion_matrix.png, a model folder for each method, "
        "and a card for each run in cards/."
    )


if __name__ == "__main__":
    with errors_of_a_run():
        main()
