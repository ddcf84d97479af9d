"""One function opens images: the same pixels in training, evaluation, predict, serve, the handler and a Space."""

from __future__ import annotations

import base64
import inspect
import io
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor

from ccssl_hf.data import EvaluationDataset, drop_unreadable, images
from ccssl_hf.data.images import MISSING, EncodedImages, decode_image, open_image, upright_rgb
from ccssl_hf.data.pixels import ImageFiles, PixelTable
from ccssl_hf.data.sources import load_split
from ccssl_hf.deploy import handler
from ccssl_hf.deploy.evaluate import evaluate
from ccssl_hf.deploy.predict import Classifier, predict_to_file
from ccssl_hf.deploy.space_page import app
from ccssl_hf.standalone import standalone
from ccssl_hf.transforms import View, ViewSettings
from pictures import picture
from small_models import published


def written(module: ModuleType) -> ModuleType:
    """A module from its file as it is copied to where others run it."""
    alone = ModuleType(f"{module.__name__.rpartition('.')[2]}_alone")
    sys.modules[alone.__name__] = alone
    exec(compile(standalone(Path(str(module.__file__))), alone.__name__, "exec"), alone.__dict__)
    return alone


COPIES = {"handler": written(handler), "Space": written(app)}
OPENERS = {"package": images, **COPIES}
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


def as_before(content: bytes) -> Image.Image | None:
    """The decoding of `datasets` and a conversion to RGB: an independent definition of the pixels of training.

    None for 32-bit values without a range.
    """
    image = datasets.Image().decode_example({"bytes": content, "path": None})
    if image.mode.startswith("I;16") or (image.mode == "I" and content.startswith(b"P5")):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 256).astype(np.uint8)).convert("RGB")
    return None if image.mode in ("I", "F") else image.convert("RGB")


def same(image: Image.Image | str, expected: Image.Image | None) -> bool:
    if isinstance(image, str) or expected is None:
        return expected is None and isinstance(image, str) and "without a declared range" in image
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


@pytest.mark.parametrize("module", [handler, app], ids=COPIES)
def test_the_copies_have_the_same_code(module: ModuleType) -> None:
    text = standalone(Path(str(module.__file__)))
    for name in ("TooLargeError", "eight_bits", "upright_rgb", "open_image"):
        assert text.count(inspect.getsource(getattr(images, name))) == 1
    assert f"\nMAX_PIXELS = {images.MAX_PIXELS:_} " in text
    assert "from ." not in text and "import ccssl_hf" not in text and "from ccssl_hf" not in text


@pytest.mark.parametrize("module", OPENERS.values(), ids=OPENERS)
@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_an_icon_has_the_size_of_the_picture_inside(module: ModuleType) -> None:
    content = encode(Image.new("RGB", (1200, 1200)), "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22)
    with pytest.raises(module.TooLargeError, match="1200 x 1200"):
        module.open_image(struct.pack("<HHH", 0, 1, 1) + entry + content, max_pixels=1000)
    named = b"ic07" + struct.pack(">I", 8 + len(content)) + content  # 128 x 128
    with pytest.raises(ValueError, match=r"too large|not one of the allowed sizes"):
        module.open_image(b"icns" + struct.pack(">I", 8 + len(named)) + named, max_pixels=128 * 128)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_function_that_opens_an_image_gives_the_pixels_of_training(
    cases: dict[str, bytes], tmp_path: Path
) -> None:
    classifier = Classifier.from_pretrained(published(tmp_path / "model", "wide_resnet10_1_cifar", 16), device="cpu")
    path, endpoint, page = tmp_path / "image", COPIES["handler"], COPIES["Space"]

    def opened(content: bytes) -> dict[str, Image.Image | str]:
        path.write_bytes(content)
        calls: dict[str, Callable[[], Image.Image]] = {
            "training": lambda: decode_image({"bytes": content, "path": None}, 0, "labeled"),
            "training from a file": lambda: decode_image({"bytes": None, "path": str(path)}, 0, "labeled"),
            "bytes": lambda: open_image(content),
            "path": lambda: open_image(path),
            "handler": lambda: endpoint.open_image(content),
            "handler, opened": lambda: endpoint.read_image(Image.open(io.BytesIO(content))),
            "Space": lambda: page.open_upload(str(path)),
            "Classifier": lambda: to_image(classifier.pixels(Image.open(io.BytesIO(content)))),
        }
        if Image.open(io.BytesIO(content)).format in endpoint.FORMATS:
            calls["handler, base64"] = lambda: endpoint.read_image(base64.b64encode(content).decode())
        found: dict[str, Image.Image | str] = {}
        for name, call in calls.items():
            try:
                found[name] = call()
            except ValueError as error:
                found[name] = f"{error} {error.__cause__}"
        return found

    def to_image(pixels: Tensor) -> Image.Image:
        return (
            Image.fromarray(pixels.permute(1, 2, 0).numpy())
            if isinstance(pixels, Tensor)
            else to_image(torch.from_numpy(pixels))
        )

    different = []
    for name, content in cases.items():
        expected = as_before(content)
        for where, image in opened(content).items():
            cropped = to_image(classifier._transform(expected)) if where == "Classifier" and expected else expected
            if not same(image, cropped):
                different.append((name, where))
    assert not different


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("I", "F")])
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


