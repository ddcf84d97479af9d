"""The optimizer step and the EMA update of Wide ResNet 28-2 against loops over its tensors.

The loops follow the definitions: SGD with Nesterov momentum and weight decay, and a moving average of the weights with
copied buffers, one tensor after the other. Ours is what `CCSSLTrainer` calls. Gradients are computed beforehand.

`--quick` uses Wide ResNet 10-1 and three rounds.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from harness import FASTER, Bar, Row, compared, in_turn, main
from torch import nn
from transformers import set_seed
from workload import LABELS

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.ema import WeightAverage
from ccssl_hf.optimization import decayed_parameter_names

RATE, MOMENTUM, WEIGHT_DECAY, EMA_DECAY = 0.03, 0.9, 1e-3, 0.999


class Loops:
    """The definitions, tensor by tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.average = model, copy.deepcopy(model)
        self.decayed = set(decayed_parameter_names(model))
        self.velocity = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}

    @torch.no_grad()
    def optimizer_step(self) -> None:
        for name, weight in self.model.named_parameters():
            if weight.grad is not None:
                gradient = weight.grad + (WEIGHT_DECAY * weight if name in self.decayed else 0.0)
                self.velocity[name] = MOMENTUM * self.velocity[name] + gradient
                weight -= RATE * (gradient + MOMENTUM * self.velocity[name])

    @torch.no_grad()
    def update_average(self) -> None:
        for averaged, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            averaged.copy_(EMA_DECAY * averaged + (1 - EMA_DECAY) * weight)
        for averaged, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            averaged.copy_(buffer)


def ours(model: nn.Module) -> tuple[torch.optim.Optimizer, WeightAverage]:
    """The optimizer and the average of `CCSSLTrainer` with its default arguments."""
    with tempfile.TemporaryDirectory() as folder:
        args = CCSSLTrainingArguments(folder, use_cpu=True)
    kind, kwargs = CCSSLTrainer.get_optimizer_cls_and_kwargs(args, model)
    decayed = set(decayed_parameter_names(model))
    groups = [
        {"params": [w for name, w in model.named_parameters() if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    return kind(groups, **kwargs), WeightAverage(model, args.ema_decay)


def measure(quick: bool) -> list[Row]:
    set_seed(0)
    backbone = f"wide_resnet{'10_1' if quick else '28_2'}_cifar"
    model = CCSSLForImageClassification.from_timm(backbone, labels=LABELS)
    naive = Loops(copy.deepcopy(model))
    optimizer, average = ours(model)
    for (_, own), (_, other) in zip(model.named_parameters(), naive.model.named_parameters(), strict=True):
        if own.requires_grad:
            own.grad = 1e-3 * torch.randn_like(own)
            other.grad = own.grad.clone()
    seconds = in_turn(
        naive.optimizer_step,
        optimizer.step,
        naive.update_average,
        average.update,
        rounds=3 if quick else 60,
        warmup=1 if quick else 5,
    )
    for left, right in ((model, naive.model), (average.module, naive.average)):
        torch.testing.assert_close(left.state_dict(), right.state_dict())  # both computed the same
    sgd_loop, sgd, ema_loop, ema = seconds
    loops, both = ([a + b for a, b in zip(*pair, strict=True)] for pair in ((sgd_loop, ema_loop), (sgd, ema)))
    return [
        compared(f"{what}, {backbone}", slow, fast, FASTER, bar)
        for what, slow, fast, bar in (
            ("SGD step", sgd_loop, sgd, None),
            ("EMA update", ema_loop, ema, None),
            ("SGD step and EMA update", loops, both, Bar("≥", 3)),
        )
    ]


if __name__ == "__main__":
    main(__file__, measure)
