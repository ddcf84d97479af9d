"""Draws the figures of the README and the documentation: `python docs/figures.py [names]`.

The names are those of `FIGURES`. `run` trains the demo's FixMatch and FixMatch + CCSSL once, about two minutes on one
core, and `space` the latter. `space` needs Chromium, playwright and gradio. The others take seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageDraw
from playwright.sync_api import Error, sync_playwright
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import set_seed

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments, class_aware_contrastive_loss
from ccssl_hf.card.plots import COLORS, GREY, MARKERS, TEXT
from ccssl_hf.cli.flags import parse_recipe
from ccssl_hf.deploy.space import write_space
from ccssl_hf.deploy.space_page.app import Space, open_image
from ccssl_hf.sampling import UNLABELED
from ccssl_hf.transforms import View, ViewSettings, make_view

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.png", dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.08)


# ------------------------------------------------------------------------------------------------------------- overview


def overview() -> None:
    """The task of the demo: a few labeled digits, many unlabeled ones of which some are out-of-distribution."""
    images, digits = load_digits(return_X_y=True)
    figure = Figure(figsize=(10, 2.9))
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set_xlim(0, 10)
    canvas.set_ylim(0, 2.9)
    canvas.axis("off")

    def draw(x: float, y: float, row: int, outlined: bool = False) -> None:
        side = 0.24
        canvas.imshow(images[row].reshape(8, 8), cmap="gray_r", extent=(x, x + side, y, y + side), zorder=2)
        edge = COLORS[1] if outlined else "#C8C8C8"
        canvas.add_patch(
            FancyBboxPatch(
                (x, y), side, side, boxstyle="square,pad=0.02", fc="white", ec=edge, lw=2.2 if outlined else 0.8
            )
        )

    def text(x: float, y: float, words: str, **style: Any) -> None:
        canvas.text(x, y, words, **{"fontsize": 10, "color": TEXT, "va": "center", **style})

    text(0.15, 2.7, "labeled: 24 images", weight="bold")
    for digit in range(6):
        for number, row in enumerate(np.flatnonzero(digits == digit)[:4]):
            draw(0.2 + 0.34 * digit, 2.22 - 0.34 * number, row)
        text(0.32 + 0.34 * digit, 0.95, f"“{digit}”", ha="center", color=COLORS[0])
    text(2.65, 2.7, "unlabeled: 973 images", weight="bold")
    for position, row in enumerate(np.random.RandomState(9).permutation(np.arange(200, 1797))[:60]):
        draw(2.7 + 0.34 * (position % 10), 2.22 - 0.34 * (position // 10), row, outlined=digits[row] > 5)
    text(
        2.65,
        0.2,
        "outlined: out-of-distribution (OOD). Training does not know which these are.",
        color=COLORS[1],
        fontsize=9,
    )

    def box(x: float, width: float, title: str, lines: str) -> None:
        style = "round,pad=0.02,rounding_size=0.08"
        canvas.add_patch(FancyBboxPatch((x, 0.75), width, 1.72, boxstyle=style, fc="#F3F6FA", ec=COLORS[0], lw=1.2))
        text(x + width / 2, 2.22, title, ha="center", weight="bold")
        text(x + width / 2, 1.48, lines, ha="center", linespacing=1.6, fontsize=9)

    box(6.45, 1.5, "training", "any timm backbone\npseudo labels\n+ CCSSL loss\naveraged weights")
    box(8.35, 1.5, "published model", "config.json\nmodel.safetensors\nmodel card")
    text(8.35 + 0.75, 0.4, "loads with AutoModel,\npipeline and timm", ha="center", va="center", fontsize=9)
    for start, end in (((6.12, 1.6), (6.42, 1.6)), ((7.98, 1.6), (8.32, 1.6))):
        canvas.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=GREY))
    figure.savefig(IMAGES / "overview.png", dpi=150, facecolor="white")


# -------------------------------------------------------------------------------------------------------------- weights

BATCH = [("moth", 0.98), ("moth", 0.95), ("moth", 0.62), ("fly", 0.97), ("fly", 0.92), ("fly", 0.45), ("bee", 0.55)]
"""Pseudo label and confidence of the images in a small batch."""


def pair_weights(labels: Tensor, confidences: Tensor, push_threshold: float | None) -> Tensor:
    """The weight w of each pair of images, `[N, N]`; the diagonal is for the two views of one image."""
    pulls = confidences if push_threshold is None else confidences * (confidences >= push_threshold)
    same_class = (labels[:, None] == labels[None, :]).float()
    return (same_class * pulls[:, None] * pulls[None, :]).fill_diagonal_(1)


def check_weights(labels: Tensor, confidences: Tensor, push_threshold: float | None) -> None:
    """Compute the loss from these weights as documented, and compare it with the package's loss."""
    embeddings = F.normalize(torch.randn(len(labels), 2, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    weights = pair_weights(labels, confidences, push_threshold).repeat_interleave(2, 0).repeat_interleave(2, 1)
    weights.fill_diagonal_(0)
    views = embeddings.flatten(0, 1)
    similarities = (views @ views.T / 0.07).fill_diagonal_(-torch.inf)
    log_softmax = similarities.log_softmax(1).masked_fill(weights == 0, 0)
    expected = -((weights * log_softmax).sum(1) / weights.sum(1)).mean()
    loss = class_aware_contrastive_loss(
        embeddings=embeddings, pseudo_labels=labels, confidences=confidences, push_threshold=push_threshold
    )
    torch.testing.assert_close(loss, expected)


def weights() -> None:
    names = [f"{label}  {confidence:.2f}" for label, confidence in BATCH]
    labels = torch.tensor([["moth", "fly", "bee"].index(label) for label, _ in BATCH])
    confidences = torch.tensor([confidence for _, confidence in BATCH])
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for ax, threshold in zip(figure.subplots(1, 2), (None, 0.9), strict=True):
        check_weights(labels, confidences, threshold)
        matrix = pair_weights(labels, confidences, threshold)
        ax.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            color = "white" if value > 0.55 else TEXT
            ax.text(column, row, f"{value:.2f}" if value else "·", ha="center", va="center", fontsize=9, color=color)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.tick_params(length=0, labelcolor=TEXT)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("image j: pseudo label, confidence", color=TEXT)
        ax.set_ylabel("image i: pseudo label, confidence", color=TEXT)
        title = (
            "push_threshold none: every image joins its class"
            if threshold is None
            else "push_threshold 0.9: only confident images do"
        )
        ax.set_title(title, fontsize=10, color=TEXT, loc="left")
    save(figure, "weights")


# ---------------------------------------------------------------------------------------------------------------- views


def butterfly(side: int) -> Image.Image:
    """A drawn image, which has no licence to respect."""
    scale = side / 96
    rows = np.linspace(0, 1, side)[:, None, None]
    sky = (1 - rows) * np.array([150, 196, 232]) + rows * np.array([214, 232, 190])
    image = Image.fromarray(np.broadcast_to(sky, (side, side, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def ellipse(left: float, top: float, right: float, bottom: float, colour: str) -> None:
        draw.ellipse([scale * left, scale * top, scale * right, scale * bottom], fill=colour)

    for left in (0, 1):  # mirrored halves
        boxes = [
            (12, 14, 46, 50, "#D9641E"),
            (18, 46, 46, 78, "#C24A12"),
            (18, 20, 32, 34, "#F6E7C8"),
            (24, 56, 36, 68, "#3A2416"),
        ]
        for x0, y0, x1, y1, colour in boxes:
            ellipse(*((96 - x1, y0, 96 - x0, y1) if left else (x0, y0, x1, y1)), colour)
    ellipse(44, 20, 52, 80, "#2B1B12")
    for x in (36, 60):
        draw.line([scale * 48, scale * 22, scale * x, scale * 6], fill="#2B1B12", width=max(1, round(1.5 * scale)))
    draw.line([0, scale * 88, side, scale * 84], fill="#5B8C3A", width=round(8 * scale))
    return image


def views() -> None:
    side, columns = 128, 6
    picture = butterfly(side)
    batch = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).expand(columns, 3, side, side)
    settings = ViewSettings(image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3, weak_crop="resized", cutout_size=24)
    figure = Figure(figsize=(9.6, 4.4))
    grid = figure.add_gridspec(3, columns + 2, wspace=0.06, hspace=0.1, width_ratios=[1.25, 0.2, *[1] * columns])
    original = figure.add_subplot(grid[1, 0])
    original.imshow(picture)
    original.set_title("the image", fontsize=10, color=TEXT)
    texts = {View.WEAK: "weak", View.STRONG: "strong", View.CONTRASTIVE: "contrastive"}
    for row, (view, text) in enumerate(texts.items()):
        made = make_view(batch, view, settings, seed=3, stream=UNLABELED, draws=torch.arange(columns))
        for column, image in enumerate(made):
            ax = figure.add_subplot(grid[row, column + 2])
            ax.imshow(image.permute(1, 2, 0).numpy())
            if row == 0:
                ax.set_title(f"draw {column + 1}", fontsize=9, color=GREY)
            if column == 0:
                ax.set_ylabel(text, fontsize=10, color=TEXT)
    for ax in figure.axes:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    save(figure, "views")


# ----------------------------------------------------------------------------------------------------------------- pull


def pulled(embeddings: Tensor, labels: Tensor, confidences: Tensor, push_threshold: float | None) -> Tensor:
    """The embeddings after 600 steps of gradient descent on the contrastive loss alone."""
    free = embeddings.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.01)
    for _ in range(600):
        loss = class_aware_contrastive_loss(
            embeddings=F.normalize(free, dim=2),
            pseudo_labels=labels,
            confidences=confidences,
            temperature=0.3,
            push_threshold=push_threshold,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(free.detach(), dim=2)


def pull() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [0, 1, 2, 0, 1, 2])
    confidences = torch.tensor([0.97] * 12 + [0.6] * 6)
    angles = 2 * torch.pi * torch.rand(len(labels), 1, generator=generator)
    angles = angles + 0.35 * torch.randn(len(labels), 2, generator=generator)
    start = torch.stack([angles.cos(), angles.sin()], dim=2)
    panels = {
        "before training": start,
        "push_threshold 1: each image\nattracts its own second view only": pulled(start, labels, confidences, 1.0),
        "push_threshold none: images of one\npseudo label attract each other": pulled(start, labels, confidences, None),
        "push_threshold 0.9: only confident\nimages attract their class": pulled(start, labels, confidences, 0.9),
    }
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    for ax, (title, embeddings) in zip(figure.subplots(1, 4, sharex=True, sharey=True), panels.items(), strict=True):
        circle = torch.linspace(0, 2 * torch.pi, 200)
        ax.plot(circle.cos().numpy(), circle.sin().numpy(), color="#E4E4E4", linewidth=1, zorder=0)
        for (first, second), label, confidence in zip(embeddings, labels, confidences, strict=True):
            confident = confidence > 0.9
            color, marker = COLORS[int(label)], MARKERS[int(label)]
            # The contrastive view is drawn outside of the circle, so that the views do not overlap.
            ends = torch.stack([first, 1.13 * second]).numpy()
            ax.plot(*ends.T, color=color, linewidth=1, alpha=0.5, zorder=1)
            ax.scatter(
                *ends.T,
                s=34,
                marker=marker,
                color=color if confident else "white",
                edgecolor=color,
                linewidth=1.2,
                zorder=2,
            )
        ax.set_title(title, fontsize=10, color=TEXT, loc="left")
        ax.set_aspect("equal")
        ax.set_xlabel("embedding, first coordinate", fontsize=9, color=TEXT)
        ax.spines[:].set_visible(False)
        ax.tick_params(labelsize=8, length=0, labelcolor=GREY)
        ax.set_xticks([-1, 0, 1])
        ax.set_yticks([-1, 0, 1])
    figure.axes[0].set_ylabel("second coordinate", fontsize=9, color=TEXT)
    for number in range(3):
        for color, name in ((COLORS[number], "confidence 0.97"), ("white", "0.6")):
            figure.axes[0].scatter(
                [],
                [],
                marker=MARKERS[number],
                color=color,
                edgecolor=COLORS[number],
                label=f"class {number + 1}, {name}",
            )
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9, labelcolor=TEXT)
    save(figure, "pull")


# ------------------------------------------------------------------------------------------------------------------ run


def run() -> None:
    demo = runpy.run_path(str(ROOT / "recipes" / "train_digits.py"))
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    keys = ("mask_rate", "pseudo_label_precision", "eval_top1")
    labels = (
        "mask rate: share of unlabeled\nimages with confidence ≥ 0.95",
        "pseudo-label precision\namong these images",
        "validation top-1 accuracy\n(EMA weights)",
    )
    for number, method in enumerate(("fixmatch", "fixmatch_ccssl")):
        history = trained(demo, method).state.log_history
        for ax, key in zip(axes, keys, strict=True):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            style = dict(
                color=COLORS[number],
                linewidth=1.6,
                marker=MARKERS[number],
                markersize=4,
                markevery=3 if key != "eval_top1" else 1,
            )
            ax.plot(*zip(*points, strict=True), label=demo["TITLES"][method], **style)
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xlabel("optimizer steps", fontsize=9, color=TEXT)
        ax.set_ylabel(label, fontsize=9, color=TEXT)
        ax.set_ylim(0, 1.02)
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, labelcolor=GREY)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, "run")


