"""FSPool and its inverse, FSUnpool."""

from typing import Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_count, check_positive, check_shape
from setpred.functional.sort_pool import sort_pool, sort_unpool


class _SortWeights(nn.Module):
    """The learned piecewise-linear functions, one per channel."""

    def __init__(
        self,
        in_channels: int,
        pieces: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("pieces", pieces)
        self.in_channels, self.pieces = in_channels, pieces
        self.weight = nn.Parameter(torch.empty(in_channels, pieces + 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values at the knots: standard normal, as the published code has them."""
        nn.init.normal_(self.weight)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_channels}, pieces={self.pieces}"


class FSPool(_SortWeights):
    r"""Featurewise sort pooling: a set becomes a vector by sorting each feature and weighting the ranks.

    .. math:: y_c = \sum_{k=0}^{n-1} f_c\!\left(\frac{k}{n-1}\right) x_{(k),c}

    with :math:`x_{(0),c} \ge x_{(1),c} \ge \dots` the values of feature c and :math:`f_c` a learned
    piecewise-linear function on [0, 1] with ``pieces`` segments, so that one layer serves sets of every size n.

    Args:
        in_channels: Number of features C.
        pieces: Number of segments of each function.
        relaxed: Temperature of NeuralSort in place of the exact sort; None sorts exactly.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> pool = FSPool(3)
        >>> elements, mask = torch.rand(2, 5, 3), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
        >>> pool(elements, mask).shape
        torch.Size([2, 3])

    Source: Zhang et al., FSPool: Learning Set Representations with Featurewise Sort Pooling (ICLR 2020), section 3.
    """

    def __init__(
        self,
        in_channels: int,
        pieces: int = 20,
        *,
        relaxed: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, pieces, device, dtype)
        if relaxed is not None:
            check_positive("relaxed", relaxed)
        self.relaxed = relaxed

    @overload
    def forward(
        self, elements: Tensor, mask: Tensor | None = ..., *, return_permutation: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, elements: Tensor, mask: Tensor | None = ..., *, return_permutation: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, elements: Tensor, mask: Tensor | None = None, *, return_permutation: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool sets; see :func:`setpred.functional.sort_pool`.

        Args:
            elements: Shape ``(B, N, C)``.
            mask: Bool, or float in [0, 1] for soft sizes, shape ``(B, N)``; elements of mask 0 do not exist.
            return_permutation: Whether to return what :class:`FSUnpool` needs too.

        Returns:
            Shape ``(B, C)``, and the permutation if asked for.

        Raises:
            ValueError: If a shape is wrong, or a float mask comes with ``relaxed``.
            TypeError: If a dtype is wrong.
        """
        check_shape("elements", elements, "B", "N", self.in_channels)
        pooled, permutation = sort_pool(elements, self.weight, mask, relaxed=self.relaxed)
        return (pooled, permutation) if return_permutation else pooled

    @override
    def extra_repr(self) -> str:
        return super().extra_repr() + (f", relaxed={self.relaxed}" if self.relaxed is not None else "")


class FSUnpool(_SortWeights):
    r"""The inverse of FSPool: a vector becomes a set, in the order that an :class:`FSPool` found.

    .. math:: x_{(k),c} = f_c\!\left(\frac{k}{n-1}\right) y_c

    Args:
        in_channels: Number of features C.
        pieces: Number of segments of each function.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> pool, unpool = FSPool(3), FSUnpool(3)
        >>> vector, permutation = pool(torch.rand(2, 5, 3), return_permutation=True)
        >>> unpool(vector, permutation).shape
        torch.Size([2, 5, 3])

    Source: Zhang et al., FSPool (ICLR 2020), section 3.4.
    """

    def __init__(
        self,
        in_channels: int,
        pieces: int = 20,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, pieces, device, dtype)

    def forward(self, vector: Tensor, permutation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unpool vectors; see :func:`setpred.functional.sort_unpool`.

        Args:
            vector: Shape ``(B, C)``.
            permutation: From an FSPool with ``return_permutation=True``, relaxed or not.
            mask: The mask that the FSPool was given, shape ``(B, N)``.

        Returns:
            Shape ``(B, N, C)``; absent elements are zeros.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype is wrong.
        """
        check_shape("vector", vector, "B", self.in_channels)
        return sort_unpool(vector, permutation, self.weight, mask)
