"""MNIST digits as point sets."""

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from common.batches import Batch, InMemory
from common.digits import load_digit_sets
from setpred import pad_sets

LARGEST = 342  # points of MNIST's largest digit
LARGEST_SMALL = 32  # of scikit-learn's
MEAN = 0.1307  # of all pixels of MNIST's training images, in [0, 1]
VALIDATION = 1000
FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
MAGIC = 2051  # at the beginning of a file of images


def points_of(images: Tensor) -> Batch:
    """Turn images (S, 28, 28), uint8, into sets: x and y in [0, 1] of the pixels above the mean pixel, as published."""
    points = [image.nonzero().flip(1) / (image.shape[0] - 1) for image in images / 255 > MEAN]
    return Batch(*pad_sets(points, LARGEST))


def find_images(root: Path, part: str) -> Path:
    """Find the file of a part's images, gzipped or not, where torchvision puts it."""
    plain = root / "MNIST/raw" / FILES[part]
    for file in (plain, plain.with_name(f"{plain.name}.gz")):
        if file.is_file():
            return file
    raise SystemExit(f"--data: there is no file {plain}, nor {plain.name}.gz")


def read_images(file: Path) -> Tensor:
    """Read images (S, height, width), uint8."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        magic, *shape = struct.unpack(">4I", content[:16])
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic}, not {MAGIC}")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16).view(shape)
    except (OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise SystemExit(f"--data: {file} is no whole file of MNIST's images: {error}") from None


def load_training_digits(root: Path | None, limit: int | None) -> tuple[InMemory, InMemory]:
    """Load sets to train on and to validate: of MNIST in `root`, or of scikit-learn's digits.

    Args:
        root: Directory that torchvision would download MNIST to, or None.
        limit: Take only so many digits of each part.
    """
    if root is None:
        return _small(0, limit), _small(1, limit)
    images = read_images(find_images(root, "train"))
    parts = (images[:-VALIDATION], images[-VALIDATION:])
    train, validation = (InMemory(points_of(part[:limit])) for part in parts)
    return train, validation


def load_test_digits(root: Path | None, limit: int | None) -> InMemory:
    """Load sets to test on."""
    if root is None:
        return _small(2, limit)
    return InMemory(points_of(read_images(find_images(root, "test"))[:limit]))


def _small(part: int, limit: int | None) -> InMemory:
    return InMemory(Batch(*load_digit_sets()[part])).first(limit)