# ------------------------------------------------------------------------------------------------------ depth and shape


def tiff(values: np.ndarray, tags: dict[int, object]) -> bytes:
    """A grey TIFF file with these further tags, by hand: Pillow cannot write all of them."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    pixels = values.tobytes()
    entries: dict[int, object] = {256: width, 257: height, 258: 8 * values.dtype.itemsize, 259: 1, 262: 1, 277: 1}
    entries |= {278: height, 279: len(pixels), 339: kind} | tags
    head = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = head
    directory = struct.pack(order + "H", len(entries))
    for tag, value in sorted(entries.items()):
        code, form = (11, "f") if isinstance(value, float) else (4, "I") if value >= 0 else (9, "i")  # type: ignore[operator]
        directory += struct.pack(f"{order}HHI{form}", tag, code, 1, value)
    return (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8) + directory + bytes(4) + pixels


def grey(content: bytes) -> list[int]:
    return np.asarray(open_image(content))[..., 0].ravel().tolist()


RAMP = np.array([[0, 1, 127, 128, 254, 255]])


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<u4", "<i4", ">i4", "<f4", ">f4", "<i2", ">i2"])
@pytest.mark.parametrize("tags", [(340, 341), (280, 281)])
def test_values_are_scaled_by_the_range_that_a_file_declares(kind: str, tags: tuple[int, int]) -> None:
    dtype = np.dtype(kind)
    if dtype.kind == "u" and dtype.itemsize == 2:  # 16 bits have a range of their own
        assert grey(tiff((RAMP * 257).astype(dtype), {tags[0]: 0, tags[1]: 9})) == RAMP[0].tolist()
        return
    for low, step in ((0, 1), (0, 3), (-100, 50) if dtype.kind != "u" and tags[0] == 340 else (10, 1)):
        values = (low + RAMP * step).astype(dtype)
        number = float if dtype.kind == "f" else int
        content = tiff(values, {tags[0]: number(low), tags[1]: number(low + 255 * step)})
        assert grey(content) == RAMP[0].tolist(), (low, step)
    beyond = tiff(np.array([[10, 20, 21]]).astype(dtype), {tags[0]: 11, tags[1]: 20})
    assert grey(beyond) == [0, 255, 255]


def test_a_range_of_16_bits_keeps_the_upper_8_and_large_unsigned_values_stay_positive() -> None:
    values = np.array([[0, 255, 256, 0x4000, 0x40FF, 0xFFFF]])
    expected = [0, 0, 1, 0x40, 0x40, 0xFF]
    assert grey(tiff(values.astype("<i4"), {340: 0, 341: 0xFFFF})) == expected
    assert grey(tiff((values << 16).astype("<u4"), {340: 0, 341: 0xFFFFFFFF})) == expected
    assert grey(b"P5 6 1 65535\n" + values.astype(">u2").tobytes()) == expected


def test_12_bits_in_a_tiff_are_not_nearly_black() -> None:
    """Two values of 12 bits in three bytes, as scanners write them."""
    content = tiff(np.array([[0x80, 0x0F, 0xFF]], np.uint8), {256: 2, 258: 12, 279: 3})
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "I;16" and np.asarray(image).tolist() == [[0x800, 0xFFF]]
    assert grey(content) == [0x80, 0xFF]


@pytest.mark.parametrize(
    ("low", "high", "value"),
    [(1.0, 1.0, 1.0), (5.0, 1.0, 2.0), (0.0, np.inf, 2.0), (np.nan, 1.0, 0.0), (0.0, 1.0, np.nan)],
)
def test_a_range_or_values_that_are_no_numbers_are_refused(low: float, high: float, value: float) -> None:
    content = tiff(np.array([[0, value]], "<f4"), {340: float(low), 341: float(high)})
    for module in OPENERS.values():
        with pytest.raises(ValueError, match="not numbers in order"):
            module.open_image(content)


@pytest.mark.parametrize("array", [np.uint16, np.int32, np.uint32, np.float32, np.float64, np.int64])
def test_arrays_in_a_dataset_follow_the_same_rule(array: type) -> None:
    """`datasets` stores them as TIFF files: 16 bits as they are, others without a range."""
    values = (np.arange(256).reshape(16, 16) * 256).astype(array)
    dataset = datasets.Dataset.from_dict({"image": [values]}, features=datasets.Features({"image": datasets.Image()}))
    if array is np.uint16:
        image = EvaluationDataset(dataset, None, image_column="image", transform=np.asarray, role="test")[0]
        assert np.array_equal(image["pixel_values"][..., 0].ravel(), np.arange(256))
    else:
        [(row, name, reason)] = images.unreadable(dataset, "image")
        assert (row, name) == (0, "row 0") and "convert the image to 8 or 16 bits" in reason


def test_transparency_is_dropped() -> None:
    hidden = Image.new("RGBA", (2, 2), (10, 200, 30, 0))
    assert open_image(encode(hidden, "PNG")).getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 5000), (31, 1)])
def test_tiny_and_long_images_are_decoded_everywhere(size: tuple[int, int], tmp_path: Path) -> None:
    """Resizing the shorter side of 1 x 5000 pixels to 256 would make 1.3 million rows of the other."""
    middle = 3 * (size[0] // 2), 5 * (size[1] // 2)
    array = np.zeros((size[1], size[0], 3), np.uint8)
    array[..., 0], array[..., 1] = np.arange(size[0]) * 3 % 256, np.arange(size[1])[:, None] * 5 % 256
    content = encode(Image.fromarray(array), "PNG")
    image = open_image(content)
    assert max(image.size) <= 32 * min(image.size)
    assert image.getpixel((image.width // 2, image.height // 2))[:2] == (middle[0] % 256, middle[1] % 256)
    dataset = dataset_of([content] * 2)
    table = PixelTable(dataset, image_column="image", size=16, role="labeled")
    assert table.read(np.array([1])).shape == (1, 3, 16, 16)
    settings = ViewSettings(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, weak_crop="resized")
    files = ImageFiles(dataset, image_column="image", role="labeled", settings=settings, seed=0, stream=0)
    assert files.read(np.array([0]), np.array([3]), [View.WEAK, View.CONTRASTIVE]).shape == (1, 2, 3, 16, 16)
    transform = create_transform(input_size=(3, 224, 224), crop_pct=0.9)
    evaluated = EvaluationDataset(dataset, None, image_column="image", transform=transform, role="test")
    assert evaluated[1]["pixel_values"].shape == (3, 224, 224)


def test_the_middle_of_a_long_image_is_seen_as_before() -> None:
    """What a crop to the central square sees does not depend on the pixels far from it."""
    wide = picture(5, 66 * 16, 16)  # 66 times as long
    narrow = np.asarray(ImageOps.fit(upright_rgb(wide), (16, 16)))
    assert np.array_equal(narrow, np.asarray(ImageOps.fit(wide, (16, 16))))


def test_an_image_in_memory_without_pixels_is_an_error() -> None:
    for size in ((0, 0), (0, 4)):
        with pytest.raises(ValueError, match="has no pixels"):
            upright_rgb(Image.new("RGB", size))


# ------------------------------------------------------------------------------------------------------------ datasets


def dataset_of(contents: list[bytes | None], paths: list[str | None] | None = None) -> datasets.Dataset:
    given = zip(contents, paths or [None] * len(contents), strict=True)
    rows = [None if content is path is None else {"bytes": content, "path": path} for content, path in given]
    return datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))


def content_hashes(dataset: datasets.Dataset) -> list[bytes]:
    return [row.tobytes() for row in EncodedImages(dataset, "image").hashes()]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_training_and_evaluation_see_the_pixels_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares, so that nothing is cropped or resized."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    square = [
        encode(noise(mode).crop((0, 0, 16, 16)), "TIFF") for mode in ("1", "P", "CMYK", "LA", "LAB", "I;16B", "L")
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
    urls += ["zip://a.png::https://example.com/a.zip", "simplecache::https://example.com/a.png"]
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


@pytest.mark.parametrize("name", ["12:30.png", "moth::1.png"])
def test_a_colon_in_a_file_name_is_not_a_url(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(module.TooLargeError, match="decompression bomb"):
            open_it(content)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG file whose header promises this size, with few pixels."""
    header = b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [header, *chunks, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
REFUSED = {
    "a bomb": (png(10_000, 10_000), "too large .*100000000|too large .*10000 x 10000"),
    "a larger bomb": (png(60_000, 60_000), "too large"),
    "a bomb of text": (png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))), "not a readable image"),
    "no pixels": (png(0, 8), "unknown format"),
    "a cut PNG": (encode(picture(0, 200, 200), "PNG")[:4000], "truncated"),
    "a cut JPEG": (encode(picture(0, 200, 200), "JPEG")[:2000], "truncated"),
    "PostScript": (EPS, "decodes EPS with other programs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_files_are_refused_everywhere_before_they_are_decoded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", never)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", never)
    content, sentence = REFUSED[case]
    for module in OPENERS.values():
        with pytest.raises(ValueError, match=sentence):
            module.open_image(content)
    good = encode(noise("RGB"), "PNG")
    dataset = dataset_of([good, content])
    [(row, _, reason)] = images.unreadable(dataset, "image")
    assert row == 1 and re.search(sentence, reason) and "\n" not in reason
    for decode in ("memory", "stream"):
        with pytest.raises(ValueError, match=sentence):
            if decode == "memory":
                PixelTable(dataset, image_column="image", size=16, role="unlabeled")
            else:
                settings = ViewSettings(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
                files = ImageFiles(dataset, image_column="image", role="unlabeled", settings=settings, seed=0, stream=1)
                files.read(np.array([1]), np.array([0]), [View.WEAK])
    with pytest.raises(ValueError, match=sentence):
        EvaluationDataset(dataset, None, image_column="image", transform=np.asarray, role="test")[1]
    classifier = Classifier.from_pretrained(published(tmp_path / "model", "wide_resnet10_1_cifar", 16), device="cpu")
    assert predict_to_file(classifier, dataset, tmp_path / "out.parquet").unreadable == 1


def test_the_limit_of_pixels_can_be_raised_and_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also above the limit of Pillow, which is then raised."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    content = encode(noise("RGB"), "PNG")
    assert open_image(content, max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)
    assert Image.MAX_IMAGE_PIXELS == WIDTH * HEIGHT
    few = {"max_pixels": WIDTH * HEIGHT - 1}
    dataset = dataset_of([content])
    assert len(images.unreadable(dataset, "image", **few)) == 1
    with pytest.raises(ValueError, match="at most 383 are allowed"):
        PixelTable(dataset, image_column="image", size=16, role="labeled", **few)
    with pytest.raises(ValueError, match="at most 383 are allowed"):
        EvaluationDataset(dataset, None, image_column="image", transform=np.asarray, role="test", **few)[0]
    classifier = Classifier.from_pretrained(published(tmp_path / "model", "wide_resnet10_1_cifar", 16), device="cpu")
    assert predict_to_file(classifier, dataset, tmp_path / "out.parquet", **few).unreadable == 1
    with pytest.raises(ValueError, match="at most 383 are allowed"):
        evaluate(classifier, dataset.add_column("label", ["moth"]), "test", **few)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / "pipe"), str(tmp_path), "/dev/zero", "a\0b"]
    assert [row for row, _, _ in images.unreadable(dataset_of([None] * 4, paths))] == [0, 1, 2, 3]
    assert content_hashes(dataset_of([None] * 4, paths)) == [MISSING] * 4


