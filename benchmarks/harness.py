"""Timing, memory, command line and table of the speed benchmarks.

A benchmark is a script with `measure(quick) -> list[Row]` that ends with `harness.main(__file__, measure)`. It prints
its table and writes `results/<name>.json`. `run.py` runs all benchmarks, each in its own process.
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

from ccssl_hf.card.text import format_table
from ccssl_hf.record import library_versions

RESULTS = Path(__file__).parent / "results"
FASTER, SHARE = "times as fast", "x the baseline's time"
"""Units of a ratio of times."""

T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """The aim of a figure."""

    relation: Literal["≤", "≥"]
    value: float

    def holds(self, figure: float) -> bool:
        return figure <= self.value if self.relation == "≤" else figure >= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: What was measured, with its sizes.
        baseline: Median of the baseline with its unit, such as "2.31 s"; "" without a baseline.
        ours: Median of our implementation with its unit.
        figure: The result, such as a ratio of times; None if it was not measured.
        unit: Unit of the figure: `FASTER`, `SHARE`, "MiB", "views/s".
        bar: The aim of the figure; None if it has none.
        details: Kept in the JSON file: every time, sizes, settings.
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
    """Seconds of each call of each way, called in turn (A B C A B C …), so a drift of the machine affects all of them.

    Args:
        ways: Functions to time. The first is the baseline.
        rounds: Counted calls of each.
        warmup: Calls of each before these, not counted.
        clock: `time.perf_counter`, or `time.process_time` for processor time.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    gc.collect()
    gc.freeze()  # no collection has to visit the libraries' objects
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
    """Call `function(*args)` in a fresh process, forked from one that has only imported the package.

    The function must be defined at module level; its arguments and result must pickle.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ccssl_hf.trainer"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def resident(*kinds: str) -> float:
    """Sum of these kinds of this process's memory, as named in /proc/self/status, in MiB. Linux only."""
    status = Path("/proc/self/status").read_text()
    return sum(int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0]) for kind in kinds) / 1024


def rise_of_memory(call: Callable[[], Any]) -> float:
    """Peak of the resident memory that `call()` adds, in MiB, with pages of mapped files. Use a fresh process."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which is from the imports
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def rise_of_own_memory(call: Callable[[], Any]) -> float:
    """Peak of the memory that `call()` adds without pages of mapped files, in MiB.

    The system keeps no peak of this: a thread reads it every 2 ms.
    """
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
    """Median of the ratios of each round: both times of a round saw the machine in the same state."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def median(seconds: Sequence[float]) -> str:
    """The median in seconds or milliseconds."""
    value = statistics.median(seconds)
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def compared(
    what: str,
    baseline: Sequence[float],
    ours: Sequence[float],
    unit: str,
    bar: Bar | None = None,
    *,
    per_second: tuple[int, str] | None = None,
    **details: Any,
) -> Row:
    """A row of two ways that were timed in turn.

    Args:
        what: What was measured, with its sizes.
        baseline: Seconds of each round.
        ours: Seconds of each round.
        unit: `SHARE`: the figure is ours by baseline. Any other, such as `FASTER`: baseline by ours.
        bar: The aim of the figure.
        per_second: Things done in a round and their unit, such as `(64, "images/s")`, to show a rate instead of a time.
        details: Further entries of the JSON file.
    """

    def shown(seconds: Sequence[float]) -> str:
        if per_second is None:
            return median(seconds)
        rate = per_second[0] / statistics.median(seconds)
        return f"{rate:,.0f} {per_second[1]}" if rate >= 100 else f"{rate:.3g} {per_second[1]}"

    figure = ratio(ours, baseline) if unit == SHARE else ratio(baseline, ours)
    times = {"baseline_seconds": list(baseline), "seconds": list(ours)}
    return Row(what, shown(baseline), shown(ours), figure, unit, bar, {**times, **details})


def machine() -> dict[str, Any]:
    """Processor, threads, accelerator, versions and commit."""
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
    """The rows of `results/*.json` as a table."""
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


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags that every speed benchmark has."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("--quick", action="store_true", help="tiny sizes: only checks that the benchmark runs")
    flags.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    return flags


def main(
    script: str, measure: Callable[[bool], list[Row]], draw: Callable[[list[Row], Path], None] | None = None
) -> None:
    """The command line of a benchmark: measures, prints the table, writes the JSON file, draws into its folder."""
    given = parser().parse_args()
    measured = measure(given.quick)
    publish(script, measured, quick=given.quick, output=given.output)
    if draw is not None:
        draw(measured, given.output)


def publish(script: str, measured: Sequence[Row], *, quick: bool, output: Path) -> None:
    """Print the table and write `<output>/<name of the script>.json`."""
    name, rows = Path(script).stem, [asdict(row) for row in measured]
    output.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": quick, "machine": machine(), "rows": rows}
    (output / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(table(rows))
