"""PooledEncoder: every element by itself through an MLP, then a pool."""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpred._checks import check_count, is_exporting
from setpred.encoders.base import EncoderBase, Pull, are_plain, relu_backward
from setpred.encoders.pool import PoolName
from setpred.encoders.scaling import Scaling


class PooledEncoder(EncoderBase):
    r"""Set encoder that applies an MLP to each element and pools the results.

    .. math:: H(Y) = \operatorname{pool}_i\, \mathrm{MLP}([y_i; m_i])

    The mask m is one more feature of each element.

    Args:
        in_channels: Features C of an element, without the mask.
        out_channels: Size D of the representation.
        hidden_channels: Width of the hidden layers.
        layers: Number of linear layers, ReLU between them; 1 is a linear map.
        pool: ``"fspool"``, ``"sum"``, ``"mean"``, ``"max"``, or a module ``(B, N, D) -> (B, D)``.
        size_feature: Make the last of the D features the size, the sum of the mask, instead of a learned one; times
            2/sqrt(N) where conditioned, else 4/N as published.
        scaling: How weights are drawn and what the pool's result is divided by. ``"conditioned"``: so that the
            curvature of a fresh encoder's inner loss is about 0.6 whatever the sizes, for an ``lr`` of at most 1.
            ``"dspn"``: as in that paper's code, where FSPool is divided by N, for an ``lr`` of 25 and more.
            ``"idspn"``: as in that paper's code (which has ``layers=2``). A pool of your own is never scaled. See
            :doc:`/concepts/inner_optimisation`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, or the pool or scaling is unknown.

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
        scaling: Scaling = "conditioned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("layers", layers)
        check_count("hidden_channels", hidden_channels)
        super().__init__(
            in_channels, out_channels, pool, scaling=scaling, size_feature=size_feature, device=device, dtype=dtype
        )
        widths = [in_channels + 1, *[hidden_channels] * (layers - 1), self.row_channels]
        self.layers = nn.ModuleList(nn.Linear(*pair, device=device, dtype=dtype) for pair in pairwise(widths))
        self.reset_parameters()

    def vjp(self, elements: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Pull] | None:
        """Encode sets, and return the function that their gradient comes from; see :class:`setpred.SetEncoder`."""
        known = type(self) is PooledEncoder and len(elements) > 0 and self._is_known(*self.layers)
        return self._vjp(elements, mask) if known else None

    def _rows(self, x: Tensor) -> Tensor:
        if are_plain(*self.layers) and len(x) > 0:  # PyTorch 2.7 does not pad an empty batch
            return self._products(x)[0]
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        rows: Tensor = last(x)
        return rows.movedim(-1, 0).contiguous()

    def _products(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Rows, and what goes into each layer, columns of shape (products, features, columns)."""
        # Products of equal shape, (out, in) x (in, columns), one for each sample: faster than one for all, whose rows
        # lie far apart, and a sample's rounding is the same in every batch, where a last digit can decide which of two
        # nearly equal rows FSPool ranks first. Small samples share a product, because the weights' gradient has a
        # matrix for each product; no more of them than 64 columns hold, beyond which BLAS does not treat all columns
        # alike. Samples of whole 16 bytes, because rounding goes by alignment too.
        batch, size, channels = x.shape
        columns = size + -size % 4
        together = 1 if is_exporting() else max(64 // columns, 1)  # a graph is for every batch size
        products = (batch + together - 1) // together
        x = F.pad(x, (0, 0, 0, columns - size, 0, products * together - batch))
        inputs = [x.view(products, together * columns, channels).mT.contiguous()]
        *hidden, last = self.layers
        for layer in hidden:
            inputs.append(F.relu(_linear(layer, inputs[-1]), inplace=True))
        x = _linear(last, inputs[-1]).transpose(0, 1).reshape(self.row_channels, products * together, columns)
        return x[:, :batch, :size].contiguous(), inputs

    def _rows_vjp(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        batch, size, channels = x.shape
        rows, inputs = self._products(x)

        def pull(grad: Tensor) -> Tensor:
            products, _, columns = inputs[0].shape
            width = size + -size % 4
            grad = F.pad(grad, (0, width - size, 0, products * columns // width - batch))
            grad = grad.reshape(self.row_channels, products, columns).transpose(0, 1)
            for number, layer in reversed(list(enumerate(self.layers))):
                assert isinstance(layer, nn.Linear)
                grad = torch.bmm(layer.weight.t().expand(products, -1, -1), grad)
                if number > 0:
                    grad = relu_backward(grad, inputs[number], 0)
            return grad.mT.reshape(-1, width, channels)[:batch, :size]

        return rows, pull


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply an `nn.Linear` to columns: (M, in, columns) -> (M, out, columns)."""
    assert isinstance(layer, nn.Linear)  # for mypy: nn.ModuleList forgets it
    return torch.baddbmm(layer.bias.unsqueeze(1), layer.weight.expand(len(x), -1, -1), x)
