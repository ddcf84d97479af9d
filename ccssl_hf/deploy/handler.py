"""Answers of an image classifier on Hugging Face's Inference Endpoints. Needs transformers, timm and this folder alone.

Their inference toolkit makes one `EndpointHandler` of the repository's folder, and calls it with what a request holds.
Scores are those of `transformers.pipeline("image-classification")`, which does the work.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is decoded. PIL knows more, but some of it runs other programs (EPS)."""

MAX_PIXELS = 89_478_485
"""Where PIL begins to warn of a decompression bomb: 268 MB once decoded."""

FUNCTIONS = ("softmax", "sigmoid", "none")
PARAMETERS = ("top_k", "function_to_apply")


class TooLargeError(ValueError):
    """An image of more pixels than are decoded."""


def read_image(content: bytes) -> Image.Image:
    """An encoded image, decoded, upright and in RGB.

    Raises:
        TooLargeError: It has more than `MAX_PIXELS`, and wasn't decoded.
        ValueError: It can't be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            too_large = image.width * image.height > MAX_PIXELS
            if not too_large:
                return ImageOps.exif_transpose(image).convert("RGB")
            problem = f"{image.width} x {image.height} pixels"
    except Image.DecompressionBombError:
        problem = "more than twice as many pixels"
    except Exception as error:  # PIL raises nearly anything for a broken file
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        reason = "in none of these formats" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"This is no image that can be read ({reason}): send a whole {formats} file.") from error
    raise TooLargeError(f"The image has {problem}, but at most {MAX_PIXELS:,} are decoded: send a smaller one.")


def decode_base64(text: Any) -> bytes:
    """The bytes of base64 text, with or without `data:image/...;base64,` before it.

    Raises:
        ValueError: It is something else, such as an address: nothing is ever fetched.
    """
    if not isinstance(text, str):
        raise ValueError(f"An image must be base64 text, but this is of type {type(text).__name__}.")
    if text.startswith(("http://", "https://")):
        raise ValueError("Addresses are not fetched: send the image itself, as bytes or as base64 text.")
    try:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"This is no base64 text ({error}): send the image's bytes in base64.") from error


def check_parameters(parameters: Any) -> dict[str, Any]:
    """The parameters of a request: `top_k` and `function_to_apply`, as far as they are given.

    Raises:
        ValueError: There are others, or a value is wrong.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(f"parameters must be an object with {' and '.join(PARAMETERS)}, such as {{'top_k': 2}}.")
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in given.keys() - set(PARAMETERS):
        close = difflib.get_close_matches(str(name), PARAMETERS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {' and '.join(PARAMETERS)}."
        raise ValueError(f"There is no parameter '{name}': {hint}")
    top_k, function = given.get("top_k", 1), given.get("function_to_apply", "none")
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k must be a whole number from 1 on, but is {top_k!r}.")
    if function not in FUNCTIONS:
        raise ValueError(f"function_to_apply must be one of {', '.join(FUNCTIONS)}, but is {function!r}.")
    return given


class EndpointHandler:
    """What the inference toolkit looks for.

    Args:
        path: The repository's folder.
    """

    def __init__(self, path: str = "") -> None:
        self._pipeline = transformers.pipeline(
            "image-classification",
            model=path,
            device=0 if torch.cuda.is_available() else "cpu",
            trust_remote_code=True,  # a backbone that timm lacks lies beside this file
        )

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Labels and scores, the best first: `[{"label": ..., "score": ...}, ...]`, or a list of those for a list.

        Args:
            data: `inputs`: a PIL image, an encoded image as bytes or base64 text, or a list of those; and
                `parameters`: see `check_parameters`.

        Raises:
            ValueError: Something can't be read; the toolkit answers with the sentence.
        """
        inputs, parameters = data.get("inputs"), check_parameters(data.get("parameters") or {})
        if inputs is None or inputs == []:
            raise ValueError("inputs is missing: send an image, or a list of at least one.")
        images = [_image(one) for one in (inputs if isinstance(inputs, list) else [inputs])]
        answers = self._pipeline(images, **parameters)
        return answers if isinstance(inputs, list) else answers[0]


def _image(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    return read_image(given if isinstance(given, bytes) else decode_base64(given))
