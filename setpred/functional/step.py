"""How a descent takes a step: rules from a gradient to the next point, whose state is explicit."""

from __future__ import annotations  # torch.compile cannot evaluate the annotations of nested functions

from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from setpred._checks import check_at_least, check_positive

Point = tuple[Tensor, ...]
_LONG = 0.05  # of `max_lr`: from here on, implicit differentiation sees less and less of a step's size


class Gradient(NamedTuple):
    """What a step is taken from: an objective and its gradient at a point.

    Attributes:
        grad: Gradient with respect to each tensor of the point, ``(B, ...)`` each.
        loss: Objective, shape ``(B,)``.
        norm: Norm of each sample's gradient, over all its tensors together, shape ``(B,)``.

    Example:
        >>> from setpred import PolyakDescent
        >>> y = (torch.tensor([[3.0, 4.0]]),)  # of half the square of y
        >>> gradient = Gradient(grad=y, loss=torch.tensor([12.5]), norm=torch.tensor([5.0]))
        >>> rule = PolyakDescent(momentum=0.0)
        >>> rule.step(y, gradient, rule.init(y))[0]
        (tensor([[1.5000, 2.0000]]),)
    """

    grad: tuple[Tensor, ...]
    loss: Tensor
    norm: Tensor


@runtime_checkable
class StepRule(Protocol):
    """How :func:`setpred.functional.descend` takes a step; write your own with these two methods.

    A point is a tuple of tensors whose first dimension is the batch, and so is the state, of any structure of tuples.
    A sample's step must depend on that sample only: samples may leave the batch on the way.

    A rule whose step does not grow with the objective may have a third method, ``implicit_step(gradient)``: what
    implicit differentiation goes through in place of the gradient.

    Example:
        >>> class SignDescent:
        ...     def init(self, y):
        ...         return ()
        ...     def step(self, y, gradient, state):
        ...         return tuple(part - 0.1 * g.sign() for part, g in zip(y, gradient.grad)), state
        >>> isinstance(SignDescent(), StepRule)
        True

    Source: the solvers of optimistix (Rader, Lyons, Kidger 2024), whose state is explicit too.
    """

    def init(self, y: tuple[Tensor, ...], /) -> Any:
        """Make the state before the first step from the initial point."""
        ...

    def step(self, y: tuple[Tensor, ...], gradient: Gradient, state: Any, /) -> tuple[tuple[Tensor, ...], Any]:
        """Return the next point, before it is projected, and the next state."""
        ...


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """View (B,) so that it broadcasts against (B, ...)."""
    return value.view(-1, *[1] * (like.dim() - 1))


def _times(value: Tensor, grad: Point) -> Point:
    return tuple(per_sample(value, part).to(part.dtype) * part for part in grad)


def _plus(grad: Point, momentum: float, velocity: Point) -> Point:
    return tuple(g + momentum * v for g, v in zip(grad, velocity, strict=True))


