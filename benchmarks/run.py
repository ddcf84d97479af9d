"""All speed benchmarks, one after the other, each in a process of its own: one table at the end.

python benchmarks/run.py                  # all, as `make bench` does
python benchmarks/run.py step ema         # some
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from harness import RESULTS, table

HERE = Path(__file__).parent
BENCHMARKS = ("step", "optimizer", "augmentation", "views_224", "contrastive", "start", "predict", "serve", "cost")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that they run, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    given = parser.parse_args()
    rows, failed = [], []
    for name in given.names or BENCHMARKS:
        print(f"\n== {name}", flush=True)
        flags = ["--output", str(given.output), *(["--quick"] if given.quick else [])]
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *flags]).returncode:
            failed.append(name)
            continue
        rows += json.loads((given.output / f"{name}.json").read_text())["rows"]
    if rows:
        print(f"\n{table(rows)}")
    if failed:
        print(f"\nThese ended in an error: {', '.join(failed)}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
