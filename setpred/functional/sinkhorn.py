"""Entropic optimal transport between weighted point sets, balanced or not, in batches."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from setpred._checks import check_count, check_finite, check_positive, check_shape, is_exporting
from setpred.functional._batching import in_front
from setpred.functional._precision import common_dtype, full_precision


class Transport(NamedTuple):
    r"""What :func:`entropic_transport` returns. Only the value has a gradient.

    Attributes:
        value: The transport cost with its penalties, shape ``(B,)``.
        plan: Mass that goes from each row to each column, shape ``(B, N, M)``.
        row_potential: Dual variables f of the rows, shape ``(B, N)``; without ``rho``, the derivative of the value by
            the rows' weights, up to a constant.
        col_potential: Dual variables g of the columns, shape ``(B, M)``.
        error: How far the plan is from converged, shape ``(B,)``: by how much the sums of its rows differ, all
            together, from what they would be, the weights a, or with ``rho`` :math:`a e^{-f / \rho}`.

    Example:
        >>> transport = entropic_transport(torch.zeros(1, 2, 3), torch.full((1, 2), 1 / 2), torch.full((1, 3), 1 / 3))
        >>> transport.plan.shape
        torch.Size([1, 2, 3])
    """

    value: Tensor
    plan: Tensor
    row_potential: Tensor
    col_potential: Tensor
    error: Tensor


def check_transport(epsilon: float, iters: int, tol: float | None, rho: float | None) -> None:
    """Check what :func:`entropic_transport` is configured with."""
    check_positive("epsilon", epsilon)
    check_finite("epsilon", epsilon)
    check_count("iters", iters)
    if tol is not None:
        check_positive("tol", tol)
    if rho is not None:
        check_positive("rho", rho)
        check_finite("rho", rho)


def entropic_transport(
    cost: Tensor,
    row_weight: Tensor,
    col_weight: Tensor | None = None,
    *,
    epsilon: float = 0.01,
    iters: int = 100,
    tol: float | None = None,
    rho: float | None = None,
) -> Transport:
    r"""Transport the rows' weights onto the columns' at the least cost, smoothed by entropy.

    .. math::
        \operatorname{OT}_\epsilon(a, b) = \min_{\pi 1 = a,\ \pi^\top 1 = b}
        \sum_{ij} \pi_{ij} \text{cost}_{ij} + \epsilon \operatorname{KL}(\pi \,|\, a b^\top), \qquad
        \operatorname{KL}(p \,|\, q) = \sum p \log \frac{p}{q} - p + q

    ``rho`` makes it unbalanced: mass may also be destroyed and created, where to transport it would cost more. Instead
    of the constraints, :math:`\rho \operatorname{KL}(\pi 1 | a) + \rho \operatorname{KL}(\pi^\top 1 | b)` is added.
    Where one of the sides has no mass, that of the other is destroyed: the value is rho times it, and its potentials
    are infinite.

    Found by Sinkhorn's iterations; during the first of them, epsilon falls from the largest cost of the sample. The
    value has the first derivatives that it has once converged, by the cost the plan; a second one is an error, and NaN
    in what is compiled.
    Computed in float32 at least.
    ``torch.compile`` takes it as one operator.

    Args:
        cost: Shape ``(B, N, M)``; finite where both weights are positive.
        row_weight: Weights a, at least 0 and, without ``rho``, of sum 1, shape ``(B, N)``. What has weight 0 does not
            exist.
        col_weight: Weights b, shape ``(B, M)``. None is the transport of a set onto itself: the columns weigh as the
            rows, and the cost must be symmetric, which is not looked at. An iteration is half the work then.
        epsilon: Strength of the entropy, in units of the cost.
        iters: Number of iterations, with ``tol`` the most there are. The more, the smaller epsilon is beside the costs:
            100 bring random points of a unit square or cube to an error of about 0.001, and values to one of 2e-5.
        tol: If given, a sample is done once its ``error`` is at most this, and iterations end when all are. That is
            looked at every 20 iterations or oftener, and waits for the device. Float32 may not reach less than some
            1e-7 times the largest cost over epsilon.
        rho: Price of a marginal that is not the weights, in units of the cost; None is infinity.

    Returns:
        Value, plan, potentials, and how far the plan is from converged.

    Raises:
        ValueError: If a shape is wrong or a number is out of its range.
        TypeError: If a dtype is not floating, or ``iters`` no integer.
        RuntimeError: If a second derivative is taken.

    Example:
        >>> cost, half = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5)
        >>> entropic_transport(cost, half, half, epsilon=0.05).plan
        tensor([[[5.0000e-01, 1.0306e-09],
                 [1.0306e-09, 5.0000e-01]]])

    Source: Cuturi, Sinkhorn distances (NeurIPS 2013); Schmitzer, Stabilized sparse scaling algorithms for entropy
    regularized transport problems (SIAM J. Sci. Comput. 2019), section 3; with ``rho`` Chizat et al., Scaling
    algorithms for unbalanced optimal transport problems (Math. Comp. 2018).
    """
    check_shape("cost", cost, "B", "N", "M")
    check_shape("row_weight", row_weight, *cost.shape[:2])
    symmetric = col_weight is None
    if col_weight is None:
        check_shape("cost", cost, *row_weight.shape, row_weight.shape[1])
        col_weight = row_weight
    check_shape("col_weight", col_weight, *cost.shape[::2])
    check_transport(epsilon, iters, tol, rho)
    dtype = common_dtype(cost, row_weight, col_weight)
    cost, row_weight, col_weight = cost.to(dtype), row_weight.to(dtype), col_weight.to(dtype)
    cost = without_absent(cost, row_weight, col_weight)
    return transport_of(cost, row_weight, None if symmetric else col_weight, epsilon, iters, tol, rho)


def without_absent(cost: Tensor, row_weight: Tensor, col_weight: Tensor) -> Tensor:
    """Costs with those of what does not exist set to 0."""
    return cost.masked_fill((row_weight == 0).unsqueeze(2) | (col_weight == 0).unsqueeze(1), 0)


def transport_of(
    cost: Tensor,
    row_weight: Tensor,
    col_weight: Tensor | None,
    epsilon: float,
    iters: int,
    tol: float | None,
    rho: float | None,
) -> Transport:
    """:func:`entropic_transport` of what has been checked, in one dtype and :func:`without_absent`."""
    # Detached, because forward-mode differentiation sees through no_grad.
    c, a = cost.detach(), row_weight.detach()
    b = a if col_weight is None else col_weight.detach()
    with torch.no_grad():
        mass_a, mass_b = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
        full_a, full_b = a, b
        if rho is not None:  # where a side has nothing, costs are 0: any weights do
            nothing = (mass_a == 0) | (mass_b == 0)
            full_a, full_b = a.masked_fill(nothing, 1), b.masked_fill(nothing, 1)
        # An operator of our own cannot be exported.
        solve = _iterate if is_exporting() else torch.ops.setpred.entropic_transport.default
        plan, f, g = solve(c, full_a, None if col_weight is None else full_b, epsilon, iters, tol, rho)
        if rho is None:
            wanted, by_a, by_b = a, f, g
            value = (a * f).sum(1) + (b * g).sum(1)
        else:
            plan = plan.masked_fill(nothing.unsqueeze(2), 0)
            f, g = f.masked_fill(nothing, 0), g.masked_fill(nothing, 0)
            f, g = f.masked_fill(nothing & (a > 0), torch.inf), g.masked_fill(nothing & (b > 0), torch.inf)
            lost_a, lost_b = -torch.expm1(-f / rho), -torch.expm1(-g / rho)  # shares of the weights
            wanted = a * (1 - lost_a)
            by_a = rho * lost_a - epsilon * (1 - lost_a - mass_b)
            by_b = rho * lost_b - epsilon * (1 - lost_b - mass_a)
            value = rho * ((a * lost_a).sum(1) + (b * lost_b).sum(1))
            value = value - epsilon * (plan.sum((1, 2)) - (mass_a * mass_b).squeeze(1))
        error = (plan.sum(2) - wanted).abs().sum(1)
    cost, row_weight = _once(cost), _once(row_weight)
    col_weight = row_weight if col_weight is None else _once(col_weight)
    derivative = (plan * cost).sum((1, 2)) + (by_a * row_weight).sum(1) + (by_b * col_weight).sum(1)
    change = derivative - derivative.detach()
    if torch.compiler.is_compiling():  # where _once() does nothing: |x|^1.5 has a first derivative of 0, and no second
        change = change + change.abs().pow(1.5)
    return Transport(value + change, plan, f, g, error)


def _once(x: Tensor) -> Tensor:
    """The same, but a second derivative by it is an error: the plan, the first one, is held fixed."""
    if torch.compiler.is_compiling():  # which does not take it: NaN, see above
        return x
    once: Tensor = _Once.apply(x, x[:, :0].clone())
    return once


def differentiable_plan(cost: Tensor, row_weight: Tensor, col_weight: Tensor, *, epsilon: float, iters: int) -> Tensor:
    """Plan of :func:`entropic_transport` with its first derivatives, those that it has once converged.

    A second derivative is an error, and NaN in what is compiled. Weights are positive, or 0 with no derivative.
    """
    plan = entropic_transport(cost.detach(), row_weight, col_weight, epsilon=epsilon, iters=iters).plan.detach()
    if is_exporting():
        return plan
    cost, row_weight, col_weight = _once(cost), _once(row_weight), _once(col_weight)
    change = plan_change(
        plan,
        (cost.detach() - cost) / epsilon,
        row_weight - row_weight.detach(),
        col_weight - col_weight.detach(),
    )
    if torch.compiler.is_compiling():  # see transport_of
        change = change + change.abs().pow(1.5)
    return plan + change


def plan_change(plan: Tensor, by: Tensor, of_rows: Tensor, of_cols: Tensor) -> Tensor:
    """How a plan changes with -cost / epsilon, and with the sums of its rows and columns, to first order.

    It is plan (by + u + v), of which u, one for each row, and v, for each column, give it these sums. They solve linear
    equations; u is eliminated, and for v a Laplacian is left: of a graph in which columns are joined by the rows that
    they share.
    """
    rows, cols = plan.sum(2).clamp(min=torch.finfo(plan.dtype).tiny), plan.sum(1)
    direct, share = plan * by, plan / rows.unsqueeze(2)
    missing = of_rows - direct.sum(2)
    target = of_cols - direct.sum(1) - (missing.unsqueeze(1) @ share).squeeze(1)
    joined = share.mT @ plan
    joined = joined - joined.diagonal(dim1=1, dim2=2).diag_embed()
    # What a constant may be added to has one solution by the second term, and columns that share no row by the third.
    slack = 8 * torch.finfo(plan.dtype).eps
    laplacian = (joined.sum(2) + slack * cols).diag_embed() - joined + cols.unsqueeze(2) * cols.unsqueeze(1)
    v: Tensor = torch.linalg.solve_ex(laplacian, target.unsqueeze(2))[0].mT  # (B, 1, M)
    u = (missing / rows).unsqueeze(2) - share @ v.mT
    return direct + plan * (u + v)


class _Identity(torch.autograd.Function):
    """Identity in the first argument."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, _: Tensor) -> Tensor:
        return x.view_as(x)


