"""The pools that encoders take by name."""

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_choice
from setpred.encoders.fspool import FSPool

PoolName = Literal["fspool", "sum", "mean", "max"]


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
        check_choice("pool", kind, ("fspool", "sum", "mean", "max"))
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

    @override
    def extra_repr(self) -> str:
        return repr(self.kind)
