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
    """Makes the weak view of the labeled images, then each of `views` of the unlabeled images.

    Args:
        inputs: A batch of `data.PairedDataset`, on the device that makes the views.
        views: The views of the unlabeled images, in the order of the batch's crops.
        settings: The settings of the views.
        seed: The run's seed.
        cropped: Whether the batch holds one crop for each view, `[n, views, 3, S, S]`, not whole images `[n, 3, S, S]`.

    Returns:
        One normalised batch `[n, 3, S, S]` for each view.
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
    """Runs the network on all views.

    Args:
        network: The model, possibly wrapped by DDP or `torch.compile`.
        views: From `make_views`.
        inputs: The batch that the views were made from.
        with_embeddings: Whether to compute the embeddings.
        weak_forward: "joint": one forward pass over all views. "separate": the unlabeled weak views in their own pass
            without gradient; BatchNorm then normalises them separately.
    """

    def run(module: nn.Module, chosen: Sequence[Tensor]) -> list[CCSSLOutput]:
        output = module(pixel_values=torch.cat(list(chosen)), return_embeddings=with_embeddings)
        sizes = [len(view) for view in chosen]
        embeddings = [None] * len(sizes) if output.embeddings is None else output.embeddings.split(sizes)
        heads = {name: head.split(sizes) for name, head in (output.heads or {}).items()}
        return [
            CCSSLOutput(logits=part, embeddings=embeddings[i], heads={name: head[i] for name, head in heads.items()})
            for i, part in enumerate(output.logits.split(sizes))
        ]

    if len(views) == 1:
        return SSLBatch(logits_labeled=run(network, views)[0].logits, labels=inputs["labels"])
    if weak_forward == "separate":
        with torch.no_grad():  # without DDP, which expects a backward pass after each forward pass
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
