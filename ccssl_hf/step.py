"""One training step: uint8 images to views, and views to the network's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .algorithms import SSLBatch
from .modeling import CCSSLOutput
from .sampling import LABELED, UNLABELED
from .transforms import View, ViewSettings, make_view, normalize


@torch.no_grad()
def make_views(
    inputs: Mapping[str, Any], views: Sequence[View], settings: ViewSettings, *, seed: int, cropped: bool
) -> list[Tensor]:
    """Makes the weak view of the labeled images, then each of `views` of the unlabeled images, normalised.

    `inputs` is a batch of `data.PairedDataset` on the device that makes the views. It holds whole images
    `[n, 3, S, S]`, or if `cropped` one crop for each view, `[n, views, 3, S, S]`, in the order of `views`.
    """
    wanted = [("labeled", LABELED, 0, View.WEAK)]
    if "unlabeled_images" in inputs:
        wanted += [("unlabeled", UNLABELED, position, view) for position, view in enumerate(views)]
    out = []
    for split, stream, position, view in wanted:
        images, draws = inputs[f"{split}_images"], torch.from_numpy(inputs[f"{split}_draws"])
        images = images[:, position] if cropped else images
        made = make_view(images, view, settings, seed=seed, stream=stream, draws=draws, cropped=cropped)
        out.append(normalize(made, settings, view=view))
    return out


def forward_views(
    network: nn.Module,
    views: Sequence[Tensor],
    inputs: Mapping[str, Tensor],
    *,
    with_embeddings: bool,
    weak_forward: Literal["joint", "separate"] = "joint",
) -> SSLBatch:
    """Runs the network, possibly wrapped by DDP or `torch.compile`, on the views that `make_views` made of `inputs`.

    `weak_forward` is "joint", one forward pass over all views, or "separate": the unlabeled weak views in their own
    pass without gradient. BatchNorm then normalises them separately.
    """

    def run(module: nn.Module, *chosen: Tensor) -> list[CCSSLOutput]:
        output = module(pixel_values=torch.cat(chosen), return_embeddings=with_embeddings)
        sizes = [len(view) for view in chosen]
        embeddings = [None] * len(sizes) if output.embeddings is None else output.embeddings.split(sizes)
        heads = {name: head.split(sizes) for name, head in (output.heads or {}).items()}
        return [
            CCSSLOutput(logits=part, embeddings=embeddings[i], heads={name: head[i] for name, head in heads.items()})
            for i, part in enumerate(output.logits.split(sizes))
        ]

    if len(views) == 1:
        return SSLBatch(run(network, *views)[0].logits, inputs["labels"])
    if weak_forward == "separate":
        with torch.no_grad():  # without DDP, which expects a backward pass after each forward pass
            [weak] = run(getattr(network, "module", network), views[1])
        labeled, strong, *contrast = run(network, views[0], *views[2:])
    else:
        labeled, weak, strong, *contrast = run(network, *views)
    heads = [each.heads or {} for each in (labeled, weak, strong)]
    return SSLBatch(
        logits_labeled=labeled.logits,
        labels=inputs["labels"],
        logits_weak=weak.logits,
        logits_strong=strong.logits,
        embeddings_labeled=labeled.embeddings,
        embeddings_weak=weak.embeddings,
        embeddings_strong=strong.embeddings,
        embeddings_contrast=contrast[0].embeddings if contrast else None,
        index=inputs["unlabeled_index"],
        heads={name: (heads[0][name], heads[1][name], heads[2][name]) for name in heads[0]} or None,
    )
