"""Collectives for training. With a single process, each of them is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


def world_size() -> int:
    """Returns the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates the tensors `[n, ...]` of all processes, all of one shape and dtype, in the order of ranks."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # All-reduce and slice, because older releases of gloo have no reduce-scatter.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """Like `all_gather`, with gradients that flow back to the process of each part, summed over processes.

    If the loss of each process is the mean over its share of the global batch, `DistributedDataParallel`, which
    averages gradients, gives the gradient of the mean over the global batch. Every process must run the backward pass.
    """
    return tensor if world_size() == 1 else _AllGather.apply(tensor)


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Returns the mean of a floating-point tensor over processes, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def copy_from_main_process(model: nn.Module) -> None:
    """Copies the parameters and buffers of the main process to every process."""
    for tensor in model.state_dict().values() if world_size() > 1 else ():
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def on_main_process(work: Callable[[], T]) -> T:
    """Runs `work` on the main process. Every process must call it, and gets its result or raises its error."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _batchnorm_buffers(model: nn.Module) -> list[Tensor]:
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def read_batchnorm_buffers(model: nn.Module) -> Tensor:
    """Concatenates the running means and variances of all BatchNorms, float32 `[n]`."""
    buffers = [buffer.flatten().float() for buffer in _batchnorm_buffers(model)]
    return torch.cat(buffers) if buffers else torch.empty(0)


@torch.no_grad()
def write_batchnorm_buffers(model: nn.Module, values: Tensor) -> None:
    """Writes what `read_batchnorm_buffers` returned."""
    buffers = _batchnorm_buffers(model)
    for buffer, value in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))


def average_batchnorm_buffers(model: nn.Module) -> None:
    """Replaces the running means and variances of all BatchNorms by their mean over processes, in one collective.

    The mean of the variances ignores that the means of the processes differ, slightly: images are assigned at random.
    """
    values = read_batchnorm_buffers(model)
    if world_size() > 1 and len(values):
        write_batchnorm_buffers(model, all_reduce_mean(values))
