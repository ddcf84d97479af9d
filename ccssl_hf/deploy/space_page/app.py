"""A page for one image classifier: `python app.py` serves it from the files in this folder.

Everything that a Space computes and shows is in this one file, so that it can be read in one place.
"""

from __future__ import annotations

import html
import importlib
import json
import math
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ...data.images import MAX_PIXELS, TooLargeError, open_image  # see `standalone`

SETTINGS_FILE = "space.json"
MODEL_FOLDER, GALLERY_FOLDER, EXAMPLES_FOLDER = "model", "gallery", "examples"
EMBEDDINGS_FILE, THUMBNAILS_FILE = f"{GALLERY_FOLDER}/embeddings.safetensors", f"{GALLERY_FOLDER}/images.zip"

MIN_SIDE = 4  # cells along the shorter side of a heat map, at least: fewer do not locate anything
CONFIDENCE_FLOOR = 0.6  # an image below may be out of distribution, where no thresholds were measured
NEAREST = 6  # labeled images to show
SHOWN_SIDE = 448  # longer side of shown images in pixels: the input of many networks is tiny


def open_upload(path: str) -> Image.Image:
    """Open a visitor's image. Raises ValueError with a message for the visitor."""
    try:
        return open_image(path, max_pixels=MAX_PIXELS)
    except TooLargeError as error:
        raise ValueError(f"The image is {error}. Try a smaller one.") from error
    except ValueError as error:
        raise ValueError("This file can't be read as an image. Try a JPEG, PNG or WebP file.") from error


@dataclass(frozen=True)
class Thresholds:
    """Below both thresholds an image may be out of distribution (OOD). Measured on labeled images."""

    confidence: float  # of the largest softmax probability
    energy: float  # of the log-sum-exp of the logits
    quantile: float  # share of the in-distribution images below each threshold
    source: str  # name of the labeled images
    images: int  # number of in-distribution images
    top1: float  # top-1 accuracy on these
    flagged: float  # share of these below both thresholds
    ood_images: int = 0
    ood_flagged: float | None = None  # share of the OOD images below both thresholds


@dataclass(frozen=True)
class Settings:
    """`space.json`: the page's title, the model's folder or Hub id and revision, and the measured thresholds."""

    title: str
    model: str
    revision: str | None = None
    thresholds: Thresholds | None = None

    @classmethod
    def load(cls, folder: Path) -> Settings:
        content = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        measured = content.pop("thresholds")
        return cls(**content, thresholds=None if measured is None else Thresholds(**measured))

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def shown(text: str, most: int = 80) -> str:
    """A name in one line, not too long, without characters that are invisible or change the direction of text."""
    text = "".join(each if each.isprintable() or each in "\u200c\u200d" else " " for each in text).strip()
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown_names(labels: Iterable[str]) -> list[str]:
    """The names of the classes as the page shows them: each another one."""
    names = [shown(label) for label in labels]
    twice = Counter(names)
    return [f"{name} ({number})" if twice[name] > 1 or not name else name for number, name in enumerate(names)]


def code_span(text: str) -> str:
    """Text for Markdown that shows as it is."""
    return "`" + (shown(text).replace("`", "'") or " ") + "`"


