"""Time of the command's help against an empty Python process, and of `import ccssl_hf` against timm and torch.

Every call is a fresh process. Files are read once before, so that the disk does not matter.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

from harness import SHARE, Bar, Row, in_turn, main

EMPTY, LIBRARIES, PACKAGE = ["-c", "pass"], ["-c", "import timm, torch"], ["-c", "import ccssl_hf"]
HELP = [["--help"], ["train", "--help"], ["train", "--help_all"], ["predict", "--help"], ["export", "onnx", "--help"]]


def process(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def measure(quick: bool) -> list[Row]:
    commands = [["-m", "ccssl_hf.cli", *words] for words in (HELP[1:2] if quick else HELP)]
    times = in_turn(process(*EMPTY), *(process(*words) for words in commands), rounds=1 if quick else 9)
    empty, *taken = map(statistics.median, times)
    rows = [
        Row(
            what=f"ccssl-hf {' '.join(words[2:])}, against `python -c pass`",
            baseline=f"{empty:.3f} s",
            ours=f"{seconds:.3f} s",
            figure=seconds,
            unit="s",
            bar=Bar("≤", 0.6),
            details={"ratio": seconds / empty},
        )
        for words, seconds in zip(commands, taken, strict=True)
    ]
    libraries, package = map(
        statistics.median, in_turn(process(*LIBRARIES), process(*PACKAGE), rounds=1 if quick else 9)
    )
    what, figure = "import ccssl_hf, against import timm, torch", package / libraries
    return [*rows, Row(what, f"{libraries:.2f} s", f"{package:.2f} s", figure, SHARE, Bar("≤", 1.1))]


if __name__ == "__main__":
    main(__file__, measure)
