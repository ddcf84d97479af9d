"""The benchmark of all algorithms, for two steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from conftest import SHARED, needs_shared

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "algorithms.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_algorithms", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def few(data: str, output: Path, *more: str) -> list[str]:
    return ["--data", data, "--root", str(SHARED / "data"), "--steps", "2", "--output", str(output), *more]


@needs_shared
@pytest.mark.parametrize(("data", "precision"), [("cifar10_mini", True), ("butterfly10_mini", False)])
def test_every_run_is_a_line_and_the_page_has_a_table_of_them(benchmark, data, precision, tmp_path):
    page = tmp_path / "algorithms.md"
    page.write_text(benchmark.NEW_PAGE + "\nWhat it means.\n")
    asked = few(data, tmp_path, "--algorithms", "iomatch", "--seeds", "0,1")
    benchmark.main([*asked, "--shard", "0/2"])
    benchmark.main([*asked, "--shard", "1/2"])
    rows = [json.loads(line) for line in (tmp_path / f"algorithms_{data}.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(0 <= row[name] <= 1 for row in rows for name in ("top1", "auroc", "auroc_open_set", "coverage"))
    assert {"precision" in row for row in rows} == {precision}
    text = page.read_text()
    assert text.endswith("What it means.\n") and f"## {data}" in text
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| iomatch")]
    assert [line[1].strip() for line in lines] == ["iomatch", "iomatch + CCSSL"]
    assert all(line[2].strip() == "2" and "±" in line[3] for line in lines)


@needs_shared
def test_a_finished_run_is_not_repeated(benchmark, tmp_path, monkeypatch):
    asked = few("butterfly10_mini", tmp_path, "--algorithms", "supervised", "--seeds", "0")
    benchmark.main(asked)
    before = (tmp_path / "algorithms_butterfly10_mini.jsonl").read_text()
    monkeypatch.delattr(benchmark, "run")
    benchmark.main(asked)
    assert (tmp_path / "algorithms_butterfly10_mini.jsonl").read_text() == before


@needs_shared
def test_no_image_is_both_trained_on_and_evaluated_with(benchmark):
    for data, load in benchmark.DATA.items():
        for seed in (0, 1, 2):
            known, splits = load(SHARED / "data", seed)
            pixels = {name: {row["image"].tobytes() for row in split} for name, split in splits.items()}
            assert not pixels["labeled"] & pixels["unlabeled"], data
            for held_out in ("validation", "test"):
                assert not pixels[held_out] & (pixels["labeled"] | pixels["unlabeled"]), (data, held_out)
            labels = splits["labeled"].features["label"]
            assert {labels.int2str(label) for label in splits["labeled"]["label"]} == set(known)


def test_a_missing_pack_is_named(benchmark, tmp_path):
    with pytest.raises(ValueError, match="pass the folder of the image packs as --root"):
        benchmark.main(["--data", "cifar10_mini", "--root", str(tmp_path), "--output", str(tmp_path)])


def test_only_settings_that_an_algorithm_has_are_passed(benchmark):
    for data in benchmark.DATA:
        supervised = benchmark.settings_of(data, "supervised", False, {})
        assert "confidence_threshold" not in supervised and supervised["lambda_contrast"] == 0
        assert benchmark.settings_of(data, "simmatch", True, {})["memory_batches"] == 8
