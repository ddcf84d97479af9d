"""The few collectives that training needs. Every one of them is the identity where there is a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def world_size() -> int:
    """How many processes train together; 1 where no process group was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """The processes' tensors one after the other, without gradient.

    Args:
        tensor: `[n, ...]`, of one shape and dtype on every process.

    Returns:
        `[world_size * n, ...]`, in the order of the ranks.
    """
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    """Forward: `all_gather`. Backward: what all processes' losses send to this process's part, summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # An all-reduce and a slice rather than a reduce-scatter, which gloo lacks in older releases.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """Like `all_gather`, but a gradient with respect to any process's part flows back to that process.

    The gradients are summed over the processes. So where each process's loss is the mean over its own share of the
    global batch, the averaging of gradients in `DistributedDataParallel` gives the gradient of the mean over the global
    batch. Every process must run the backward pass.
    """
    return tensor if world_size() == 1 else _AllGather.apply(tensor)


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of a floating point tensor over the processes, as a new tensor without gradient."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def copy_from_main_process(model: nn.Module) -> None:
    """Gives every process the main process's parameters and buffers."""
    if world_size() == 1:
        return
    for tensor in model.state_dict().values():
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def _batchnorm_buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


def read_batchnorm_buffers(model: nn.Module) -> Tensor:
    """BatchNorm's running means and variances, one after the other, `[n]` in float32."""
    buffers = _batchnorm_buffers(model)
    return torch.cat([buffer.detach().flatten().float() for buffer in buffers]) if buffers else torch.empty(0)


@torch.no_grad()
def write_batchnorm_buffers(model: nn.Module, values: Tensor) -> None:
    """The inverse of `read_batchnorm_buffers`."""
    buffers = _batchnorm_buffers(model)
    for buffer, value in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))


@torch.no_grad()
def average_batchnorm_buffers(model: nn.Module) -> None:
    """Replaces BatchNorm's running mean and variance by their mean over the processes, in one collective.

    Each process tracks them on its own images; without this, what is evaluated and saved is the main process's alone.
    The mean of the variances leaves out how far the processes' means are apart:
    little where images are dealt out at random.
    """
    values = read_batchnorm_buffers(model)
    if world_size() > 1 and len(values):
        write_batchnorm_buffers(model, all_reduce_mean(values))