class _Once(_Identity):
    """With a gradient that depends on where it was taken: on a tensor without elements, to keep no memory."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Refuse.apply(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor) -> Tensor:
        once: Tensor = _Refuse.apply(tangent, *ctx.saved_tensors)
        return once


class _Refuse(_Identity):
    """Without a derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError("entropic transport (the Sinkhorn loss) has no second derivative: it differentiates once")

    jvp = backward


def _soft_min(
    cost: Tensor, potential: Tensor, log_weight: Tensor, eps: Tensor, dim: int, kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft minimum over the rows (dim 1) or columns (dim 2) of the cost less a potential, in the log domain.

    Leaves the exponentials in ``kernel``, relative to the largest along the dimension; returns the logarithm of that
    and their sum too.
    """
    least = 0.7 * math.log(torch.finfo(cost.dtype).tiny)
    factor = -1 / eps.unsqueeze(2)
    if is_exporting():  # a graph that is run with gradients takes no `out`
        kernel.copy_(cost * factor)
    else:
        torch.mul(cost, factor, out=kernel)
    kernel.add_((potential / eps + log_weight).unsqueeze(3 - dim))
    top = kernel.amax(dim, keepdim=True)
    # exp() of what underflows takes ten times as long on the CPU.
    F.threshold(kernel.sub_(top).clamp_(min=least).exp_(), 2 * math.exp(least), 0.0, inplace=True)
    top, total = top.squeeze(dim), kernel.sum(dim)
    return -eps * (top + total.log()), top, total


def _blocks(cost: Tensor, epsilon: float, iters: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of iterations, in all one less than ``iters``: length, epsilon, and whether the block before had the last.

    Epsilon and the last are of shape (B, 1).
    """
    first = min(max(iters // 10, 1), 10)  # length of the blocks that lower epsilon
    stages = min(iters // (2 * first), 16)  # how many there are
    # Logarithm of what epsilon is multiplied by. Faster than by 4 a block it falls only if there are too few blocks.
    excess = (torch.maximum(cost.amax((1, 2)), -cost.amin((1, 2))) / epsilon).clamp(min=1).log().unsqueeze(1)
    rate = (excess / max(stages, 1)).clamp(min=math.log(4))
    reached = torch.zeros_like(excess, dtype=torch.bool)
    index, left = 0, iters - 1
    while left > 0:
        length = min(left, first if index < stages else 20)
        excess = (excess - rate).clamp(min=0)
        yield length, epsilon * excess.exp(), reached
        reached = excess == 0
        index, left = index + 1, left - length


def _damped(potential: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """What a soft minimum becomes where marginals have a price."""
    return potential if rho is None else potential * (rho / (rho + eps))


def _scaling(ratio: Tensor, exponent: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """What brings sums to the weights, of which this is the ratio: exactly or, with rho, as far as that pays."""
    if rho is None:
        return ratio
    return (_damped(ratio.log(), eps, rho) + exponent / (rho + eps)).clamp(-60, 60).exp()


def _off(before: Tensor, after: Tensor, weight: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """The error, (B, 1), of potentials of which these are the soft minima of the others."""
    wanted = 1 if rho is None else (-before / rho).exp()
    return (weight * (((before - after) / eps).exp() - wanted).abs()).sum(1, keepdim=True)


def _iterate(
    cost: Tensor, a: Tensor, b: Tensor | None, epsilon: float, iters: int, tol: float | None, rho: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and potentials.

    Each block of iterations begins with one in the log domain, which is stable for any epsilon and leaves a kernel
    whose columns are relative to their largest entry; the others are products of it with vectors, ten times as fast.
    Where they go beyond the numbers that there are, the next block sets that right. The last iteration is in the log
    domain too.
    """
    if cost.numel() == 0:
        return cost.clone(), torch.zeros_like(a), torch.zeros_like(a if b is None else b)
    with full_precision(cost.device):
        if b is None:
            return _between_equals(cost, a, epsilon, iters, tol, rho)
        return _between_two(cost, a, b, epsilon, iters, tol, rho)


def _between_two(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iters: int, tol: float | None, rho: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials are in turn the soft minimum of the other."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    log_a, log_b = a.log(), b.log()
    least = torch.finfo(cost.dtype).tiny ** 0.7
    positive = a.clamp(min=least)
    kernel = torch.empty_like(cost)
    done = torch.zeros_like(a[:, :1], dtype=torch.bool)

    def centred(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Add to f and take from g what is best with rho; iterations alone come there slowly if rho is large."""
        if rho is None:
            return f, g
        shift = (log_a - f / rho).logsumexp(1, keepdim=True) - (log_b - g / rho).logsumexp(1, keepdim=True)
        return f + rho / 2 * shift, g - rho / 2 * shift

    for length, eps, reached in _blocks(cost, epsilon, iters):
        last = centred(f, g)
        f, _, _ = _soft_min(cost, last[1], log_b, eps, 2, kernel)
        if tol is not None:
            done = done | (reached & (_off(last[0], f, a, eps, rho) <= tol))
            if not is_exporting() and bool(done.all()):
                f, g = last
                break
        f = _damped(f, eps, rho)
        g, top, total = _soft_min(cost, f, log_a, eps, 1, kernel)
        u = None
        for _ in range(length - 1):
            v = b * _scaling(1 / total, top * eps, eps, rho)
            u = _scaling(positive / (v.unsqueeze(1) @ kernel.mT).squeeze(1).clamp(min=least), -f, eps, rho)
            total = (u.unsqueeze(1) @ kernel).squeeze(1).clamp(min=least)
        if u is not None:
            f, g = f + eps * u.log(), -eps * (top + total.log())
        g = _damped(g, eps, rho)
        if tol is not None:
            f, g = torch.where(done, last[0], f), torch.where(done, last[1], g)
    eps = torch.full_like(a[:, :1], epsilon)
    f, g = centred(f, g)
    f = _damped(_soft_min(cost, g, log_b, eps, 2, kernel)[0], eps, rho)
    g, top, total = _soft_min(cost, f, log_a, eps, 1, kernel)
    return kernel.mul_((b * _scaling(1 / total, top * eps, eps, rho)).unsqueeze(1)), f, _damped(g, eps, rho)


def _between_equals(
    cost: Tensor, a: Tensor, epsilon: float, iters: int, tol: float | None, rho: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The potentials are equal, and each is the mean of itself and its soft minimum."""
    f, log_a = torch.zeros_like(a), a.log()
    least = torch.finfo(cost.dtype).tiny ** 0.7
    kernel = torch.empty_like(cost)
    done = torch.zeros_like(a[:, :1], dtype=torch.bool)
    for length, eps, reached in _blocks(cost, epsilon, iters):
        last = f
        g, top, total = _soft_min(cost, f, log_a, eps, 1, kernel)
        if tol is not None:
            done = done | (reached & (_off(f, g, a, eps, rho) <= tol))
            if not is_exporting() and bool(done.all()):
                break
        f = (f + _damped(g, eps, rho)) / 2
        for _ in range(length - 1):
            u = ((f - last) / eps).clamp(-60, 60).exp()
            total = (u.unsqueeze(1) @ kernel).squeeze(1).clamp(min=least)
            f = (f + _damped(-eps * (top + total.log()), eps, rho)) / 2
        if tol is not None:
            f = torch.where(done, last, f)
    eps = torch.full_like(a[:, :1], epsilon)
    g, top, total = _soft_min(cost, f, log_a, eps, 1, kernel)
    return kernel.mul_((a * _scaling(1 / total, top * eps, eps, rho)).unsqueeze(1)), f, _damped(g, eps, rho)


# An operator, so that torch.compile does not unroll the iterations.
torch.library.define(
    "setpred::entropic_transport",
    "(Tensor cost, Tensor a, Tensor? b, float epsilon, int iters, float? tol, float? rho) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("setpred::entropic_transport", "CompositeExplicitAutograd")(_iterate)


@torch.library.register_fake("setpred::entropic_transport")  # type: ignore[untyped-decorator]
def _shapes(
    cost: Tensor, a: Tensor, b: Tensor | None, epsilon: float, iters: int, tol: float | None, rho: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(cost), torch.empty_like(a), torch.empty_like(a if b is None else b)


@torch.library.register_vmap("setpred::entropic_transport")  # type: ignore[untyped-decorator]
def _iterate_all(
    info: Any, in_dims: tuple[int | None, ...], cost: Tensor, a: Tensor, b: Tensor | None, *options: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batched = in_front(info, in_dims, cost, a, b)
    sizes = batched[0].shape[:2]
    found = torch.ops.setpred.entropic_transport.default(
        *(None if x is None else x.flatten(0, 1) for x in batched), *options
    )
    return tuple(x.unflatten(0, sizes) for x in found), (0, 0, 0)