# ------------------------------------------------------------------------------------------------------ content hashes


def test_content_hashes_follow_the_rows_and_not_the_place_of_the_bytes(tmp_path: Path) -> None:
    contents = [encode(picture(seed), "PNG") for seed in range(5)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    stored = dataset_of([None] * 5, [str(tmp_path / f"{number}.png") for number in range(5)])
    held = dataset_of([*contents, None], [None] * 5 + [str(tmp_path / "none.png")])
    hashes = content_hashes(held)
    assert content_hashes(stored) == hashes[:5] and hashes[5] == MISSING == bytes(16)
    assert len(set(hashes)) == 6 and {len(each) for each in hashes} == {16}
    order = [4, 0, 5, 0]
    assert content_hashes(held.select(order)) == [hashes[row] for row in order]
    parts = datasets.concatenate_datasets([held.select([3]), stored, held])
    assert content_hashes(parts) == [hashes[3], *hashes[:5], *hashes]
    assert content_hashes(parts.shard(3, 1).with_format("torch")) == [hashes[each] for each in (3, 4, 0, 1)]
    assert content_hashes(dataset_of([None])) == [MISSING]


def test_files_rewritten_in_place_are_decoded_again_and_the_same_images_elsewhere_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def first(folder: Path) -> list[int]:
        split = load_split(folder, role="labeled")
        return PixelTable(split, image_column="image", size=8, role="labeled").read(np.array([0]))[0, :, 0, 0].tolist()

    def write(folder: Path, colours: list[str]) -> None:
        for number, colour in enumerate(colours):
            path = folder / "moth" / f"{number}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(path)
            os.utime(path, (10**9, 10**9))

    write(tmp_path / "a", ["red", "lime"])
    assert first(tmp_path / "a") == [255, 0, 0]
    write(tmp_path / "a", ["blue", "lime"])
    assert first(tmp_path / "a") == [0, 0, 255]
    tables = sorted((tmp_path / "cache" / "ccssl_hf").glob("*.arrow"))
    write(tmp_path / "b", ["blue", "lime"])
    assert first(tmp_path / "b") == [0, 0, 255]
    assert sorted((tmp_path / "cache" / "ccssl_hf").glob("*.arrow")) == tables and len(tables) == 2


def test_a_parquet_file_rewritten_in_place_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path, sizes, seen = tmp_path / "rows.parquet", set(), []
    for colour in ("red", "blue"):
        dataset_of([encode(Image.new("RGB", (8, 8), colour), "BMP")]).to_parquet(path)
        os.utime(path, (10**9, 10**9))
        sizes.add(path.stat().st_size)
        seen.append(load_split(str(path), role="unlabeled")[0]["image"].getpixel((0, 0)))
    assert len(sizes) == 1 and seen == [(255, 0, 0), (0, 0, 255)]
