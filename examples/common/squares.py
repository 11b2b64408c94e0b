"""A rotating square: the smallest case of the responsibility problem.

The four corners of a square that turns by a right angle are the same set again, but each corner has become the next
one. A decoder that gives an output to each corner must jump somewhere on the way.
"""

import math

import torch
from torch import Tensor

from common.batches import Batch
from setpred import linear_assignment

QUARTER = math.pi / 2


def squares(angles: Tensor) -> Batch:
    """Corners (S, 4, 2) of squares turned by these angles, around 0 and of circumradius 1."""
    turned = angles.unsqueeze(1) + QUARTER * torch.arange(4)
    elements = torch.stack([turned.cos(), turned.sin()], -1)
    return Batch(elements, torch.ones(elements.shape[:2], dtype=torch.bool))


def draw_squares(count: int, generator: torch.Generator) -> Batch:
    """Squares of uniform angles."""
    return squares(2 * math.pi * torch.rand(count, generator=generator))


def grid_of_squares(count: int, *, offset: float = 0.0) -> Batch:
    """Squares of evenly spaced angles, which are all that there are: a square turned by a quarter is the same set.

    Args:
        count: Number of squares S.
        offset: Where the first one stands, in spacings.
    """
    return squares((torch.arange(count) + offset) * (QUARTER / count))


def corner_errors(elements: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Distance (S, 4) of each corner from its point, in circumradii, in the best matching of a square.

    A point that is absent, of a mask under one half, counts as in the middle: one circumradius away.
    """
    points = elements.masked_fill((mask < 0.5).unsqueeze(-1), 0)
    distance = torch.cdist(target, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.gather(2, linear_assignment(distance).unsqueeze(2)).squeeze(2)


def score_squares(elements: Tensor, mask: Tensor, target: Tensor, target_mask: Tensor) -> dict[str, float]:
    """Compute the error of the worst corner at the worst angle, and the mean over corners and angles."""
    errors = corner_errors(elements, mask, target)
    return {"worst": errors.max().item(), "mean": errors.mean().item()}
