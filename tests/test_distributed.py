"""Two processes against one process on the global batch: values and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ccssl_hf.algorithms import SSLBatch, build_algorithm
from ccssl_hf.distributed import (
    all_gather,
    all_gather_with_gradient,
    all_reduce_mean,
    average_batchnorm_buffers,
    rank,
    synchronize_batchnorm,
    world_size,
)
from ccssl_hf.losses import class_aware_contrastive_loss
from ccssl_hf.optimization import decayed_parameter_names

WORLD, LABELED, UNLABELED, CLASSES, STEPS = 2, 2, 6, 4, 3  # batch sizes are those of one process


class Network(nn.Module):
    """Two heads on the input, with one forward pass over all views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier, self.projection = nn.Linear(10, CLASSES), nn.Linear(10, 6)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * self.classifier(inputs), F.normalize(self.projection(inputs), dim=1)


def loss_of(model: nn.Module, algorithm: nn.Module, step: int, process: int, processes: int) -> Any:
    """The loss on the share of one process of a fixed global batch."""
    generator = torch.Generator().manual_seed(step)
    share = slice(process * WORLD // processes, (process + 1) * WORLD // processes)
    labeled = torch.randn(WORLD, LABELED, 10, generator=generator)[share].flatten(0, 1)
    labels = torch.randint(CLASSES, (WORLD, LABELED), generator=generator)[share].flatten()
    views = torch.randn(3, WORLD, UNLABELED, 10, generator=generator)[:, share].flatten(0, 2)
    logits, embeddings = model(torch.cat([labeled, views]))
    (logits_labeled, *logits_views), count = logits.split([len(labels)] + 3 * [len(views) // 3]), len(views) // 3
    return algorithm(
        SSLBatch(
            logits_labeled=logits_labeled,
            labels=labels,
            logits_weak=logits_views[0],
            logits_strong=logits_views[1],
            embeddings_strong=embeddings[-2 * count : -count],
            embeddings_contrast=embeddings[-count:],
        )
    )


def train(process: int, processes: int) -> dict[str, Any]:
    """Losses, gradients of the last step, and the algorithm's state after a few steps of SGD."""
    network = Network()
    model = nn.parallel.DistributedDataParallel(network) if processes > 1 else network
    options: Any = {"confidence_threshold": 0.6, "push_threshold": 0.5, "distribution_alignment_window": 2}
    algorithm = build_algorithm(
        "fixmatch", num_classes=CLASSES, lambda_contrast=1.0, own_pair_weight="squared", **options
    )
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        result = loss_of(model, algorithm, step, process, processes)
        result.loss.backward()
        optimizer.step()
        losses.append(torch.stack([result.loss.detach(), *result.terms.values()]))
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"losses": torch.stack(losses), "gradients": gradients, "state": algorithm.state_dict()}


def batchnorm_step(rows: Tensor) -> dict[str, Tensor]:
    """Two synchronized BatchNorms (one of them with timm's activation) on some rows of a fixed batch of eight."""
    torch.manual_seed(0)
    images, weights = 3 + 2 * torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    norms = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), BatchNormAct2d(3, act_layer=nn.Tanh), nn.Flatten(2))
    norms[1].weight.data.uniform_()
    synchronize_batchnorm(norms, torch.device("cpu"))
    own = images[rows].requires_grad_()
    output = norms(own)
    (output * weights[rows].flatten(2)).sum(1).mean().backward()
    assert own.grad is not None
    gradients = {f"gradient.{name}": p.grad for name, p in norms.named_parameters() if p.grad is not None}
    evaluated = norms.eval()(images)
    return {
        "output": output.detach(),
        "input": own.grad,
        "evaluated": evaluated.detach(),
        **gradients,
        **norms.state_dict(),
    }


