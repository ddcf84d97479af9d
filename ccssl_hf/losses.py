"""Loss functions on tensors. Shapes: `N` images with two views each, `C` classes, `D` projection size."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .distributed import all_gather, all_gather_with_gradient, rank

OwnPairWeight = Literal["one", "squared"]  # of the two views of one image: 1, or the image's confidence squared
_CHUNK_ELEMENTS = 1 << 21  # similarities in memory: 8 MiB in float32, which fits CPU caches and 2 x 448 views
_LEAST_ROWS = 64  # of a chunk: matrix products with fewer rows are slower


def upcast(tensor: Tensor) -> Tensor:
    """Converts half precision to float32; other types stay."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def masked_cross_entropy(*, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy times `mask`, averaged over all `N` images, including masked ones: a scalar.

    `logits` are `[N, C]`, `targets` classes `[N]` or class probabilities `[N, C]`; `mask` is 0/1 or a weight, `[N]`.
    """
    return (F.cross_entropy(logits, targets, reduction="none") * mask).mean()


def class_aware_contrastive_loss(
    *,
    embeddings: Tensor,
    pseudo_labels: Tensor,
    confidences: Tensor,
    temperature: float = 0.07,
    push_threshold: float | None = None,
    own_pair_weight: OwnPairWeight = "one",
    gather: bool = False,
) -> Tensor:
    r"""Class-aware contrastive loss of CCSSL (https://arxiv.org/abs/2203.02261, equations 6 to 8).

    Images with the same pseudo label attract each other in proportion to both confidences. Every other image is its own
    class, as in SimCLR. Over the 2N views, with confidence q, pseudo label ŷ, temperature τ, unit vectors z:

        w_ij = 1[ŷ_i = ŷ_j] · q_i q_j · 1[q_i ≥ T_push] · 1[q_j ≥ T_push]    for views of different images
        w_ij = 1  (own_pair_weight="one")   or   q_i²  ("squared")           for the two views of one image
        L = −(τ / 0.07) · mean_i [ Σ_{j≠i} w_ij · log softmax_{k≠i}(z_i·z_k / τ)_j  /  Σ_{j≠i} w_ij ]

    The weight is outside the logarithm. Equation 8 prints it inside, a typo that the authors confirmed. The published
    numbers used `own_pair_weight="squared"`; the authors' current code uses "one".

    A view without positives (all weights zero: "squared" with confidence zero) adds 0 to the mean and still counts in
    it. The loss of a single image is 0. Time is O(N² D), memory O(N D). Computed in float32 or float64, also under
    autocast. Only `embeddings` get a gradient.

    Args:
        embeddings: The strong and the contrastive view, `[N, 2, D]`, of unit norm.
        pseudo_labels: Integers `[N]`.
        confidences: In [0, 1], `[N]`.
        push_threshold: T_push in [0, 1], the minimum confidence of an image that attracts others; None: no threshold.
        gather: Contrast with the images of all processes, each with the same `N`. Each process returns the mean over
            its own images; averaging gradients over processes gives the gradient of one process on the global batch.

    Raises:
        ValueError: A shape, a dtype or an option is not as described.
    """
    n = embeddings.shape[:1]
    views = embeddings.ndim == 3 and len(embeddings) > 0 and embeddings.shape[1] == 2 and embeddings.is_floating_point()
    integers = not pseudo_labels.is_floating_point() and pseudo_labels.dtype != torch.bool
    floats = confidences.is_floating_point()
    threshold = push_threshold is None or 0 <= push_threshold <= 1
    choices = get_args(OwnPairWeight)
    _require(views, "`embeddings` must be floating point [N, 2, D], N >= 1: stack two views along dim 1", embeddings)
    _require(integers and pseudo_labels.shape == n, f"`pseudo_labels` must be integers {list(n)}", pseudo_labels)
    _require(floats and confidences.shape == n, f"`confidences` must be floating point {list(n)}", confidences)
    _require(temperature > 0, "`temperature` must be above 0", temperature)
    _require(threshold, "`push_threshold` must be a confidence in [0, 1] or None", push_threshold)
    _require(own_pair_weight in choices, f"`own_pair_weight` must be one of {choices}", own_pair_weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        anchors, keys, confidences = upcast(embeddings), upcast(embeddings), upcast(confidences.detach())
        first = 0
        if gather:
            keys = all_gather_with_gradient(keys)
            pseudo_labels, confidences = all_gather(pseudo_labels), all_gather(confidences)
            first = rank() * len(anchors)
        attraction = confidences if push_threshold is None else confidences * (confidences >= push_threshold)
        own_pair = torch.ones_like(confidences) if own_pair_weight == "one" else confidences.square()
        positives, total_weight = _weighted_positives(
            anchors=anchors, keys=keys, labels=pseudo_labels, attraction=attraction, own_pair=own_pair, first=first
        )
        has_positive = total_weight > 0
        positives = torch.where(has_positive, positives / total_weight.where(has_positive, 1.0), 0.0)
        partition = _WeightedLogPartition.apply(
            anchors.flatten(0, 1) / temperature,
            keys.flatten(0, 1),
            has_positive.to(anchors.dtype).repeat_interleave(2),
            2 * first,
        )
        return (temperature / 0.07) * (partition - positives.sum() / temperature) / (2 * len(anchors))


def _require(fits: bool, message: str, got: Any) -> None:
    if not fits:
        shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise ValueError(f"{message}; got {shown}.")


def _weighted_positives(
    *, anchors: Tensor, keys: Tensor, labels: Tensor, attraction: Tensor, own_pair: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns Σ_j w_ij z_i·z_j, summed over the two views of each anchor, and Σ_j w_ij, the same for both; `[A]` each.

    No matrix of pairs is needed: Σ_j w_ij z_i·z_j = a_i z_i·S, where S sums a_j z_j over the class of i without i.
    Anchors `[A, 2, D]` are the images `first` to `first + A` of the keys `[N, 2, D]`. `attraction` a is the confidence,
    or 0 for an image that attracts no other image, `own_pair` the weight of the pair of views of one image; `[N]` each.
    """
    group = torch.searchsorted(labels.sort().values, labels)  # class → a number below N, without a device sync
    pull = keys.sum(1) * attraction[:, None]
    class_pull = torch.zeros_like(pull).index_add(0, group, pull)
    class_attraction = torch.zeros_like(attraction).index_add(0, group, attraction)

    own = slice(first, first + len(anchors))
    group, attraction, own_pair = group[own], attraction[own], own_pair[own]
    others = class_pull.index_select(0, group) - pull[own]
    others_attraction = 2 * (class_attraction[group] - attraction)
    positives = attraction * (anchors.sum(1) * others).sum(1) + 2 * own_pair * (anchors[:, 0] * anchors[:, 1]).sum(1)
    return positives, attraction * others_attraction + own_pair


class _WeightedLogPartition(torch.autograd.Function):
    """Σ_i c_i log Σ_{k≠i} exp(x_i·y_k): a scalar, from anchors x `[A, D]`, keys y `[K, D]` and weights c `[A]`.

    Anchor i is key `first + i`. Only one chunk of rows of the similarities is in memory. The gradient is a multiple of
    the incoming scalar gradient, so forward computes it while it has the exponentials of a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, keys: Tensor, weights: Tensor, first: int, chunk_rows: int | None = None
    ) -> Tensor:
        rows = min(len(anchors), chunk_rows or max(_LEAST_ROWS, _CHUNK_ELEMENTS // len(keys)))
        buffer = anchors.new_empty(rows, len(keys))
        log_sums = torch.empty_like(weights)
        # The keys' gradient is kept transposed, so that its product runs along the rows of a chunk.
        grads = (torch.empty_like(anchors), keys.new_zeros(keys.shape[::-1])) if any(ctx.needs_input_grad) else None
        for start in range(0, len(anchors), rows):
            chunk = slice(start, start + rows)
            x = anchors[chunk]
            similarities = torch.mm(x, keys.T, out=buffer[: len(x)])
            similarities.diagonal(first + start).fill_(-torch.inf)
            largest = similarities.amax(1, keepdim=True)
            exponentials = similarities.sub_(largest).exp_()
            sums = exponentials.sum(1, keepdim=True)
            log_sums[chunk] = (largest + sums.log()).squeeze(1)
            if grads is not None:  # scale the smaller factor, [rows, D], not the similarities
                scale = weights[chunk, None] / sums
                torch.mm(exponentials, keys, out=grads[0][chunk]).mul_(scale)
                grads[1].addmm_((x * scale).T, exponentials)
        ctx.save_for_backward(*(grads or ()))
        return weights @ log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_anchors, grad_keys = ctx.saved_tensors
        return grad * grad_anchors, (grad * grad_keys).T, None, None, None
