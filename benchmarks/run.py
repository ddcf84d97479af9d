"""Run the speed benchmarks one after the other, each in its own process, and print one table.

python benchmarks/run.py                  # all, as `make bench` does
python benchmarks/run.py step predict     # some
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import parser, table

HERE = Path(__file__).parent
BENCHMARKS = (
    *("step", "optimizer", "augmentation", "views_224", "contrastive"),
    *("start", "command", "predict", "serve", "cost"),
)


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(BENCHMARKS)}; default: all")
    given = flags.parse_args()
    rows, failed = [], []
    for name in given.names or BENCHMARKS:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(given.output)]
        if subprocess.run([*command, *["--quick"] * given.quick]).returncode:
            failed.append(name)
            continue
        rows += json.loads((given.output / f"{name}.json").read_text())["rows"]
    if rows:
        print(f"\n{table(rows)}")
    if failed:
        print(f"\nThese failed: {', '.join(failed)}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