@dataclass(frozen=True)
class GradientDescent:
    r"""Gradient descent with momentum and a fixed learning rate.

    With the gradient :math:`g_t`, scaled down to norm ``grad_clip`` where it is longer, and :math:`v_0 = 0`:

    .. math::
        v_{t+1} &= \mu v_t + g_t \\
        y_{t+1} &= y_t - \eta\, v_{t+1} \quad\text{or, with Nesterov,}\quad y_t - \eta\,(g_t + \mu v_{t+1})

    Args:
        lr: Learning rate :math:`\eta`, the factor on the gradient.
        momentum: Factor :math:`\mu` on the velocity.
        nesterov: Whether to look ahead along the velocity; needs a momentum.
        grad_clip: Largest norm of a sample's gradient, over all its tensors together.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> GradientDescent(25.0).lr
        25.0

    Source: Zhang et al. (NeurIPS 2019), equation 5; momentum and clipping: Zhang et al. (ICLR 2022).
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_at_least("momentum", self.momentum, 0)
        if self.nesterov and self.momentum == 0:
            raise ValueError("`momentum` must be positive when `nesterov` is True, got 0")
        if self.grad_clip is not None:
            check_positive("grad_clip", self.grad_clip)

    def init(self, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The velocity: zeros, or nothing without momentum."""
        return tuple(torch.zeros_like(part) for part in y) if self.momentum != 0 else ()

    def step(
        self, y: tuple[Tensor, ...], gradient: Gradient, state: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See :class:`setpred.functional.StepRule`."""
        grad = gradient.grad
        if self.grad_clip is not None:
            scale = self.grad_clip / gradient.norm.clamp(min=self.grad_clip)
            grad = _times(scale, grad)
        direction = grad
        if self.momentum != 0:
            state = direction = _plus(grad, self.momentum, state)
            if self.nesterov:
                direction = _plus(grad, self.momentum, state)
        return tuple(part - self.lr * d for part, d in zip(y, direction, strict=True)), state


@dataclass(frozen=True)
class PolyakDescent:
    r"""Gradient descent with momentum whose step sizes itself, sample by sample, for objectives of minimum 0.

    With the objective :math:`L_t`, its gradient :math:`g_t` and :math:`v_0 = 0`:

    .. math::
        \eta_t &= \min\!\left(\frac{L_t}{\lVert g_t \rVert^2},\; \eta_\text{max}\right) \\
        v_{t+1} &= \mu v_t + \eta_t g_t \\
        y_{t+1} &= y_t - (\eta_t g_t + \mu v_{t+1})

    Of a quadratic, :math:`L_t / \lVert g_t \rVert^2` is between half the inverse of its largest curvature and half
    that of its smallest, and the nearer to the first the faster a direction diverges: where a fixed step would leave
    its stable range, this one shrinks. ``max_lr`` is for objectives whose least value is above 0, where the fraction
    grows without bound as the gradient vanishes.

    Args:
        max_lr: Largest step :math:`\eta_\text{max}`.
        momentum: Factor :math:`\mu` on the velocity, Nesterov's.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> PolyakDescent().momentum
        0.9

    Source: Polyak, Introduction to Optimization (1987), section 5.3; the bound: Loizou et al., Stochastic Polyak
    Step-size for SGD (AISTATS 2021), equation 3.
    """

    max_lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_positive("max_lr", self.max_lr)
        check_at_least("momentum", self.momentum, 0)

    def init(self, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The velocity: zeros."""
        return tuple(torch.zeros_like(part) for part in y)

    def step(
        self, y: tuple[Tensor, ...], gradient: Gradient, state: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See :class:`setpred.functional.StepRule`."""
        moves = _times(self._lr(gradient), gradient.grad)
        state = _plus(moves, self.momentum, state)
        direction = _plus(moves, self.momentum, state)
        return tuple(part - d for part, d in zip(y, direction, strict=True)), state

    def implicit_step(self, gradient: Gradient) -> tuple[Tensor, ...]:
        r"""Return :math:`\eta_t g_t`, of whose size a part is differentiated: none of a long one, all as it vanishes.

        With its size held constant, the derivative says of each descent that has not arrived that the objective should
        grow; with its size, which shrinks as the objective grows, it does not. The first is welcome until steps are a
        twentieth of ``max_lr``, and without an end it is what trainings collapse by.
        """
        lr = self._lr(gradient)
        constant = (lr.detach() / (_LONG * self.max_lr)).clamp(max=1)
        return _times(constant * lr.detach() + (1 - constant) * lr, gradient.grad)

    def _lr(self, gradient: Gradient) -> Tensor:
        square = gradient.norm.square()
        loss = gradient.loss.clamp(min=0)
        small = loss < self.max_lr * square  # elsewhere the gradient may be 0, and no derivative may pass through there
        return torch.where(small, loss / torch.where(small, square, 1), self.max_lr)


def as_rule(lr: float | StepRule) -> StepRule:
    """Plain gradient descent for a number."""
    if isinstance(lr, StepRule):
        return lr
    if not isinstance(lr, Real):
        raise TypeError(f"`lr` must be a number or a StepRule, got {lr!r} ({type(lr).__name__})")
    return GradientDescent(float(lr))
