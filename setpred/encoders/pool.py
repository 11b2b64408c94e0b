"""The pools that encoders take by name."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_choice
from setpred.encoders.fspool import FSPool
from setpred.functional.argsort import argsort_descending
from setpred.functional.sort_pool import element_weights

PoolName = Literal["fspool", "sum", "mean", "max"]
POOLS = get_args(PoolName)


class Pool(nn.Module):
    """Permutation-invariant pool by name, (B, rows, C) -> (B, C); the encoder scales its result."""

    def __init__(
        self,
        kind: PoolName,
        channels: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_choice("pool", kind, POOLS)
        self.kind = kind
        self.fspool = FSPool(channels, device=device, dtype=dtype) if kind == "fspool" else None

    def reset_parameters(self) -> None:
        """Draw new parameters, if the pool has any."""
        if self.fspool is not None:
            self.fspool.reset_parameters()

    def forward(self, rows: Tensor) -> Tensor:
        """Pool rows (B, rows, C) into (B, C)."""
        if self.fspool is not None:
            pooled: Tensor = self.fspool(rows)
            return pooled
        if self.kind == "sum":
            return rows.sum(1)
        # amax shares the gradient among equal rows: no order among duplicates.
        return rows.mean(1) if self.kind == "mean" else rows.amax(1)

    def vjp(self, rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Pool channel-major rows (C, B, rows); return (B, C), and a function from its gradient to that of the rows."""
        if self.kind == "sum":
            weights = torch.ones_like(rows)
        elif self.kind == "mean":
            weights = torch.full_like(rows, 1 / rows.shape[-1])
        elif self.fspool is not None:
            weights = element_weights(self.fspool.weight, argsort_descending(rows).permute(1, 2, 0), None)
        else:
            largest = (rows == rows.amax(-1, keepdim=True)).to(rows.dtype)
            weights = largest / largest.sum(-1, keepdim=True)  # as amax shares its gradient
        return (rows * weights).sum(-1).t(), lambda grad: grad.t().unsqueeze(-1) * weights

    @override
    def extra_repr(self) -> str:
        return repr(self.kind)
