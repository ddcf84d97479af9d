"""A card for each method whose runs are lines in `results/`, into `model_cards/benchmarks/`.

    python benchmarks/cards.py

The weights of these runs were not kept, so what a card says comes from its lines (results, seeds) and from a trainer
that is made as theirs were and not trained (settings, views, data). A card has the runs of all seeds; data that are
drawn by the seed have no fingerprint.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fast_flags
from algorithms import BN_MOMENTUM, DATA, RESULTS, SETTINGS, read_rows, settings_of, trainer_of
from huggingface_hub import ModelCard

from ccssl_hf.algorithms import ALGORITHMS
from ccssl_hf.card.facts import run_facts
from ccssl_hf.card.model_card import CardFacts, render_card
from ccssl_hf.record import Provenance, Result

CARDS = Path(__file__).resolve().parents[1] / "model_cards" / "benchmarks"
MEASURED = {
    "validation_top1": ("top1", "validation"),
    "top1": ("top1", "test"),
    "auroc": ("auroc", "test_open"),
    "auroc_open_set": ("auroc_open_set", "test_open"),
    "precision": ("precision", "unlabeled"),
    "coverage": ("coverage", "unlabeled"),
}
"""A line's numbers as metric and split of a card. Where there is no split `test_open`, `test` has strangers itself."""


def methods(data: str, results: Path) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Name, script and lines of each method whose runs are reported; settings that were only tried are none."""
    rows = read_rows(results / f"algorithms_{data}.jsonl")
    for algorithm in ALGORITHMS:
        for ccssl in (False, True):
            settings = settings_of(data, algorithm, ccssl, {})
            yield f"{data}_{algorithm}{'_ccssl' * ccssl}", "algorithms.py", _runs(rows, settings)
    rows = read_rows(results / f"fast_flags_{data}.jsonl")
    for flag, changes in fast_flags.FLAGS.items():
        name = f"{data}_fast_flags_{flag.rpartition(' ')[2]}"
        yield name, "fast_flags.py", _runs(rows, fast_flags.settings_with(data, changes, None))


def _runs(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    found = [row for row in rows if row["settings"] == settings and not row["validation_only"]]
    return sorted(found, key=lambda row: row["seed"])


def card_of(name: str, script: str, rows: Sequence[dict[str, Any]], root: Path) -> ModelCard:
    """The card of runs that differ in their seed alone."""
    facts = [_facts(name, script, row, root) for row in rows]
    in_all = set.intersection(*(set(each.split_fingerprints.items()) for each in facts))
    seeds = ", ".join(str(row["seed"]) for row in rows)
    machines = " and ".join(dict.fromkeys(row["machine"] for row in rows))
    limits = (
        f"It was trained for {facts[0].steps} steps, to compare methods. Seeds {seeds}, on {machines}; "
        f"`python benchmarks/{script} --data {rows[0]['data']}` trains it again."
    )
    return render_card(
        replace(
            facts[0],
            seed=None,
            split_fingerprints=dict(each for each in facts[0].split_fingerprints.items() if each in in_all),
            results=[result for each in facts for result in each.results],
            limits=limits,
        )
    )


def _facts(name: str, script: str, row: dict[str, Any], root: Path) -> CardFacts:
    settings, data = row["settings"], row["data"]
    provenance = Provenance("EMA", settings["max_steps"], "last", row["seed"])
    with tempfile.TemporaryDirectory() as folder:
        trainer, splits = trainer_of(data, root, row["seed"], settings, folder=folder, callbacks=[])
        trainer.evaluated = {split: splits[split] for split in splits if split.startswith("test")}
        facts = run_facts(trainer, name)
    threshold = SETTINGS[data]["confidence_threshold"]
    results = [
        Result(
            metric=f"{metric}@{threshold}" if split == "unlabeled" else metric,
            value=row[key],
            split=split if split in splits else "test",
            provenance=provenance,
        )
        for key, (metric, split) in MEASURED.items()
        if row.get(key) is not None
    ]
    return replace(
        facts,
        steps=settings["max_steps"],
        optimization={**facts.optimization, "bn_momentum": BN_MOMENTUM},
        datasets={split: f"{data}, {split} split of {script}" for split in splits},
        versions={},  # of today, not of the runs
        published=None,
        results=results,
        weights_kept=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="folder that holds the image packs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines")
    parser.add_argument("--output", type=Path, default=CARDS, help="folder of the cards")
    given = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    given.output.mkdir(parents=True, exist_ok=True)
    for data in DATA:
        for name, script, rows in methods(data, given.results):
            if rows:
                card_of(name, script, rows, given.root).save(given.output / f"{name}.md")
                print(name, flush=True)


if __name__ == "__main__":
    main()
