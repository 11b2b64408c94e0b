"""RelationEncoder: every pair of elements through an MLP, then a pool."""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpred._checks import check_count
from setpred.encoders.base import EncoderBase, Pull, are_plain, relu_backward
from setpred.encoders.pool import PoolName
from setpred.encoders.scaling import Scaling


class RelationEncoder(EncoderBase):
    r"""Set encoder that applies a two-layer MLP to each ordered pair of elements and pools the N^2 results.

    .. math:: H(Y) = \operatorname{pool}_{i,j}\, W_2 \operatorname{relu}(W_1 [y_i; m_i; y_j; m_j] + b_1) + b_2

    The mask m is one more feature of each element. Pairs are never built in the first layer: it is a sum of two
    per-element projections.

    Args:
        in_channels: Features C of an element, without the mask.
        out_channels: Size D of the representation.
        hidden_channels: Width of the hidden layer.
        pool: ``"fspool"``, ``"sum"``, ``"mean"``, ``"max"``, or a module ``(B, N^2, D) -> (B, D)``.
        size_feature: Make the last of the D features the size, the sum of the mask, instead of a learned one; times
            2/sqrt(N) where conditioned, else 4/N as published.
        scaling: How weights are drawn and what the pool's result is divided by. ``"conditioned"``: so that the
            curvature of a fresh encoder's inner loss is about 0.6 whatever the sizes, for an ``lr`` of at most 1.
            ``"dspn"``: as in that paper's code, where FSPool is divided by N^2, for an ``lr`` of 25 and more.
            ``"idspn"``: as in that paper's code. A pool of your own is never scaled. See
            :doc:`/concepts/inner_optimisation`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, or the pool or scaling is unknown.

    Example:
        >>> encoder = RelationEncoder(in_channels=18, out_channels=64)
        >>> encoder(torch.rand(8, 10, 18)).shape
        torch.Size([8, 64])

    Source: Zhang et al. (NeurIPS 2019), section 5.2 and Appendix B.2; Santoro et al., relational reasoning (2017).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 512,
        *,
        pool: PoolName | nn.Module = "fspool",
        size_feature: bool = False,
        scaling: Scaling = "conditioned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("hidden_channels", hidden_channels)
        super().__init__(
            in_channels, out_channels, pool, scaling=scaling, size_feature=size_feature, device=device, dtype=dtype
        )
        self.pair = nn.Linear(2 * (in_channels + 1), hidden_channels, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_channels, self.row_channels, device=device, dtype=dtype)
        self.reset_parameters()

    def vjp(self, elements: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Pull] | None:
        """Encode sets, and return the function that their gradient comes from; see :class:`setpred.SetEncoder`."""
        known = type(self) is RelationEncoder and self._is_known(self.pair, self.out)
        return self._vjp(elements, mask) if known else None

    def _rows(self, x: Tensor) -> Tensor:
        if are_plain(self.pair, self.out):
            return self._products(x)[0]
        each = x.expand(x.shape[1], *x.shape)  # (N, B, N, C+1)
        pairs = torch.cat([each.permute(1, 2, 0, 3), each.transpose(0, 1)], -1)
        rows: Tensor = self.out(F.relu(self.pair(pairs)))
        return rows.flatten(1, 2).movedim(-1, 0).contiguous()

    def _products(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows; hidden features of the pairs, (hidden, B, N, N); and the first layer's weight of each sample."""
        # One product a sample, so that a sample's rounding is the same in every batch: BLAS has other kernels for few
        # columns, and a last digit can decide which of two nearly equal rows FSPool ranks first. And a width of whole
        # 16 bytes, because the gradient's rounding goes by how its memory is aligned. The second, larger product is one
        # for all, for speed: most columns are alike with AVX-512; with AVX2 the batch moved predictions by up to 1e-4.
        size = x.shape[1]
        padding = (0, -x.shape[-1] % 4)
        x = F.pad(x, padding)
        weight = F.pad(torch.cat(self.pair.weight.chunk(2, dim=1)), padding).expand(len(x), -1, -1)
        left, right = torch.bmm(weight, x.mT).transpose(0, 1).contiguous().chunk(2)
        left = left + self.pair.bias.view(-1, 1, 1)
        pairs = F.relu(left.unsqueeze(-1) + right.unsqueeze(-2), inplace=True)
        rows = torch.addmm(self.out.bias.unsqueeze(1), self.out.weight, pairs.flatten(1))  # no transpose to sort
        return rows.view(self.row_channels, len(x), size * size), pairs, weight

    def _rows_vjp(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rows, pairs, weight = self._products(x)

        def pull(grad: Tensor) -> Tensor:
            of_pairs = relu_backward((self.out.weight.t() @ grad.flatten(1)).view(pairs.shape), pairs, 0)
            of_sides = torch.cat([of_pairs.sum(-1), of_pairs.sum(-2)]).transpose(0, 1)
            return torch.bmm(weight.mT, of_sides).mT[..., : x.shape[-1]]

        return rows, pull
