"""One batch on its way through a step: uint8 images to views, views to the network's answers."""

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
    """The weak view of the labeled images, then each of `views` of the unlabeled ones, normalised, `[n, 3, S, S]`.

    Args:
        inputs: A batch of `data.PairedDataset`, on the device where the views are made.
        views: As the batch has them, if each has a crop of its own.
        settings: How views are made.
        seed: The run's seed.
        cropped: Whether images come as one crop for each view, `[n, views, 3, S, S]`, and not as `[n, 3, S, S]`.
    """
    wanted = [("labeled", LABELED, 0, View.WEAK)]
    if "unlabeled_images" in inputs:
        wanted += [("unlabeled", UNLABELED, position, view) for position, view in enumerate(views)]
    out = []
    for split, stream, position, view in wanted:
        images, draws = inputs[f"{split}_images"], torch.from_numpy(inputs[f"{split}_draws"])
        if cropped:
            images = images[:, position]
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
    """All views through the network, and its answers by name.

    Args:
        network: The model, or what DDP or a compiler made of it.
        views: From `make_views`.
        inputs: The batch they were made of.
        with_embeddings: Whether to compute the projection too.
        weak_forward: `joint`: one forward over all views. `separate`: the unlabeled weak views on their own, without
            gradient; BatchNorm then normalises them apart.
    """

    def run(module: nn.Module, chosen: Sequence[Tensor]) -> list[CCSSLOutput]:
        return _split(module(pixel_values=torch.cat(list(chosen)), return_embeddings=with_embeddings), chosen)

    if len(views) == 1:
        return SSLBatch(logits_labeled=run(network, views)[0].logits, labels=inputs["labels"])
    if weak_forward == "separate":
        with torch.no_grad():  # past DDP, which expects a backward after each forward
            [weak] = run(getattr(network, "module", network), views[1:2])
        labeled, strong, *contrast = run(network, [views[0], *views[2:]])
    else:
        labeled, weak, strong, *contrast = run(network, views)
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
        heads={
            name: (labeled.heads[name], weak.heads[name], strong.heads[name])  # type: ignore[index]
            for name in labeled.heads or {}
        }
        or None,
    )


def _split(output: CCSSLOutput, views: Sequence[Tensor]) -> list[CCSSLOutput]:
    """The answers for each of the concatenated views."""
    sizes = [len(view) for view in views]
    logits = output.logits.split(sizes)
    embeddings = [None] * len(sizes) if output.embeddings is None else output.embeddings.split(sizes)
    heads = {name: head.split(sizes) for name, head in (output.heads or {}).items()}
    return [
        CCSSLOutput(logits=logits[i], embeddings=embeddings[i], heads={name: part[i] for name, part in heads.items()})
        for i in range(len(sizes))
    ]
