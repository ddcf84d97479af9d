"""Two processes against one process on the global batch: state, losses and gradients of every algorithm."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ccssl_hf.algorithms import ALGORITHMS, SSLBatch, algorithm_hyperparameters
from test_algorithms import build, make_batch

WORLD, STEPS = 2, 6
OPTIONS = {
    "lambda_contrast": 1.0,
    "lambda_fairness": 1.0,
    "confidence_threshold": 0.7,
    "distribution_alignment_window": 2,
    "memory_batches": 2,
    "graph_threshold": 0.3,
    "momentum": 0.5,
}
RUNS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ALGORITHMS] + [("freematch", {"use_quantile": True})]


def share(batch: SSLBatch, process: int, processes: int) -> SSLBatch:
    """The part of each tensor that belongs to one process, as leaves."""

    def part(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuple(map(part, parts)) for name, parts in value.items()}
        mine = value.detach().chunk(processes)[process].clone()
        return mine.requires_grad_(mine.is_floating_point())

    return replace(batch, **{item.name: part(getattr(batch, item.name)) for item in fields(batch)})


def gradients(batch: SSLBatch) -> dict[str, Tensor]:
    leaves = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for name, parts in (batch.heads or {}).items():
        leaves |= {f"{name}.{number}": part for number, part in enumerate(parts)}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run(name: str, more: dict[str, Any], process: int, processes: int) -> dict[str, Any]:
    known = algorithm_hyperparameters(name)
    algorithm = build(name, **{key: value for key, value in OPTIONS.items() if key in known}, **more)
    found: dict[str, Any] = {"terms": [], "gradients": [], "masks": []}
    for step in range(STEPS):
        batch = share(make_batch(step), process, processes)
        result = algorithm(batch)
        result.loss.backward()
        found["terms"].append(torch.stack([result.loss.detach(), *result.terms.values()]))
        found["gradients"].append(gradients(batch))
        found["masks"].append(result.mask if result.mask is not None else torch.zeros(0))
    return {**found, "state": {key: value.clone() for key, value in algorithm.state_dict().items()}}


def worker(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=process, world_size=WORLD)
    torch.save([run(name, more, process, WORLD) for name, more in RUNS], f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Results of the two processes for each run."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(WORLD)]


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[" ".join([name, *more]) for name, more in RUNS])
def test_two_processes_learn_as_one_on_the_global_batch(found: list[list[dict[str, Any]]], number: int) -> None:
    name, more = RUNS[number]
    results, expected = [process[number] for process in found], run(name, more, 0, 1)
    assert results[0]["state"].keys() == results[1]["state"].keys()
    for key, value in results[0]["state"].items():
        assert torch.equal(value, results[1]["state"][key]), f"{key} differs between the processes"
    torch.testing.assert_close(results[0]["state"], expected["state"])
    for step in range(STEPS):
        terms = sum(result["terms"][step] for result in results) / WORLD
        torch.testing.assert_close(terms, expected["terms"][step])
        torch.testing.assert_close(torch.cat([result["masks"][step] for result in results]), expected["masks"][step])
        for leaf, gradient in expected["gradients"][step].items():
            # DistributedDataParallel divides by the number of processes.
            mine = torch.cat([result["gradients"][step][leaf] for result in results]) / WORLD
            torch.testing.assert_close(mine, gradient)
