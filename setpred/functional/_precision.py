"""The dtype in which things are compared, one rule for the whole library; docs/guides/amp.md says it for users."""

import torch
from torch import Tensor


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype that all are promoted to, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
