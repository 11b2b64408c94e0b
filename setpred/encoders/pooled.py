"""PooledEncoder: every element by itself through an MLP, then a pool."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpred._checks import check_count
from setpred.encoders.base import EncoderBase
from setpred.encoders.pool import PoolName


class PooledEncoder(EncoderBase):
    r"""Set encoder that applies an MLP to each element and pools the results.

    .. math:: H(Y) = \operatorname{pool}_i\, \mathrm{MLP}([y_i; m_i])

    The mask m is one more feature of each element. FSPool's result is divided by N, as published.

    Args:
        in_channels: Features C of an element, without the mask.
        out_channels: Size D of the representation.
        hidden_channels: Width of the hidden layers.
        layers: Number of linear layers, ReLU between them; 1 is a linear map.
        pool: ``"fspool"``, ``"sum"``, ``"mean"``, ``"max"``, or a module ``(B, N, D) -> (B, D)``.
        size_feature: Make the last of the D features four times the mean of the mask (the sum of the masks, scaled as
            published) instead of a learned one.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range or the pool is unknown.

    Example:
        >>> encoder = PooledEncoder(in_channels=2, out_channels=64)
        >>> encoder(torch.rand(8, 30, 2)).shape
        torch.Size([8, 64])

    Source: Zhang et al. (NeurIPS 2019), section 5.1 and Appendix B.1; sum pool: Zaheer et al., Deep Sets (2017).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 256,
        *,
        layers: int = 3,
        pool: PoolName | nn.Module = "fspool",
        size_feature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("layers", layers)
        check_count("hidden_channels", hidden_channels)
        super().__init__(in_channels, out_channels, pool, size_feature=size_feature, device=device, dtype=dtype)
        widths = [in_channels + 1, *[hidden_channels] * (layers - 1), self.row_channels]
        self.layers = nn.ModuleList(nn.Linear(*pair, device=device, dtype=dtype) for pair in pairwise(widths))
        self.reset_parameters()

    def _rows(self, x: Tensor) -> Tensor:
        # Channels first, (in, B N): where small sets are differentiated twice, one product for all samples takes down to
        # a seventh of the time of one for each, whose weights' gradients are as many matrices (tests/benchmarks). Each
        # sample has whole blocks of 16 columns, so that its rounding is the same in every batch: BLAS has other kernels
        # for columns that are left over, and a last digit can decide which of two nearly equal rows FSPool ranks first.
        size = x.shape[1]
        x = F.pad(x, (0, 0, 0, -size % 16))
        samples = x.shape[:2]
        x = x.permute(2, 0, 1).flatten(1)
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(_linear(layer, x), inplace=True)
        return _linear(last, x).unflatten(1, samples)[..., :size].contiguous()


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply an `nn.Linear` to columns: (in, M) -> (out, M)."""
    assert isinstance(layer, nn.Linear)  # for mypy: nn.ModuleList forgets it
    return torch.addmm(layer.bias.unsqueeze(1), layer.weight, x)
