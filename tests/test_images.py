"""One function opens images: the same pixels in training, evaluation, predict, serve, the handler and a Space."""

from __future__ import annotations

import ast
import base64
import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
from PIL import Image

from ccssl_hf import images
from ccssl_hf.data import EvaluationDataset, drop_unreadable
from ccssl_hf.deploy import handler
from ccssl_hf.deploy.predict import Classifier, predict_to_file
from ccssl_hf.deploy.space_page import app
from ccssl_hf.images import PixelTable, decode_image, open_image, upright_rgb
from small_models import published

COPIES = {"handler": handler, "Space": app}
ORIENTATION = 0x0112
WIDTH, HEIGHT = 24, 16

STORED = {"1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "LA", "PA", "I;16", "I;16B", "I;16L"}
"""The modes that images from files have."""

MODES = [*sorted(STORED), "HSV", "RGBX", "RGBa", "I;16N"]
"""All modes of Pillow, except La, which Pillow cannot convert."""


def noise(mode: str) -> Image.Image:
    """An image of random values, over the whole range of the mode."""
    generator = np.random.default_rng(0)
    image = Image.new(mode, (WIDTH, HEIGHT))
    content = generator.integers(0, 256, len(image.tobytes()), dtype=np.uint8).tobytes()
    if mode == "F":
        content = (generator.random((HEIGHT, WIDTH)) * 300 - 20).astype(np.float32).tobytes()
    if mode == "I":
        content = generator.integers(-100, 70_000, (HEIGHT, WIDTH), dtype=np.int32).tobytes()
    image.frombytes(content)
    if mode in ("P", "PA"):
        image.putpalette(generator.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encoded_modes() -> Iterator[tuple[str, bytes]]:
    """Every mode in every format that can store it and be opened again."""
    Image.init()
    for mode in MODES:
        for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys() - {"EPS", "ICNS", "ICO"}):  # of other images, or slow
            try:
                content = encode(noise(mode), kind)
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
            except Exception:  # the format does not have this mode, or Pillow only writes it
                continue
            yield f"{mode} as {kind}", content


def special_cases() -> Iterator[tuple[str, bytes]]:
    """EXIF orientations, palettes with transparency and animations."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        for kind, mode in (
            *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
            *(("PNG", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
            *(("TIFF", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F", "I;16", "I;16B")),
            *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        ):
            yield f"{mode} as {kind}, orientation {orientation}", encode(noise(mode), kind, exif=exif)
    palette = noise("P")
    for kind in ("PNG", "GIF"):
        yield f"one transparent colour as {kind}", encode(palette, kind, transparency=3)
    yield "transparent palette as PNG", encode(palette, "PNG", transparency=bytes(range(256)))
    yield "transparent grey as PNG", encode(noise("L"), "PNG", transparency=7)
    yield "transparent colour as PNG", encode(noise("RGB"), "PNG", transparency=(1, 2, 3))
    frames = [noise("P"), Image.new("RGB", (WIDTH, HEIGHT), "teal"), noise("RGB")]
    for first in (0, 1):
        for kind in ("GIF", "TIFF", "WEBP", *(["PNG"] if first else [])):  # Pillow fails on a PNG of palettes
            content = encode(frames[first], kind, save_all=True, append_images=frames[first + 1 :], duration=50)
            yield f"{len(frames) - first} frames as {kind}", content


def as_before(content: bytes) -> Image.Image:
    """The decoding of `datasets` and a conversion to RGB: an independent definition of the pixels of training."""
    image = datasets.Image().decode_example({"bytes": content, "path": None})
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 256).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def same(image: Image.Image, expected: Image.Image) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.fixture(scope="module")
def cases() -> dict[str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of mode I as PNG
        return dict([*encoded_modes(), *special_cases()])


def test_every_mode_that_a_file_can_have_is_tested(cases: dict[str, bytes]) -> None:
    opened = {Image.open(io.BytesIO(content)).mode for content in cases.values()}
    assert opened >= STORED
    for kind in ("PNG", "TIFF", "WEBP", "GIF", "JPEG"):
        assert any(name.endswith(f" as {kind}") for name in cases)


def code_of(item: object) -> str:
    """The source of a class or function without its docstring and comments."""
    [definition] = ast.parse(inspect.getsource(item)).body
    assert isinstance(definition, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(definition)
    definition.body[0] = ast.Pass()
    return ast.unparse(definition)


@pytest.mark.parametrize("module", COPIES.values(), ids=COPIES)
def test_the_copies_have_the_same_code(module: ModuleType) -> None:
    for name in ("TooLargeError", "upright_rgb", "open_image"):
        assert code_of(getattr(module, name)) == code_of(getattr(images, name))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_function_that_opens_an_image_gives_the_pixels_of_training(
    cases: dict[str, bytes], tmp_path: Path
) -> None:
    classifier = Classifier.from_pretrained(published(tmp_path / "model", "wide_resnet10_1_cifar", 16), device="cpu")
    path = tmp_path / "image"

    def opened(content: bytes) -> dict[str, Image.Image]:
        path.write_bytes(content)
        return {
            "training": decode_image({"bytes": content, "path": None}, 0, "labeled"),
            "training from a file": decode_image({"bytes": None, "path": str(path)}, 0, "labeled"),
            "bytes": open_image(content),
            "path": open_image(path),
            "handler": handler.open_image(content),
            "handler, opened": handler.read_image(Image.open(io.BytesIO(content))),
            "Space": app.open_upload(str(path)),
        }

    different = []
    for name, content in cases.items():
        found, expected = opened(content), as_before(content)
        kind = Image.open(io.BytesIO(content)).format
        if kind in handler.FORMATS:
            found["handler, base64"] = handler.read_image(base64.b64encode(content).decode())
        different += [(name, where) for where, image in found.items() if not same(image, expected)]
        cropped = classifier._transform(expected)
        if not np.array_equal(classifier.pixels(Image.open(io.BytesIO(content))), cropped):
            different.append((name, "Classifier"))
    assert not different


@pytest.mark.parametrize("mode", MODES)
def test_images_in_memory_of_every_mode_become_rgb(mode: str) -> None:
    image = noise(mode)
    converted = upright_rgb(image)
    assert converted.mode == "RGB" and converted.size == (WIDTH, HEIGHT)
    for module in COPIES.values():
        assert same(module.upright_rgb(image), converted)
    assert image.mode == mode  # the caller's image is left as it was


def test_16_bits_keep_their_upper_8() -> None:
    values = np.array([[0, 255, 256, 0x4000, 0x40FF, 0xFFFF]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(open_image(encode(Image.fromarray(values), kind)))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 0x40, 0x40, 0xFF]


# ------------------------------------------------------------------------------------------------------------ datasets


def dataset_of(contents: list[bytes | None], paths: list[str | None] | None = None) -> datasets.Dataset:
    given = zip(contents, paths or [None] * len(contents), strict=True)
    rows = [None if content is path is None else {"bytes": content, "path": path} for content, path in given]
    return datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_training_and_evaluation_see_the_pixels_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares, so that nothing is cropped or resized."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    square = [
        encode(noise(mode).crop((0, 0, 16, 16)), "TIFF") for mode in ("1", "P", "CMYK", "LA", "LAB", "I;16B", "F")
    ]
    dataset = dataset_of(square)
    pixels = [np.asarray(as_before(content)).transpose(2, 0, 1) for content in square]
    index = np.arange(len(square))
    table = PixelTable(dataset, image_column="image", size=16, role="labeled")
    assert np.array_equal(table.read(index), pixels)
    evaluated = EvaluationDataset(
        dataset, np.zeros(len(square), np.int64), image_column="image", transform=np.asarray, role="test"
    )
    for number, image in enumerate(pixels):
        assert np.array_equal(evaluated[number]["pixel_values"].transpose(2, 0, 1), image)


def test_a_url_is_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    urls = ["https://example.com/a.png", "hf://datasets/user/name/a.png", "file:///etc/a.png"]
    for url in urls:
        with pytest.raises(
            ValueError, match=rf"Image 7 of the test split .*{re.escape(url)} is a URL.*download the file"
        ):
            decode_image({"bytes": None, "path": url}, 7, "test")
    content = encode(noise("RGB"), "PNG")
    assert decode_image({"bytes": content, "path": urls[0]}, 0, "test").size == (WIDTH, HEIGHT)
    assert len(drop_unreadable(dataset_of([None, content], [urls[0], None]))) == 1
    classifier = Classifier.from_pretrained(published(tmp_path / "model", "wide_resnet10_1_cifar", 16), device="cpu")
    predict_to_file(classifier, urls, tmp_path / "out.parquet")
    errors = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))["error"]
    assert all("is a URL and only local files are opened" in error for error in errors)


def test_a_colon_in_a_file_name_is_not_a_url(tmp_path: Path) -> None:
    path = tmp_path / "12:30.png"
    try:
        noise("RGB").save(path)
    except OSError:
        pytest.skip("this file system has no colons in names")
    assert decode_image({"bytes": None, "path": str(path)}, 0, "test").size == (WIDTH, HEIGHT)


def test_a_row_without_an_image_is_an_error() -> None:
    for encoded in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="the row holds no image"):
            decode_image(encoded, 0, "test")
    assert len(drop_unreadable(dataset_of([encode(noise("RGB"), "PNG"), None]))) == 1


# -------------------------------------------------------------------------------------------------------------- limits


OPENERS = {"package": images, **COPIES}


@pytest.mark.parametrize("module", OPENERS.values(), ids=OPENERS)
def test_limits_are_arguments(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_it: Callable[..., Image.Image] = module.open_image
    content = encode(noise("RGB"), "PNG")
    pixels = WIDTH * HEIGHT
    assert open_it(content, max_pixels=pixels, formats=("PNG",)).size == (WIDTH, HEIGHT)
    with pytest.raises(module.TooLargeError, match=r"too large \(24 x 16 pixels, at most 383 are allowed\)"):
        open_it(content, max_pixels=pixels - 1)
    with pytest.raises(ValueError, match=r"^not a readable image \(unknown format\)$"):
        open_it(content, formats=("JPEG", "GIF"))
    with pytest.raises(ValueError, match=r"^not a readable image \(unknown format\)$"):
        open_it(b"no image")
    with pytest.raises(ValueError, match=r"^not a readable image \(FileNotFoundError: .*none\.png"):
        open_it(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"^not a readable image \((OSError|SyntaxError): "):
        open_it(content[:-400])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(module.TooLargeError, match="decompression bomb"):
        open_it(content)
