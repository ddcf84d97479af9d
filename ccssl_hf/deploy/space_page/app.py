"""A page for one image classifier: drop an image, and see its classes, where the network looked, and what is near it.

`python app.py` serves it. All that it reads lies beside it: `space.json`, and as they were given `model/`, `gallery/`
and `examples/`. One file, longer than most, so that what a Space computes and shows can be read in one place.
"""

from __future__ import annotations

import html
import importlib
import io
import json
import math
import threading
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

SETTINGS_FILE = "space.json"
MODEL_FOLDER, GALLERY_FOLDER, EXAMPLES_FOLDER = "model", "gallery", "examples"
EMBEDDINGS_FILE, THUMBNAILS_FILE = f"{GALLERY_FOLDER}/embeddings.safetensors", f"{GALLERY_FOLDER}/images.zip"

MAX_PIXELS = 50_000_000
"""Larger images are turned down: a small file can hold enough pixels to fill the memory."""

MIN_SIDE = 4
"""Cells that a heat map has along a side, at least: fewer say nothing of where."""

CONFIDENCE_FLOOR = 0.6
"""Below it an image may be of no class, where no images of known classes were given to measure thresholds on."""

NEAREST = 6
"""Labeled images that are shown beside an image."""

SHOWN_SIDE = 448
"""Pixels that pictures are shown with: of a network for 32 px one would see nothing."""


class UnreadableImage(ValueError):
    """An upload that can't be used; the message is for the visitor."""


def open_image(path: str | Path) -> Image.Image:
    """An upright RGB image from a file.

    Raises:
        UnreadableImage: It is no image, damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(
                    f"This image has {image.width} × {image.height} pixels, which is too large for this page: try one "
                    f"of at most {MAX_PIXELS // 1_000_000} million pixels."
                )
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # PIL would clip the 16 bits, and leave a white image
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except UnreadableImage:
        raise
    except Exception as error:  # PIL raises nearly anything for a broken file
        raise UnreadableImage("This file can't be read as an image: try a JPEG, PNG or WebP file.") from error


# ------------------------------------------------------------------------------------------------ known or none of them


@dataclass(frozen=True)
class Thresholds:
    """Below both an image may be of no known class; with what is known of how well that works.

    Attributes:
        confidence: Of the largest softmax probability.
        energy: Of the log-sum-exp of the logits.
        quantile: Share of the images of known classes that lie below each of the two.
        source: What these images are.
        images: How many there are.
        top1: Share of them whose most probable class is right.
        noted: Share of them that lie below both.
        strangers: Images of no known class in the same source.
        strangers_noted: Share of these that lie below both; None where there are none.
    """

    confidence: float
    energy: float
    quantile: float
    source: str
    images: int
    top1: float
    noted: float
    strangers: int = 0
    strangers_noted: float | None = None


@dataclass(frozen=True)
class Settings:
    """`space.json`: the page's title, the model's folder or Hub id with its revision, and the measured thresholds."""

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


def confidence_and_energy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest softmax probability and the log-sum-exp of logits `[N, C]`, both `[N]`; low for a stranger.

    The second is the (negative) energy of Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020,
    https://arxiv.org/abs/2010.03759.
    """
    return logits.softmax(dim=1).amax(dim=1), logits.logsumexp(dim=1)