def trained(demo: dict, method: str) -> CCSSLTrainer:
    """The demo's run of a method with seed 0, which logs the precision of its pseudo labels."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--logging_steps", "20", "--eval_steps", "50", "--disable_tqdm", "true", "--output_dir", folder]
        recipe, args = parse_recipe(
            demo["DemoArguments"], CCSSLTrainingArguments, config=demo["CONFIG"], arguments=flags
        )
        args = dataclasses.replace(args, seed=0, hidden_label_column="label", **demo["METHODS"][method])
        splits = demo["load_splits"](0, recipe.image_size)
        set_seed(0)
        model = CCSSLForImageClassification.from_timm(
            recipe.backbone, labels=demo["KNOWN"], image_size=recipe.image_size, bn_momentum=0.1
        )
        trainer = CCSSLTrainer(model, args, splits["labeled"], splits["unlabeled"], splits["validation"])
        trainer.train()
        return trainer


# ---------------------------------------------------------------------------------------------------------------- space


def space() -> None:
    """The page of the demo's model for a digit that is out-of-distribution."""
    demo = runpy.run_path(str(ROOT / "recipes" / "train_digits.py"))
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained(demo, "fixmatch_ccssl").save_model(str(folder / "model"))
        for split, images in demo["load_splits"](0, 16).items():
            for number, row in enumerate(images):
                file = folder / split / row["label"] / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                row["image"].save(file)
        title = "Digits 0 to 5, learned from 24 labels"
        sources = dict(labeled=str(folder / "labeled"), validation=str(folder / "validation"))
        write_space(folder / "model", folder / "space", title=title, **sources)
        page_of = Space(folder / "space")
        nines = sorted((folder / "test" / "9").iterdir())
        shown = next(file for file in nines if page_of.answer(open_image(file)).out_of_distribution)
        port = {"GRADIO_SERVER_PORT": "7861", "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder / "space", env=os.environ | port)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1060, "height": 900})
            while True:
                with contextlib.suppress(Error):
                    page.goto("http://127.0.0.1:7861")
                    break
                assert server.poll() is None
                time.sleep(1)
            page.locator("#picture input[type=file]").set_input_files(shown)
            page.locator("#overlay img").wait_for()
            page.locator("#nearest img").first.wait_for()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=IMAGES / "space.png", full_page=True)
        server.terminate()
        server.wait()


FIGURES = {"overview": overview, "weights": weights, "views": views, "pull": pull, "run": run, "space": space}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or FIGURES:
        FIGURES[chosen]()
