"""Accuracy of FixMatch + CCSSL with each flag that makes a step faster, compared with the defaults.

    python benchmarks/fast_flags.py --data cifar10_mini            # seeds 0, 1 and 2

Data and settings are those of algorithms.py. A finished run is a line in results/fast_flags_<data>.jsonl and is not
repeated. The tables in results/fast_flags.md are written from these lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from algorithms import (
    BACKBONE,
    DATA,
    IMAGE_SIZES,
    SETTINGS,
    parser_of_runs,
    read_rows,
    run_missing,
    settings_of,
    write_tables,
)

from ccssl_hf.card.text import format_table

NEW_PAGE = """# Accuracy with the fast flags

<!-- tables: written by benchmarks/fast_flags.py -->
<!-- /tables -->
"""
FLAGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weak_forward: separate": {"weak_forward": "separate"},
    "bf16": {"bf16": True},
}


def settings_with(data: str, flags: dict[str, Any], steps: int | None) -> dict[str, Any]:
    return settings_of(data, "fixmatch", True, {**flags, **({"max_steps": steps} if steps else {})})


def planned(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of a seed before those of the next seed, so a drift of the machine's speed affects all flags."""
    return [
        {"data": options.data, "seed": seed, "settings": settings, "validation_only": False}
        for seed in options.seeds
        for settings in (settings_with(options.data, flags, options.steps) for flags in FLAGS.values())
    ]


def section(data: str, rows: Sequence[dict[str, Any]], steps: int | None) -> str:
    """A row for each flag, with its differences from the defaults for each seed."""
    runs = {
        name: {row["seed"]: row for row in rows if row["settings"] == settings_with(data, flags, steps)}
        for name, flags in FLAGS.items()
    }
    default, lines = runs["defaults"], []
    for name, mine in runs.items():
        if not mine:  # not run yet
            continue
        pairs = [(row, default[seed]) for seed, row in mine.items() if seed in default and name != "defaults"]
        changes = [row["top1"] - other["top1"] for row, other in pairs]
        times = [row["seconds_per_step"] / other["seconds_per_step"] for row, other in pairs]
        lines.append(
            {
                "flag": name,
                "seeds": len(mine),
                "Top-1 accuracy": [row["top1"] for row in mine.values()],
                "change": changes or None,
                "change of each seed": ", ".join(f"{change:+.3f}" for change in changes),
                "CPU seconds a step": [row["seconds_per_step"] for row in mine.values()],
                "x the defaults' time": times or None,
            }
        )
    parts = [
        f"## {data}",
        f"`{BACKBONE}` at {IMAGE_SIZES[data]} px, {steps or SETTINGS[data]['max_steps']} steps, FixMatch + CCSSL with "
        "the settings of [algorithms.md](algorithms.md). Test split, EMA weights, last step; mean ± standard deviation "
        f"over seeds. Times are processor times of {rows[-1]['machine']}.",
        format_table(lines, list(lines[0]), markdown=True),
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser_of_runs(__doc__).parse_args(arguments)
    file = options.output / f"fast_flags_{options.data}.jsonl"
    run_missing(planned(options), file, root=options.root, threads=options.threads)
    rows = {data: read_rows(options.output / f"fast_flags_{data}.jsonl") for data in DATA}
    tables = [section(data, mine, options.steps) for data, mine in rows.items() if mine]
    write_tables(options.output / "fast_flags.md", "\n\n".join(tables), new_page=NEW_PAGE)


if __name__ == "__main__":
    main()