def may_be_none(logits: Tensor, *, confidence: float, energy: float) -> Tensor:
    """Whether both scores of logits `[N, C]` lie below their thresholds, bool `[N]`."""
    confidences, energies = confidence_and_energy(logits)
    return (confidences < confidence) & (energies < energy)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class MapReader:
    """Turns a layer's output into a map `[N, C, rows, columns]`; grad-cam calls it `reshape_transform`.

    Attributes:
        layout: `NCHW`, `NHWC`, or `tokens` for `[N, T, C]`.
        height: Of the network's images, in pixels.
        width: Likewise.
        prefix_tokens: Class and register tokens before those of patches.
    """

    layout: str
    height: int
    width: int
    prefix_tokens: int = 0

    def __call__(self, output: Tensor) -> Tensor:
        """The map. Raises ValueError for a tensor that is none, or too coarse a one."""
        if output.ndim == 3 and self.layout == "tokens":
            output = self._unfolded(output)
        elif output.ndim == 4 and self.layout == "NHWC":
            output = output.permute(0, 3, 1, 2)
        elif output.ndim != 4 or self.layout != "NCHW":
            raise ValueError(f"{tuple(output.shape)} is not {self.layout}.")
        rows, columns = output.shape[-2:]
        # A table of attention is no map: it has other proportions than the image.
        if min(rows, columns) < MIN_SIDE or abs(rows * self.width / self.height - columns) >= 1:
            raise ValueError(f"{rows} x {columns} is no map of the image.")
        return output

    def _unfolded(self, tokens: Tensor) -> Tensor:
        # Some networks add their class token late: in earlier layers every token is a patch.
        for skipped in (self.prefix_tokens, 0):
            patches = tokens.shape[1] - skipped
            rows = max(1, round(math.sqrt(max(patches, 0) * self.height / self.width)))
            if patches > 0 and patches % rows == 0:
                return tokens[:, skipped:].unflatten(1, (rows, patches // rows)).permute(0, 3, 1, 2)
        raise ValueError(f"{tokens.shape[1]} tokens make no rectangle.")


def find_map(network: Any, size: tuple[int, int]) -> tuple[nn.Module, MapReader] | None:
    """The last layer whose output is a map that the pooled features depend on, and how to read it.

    It is found by a dry run, so any timm network will do: after the last layer of a vision transformer, say, only the
    class token matters, and its last map is before its last attention.

    Args:
        network: A timm classifier in eval mode.
        size: Height and width of its images in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, *size, generator=generator).requires_grad_()
    outputs: list[tuple[nn.Module, Any]] = []
    modules = [module for module in network.modules() if module is not network]
    hooks = [module.register_forward_hook(lambda module, _, out: outputs.append((module, out))) for module in modules]
    try:
        features = network.forward_features(pixels)
        pooled = network.forward_head(features, pre_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    # Any direction will do: a classifier that has not been trained may be all zeros.
    score = (pooled * torch.randn(pooled.shape, generator=generator)).sum()
    tokens = isinstance(features, Tensor) and features.ndim == 3
    last = isinstance(features, Tensor) and features.shape[-1] == network.num_features != features.shape[1]
    layout = "tokens" if tokens else "NHWC" if last else "NCHW"
    reader = MapReader(layout, *size, prefix_tokens=getattr(network, "num_prefix_tokens", 0))
    calls = Counter(module for module, _ in outputs)
    for module, output in reversed(outputs):
        if calls[module] > 1 or not isinstance(output, Tensor) or not output.requires_grad:
            continue
        if tokens and output.shape[-1] != features.shape[-1]:  # queries, keys and values in one, for instance
            continue
        try:
            [slope] = torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)
            if slope is not None and reader(slope).any():
                return module, reader
        except ValueError:
            continue
    return None


class Model:
    """A published classifier.

    Attributes:
        labels: The class names, in the order of the logits.
        network: The timm model.
        side: Of its images, in pixels; the longer one.
    """

    def __init__(self, name: str | Path, *, revision: str | None = None) -> None:
        """Loads a folder or Hub id; no code from there is run."""
        self._processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        model = AutoModelForImageClassification.from_pretrained(name, revision=revision)
        self.labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
        self.network = model.timm_model.eval().requires_grad_(False)
        size = self._processor.data_config["input_size"][-2:]
        self.side, self._map = max(size), find_map(self.network, size)
        self._lock = threading.Lock()  # a heat map hangs hooks into the network

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"]

    @property
    def has_map(self) -> bool:
        """Whether `heat` can say anything."""
        return self._map is not None

    @torch.no_grad()
    def describe(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """The logits `[N, C]` of RGB images, and the pooled features `[N, D]` that they are computed from."""
        with self._lock:
            features = self.network.forward_features(self._pixels(images))
            return self.network.forward_head(features), self.network.forward_head(features, pre_logits=True).flatten(1)

    def seen(self, image: Image.Image) -> Image.Image:
        """What the network sees of an image: resized and cropped."""
        config = self._processor.data_config
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = (self._pixels([image])[0] * std + mean).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def heat(self, image: Image.Image, number: int) -> np.ndarray | None:
        """Grad-CAM of class `number`: 0 to 1, `[H, W]` as `seen` is; None where the network has no map to read.

        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV
        2017, https://arxiv.org/abs/1610.02391.
        """
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        if self._map is None:
            return None
        layer, reader = self._map
        pixels = self._pixels([image]).requires_grad_()  # the weights ask for no gradient
        with self._lock, GradCAM(model=self.network, target_layers=[layer], reshape_transform=reader) as cam:
            return cam(input_tensor=pixels, targets=[ClassifierOutputTarget(number)])[0]


def enlarged(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """The image with its longer side `side` pixels long; a tiny one as the squares that it is made of."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC)


def overlay(seen: Image.Image, heat: np.ndarray) -> Image.Image:
    """The heat map `[H, W]` over the image, which shows through the more the less warm it is."""
    picture = enlarged(seen)
    warmth = Image.fromarray((255 * heat).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(matplotlib.colormaps["autumn_r"](np.asarray(warmth), bytes=True)[..., :3])
    return Image.composite(colours, picture, warmth.point(lambda value: round(0.65 * value)))


# -------------------------------------------------------------------------------------------------------------- gallery


def thumbnail_name(row: int) -> str:
    """The name within `THUMBNAILS_FILE` of the image that `row` of the embeddings belongs to."""
    return f"{row}.webp"


class Gallery:
    """Labeled images with their embeddings: unit vectors `[N, D]`, and labels `[N]` as class numbers."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / EMBEDDINGS_FILE)
        self.embeddings, self.labels = tensors["embeddings"].float(), tensors["labels"].tolist()
        self._images = folder / THUMBNAILS_FILE

    def nearest(self, features: Tensor, count: int = NEAREST) -> list[tuple[Image.Image, int, float]]:
        """The nearest labeled images to pooled features `[D]`, nearest first: image, class number and cosine."""
        cosines = self.embeddings @ F.normalize(features.float(), dim=0)
        best = cosines.topk(min(count, len(cosines)))
        with zipfile.ZipFile(self._images) as images:
            return [
                (Image.open(io.BytesIO(images.read(thumbnail_name(row)))).convert("RGB"), self.labels[row], cosine)
                for row, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]


# ----------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Answer:
    """What the page shows of one image.

    Attributes:
        stranger: Whether it may be of no class.
        numbers: By which numbers, in words.
        confidences: Class name to softmax probability.
        best: Number of the most probable class.
        overlay: Its heat map over the image; the image alone where there is none.
        nearest: Image and caption of each of the nearest labeled images.
    """

    stranger: bool
    numbers: str
    confidences: dict[str, float]
    best: int
    overlay: Image.Image
    nearest: list[tuple[Image.Image, str]]


class Space:
    """The page's model and what was measured of it, from the folder that `app.py` lies in."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings.load(folder)
        local = folder / self.settings.model
        self.model = Model(local if local.is_dir() else self.settings.model, revision=self.settings.revision)
        self.gallery = Gallery(folder) if (folder / EMBEDDINGS_FILE).is_file() else None
        self.examples = sorted(str(path) for path in (folder / EXAMPLES_FOLDER).glob("*.*"))

    def answer(self, image: Image.Image) -> Answer:
        """All that the page says of an RGB image."""
        logits, features = self.model.describe([image])
        probabilities = logits.softmax(dim=1)[0].tolist()
        stranger, numbers = self._compared(logits)
        near = [] if self.gallery is None else self.gallery.nearest(features[0])
        labels, best = self.model.labels, int(logits.argmax())
        return Answer(
            stranger=stranger,
            numbers=numbers,
            confidences=dict(zip(labels, probabilities, strict=True)),
            best=best,
            overlay=self.explain(image, best),
            nearest=[(enlarged(near_by, 192), f"{labels[number]} · {cosine:.2f}") for near_by, number, cosine in near],
        )

    def explain(self, image: Image.Image, number: int) -> Image.Image:
        """The heat map of a class over the image."""
        seen, heat = self.model.seen(image), self.model.heat(image, number)
        return enlarged(seen) if heat is None else overlay(seen, heat)

    def _compared(self, logits: Tensor) -> tuple[bool, str]:
        """Whether an image with these logits `[1, C]` may be of no class, and the numbers in words."""
        confidence, energy = (score.item() for score in confidence_and_energy(logits))
        limits = self.settings.thresholds
        if limits is None:
            stranger = bool(may_be_none(logits, confidence=CONFIDENCE_FLOOR, energy=math.inf))
            return stranger, f"Confidence {confidence:.2f}, compared with {CONFIDENCE_FLOOR}, a limit set by hand."
        stranger = bool(may_be_none(logits, confidence=limits.confidence, energy=limits.energy))
        usual = f"{1 - limits.quantile:.0%}"
        return stranger, (
            f"Confidence {confidence:.2f} and energy score {energy:.1f}. Of the images of known classes, {usual} have "
            f"a confidence of at least {limits.confidence:.2f}, and {usual} an energy score of at least "
            f"{limits.energy:.1f}."
        )

    def about(self) -> str:
        """What the numbers are and what they are not, as Markdown."""
        count = len(self.model.labels)
        limits = self.settings.thresholds
        if limits is None:
            note = (
                f"appears where the confidence is below {CONFIDENCE_FLOOR}. That limit was set by hand and measured on "
                "nothing."
            )
        else:
            caught = (
                f"and for {limits.strangers_noted:.0%} of {limits.strangers:,} images of no known class"
                if limits.strangers_noted is not None
                else "how many images of no known class it would appear for was not measured"
            )
            note = (
                f"appears where both scores are lower than those of {1 - limits.quantile:.0%} of {limits.images:,} "
                f"images of known classes ({limits.source}; {limits.top1:.0%} of them are labeled rightly). It appears "
                f"for {limits.noted:.0%} of these, {caught}."
            )
        lines = [
            f"**Confidence** is how the network divides 100% among its {count} classes. It has to name one even where "
            "the picture shows something else, and the number is not the chance that it is right.",
            "**Energy score** is the log-sum-exp of the network's logits: high where some class speaks up, low where "
            "none does.",
            f"**“This may be none of them”** {note} Take it as a hint. A network that has learned from its own guesses "
            "(pseudo labels) can be as sure of strangers as of what it knows.",
            "**The heat map** (Grad-CAM) shows which places of the network's last feature map speak for a class, "
            "stretched over the picture: the redder, the more, and no red at all where none does. It is coarse, and "
            "says where, not why."
            if self.model.has_map
            else "There is no heat map: this network keeps no map of the picture that is fine enough.",
        ]
        if self.gallery is not None:
            lines.append(
                f"**The nearest labeled images** are those of {len(self.gallery.labels):,} whose features have the "
                "largest cosine similarity with the picture's; 1 is the most there is. They are near in the network's "
                "eyes, and carry the labels that people gave them."
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


FONT = ["system-ui", "sans-serif"]
"""Of the visitor's own: nothing is loaded from elsewhere."""


def note_html(headline: str, text: str = "", *, warning: bool = False) -> str:
    """The box above the classes."""
    kind = "note warning" if warning else "note"
    return f'<div class="{kind}" role="status"><b>{html.escape(headline)}</b>{html.escape(text)}</div>'


def build(space: Space) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    labels = space.model.labels
    some = ", ".join(labels[:20]) + (", …" if len(labels) > 20 else "")
    tiny = "tiny" if space.model.side <= SHOWN_SIDE // 4 else ""  # its squares are sharper than what is made of them

    def show(path: str | None) -> dict[Any, Any]:
        hidden = {part: gr.update(visible=False) for part in (classes, details)}
        if path is None:
            return {note: welcome, **hidden}
        try:
            answer = space.answer(open_image(path))
        except UnreadableImage as error:
            return {note: note_html("That did not work.", str(error), warning=True), **hidden}
        said = "This may be none of them." if answer.stranger else "No sign that it is none of them."
        return {
            note: note_html(said, answer.numbers, warning=answer.stranger),
            classes: gr.update(value=answer.confidences, show_heading=not answer.stranger, visible=True),
            details: gr.update(visible=True),
            chosen: answer.best,
            overlay_picture: answer.overlay,
            nearest: answer.nearest,
        }

    def explain(path: str, number: int) -> Image.Image:
        return space.explain(open_image(path), number)

    welcome = note_html("Drop an image, and see what the network takes it for.")
    with gr.Blocks(title=space.settings.title, delete_cache=(3600, 3600)) as page:
        title, about = html.escape(space.settings.title), f"A network that knows {len(labels)} classes: {some}."
        gr.HTML(f"<h1>{title}</h1><p>{html.escape(about)}</p>", padding=False)
        with gr.Row():
            with gr.Column(elem_classes=tiny):
                sources = ["upload", "clipboard"]
                picture = gr.Image(type="filepath", sources=sources, label="Your image", height=300, elem_id="picture")
                # As it came: gradio would answer a broken file with an error of its own.
                picture.preprocess = lambda payload: None if payload is None else payload.path
                if space.examples:
                    gr.Examples(space.examples, picture, label="Or take one of these", elem_id="examples")
            with gr.Column():
                note = gr.HTML(welcome, padding=False, elem_id="note")
                classes = gr.Label(num_top_classes=5, label="Confidence", visible=False, elem_id="classes")
        with gr.Row(visible=False) as details:
            with gr.Column():
                overlay_picture = gr.Image(
                    label="Where the network looked",
                    interactive=False,
                    buttons=["fullscreen"],
                    height=400,
                    elem_id="overlay",
                )
                numbered = list(zip(labels, range(len(labels)), strict=True))
                chosen = gr.Dropdown(numbered, label="Show what speaks for", elem_id="chosen")
            with gr.Column(visible=space.gallery is not None):
                nearest = gr.Gallery(
                    label="Nearest labeled images", columns=3, height="auto", buttons=[], elem_id="nearest"
                )
        with gr.Accordion("What the numbers are, and what they are not", open=False):
            gr.Markdown(space.about())
        parts = [note, classes, details, chosen, overlay_picture, nearest]
        picture.change(show, picture, parts, api_name="classify")
        chosen.input(explain, [picture, chosen], overlay_picture, api_name="explain")
    return page


if __name__ == "__main__":
    import gradio

    with suppress(ModuleNotFoundError):  # lies here where timm lacks the network, and tells timm of it
        importlib.import_module("wide_resnet_cifar")
    space = Space(Path(__file__).parent)
    space.answer(Image.new("RGB", (64, 64)))  # the first answer loads more libraries: no visitor waits for it
    build(space).launch(
        theme=gradio.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=FONT),
        css=CSS,
        max_file_size="20mb",
        footer_links=[],
        run_history=False,
    )
