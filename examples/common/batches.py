"""What the training engine trains on: batches of sets, with the images that they are predicted from, if any."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Batch(NamedTuple):
    """Padded sets, and the image of each."""

    elements: Tensor  # (B, N, C)
    mask: Tensor  # (B, N), bool
    images: Tensor | None = None  # (B, 3, S, S), float32 in [0, 1] or uint8


class Stream(Protocol):
    """Endless training data: batch k is made when it is asked for, and always the same."""

    def batch(self, k: int, device: torch.device) -> Batch:
        """Make batch k on a device."""
        ...


class InMemory(Dataset[Batch]):
    """Tensors of a whole data set. A batch is taken by one indexing operation."""

    def __init__(self, data: Batch) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.elements)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__(index)  # type: ignore[arg-type]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Take a batch; `DataLoader` calls this if it is there."""
        return Batch(*(None if part is None else part[indices] for part in self.data))

    def first(self, count: int | None) -> "InMemory":
        """Take the first `count` items, or all."""
        return InMemory(Batch(*(None if part is None else part[:count] for part in self.data)))
