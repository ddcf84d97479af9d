"""Request handler for Hugging Face Inference Endpoints. Needs only transformers, timm and the files of this folder."""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs other programs for some other formats (EPS)
MAX_PIXELS = 89_478_485  # the number from which Pillow warns of a decompression bomb, 268 MB decoded
FUNCTIONS = ("softmax", "sigmoid", "none")
PARAMETERS = ("top_k", "function_to_apply")


# `open_image` checks the number of pixels itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# This file runs without the package: these are copies from ccssl_hf/data/images.py, which a test keeps equal.


class TooLargeError(ValueError):
    """The image has more pixels than allowed."""


def eight_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """Convert a grey image of 12, 16 or 32 bits to 8: the upper 8 bits of its depth, or of its declared range.

    `source` is the image as it was opened. 32-bit integers and floats have a range only if the file is a TIFF with
    SMinSampleValue and SMaxSampleValue, or MinSampleValue and MaxSampleValue. Raises ValueError for all others.
    """
    values, tags = np.asarray(image), getattr(source, "tag_v2", {})
    if image.mode.startswith("I;16") or (source.format == "PPM" and image.mode == "I"):  # in PPM 16 bits, too
        depth = 12 if tags.get(258) == (12,) else 16
        return Image.fromarray((values >> (depth - 8)).astype(np.uint8))
    kind = "float" if image.mode == "F" else "32-bit integer"
    for pair in ((340, 341), (280, 281)):
        if all(tag in tags for tag in pair):
            low, high = (float(np.ravel(tags[tag])[0]) for tag in pair)
            break
    else:
        raise ValueError(
            f"{kind} values without a declared range: convert the image to 8 or 16 bits, or write the TIFF tags "
            "SMinSampleValue and SMaxSampleValue"
        )
    if tags.get(339) == (1,):  # unsigned integers, which Pillow holds in a signed type
        values = values.view(np.uint32)
    if not (np.isfinite([low, high]).all() and low < high and np.isfinite(values).all()):
        raise ValueError(f"{kind} values or a declared range ({low:g} to {high:g}) that are not numbers in order")
    scaled = (values.astype(np.float64) - low) * 256 / (high - low)
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, rotated by its EXIF orientation. Transparency is dropped.

    Of an image that is more than 32 times as long as wide the middle is kept. Raises ValueError if it has no pixels, or
    has 32-bit values without a declared range (see `eight_bits`).
    """
    image.load()  # some formats store EXIF data behind the pixels
    source = image
    if image.getexif().get(0x0112) is not None:  # the orientation; exif_transpose copies images that have none
        image = ImageOps.exif_transpose(image)
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError("the image has no pixels")
    if max(width, height) > 32 * min(width, height):  # resizing its shorter side up would fill the memory
        left, top = (width - min(width, 32 * height)) // 2, (height - min(height, 32 * width)) // 2
        image = image.crop((left, top, width - left, height - top))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert() would clip all values above 255 to white
        image = eight_bits(image, source)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(
    source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Open an encoded image as upright RGB. Raises ValueError, or TooLargeError above `max_pixels`."""
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for the whole process
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        # Not by its path: Pillow would map some TIFF files into memory, and read rotated ones wrongly.
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.format in ("EPS", "WMF"):
                raise ValueError(f"Pillow decodes {image.format} with other programs: convert the image to PNG")
            if image.width * image.height <= max_pixels:
                image.load()  # the header of an ICO or ICNS file may name a smaller size than its picture has
            if image.width * image.height <= max_pixels:
                return upright_rgb(image)
            problem = f"{image.width} x {image.height} pixels, at most {max_pixels:,} are allowed"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = str(error)
    except Exception as error:  # Pillow raises nearly any type of error for a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # its message names a path or an object in memory
        reason = "unknown format" if unknown else str(error)
        if isinstance(error, OSError) and error.filename:  # its message names all folders
            reason = f"{error.strerror}: {Path(error.filename).name}"
        if type(error) not in (UnidentifiedImageError, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"not a readable image ({' '.join(reason.split())})") from error
    raise TooLargeError(f"too large ({problem})")


def decode_base64(text: Any) -> bytes:
    """Decode base64 text, with or without the prefix `data:image/...;base64,`. Raises ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"An image must be base64 text, but this is of type {type(text).__name__}.")
    if text.startswith(("http://", "https://")):
        raise ValueError("URLs are not fetched: send the image itself, as bytes or as base64 text.")
    try:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"This is not base64 text ({error}): send the image's bytes in base64.") from error


def read_image(given: Any) -> Image.Image:
    """Open an image of a request: a PIL image, the bytes of a file, or base64 text.

    Raises TooLargeError above `MAX_PIXELS`, and ValueError if it cannot be read or its format is not in `FORMATS`.
    """
    if isinstance(given, Image.Image):
        return upright_rgb(given)
    content = given if isinstance(given, bytes) else decode_base64(given)
    try:
        return open_image(content, max_pixels=MAX_PIXELS, formats=FORMATS)
    except TooLargeError as error:
        raise TooLargeError(f"The image is {error}: send a smaller one.") from error
    except ValueError as error:
        raise ValueError(f"This is {error}: send a complete {', '.join(FORMATS)} file.") from error


def check_parameters(parameters: Any) -> dict[str, Any]:
    """The parameters `top_k` and `function_to_apply` of a request that are given. Raises ValueError for all others."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"parameters must be an object with {' and '.join(PARAMETERS)}, such as {{'top_k': 2}}.")
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in given.keys() - set(PARAMETERS):
        close = difflib.get_close_matches(str(name), PARAMETERS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {' and '.join(PARAMETERS)}."
        raise ValueError(f"There is no parameter '{name}': {hint}")
    top_k, function = given.get("top_k", 1), given.get("function_to_apply", "none")
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k must be an integer of at least 1, but is {top_k!r}.")
    if function not in FUNCTIONS:
        raise ValueError(f"function_to_apply must be one of {', '.join(FUNCTIONS)}, but is {function!r}.")
    return given


class EndpointHandler:
    """The class that the inference toolkit builds from the repository's folder, to call it with each request."""

    def __init__(self, path: str = "") -> None:
        self._pipeline = transformers.pipeline(
            "image-classification",
            model=path,
            device=0 if torch.cuda.is_available() else "cpu",
            trust_remote_code=True,  # the code of a backbone that timm lacks is in this folder
        )
        weights = self._pipeline.model.state_dict().items()
        if wrong := [name for name, each in weights if each.is_floating_point() and not each.isfinite().all()]:
            raise ValueError(f"The model has NaN or infinite numbers in {wrong[0]} and {len(wrong) - 1} other tensors.")

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Labels and scores, best first: `[{"label": ..., "score": ...}, ...]`, or a list of those for a list.

        `data` has `inputs`, an image of any type that `read_image` takes or a list of those, and `parameters`, see
        `check_parameters`. Raises ValueError, whose message the toolkit answers.
        """
        inputs, parameters = data.get("inputs"), check_parameters(data.get("parameters") or {})
        if inputs is None or inputs == []:
            raise ValueError("inputs is missing: send an image, or a list of at least one.")
        images = [read_image(one) for one in (inputs if isinstance(inputs, list) else [inputs])]
        answers = self._pipeline(images, **parameters)
        for number, answer in enumerate(answers):
            if not all(math.isfinite(each["score"]) for each in answer):
                raise ValueError(f"The network's output for image {number} is NaN or infinite.")
        return answers if isinstance(inputs, list) else answers[0]