def worker(process: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=process, world_size=WORLD)
    mine = torch.full((2, 3), float(process + 1)).requires_grad_()
    gathered = all_gather_with_gradient(mine)
    # Process p weights its loss by p + 1. Each part must get the gradients of both.
    ((process + 1) * (gathered * torch.arange(4.0)[:, None]).sum()).backward()
    norm = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3, track_running_stats=False))
    norm[0].running_mean.fill_(process)
    norm[0].running_var.fill_(1 + 2 * process)
    average_batchnorm_buffers(norm)
    synced = batchnorm_step(torch.arange(process, 8, WORLD))
    found = {
        "synced": synced,
        "world": (world_size(), rank()),
        "gathered": gathered.detach(),
        "gathered_integers": all_gather(torch.tensor([process, 7])),
        "gradient": mine.grad,
        "mean": all_reduce_mean(torch.tensor([1.0, process])),
        "norm": {name: buffer.clone() for name, buffer in norm.named_buffers()},
        **train(process, WORLD),
    }
    torch.save(found, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of the two processes."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)  # type: ignore[no-untyped-call]
    results = [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(WORLD)]
    assert [result["world"] for result in results] == [(WORLD, process) for process in range(WORLD)]
    return results


def test_gather_keeps_the_order_of_ranks_and_sums_gradients(found: list[dict[str, Any]]) -> None:
    for process, result in enumerate(found):
        assert result["gathered"].tolist() == 2 * [[1.0] * 3] + 2 * [[2.0] * 3]
        assert result["gathered_integers"].tolist() == [0, 7, 1, 7]
        rows = torch.arange(4.0)[2 * process : 2 * process + 2, None].expand(2, 3)
        assert torch.equal(result["gradient"], (1 + 2) * rows)


def test_means_over_processes(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["mean"].tolist() == [1.0, 0.5]
        assert result["norm"]["0.running_mean"].tolist() == [0.5, 0.5]
        assert result["norm"]["0.running_var"].tolist() == [2.0, 2.0]


def test_two_processes_train_as_one_on_the_global_batch(found: list[dict[str, Any]]) -> None:
    expected = train(0, 1)
    assert expected["losses"].isfinite().all() and expected["losses"].min() > 0
    torch.testing.assert_close(sum(result["losses"] for result in found) / WORLD, expected["losses"])
    for result in found:
        torch.testing.assert_close(result["gradients"], expected["gradients"])
        torch.testing.assert_close(result["state"], expected["state"])


def test_synchronized_batchnorm_is_batchnorm_over_the_global_batch(found: list[dict[str, Any]]) -> None:
    expected = batchnorm_step(torch.arange(8))
    assert set(expected) >= {"0.running_mean", "1.weight", "gradient.1.bias"}  # plain names
    for process, result in enumerate(found):
        mine = result["synced"]
        rows = torch.arange(process, 8, WORLD)
        torch.testing.assert_close(mine["output"], expected["output"][rows])
        torch.testing.assert_close(mine["input"] / WORLD, expected["input"][rows], rtol=1e-4, atol=1e-6)
        for name in ("evaluated", "0.running_mean", "0.running_var", "1.running_var", "0.num_batches_tracked"):
            torch.testing.assert_close(mine[name], expected[name])
    for name in (name for name in expected if name.startswith("gradient")):  # DDP averages them
        mean = sum(result["synced"][name] for result in found) / WORLD
        torch.testing.assert_close(mean, expected[name], rtol=1e-4, atol=1e-6)


def test_a_synchronized_model_is_the_same_model() -> None:
    from ccssl_hf import CCSSLForImageClassification

    model = CCSSLForImageClassification.from_timm("test_resnet", labels=["a", "b"]).eval()
    before, images = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    synchronize_batchnorm(model, torch.device("cpu"))
    synchronize_batchnorm(model, torch.device("cpu"))  # a second trainer of the same model
    assert model.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(model(images).logits, before(images).logits)
    assert torch.equal(copy.deepcopy(model)(images).logits, before(images).logits)
    assert decayed_parameter_names(model) == decayed_parameter_names(before)
    assert torch.equal(model.train()(images).logits, before.train()(images).logits)  # one process


def test_alone_everything_is_the_identity() -> None:
    tensor = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert all_gather_with_gradient(tensor) is tensor
    for value in (all_gather(tensor), all_reduce_mean(tensor)):
        assert torch.equal(value, tensor) and not value.requires_grad
    norm = nn.BatchNorm1d(2)
    average_batchnorm_buffers(norm)
    assert norm.running_var is not None and norm.running_var.tolist() == [1.0, 1.0]


def test_gathering_alone_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "embeddings": F.normalize(torch.randn(5, 2, 4, generator=generator), dim=-1).requires_grad_(),
        "pseudo_labels": torch.tensor([0, 1, 0, 1, 2]),
        "confidences": torch.rand(5, generator=generator),
    }
    losses = [class_aware_contrastive_loss(**inputs, gather=gather) for gather in (True, False)]
    gradients = [torch.autograd.grad(loss, inputs["embeddings"])[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)
