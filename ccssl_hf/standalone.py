"""Files that run without this package: what they import from `data.images` is written out in place of the import."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from .data import images

_SHARED = (images.TooLargeError, images.eight_bits, images.upright_rgb, images.open_image)
_START = f"""import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# From ccssl_hf/data/images.py. `open_image` checks the number of pixels itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MAX_PIXELS = {images.MAX_PIXELS:_}  # the number from which Pillow warns of a decompression bomb, 268 MB decoded"""


def standalone(file: Path) -> str:
    """The code of a file of this package, as it is copied to where others run it."""
    code = "\n\n\n".join([_START, *(inspect.getsource(each).rstrip() for each in _SHARED)])
    return re.sub(r"^from \.+data\.images import .*$", lambda _: code, file.read_text(encoding="utf-8"), flags=re.M)
