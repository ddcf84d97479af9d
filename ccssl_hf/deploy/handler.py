"""Request handler for Hugging Face Inference Endpoints. Needs only transformers, timm and the files of this folder."""

from __future__ import annotations

import base64
import binascii
import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image

from ..data.images import MAX_PIXELS, TooLargeError, open_image, upright_rgb  # see `standalone`

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs other programs for some other formats (EPS)
FUNCTIONS = ("softmax", "sigmoid", "none")
PARAMETERS = ("top_k", "function_to_apply")


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
