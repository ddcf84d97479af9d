"""Collectives for training. With a single process, each of them is the identity."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")
_LAUNCHERS = {"accelerate", "torchrun", "torch.distributed.run", "accelerate.commands.launch"}


def world_size() -> int:
    """Returns the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def launcher() -> psutil.Process | None:
    """The process of `accelerate launch` or `torchrun` that started this process, if one did."""
    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if any(Path(word).name in _LAUNCHERS for word in parent.cmdline()[:4]):
            return parent
    return None


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates the tensors `[n, ...]` of all processes, all of one shape and dtype, in the order of ranks."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def all_gather_json(item: Any, device: torch.device) -> list[Any]:
    """Returns what each process gave, in the order of ranks, as JSON reads it: no pickle is loaded."""
    if world_size() == 1:
        return [item]
    text = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
    sizes = all_gather(torch.tensor([len(text)], device=device)).tolist()
    parts = all_gather(F.pad(text, (0, max(sizes) - len(text))).to(device)[None]).cpu().numpy()
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


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


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _SynchronizedOnCPU(_BatchNorm):
    """BatchNorm over the images of all processes, in training. `torch.nn.SyncBatchNorm` raises on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        dimensions, shape = [0, *range(2, input.ndim)], (1, -1, *[1] * (input.ndim - 2))
        values = input.float()
        # The batches of all processes are equally large. Two passes: E[x^2] - E[x]^2 would lose digits.
        count = values.numel() // values.shape[1] * world_size()
        mean = _SumOverProcesses.apply(values.sum(dimensions)) / count
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dimensions)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), share)
            self.running_var.lerp_(variance.detach() * (count / max(1, count - 1)), share)
        output = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        output = output.to(input.dtype)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            output = getattr(self, name)(output) if hasattr(self, name) else output
        return output


def synchronize_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Makes every BatchNorm of `model` compute its statistics over all processes in training, with gradients.

    Parameters, buffers and their names stay. In eval mode and in a single process nothing changes.
    """
    if device.type != "cpu":
        convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _SynchronizedOnCPU):
            cls = type(module)
            module.__class__ = type(f"Synchronized{cls.__name__}", (_SynchronizedOnCPU, cls), {})


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
