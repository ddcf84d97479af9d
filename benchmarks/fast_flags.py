"""What the flags that make a step faster cost in accuracy: FixMatch + CCSSL with each, against the defaults.

    python benchmarks/fast_flags.py --data cifar10_mini            # seeds 0, 1 and 2

Data, settings and files are those of algorithms.py: a finished run is a line in results/fast_flags_<data>.jsonl, and is
not run again; results/fast_flags.md is written from these lines.
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

from ccssl_hf.card.tables import format_table

NEW_PAGE = """# What the fast flags cost in accuracy

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
    """One seed of everything after the other, so that a drift of the machine's speed meets all of them."""
    return [
        {"data": options.data, "seed": seed, "settings": settings, "validation_only": False}
        for seed in options.seeds
        for settings in (settings_with(options.data, flags, options.steps) for flags in FLAGS.values())
    ]


def section(data: str, rows: Sequence[dict[str, Any]], steps: int | None) -> str:
    """A line for each flag: one value for each seed, and its difference from the defaults seed by seed."""
    runs = {
        name: {row["seed"]: row for row in rows if row["settings"] == settings_with(data, flags, steps)}
        for name, flags in FLAGS.items()
    }
    default = runs["defaults"]
    lines = []
    for name, mine in runs.items():
        if not mine:  # not run yet
            continue
        pairs = [(row, default[seed]) for seed, row in mine.items() if seed in default and name != "defaults"]
        lines.append(
            {
                "flag": name,
                "seeds": len(mine),
                "top-1": [row["top1"] for row in mine.values()],
                "adds to top-1": [row["top1"] - other["top1"] for row, other in pairs] or None,
                "seed by seed": ", ".join(f"{row['top1'] - other['top1']:+.3f}" for row, other in pairs),
                "CPU seconds a step": [row["seconds_per_step"] for row in mine.values()],
                "x the defaults' time": [row["seconds_per_step"] / other["seconds_per_step"] for row, other in pairs]
                or None,
            }
        )
    parts = [
        f"## {data}",
        f"`{BACKBONE}` at {IMAGE_SIZES[data]} px, {steps or SETTINGS[data]['max_steps']} steps, FixMatch + CCSSL with "
        "the settings of [algorithms.md](algorithms.md). Test split, EMA weights, last step; mean ± standard deviation "
        f"over seeds. Processor times of {rows[-1]['machine']}.",
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
