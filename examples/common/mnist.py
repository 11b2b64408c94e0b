"""MNIST digits as point sets."""

from pathlib import Path

from torch import Tensor

from common.batches import Batch, InMemory, Splits
from common.digits import load_digit_sets
from setpred import pad_sets

LARGEST = 342  # points of MNIST's largest digit
MEAN = 0.1307  # of all pixels of MNIST's training images, in [0, 1]
VALIDATION = 1000


def points_of(images: Tensor) -> Batch:
    """Turn images (S, 28, 28), uint8, into sets: x and y in [0, 1] of the pixels above the mean pixel, as published."""
    points = [image.nonzero().flip(1) / (image.shape[0] - 1) for image in images / 255 > MEAN]
    return Batch(*pad_sets(points, LARGEST))


def load_mnist(root: Path, limit: int | None = None) -> Splits:
    """Read MNIST's files from `root/MNIST/raw`; the last 1,000 training digits are kept for validation.

    Args:
        root: Directory that torchvision would download MNIST to.
        limit: Take only so many digits of each part.
    """
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:
        raise SystemExit(
            "--data needs a torchvision that fits this torch (pip install torchvision); without --data, scikit-learn's "
            f"digits are taken. Importing it failed with: {error}"
        ) from error
    try:
        train, test = (MNIST(root, train=train, download=False).data for train in (True, False))
    except RuntimeError as error:
        raise SystemExit(f"--data: expected MNIST's files in {root / 'MNIST/raw'}: {error}") from error
    parts = (train[:-VALIDATION], train[-VALIDATION:], test)
    return Splits(*(InMemory(points_of(part[:limit])) for part in parts))


def load_small_digits(limit: int | None = None) -> Splits:
    """Take scikit-learn's 8x8 digits instead, padded to their own largest set."""
    return Splits(*(InMemory(Batch(*part)).first(limit) for part in load_digit_sets()))


def load_point_sets(root: Path | None, *, quick: bool) -> Splits:
    """Load MNIST, or without a directory scikit-learn's digits."""
    limit = 8 if quick else None
    return load_small_digits(limit) if root is None else load_mnist(root, limit)
