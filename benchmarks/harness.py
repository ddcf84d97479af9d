"""What the speed benchmarks share: two ways of doing a thing timed in turn in one process, and the table of results.

A benchmark is a script with `measure(quick) -> list[Row]`, which ends with `harness.main(__file__, measure)`. Run alone
it prints its table and writes `results/<name>.json`; `run.py` runs all of them, each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ccssl_hf.card.plots import format_table
from ccssl_hf.record import library_versions

RESULTS = Path(__file__).parent / "results"

T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """What a figure must reach."""

    relation: Literal["≤", "≥"]
    value: float

    def holds(self, figure: float) -> bool:
        return figure <= self.value if self.relation == "≤" else figure >= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: What was measured, with its sizes.
        baseline: Median of the baseline, with its unit, such as "2.31 s"; "" where there is none.
        ours: Likewise.
        figure: The number that counts, such as a ratio of medians; None where it was not measured.
        unit: What the figure is: "x the baseline's time", "times as fast", "MiB", "views/s".
        bar: What it must reach; None where it is only told.
        details: Whatever else is worth keeping in the file: every time, sizes, settings.
    """

    what: str
    baseline: str
    ours: str
    figure: float | None
    unit: str
    bar: Bar | None = None
    details: dict[str, Any] = field(default_factory=dict)


def in_turn(
    *ways: Callable[[], Any],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call of each way: A B C A B C …, so that a drift of the machine's speed meets all of them.

    Args:
        ways: What to time. The first is the baseline.
        rounds: Counted calls of each.
        warmup: Calls before them that are not counted.
        clock: `time.perf_counter`, or `time.process_time` for processor time.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    gc.collect()
    gc.freeze()  # the libraries' own objects need no look in each round
    for number in range(warmup + rounds):
        for way, taken in zip(ways, seconds, strict=True):
            gc.collect()
            started = clock()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                taken.append(clock() - started)
    gc.unfreeze()
    return seconds


def in_child(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a fresh process, forked from one that has imported the package and done nothing else.

    The function has to stand at the top of the script, and what it takes and returns has to pickle.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ccssl_hf.trainer"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def resident(*kinds: str) -> float:
    """The sum of these `kinds` of this process's memory in MiB, named as in /proc/self/status. Linux alone."""
    status = Path("/proc/self/status").read_text()
    return sum(int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0]) for kind in kinds) / 1024


def rise_of_memory(call: Callable[[], Any]) -> float:
    """How far `call()` raises the resident memory at its highest, in MiB. Best in a fresh process, warmed up.

    Pages of mapped files count.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far, that of imports
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def rise_of_own_memory(call: Callable[[], Any]) -> float:
    """Likewise without pages of mapped files. Of this the system keeps no high-water mark: a thread looks each 2 ms."""
    own = ("RssAnon", "RssShmem")
    gc.collect()
    before = highest = resident(*own)
    ended = threading.Event()

    def look() -> None:
        nonlocal highest
        while not ended.wait(0.002):
            highest = max(highest, resident(*own))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        call()
    finally:
        ended.set()
        thread.join()
    return highest - before


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of the ratios round by round: both of a round met the same machine."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def median(seconds: Sequence[float]) -> str:
    """The median as a person reads it."""
    value = statistics.median(seconds)
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": library_versions(),
        "commit": commit.stdout.strip() or None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, as `results/*.json` holds them, for a person."""
    lines = []
    for row in rows:
        bar, figure = row["bar"], row["figure"]
        lines.append(
            {
                "benchmark": row["what"],
                "baseline": row["baseline"],
                "ours": row["ours"],
                "result": "not measured" if figure is None else f"{figure:,.4g} {row['unit']}",
                "must be": "" if bar is None else f"{bar['relation']} {bar['value']:,g}",
                "": "" if bar is None or figure is None else "yes" if Bar(**bar).holds(figure) else "NO",
            }
        )
    return format_table(lines, list(lines[0]))


def main(
    script: str, measure: Callable[[bool], list[Row]], draw: Callable[[list[Row], Path], None] | None = None
) -> None:
    """The command line of a benchmark: measures, prints the table, writes the file, draws into its folder."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    given = parser.parse_args()
    measured = measure(given.quick)
    publish(script, measured, quick=given.quick, output=given.output)
    if draw is not None:
        draw(measured, given.output)


def publish(script: str, measured: Sequence[Row], *, quick: bool, output: Path) -> None:
    """Prints the table and writes `<output>/<name of the script>.json`."""
    name, rows = Path(script).stem, [asdict(row) for row in measured]
    output.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": quick, "machine": machine(), "rows": rows}
    (output / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(table(rows))
