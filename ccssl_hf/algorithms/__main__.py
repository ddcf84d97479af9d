"""Writes the table of algorithms into a Markdown file, between its two `algorithms` comments.

python -m ccssl_hf.algorithms README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..card.plots import format_table
from . import algorithm_hyperparameters, algorithm_table

SECTION = re.compile(r"(<!-- algorithms.*?-->\n).*?(<!-- /algorithms -->)", re.DOTALL)


def markdown_table() -> str:
    """One row for each registered algorithm; what all of them have, CCSSL's own hyperparameters, is left out."""
    shared = algorithm_hyperparameters("supervised")
    rows = [
        {
            "`algorithm`": f"`{row['algorithm']}`",
            "paper": f"[{row['paper']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else "labels only",
            "terms": ", ".join(f"`{term}`" for term in row["terms"]),
            "hyperparameters": ", ".join(f"`{k}` {v}" for k, v in row["hyperparameters"].items() if k not in shared),
            "views of an unlabeled image": ", ".join(row["views"]) or "none",
        }
        for row in algorithm_table()
    ]
    return format_table(rows, list(rows[0]), markdown=True)


def with_table(text: str) -> str:
    """`text` with today's table in its section."""
    return SECTION.sub(lambda match: f"{match[1]}\n{markdown_table()}\n\n{match[2]}", text)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
