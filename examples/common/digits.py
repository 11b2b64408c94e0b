"""scikit-learn's handwritten digits as point sets: real data inside its wheel, no download."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from setpred import pad_sets


class Sets(NamedTuple):
    """A data set of padded sets."""

    elements: Tensor  # (S, N, 2), x and y in [0, 1], y downwards
    mask: Tensor  # (S, N), bool


class Splits(NamedTuple):
    """Disjoint parts of a data set; settings are chosen on `validation`, results come from `test`."""

    train: Sets
    validation: Sets
    test: Sets


def load_digit_sets() -> Splits:
    """Each 8x8 image as the set of its pixels above its own mean: 1,200 / 297 / 300 sets of up to 32 points."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)
    bright = images > images.mean(dim=(1, 2), keepdim=True)
    points = [image.nonzero().flip(1) / (image.shape[0] - 1) for image in bright]
    sets = Sets(*pad_sets(points))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    validation, test, train = order[:297], order[297:597], order[597:]
    return Splits(*(Sets(sets.elements[part], sets.mask[part]) for part in (train, validation, test)))