def confidence_and_energy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest softmax probability and the log-sum-exp of logits `[N, C]`, both `[N]`; low for OOD images.

    The second is the (negative) energy of Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020,
    https://arxiv.org/abs/2010.03759.
    """
    return logits.softmax(dim=1).amax(dim=1), logits.logsumexp(dim=1)


def possibly_ood(logits: Tensor, *, confidence: float, energy: float) -> Tensor:
    """Whether both scores of logits `[N, C]` are below their thresholds, bool `[N]`."""
    confidences, energies = confidence_and_energy(logits)
    return (confidences < confidence) & (energies < energy)


def to_map(output: Tensor, *, layout: str, size: tuple[int, int], prefix_tokens: int) -> Tensor | None:
    """A layer's output as a map `[N, C, rows, columns]`, from `layout` NCHW, NHWC or tokens `[N, T, C]`.

    `size` is the height and width of the network's input. Class and register tokens come first. None if the output is
    not a map of the image, or is too coarse.
    """
    if (layout, output.ndim) == ("tokens", 3):
        # Some networks add their class token late: in earlier layers all tokens are patches.
        for patches in (output[:, prefix_tokens:], output):
            rows = max(1, round(math.sqrt(patches.shape[1] * size[0] / size[1])))
            if patches.shape[1] and patches.shape[1] % rows == 0:
                break
        else:
            return None
        output = patches.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
    elif (layout, output.ndim) == ("NHWC", 4):
        output = output.permute(0, 3, 1, 2)
    elif (layout, output.ndim) != ("NCHW", 4):
        return None
    rows, columns = output.shape[-2:]
    # An attention matrix is not a map: its proportions differ from the image's.
    return None if min(rows, columns) < MIN_SIDE or abs(rows * size[1] / size[0] - columns) >= 1 else output


def find_map(network: Any, size: tuple[int, int]) -> tuple[nn.Module, Callable[[Tensor], Tensor | None]] | None:
    """Find the last layer whose output is a map that the pooled features depend on, and its `to_map`.

    `network` is a timm classifier in eval mode, `size` the height and width of its input. In a vision transformer, for
    example, only the class token matters after the last attention, so the last map is the input of that attention.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, *size, generator=generator).requires_grad_()
    outputs: list[tuple[nn.Module, Any]] = []
    with ExitStack() as hooks:
        for module in network.modules():
            hook = module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
            hooks.enter_context(hook)
        features = network.forward_features(pixels)
        pooled = network.forward_head(features, pre_logits=True)
    # Not the logits: those of an untrained classifier may all be zero.
    score = (pooled * torch.randn(pooled.shape, generator=generator)).sum()
    tokens = isinstance(features, Tensor) and features.ndim == 3
    last = isinstance(features, Tensor) and features.shape[-1] == network.num_features != features.shape[1]
    layout = "tokens" if tokens else "NHWC" if last else "NCHW"
    reader = partial(to_map, layout=layout, size=size, prefix_tokens=getattr(network, "num_prefix_tokens", 0))
    calls = Counter(module for module, _ in outputs)
    for module, output in reversed(outputs):
        if calls[module] > 1 or not isinstance(output, Tensor) or not output.requires_grad:
            continue
        if tokens and output.shape[-1] != features.shape[-1]:  # such as queries, keys and values in one tensor
            continue
        [slope] = torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)
        found = None if slope is None else reader(slope)
        if found is not None and found.any():
            return module, reader
    return None


