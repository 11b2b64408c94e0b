"""What DSPNDecoder's descent minimises, and its gradient where the encoder knows its own."""

import math
from typing import Any

from torch import Tensor, nn

from setpred._checks import check_shape
from setpred.encoders.base import SetEncoder, are_unhooked
from setpred.functional.representation import Kind, distance, distance_grad

Parts = tuple[Tensor, ...]  # elements, and mask if one is carried


class Objective:
    """Representation loss of each sample, and the anchor; see :class:`setpred.DSPNDecoder`."""

    def __init__(self, encoder: SetEncoder, kind: Kind, anchor: float) -> None:
        self.encoder, self.kind, self.anchor = encoder, kind, anchor

    def __call__(self, y: Parts, z: Tensor, start: Tensor) -> Tensor:
        """Value of each sample, (B,), for vectors z (B, D) and initial elements."""
        representation = self.encoder(*_elements_and_mask(y))
        check_shape("encoder(elements, mask)", representation, *z.shape)
        if not representation.requires_grad:
            raise RuntimeError(
                "`encoder(elements, mask)` must be differentiable, got a result without a gradient: is it computed "
                "under torch.no_grad(), or detached? To keep its parameters as they are, use requires_grad_(False)"
            )
        return self._anchored(distance(representation, z, self.kind), y[0], start)

    def value_and_grad(self, y: Parts, z: Tensor, start: Tensor) -> tuple[Tensor, Parts] | None:
        """Value, and gradient with respect to y, if the encoder knows its own."""
        encoder: Any = self.encoder
        if not _knows_itself(type(encoder)) or (isinstance(encoder, nn.Module) and not are_unhooked(encoder)):
            return None
        known = encoder.vjp(*_elements_and_mask(y))
        if known is None:
            return None
        representation, pull = known
        check_shape("encoder(elements, mask)", representation, *z.shape)
        loss = self._anchored(distance(representation, z, self.kind), y[0], start)
        of_elements, of_mask = pull(distance_grad(representation, z, self.kind))
        check_shape("gradient of elements from encoder.vjp", of_elements, *y[0].shape)
        if len(y) == 2:
            check_shape("gradient of mask from encoder.vjp", of_mask, *y[1].shape)
        if self.anchor > 0:
            of_elements = of_elements + self.anchor / math.prod(start.shape[1:]) * (y[0] - start)
        return loss, tuple(part.to(y[0].dtype) for part in (of_elements, of_mask)[: len(y)])

    def _anchored(self, loss: Tensor, elements: Tensor, start: Tensor) -> Tensor:
        if self.anchor > 0:
            loss = loss + 0.5 * self.anchor * (elements - start).square().flatten(1).mean(1)
        return loss


def _knows_itself(encoder: type) -> bool:
    """Whether a class has a ``vjp``, and no subclass has since changed what it is the gradient of.

    The instance is not asked, because a wrapper may hand out what it wraps.
    """
    for cls in encoder.__mro__:
        if "vjp" in cls.__dict__:
            return True
        if "forward" in cls.__dict__ or "__call__" in cls.__dict__:
            return False
    return False


def _elements_and_mask(y: Parts) -> tuple[Tensor, Tensor | None]:
    return y[0], y[1] if len(y) == 2 else None
