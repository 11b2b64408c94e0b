"""What the batching rules of this library's operators share: how `torch.func.vmap` calls them."""

from typing import Any

from torch import Tensor


def in_front(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> list[Any]:
    """Bring the dimension that is mapped over to the front of each argument; what has none is expanded."""
    return [
        arg if arg is None else arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        for arg, dim in zip(args, in_dims, strict=False)
    ]
