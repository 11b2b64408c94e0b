"""Class-specific numbering: each element of a multiset of classes, with its number among those of its class."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batches import Batch
from setpred import hungarian_loss, on_channels, sum_costs
from setpred.functional import cross_entropy_cost
from setpred.functional.pairwise import Cost

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of elements, target, and the masks of both


def draw_numbered(count: int, size: int, classes: int, generator: torch.Generator) -> Batch:
    """Multisets of independent classes; elements (count, size, size + classes) are a number and a class, one-hot."""
    drawn = F.one_hot(torch.randint(classes, (count, size), generator=generator), classes)
    numbers = (drawn.cumsum(1) * drawn).sum(-1) - 1
    elements = torch.cat([F.one_hot(numbers, size), drawn], -1).float()
    return Batch(elements, torch.ones(count, size, dtype=torch.bool))


def given_classes_loss(cost: Cost) -> Loss:
    """Make the loss of numbers for elements of known classes: a cost of numbers, under the best matching of a class."""

    def loss(elements: Tensor, target: Tensor, mask: Tensor, target_mask: Tensor) -> Tensor:
        numbers, classes = channels(target)
        apart = on_channels("l1", classes, weight=1e4)  # those of other classes are never matched
        pairs = sum_costs(on_channels(cost, numbers), apart)
        return hungarian_loss(elements, target, target_mask=target_mask, cost=pairs, presence="none")

    return loss


def pair_loss(elements: Tensor, target: Tensor, mask: Tensor, target_mask: Tensor) -> Tensor:
    """Cross-entropies of numbers and classes, where both are predicted."""
    pairs = sum_costs(*(on_channels(cross_entropy_cost, part) for part in channels(target)))
    return hungarian_loss(elements, target, target_mask=target_mask, cost=pairs, presence="none")


def channels(elements: Tensor) -> tuple[slice, slice]:
    """Which channels of elements (B, N, N + K) are the number, and which the class."""
    _, size, both = elements.shape
    return slice(0, size), slice(size, both)


def score_numbers(elements: Tensor, mask: Tensor, target: Tensor, target_mask: Tensor) -> dict[str, float]:
    """Part of the multisets that are right in all elements, and of the elements that are.

    Where all are right, the matching of least cost finds it, since no pair's cost is less than that of an element and
    its own largest logit: this is the paper's accuracy.
    """
    found, wanted = _counts(elements), _counts(target)
    right = torch.minimum(found, wanted).sum(1)
    size = target.shape[1]
    return {"sets": (right == size).float().mean().item(), "elements": right.float().mean().item() / size}


def _counts(elements: Tensor) -> Tensor:
    """How many elements (B, N, N + K) there are of each number and class, (B, N * K)."""
    _, size, both = elements.shape
    numbers, classes = (elements[..., part] for part in channels(elements))
    pairs = (both - size) * numbers.argmax(-1) + classes.argmax(-1)
    return torch.zeros(len(pairs), size * (both - size)).scatter_add_(1, pairs, torch.ones(pairs.shape))
