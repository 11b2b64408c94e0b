"""The criteria of DETR and Deformable DETR, made of this library's parts, equal those in transformers."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from setpred import HungarianLoss, matched_cross_entropy, matched_focal_loss, on_channels, pad_sets, sum_costs
from setpred.functional import box_cost, focal_cost, probability_cost

# [docs: detr
BOX, CLASS = slice(0, 4), slice(4, None)  # channels of an element
charged = sum_costs(
    on_channels("l1", BOX, weight=5.0 * 4),  # a mean over channels, which DETR adds up
    on_channels(partial(box_cost, fmt="cxcywh"), BOX, weight=2.0),
)
matched_by = sum_costs(charged, on_channels(probability_cost, CLASS))
box_loss = HungarianLoss(charged, matching_cost=matched_by, presence="none", average_over="batch")


def detr_loss(logits: Tensor, boxes: Tensor, target_boxes: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
    """Of all K layers, (K, B, N, ...), with padded targets (B, M, ...); the last class is "no object"."""
    pred, one_hot = torch.cat([boxes, logits], -1), F.one_hot(classes, logits.shape[-1])
    target = torch.cat([target_boxes, one_hot], -1)
    of_boxes, matching = box_loss(pred, target, target_mask=mask, return_matching=True)
    return len(logits) * (of_boxes + matched_cross_entropy(logits, classes, matching))  # the sum over layers


# docs]
focal_matched_by = sum_costs(charged, on_channels(focal_cost, CLASS, weight=2.0))
focal_box_loss = HungarianLoss(charged, matching_cost=focal_matched_by, presence="none", average_over="batch")


def deformable_detr_loss(logits: Tensor, boxes: Tensor, target_boxes: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
    """The same with focal loss: there is no class "no object"."""
    pred, one_hot = torch.cat([boxes, logits], -1), F.one_hot(classes, logits.shape[-1])
    target = torch.cat([target_boxes, one_hot], -1)
    of_boxes, matching = focal_box_loss(pred, target, target_mask=mask, return_matching=True)
    return len(logits) * (of_boxes + matched_focal_loss(logits, classes, matching))


LABELS = 5


def theirs(loss: Callable, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], class_cost: float) -> Tensor:
    config = SimpleNamespace(
        class_cost=class_cost,
        bbox_cost=5,
        giou_cost=2,
        num_labels=LABELS,
        eos_coefficient=0.1,
        focal_alpha=0.25,
        bbox_loss_coefficient=5,
        giou_loss_coefficient=2,
        auxiliary_loss=True,
        decoder_layers=len(logits),
    )
    total, parts, _ = loss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)
    assert len(parts) == 4 * len(logits)  # classes, both of the boxes, cardinality, of each layer
    return total


def compare(
    ours: Callable, loss: Callable, channels: int, class_cost: float, sizes: list[int], layers: int, seed: int
) -> None:
    torch.manual_seed(seed)
    queries, batch = 7, len(sizes)
    logits = torch.randn(layers, batch, queries, channels, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(layers, batch, queries, 4, dtype=torch.float64).mul(0.9).add(0.05).requires_grad_()
    targets = [torch.rand(size, 4, dtype=torch.float64).mul(0.9).add(0.05) for size in sizes]
    classes = [torch.randint(LABELS, (size,)) for size in sizes]
    labels = [{"class_labels": c, "boxes": t} for c, t in zip(classes, targets, strict=True)]
    padded, mask = pad_sets(targets)
    padded_classes = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, torch.cat(classes))
    actual = ours(logits, boxes, padded, padded_classes, mask)
    torch.set_default_dtype(torch.float64)  # theirs makes class weights of it
    try:
        expected = theirs(loss, logits, boxes, labels, class_cost)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert actual > 0
    gradients = (torch.autograd.grad(value, (logits, boxes), materialize_grads=True) for value in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


batches = given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4), layers=st.integers(1, 3), seed=st.integers(0, 2**31)
)


@batches
@example(sizes=[0], layers=3, seed=0)
@example(sizes=[0, 7, 0, 3], layers=3, seed=0)
def test_criterion_of_detr(sizes: list[int], layers: int, seed: int) -> None:
    compare(detr_loss, ForObjectDetectionLoss, LABELS + 1, 1.0, sizes, layers, seed)


@batches
@example(sizes=[0], layers=3, seed=0)
@example(sizes=[0, 7, 0, 3], layers=3, seed=0)
def test_criterion_of_deformable_detr(sizes: list[int], layers: int, seed: int) -> None:
    compare(deformable_detr_loss, DeformableDetrForObjectDetectionLoss, LABELS, 2.0, sizes, layers, seed)
