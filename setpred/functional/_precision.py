"""The dtype in which things are compared, one rule for the whole library; docs/guides/amp.md says it for users."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype that all are promoted to, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, so that a user's cost is not computed in half precision either."""
    # A device without it, such as meta, may not even be asked; is_autocast_available() does not compile before 2.12.
    has = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    if has and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
