"""Random numbers that follow a tensor."""

import torch
from torch import Tensor


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, of the dtype and on the device of a tensor."""
    if generator is not None:
        return torch.randn(shape, device=like.device, dtype=like.dtype, generator=generator)
    return torch.randn_like(like.new_empty(shape))  # the same numbers; exported, for every batch size