class Model:
    """A published classifier, from a folder or Hub id. No code from there is run."""

    def __init__(self, name: str | Path, *, revision: str | None = None) -> None:
        self._processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        model = AutoModelForImageClassification.from_pretrained(name, revision=revision)
        self.labels = shown_names(model.config.id2label[number] for number in range(model.config.num_labels))
        self.network = model.timm_model.eval().requires_grad_(False)
        weights = self.network.state_dict().items()
        if wrong := [name for name, each in weights if each.is_floating_point() and not each.isfinite().all()]:
            raise ValueError(f"The model has NaN or infinite numbers in {wrong[0]} and {len(wrong) - 1} other tensors.")
        size = self._processor.data_config["input_size"][-2:]
        self.side = max(size)
        self.feature_map = find_map(self.network, size)  # the source of heat maps; None in some networks
        self._lock = threading.Lock()  # a heat map adds hooks to the network

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The network's input for RGB images, `[N, 3, H, W]`."""
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def logits_and_features(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """The logits `[N, C]` and the pooled features `[N, D]` of RGB images."""
        with self._lock:
            features = self.network.forward_features(self.pixels(images))
            logits = self.network.forward_head(features)
            pooled = self.network.forward_head(features, pre_logits=True).flatten(1)
        if not (logits.isfinite().all() and pooled.isfinite().all()):
            raise ValueError("The network's output for this image is NaN or infinite.")
        return logits, pooled

    def input_image(self, image: Image.Image) -> Image.Image:
        """The resized and cropped image that the network receives."""
        config = self._processor.data_config
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = (self.pixels([image])[0] * std + mean).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def heat_map(self, image: Image.Image, number: int) -> np.ndarray | None:
        """Grad-CAM of class `number`: 0 to 1, `[H, W]` of `input_image`; None where there is no `feature_map`.

        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV
        2017, https://arxiv.org/abs/1610.02391.
        """
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        if self.feature_map is None:
            return None
        layer, reader = self.feature_map
        pixels = self.pixels([image]).requires_grad_()  # the weights do not require gradients
        with self._lock, GradCAM(model=self.network, target_layers=[layer], reshape_transform=reader) as cam:
            return cam(input_tensor=pixels, targets=[ClassifierOutputTarget(number)])[0]

    def explain(self, image: Image.Image, number: int) -> Image.Image:
        """The heat map of class `number` over the image; the image alone where there is no heat map."""
        picture, heat = enlarge(self.input_image(image)), self.heat_map(image, number)
        if heat is None:
            return picture
        warmth = Image.fromarray((255 * heat).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
        colours = Image.fromarray(matplotlib.colormaps["autumn_r"](np.asarray(warmth), bytes=True)[..., :3])
        return Image.composite(colours, picture, warmth.point(lambda value: round(0.65 * value)))


def enlarge(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """Resize the longer side to `side` pixels. A tiny image keeps sharp pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC)


class Gallery:
    """Labeled images with their embeddings (unit vectors `[N, D]`) and class numbers."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / EMBEDDINGS_FILE)
        self.embeddings, self.labels = tensors["embeddings"].float(), tensors["labels"].tolist()
        self._images = folder / THUMBNAILS_FILE

    def nearest(self, features: Tensor, count: int = NEAREST) -> list[tuple[Image.Image, int, float]]:
        """Image, class number and cosine similarity of the labeled images nearest to features `[D]`, nearest first."""
        cosines = self.embeddings @ F.normalize(features.float(), dim=0)
        best = cosines.topk(min(count, len(cosines)))
        with zipfile.ZipFile(self._images) as images:
            names = images.namelist()  # in the order of the embeddings
            return [
                (open_image(images.read(names[row])), self.labels[row], cosine)
                for row, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]


@dataclass(frozen=True)
class Answer:
    """What the page shows for one image."""

    out_of_distribution: bool  # whether it may be
    reason: str  # the scores behind that, and the rule
    confidences: dict[str, float]  # class name to softmax probability
    best: int  # number of the most probable class
    overlay: Image.Image  # the heat map of that class over the image
    nearest: list[tuple[Image.Image, str]]  # labeled images with their captions


class Space:
    """The model, gallery and settings of the folder that `app.py` is in."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings.load(folder)
        local = folder / self.settings.model
        self.model = Model(local if local.is_dir() else self.settings.model, revision=self.settings.revision)
        self.gallery = Gallery(folder) if (folder / EMBEDDINGS_FILE).is_file() else None
        self.examples = sorted(str(path) for path in (folder / EXAMPLES_FOLDER).glob("*.*"))

    def answer(self, image: Image.Image) -> Answer:
        logits, features = self.model.logits_and_features([image])
        confidence, energy = (score.item() for score in confidence_and_energy(logits))
        if limits := self.settings.thresholds:
            ood = bool(possibly_ood(logits, confidence=limits.confidence, energy=limits.energy))
            scores = f"Confidence {confidence:.2f}, energy score {energy:.1f}."
        else:
            ood = confidence < CONFIDENCE_FLOOR
            scores = f"Confidence {confidence:.2f}."
        near = self.gallery.nearest(features[0]) if self.gallery else []
        labels, best = self.model.labels, int(logits.argmax())
        return Answer(
            out_of_distribution=ood,
            reason=f"{scores} {self.rule}",
            confidences=dict(zip(labels, logits.softmax(dim=1)[0].tolist(), strict=True)),
            best=best,
            overlay=self.model.explain(image, best),
            nearest=[(enlarge(each, 192), f"{labels[number]} · {cosine:.2f}") for each, number, cosine in near],
        )

    @property
    def rule(self) -> str:
        """When an image may be out of distribution, in one sentence with what was measured."""
        limits = self.settings.thresholds
        if limits is None:
            return (
                f"Rule: possibly out of distribution if confidence < {CONFIDENCE_FLOOR}, set by hand and not measured."
            )
        detected = "out-of-distribution images were not measured"
        if limits.ood_flagged is not None:
            detected = f"detects {limits.ood_flagged:.0%} of {limits.ood_images:,} out-of-distribution images"
        return (
            f"Rule: possibly out of distribution if confidence < {limits.confidence:.2f} and energy score < "
            f"{limits.energy:.1f}; on validation images, this flags {limits.flagged:.0%} of {limits.images:,} images "
            f"of the model's classes by mistake, and {detected}."
        )

    def about(self) -> str:
        """What the numbers mean and what they do not mean, as Markdown."""
        measured = ""
        if limits := self.settings.thresholds:
            measured = (
                f"The thresholds are the values that {1 - limits.quantile:.0%} of these images reach "
                f"({code_span(limits.source)}; top-1 accuracy {limits.top1:.0%}). "
            )
        lines = [
            f"**Confidence** is the softmax probability. It sums to 100% over the {len(self.model.labels)} classes, "
            "even if the image shows none of them. It is not the probability that the class is right.",
            "**Energy score** is the log-sum-exp of the logits. It is low if all logits are low.",
            f"{self.rule.replace('Rule:', '**Rule:**')} {measured}It is a hint only: a network that was trained on its "
            "own pseudo labels can be as confident on out-of-distribution images as on others.",
            "**The heat map** (Grad-CAM) shows which regions of the network's last feature map increase the score of a "
            "class. Redder regions increase it more. The map is coarse: it shows where, not why."
            if self.model.feature_map is not None
            else "There is no heat map: the feature maps of this network are too coarse.",
        ]
        if self.gallery is not None:
            lines.append(
                f"**Nearest labeled images** are those of {len(self.gallery.labels):,} labeled images whose features "
                "have the highest cosine similarity to those of your image (at most 1). People gave them their labels."
            )
        return "\n\n".join(lines)


CSS = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
.note { border-left: 4px solid #94a3b8; border-radius: 8px; padding: 10px 14px; background: rgb(148 163 184 / 12%); }
.note.warning { border-color: #d97706; background: rgb(217 119 6 / 14%); }
.note b { display: block; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.tiny img { image-rendering: pixelated; }
#nearest .grid-wrap { min-height: 0; padding-top: 32px; }
"""


def note_html(headline: str, text: str = "", *, warning: bool = False) -> str:
    """The box above the classes."""
    kind = "note warning" if warning else "note"
    return f'<div class="{kind}" role="status"><b>{html.escape(headline)}</b>{html.escape(text)}</div>'


def build(space: Space) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    labels = space.model.labels
    some = ", ".join(labels[:20]) + (", …" if len(labels) > 20 else "")
    tiny = "tiny" if space.model.side <= SHOWN_SIDE // 4 else ""  # no smoothing of the few pixels of the input

    def show(path: str | None) -> dict[Any, Any]:
        hidden = {part: gr.update(visible=False) for part in (classes, details)}
        if path is None:
            return {note: welcome, **hidden}
        try:
            answer = space.answer(open_upload(path))
        except ValueError as error:
            return {note: note_html("This did not work.", str(error), warning=True), **hidden}
        ood = answer.out_of_distribution
        verdict = "Possibly out of distribution." if ood else "No sign of an out-of-distribution image."
        return {
            note: note_html(verdict, answer.reason, warning=ood),
            classes: gr.update(value=answer.confidences, show_heading=not ood, visible=True),
            details: gr.update(visible=True),
            chosen: answer.best,
            overlay: answer.overlay,
            nearest: answer.nearest,
        }

    def explain(path: str, number: int) -> Image.Image:
        return space.model.explain(open_upload(path), number)

    welcome = note_html("Drop an image to classify it.")
    with gr.Blocks(title=space.settings.title, delete_cache=(3600, 3600)) as page:
        title, about = html.escape(space.settings.title), f"An image classifier with {len(labels)} classes: {some}."
        gr.HTML(f"<h1>{title}</h1><p>{html.escape(about)}</p>", padding=False)
        with gr.Row():
            with gr.Column(elem_classes=tiny):
                sources = ["upload", "clipboard"]
                picture = gr.Image(type="filepath", sources=sources, label="Your image", height=300, elem_id="picture")
                # The uploaded file itself: gradio would answer a broken file with its own error.
                picture.preprocess = lambda payload: None if payload is None else payload.path
                if space.examples:
                    gr.Examples(space.examples, picture, label="Examples", elem_id="examples")
            with gr.Column():
                note = gr.HTML(welcome, padding=False, elem_id="note")
                classes = gr.Label(num_top_classes=5, label="Confidence", visible=False, elem_id="classes")
        with gr.Row(visible=False) as details:
            with gr.Column():
                look = dict(interactive=False, buttons=["fullscreen"], height=400, elem_id="overlay")
                overlay = gr.Image(label="Heat map", **look)
                numbered = list(zip(labels, range(len(labels)), strict=True))
                chosen = gr.Dropdown(numbered, label="Class of the heat map", elem_id="chosen")
            with gr.Column(visible=space.gallery is not None):
                look = dict(columns=3, height="auto", buttons=[], elem_id="nearest")
                nearest = gr.Gallery(label="Nearest labeled images", **look)
        with gr.Accordion("What these numbers mean", open=False):
            gr.Markdown(space.about())
        picture.change(show, picture, [note, classes, details, chosen, overlay, nearest], api_name="classify")
        chosen.input(explain, [picture, chosen], overlay, api_name="explain")
    return page


if __name__ == "__main__":
    import gradio

    with suppress(ModuleNotFoundError):  # the file is here where timm lacks the network; it registers it with timm
        importlib.import_module("wide_resnet_cifar")
    space = Space(Path(__file__).parent)
    space.answer(Image.new("RGB", (64, 64)))  # the first answer loads more libraries; visitors should not wait for it
    font = ["system-ui", "sans-serif"]  # the visitor's own: the page loads nothing from other servers
    build(space).launch(
        theme=gradio.themes.Default(primary_hue="teal", neutral_hue="slate", font=font, font_mono=font),
        css=CSS,
        max_file_size="20mb",
        footer_links=[],
        run_history=False,
    )
