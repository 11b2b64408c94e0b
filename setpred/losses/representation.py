"""Representation loss: how far a set's encoding is from a target vector."""

from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_choice, check_shape
from setpred.functional.representation import KINDS, Kind, distance
from setpred.losses._common import REDUCTIONS, Reduction, reduce


def representation_loss(
    representation: Tensor, target: Tensor, *, kind: Kind = "huber", reduction: Reduction = "mean"
) -> Tensor:
    r"""Distance between encoded sets and their target vectors, a mean over features.

    .. math::
        \mathcal{L}_\text{repr}(Y, z) = \frac{1}{D} \sum_{d=1}^{D} \ell(H(Y)_d - z_d), \qquad
        \ell(x) = \begin{cases} x^2/2 & |x| < 1 \\ |x| - 1/2 & \text{else} \end{cases} \;\text{(huber)}, \quad
        \ell(x) = x^2/2 \;\text{(mse)}

    Computed in float32 at least, whatever the inputs' dtypes.

    Args:
        representation: Encoded sets H(Y), shape ``(B, D)``.
        target: Target vectors z, shape ``(B, D)``.
        kind: ``"huber"`` (smooth L1 with beta 1, the paper's experiments) or ``"mse"`` (half the squared error, iDSPN).
        reduction: ``"mean"`` or ``"sum"`` over samples, or ``"none"``: shape ``(B,)``.

    Returns:
        A scalar, or shape ``(B,)``.

    Raises:
        ValueError: If the shapes differ or are not ``(B, D)``, or a choice is unknown.
        TypeError: If a dtype is not floating.

    Example:
        >>> import torch
        >>> representation_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor(1.5000)

    Source: Zhang et al. (NeurIPS 2019), equation 3 and section 3.2 (Huber).
    """
    check_shape("representation", representation, "B", "D")
    check_shape("target", target, *representation.shape)
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    return reduce(distance(representation, target, kind), reduction)


class RepresentationLoss(nn.Module):
    """Distance between encoded sets and their target vectors, as a module.

    Its options are those of :func:`representation_loss`.

    Args:
        kind: ``"huber"`` or ``"mse"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If a choice is unknown.

    Example:
        >>> import torch
        >>> RepresentationLoss("mse")(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor(2.5000)

    Source: Zhang et al. (NeurIPS 2019), equation 3.
    """

    def __init__(self, kind: Kind = "huber", *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_choice("reduction", reduction, REDUCTIONS)
        self.kind, self.reduction = kind, reduction

    def forward(self, representation: Tensor, target: Tensor) -> Tensor:
        """See :func:`representation_loss`."""
        return representation_loss(representation, target, kind=self.kind, reduction=self.reduction)

    @override
    def extra_repr(self) -> str:
        return f"{self.kind!r}, reduction={self.reduction!r}"
