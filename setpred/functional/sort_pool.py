"""Featurewise sort pooling: sort each feature over the elements, weight each rank, sum.

Both directions (pool and unpool) reduce to one quantity, the weight of each element in each feature. It
is piecewise linear in the element's relative rank, and constant in the elements' values wherever no two
of them are equal, so the gradient with respect to the elements needs no sort, gather or scatter of its own.

Tensors inside are channel-major, (C, B, N): then a sort along the elements reads contiguous memory.
"""

import torch
from torch import Tensor

from setpred._checks import check_mask, check_positive, check_shape, check_tensor, in_transform
from setpred.functional._precision import common_dtype
from setpred.functional.argsort import argsort_descending


def piecewise_linear(weight: Tensor, position: Tensor) -> Tensor:
    r"""Evaluate one piecewise-linear function per channel.

    .. math:: f_c(r) = \sum_{p=0}^{P} \max(0, 1 - |P r - p|)\, w_{c,p}

    Args:
        weight: Values at the P + 1 evenly spaced knots of [0, 1], shape ``(C, P+1)``, P >= 1.
        position: Where to evaluate, in [0, 1] (clamped), shape ``(C, ...)`` or ``(1, ...)``.

    Returns:
        Shape ``(C, ...)``, dtype of ``weight``.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is not floating.

    Example:
        >>> piecewise_linear(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.25, 0.5, 1.0]]))
        tensor([[0.0000, 0.5000, 1.0000, 0.0000]])

    Source: Zhang et al., FSPool (ICLR 2020), section 3.2.
    """
    check_shape("weight", weight, "C", "P+1")
    channels, pieces = weight.shape[0], weight.shape[1] - 1
    check_positive("the number of pieces", pieces)
    check_tensor("position", position)
    if position.dim() == 0 or position.shape[0] not in (1, channels):
        raise ValueError(f"`position` must have shape ({channels}, ...) or (1, ...), got {tuple(position.shape)}")
    scaled = position.clamp(0, 1) * pieces
    left = scaled.detach().floor().clamp(max=pieces - 1)
    fraction = (scaled - left).expand(channels, *position.shape[1:])
    knot = left.long().expand_as(fraction).unsqueeze(-1).flatten(1)
    at_left, at_right = weight.gather(1, knot), weight.gather(1, knot + 1)
    values = torch.lerp(at_left.to(scaled.dtype), at_right.to(scaled.dtype), fraction.unsqueeze(-1).flatten(1))
    return values.view_as(fraction).to(weight.dtype)


def _rank_weights(weight: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """Weight of each rank, (C, B or 1, N), for element masks in rank order, (C or 1, B, N), or none."""
    # float32 at least: bfloat16 cannot count beyond 256.
    dtype = common_dtype(weight)
    if mask is None:
        position = torch.arange(size, device=weight.device, dtype=dtype) / max(size - 1, 1)
        return piecewise_linear(weight, position.view(1, 1, size))
    mask = mask.to(dtype)
    ahead = mask.cumsum(-1) - mask
    position = ahead / (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
    return (piecewise_linear(weight, position) * mask).to(weight.dtype)


def _neural_sort(values: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Relaxed descending permutation matrices (..., N, N): rows are ranks, columns elements."""
    size, dtype = values.shape[-1], values.dtype
    # In float32 at least, and the distances without a product that autocast would round: small differences of large
    # logits decide.
    values = values.to(common_dtype(values))
    present = torch.ones_like(values) if mask is None else mask.to(values.dtype).expand_as(values)
    rank = torch.arange(1, size + 1, device=values.device, dtype=values.dtype)
    scale = present.sum(-1, keepdim=True) + 1 - 2 * rank
    distance = ((values.unsqueeze(-1) - values.unsqueeze(-2)).abs() * present.unsqueeze(-2)).sum(-1)
    logits = (scale.unsqueeze(-1) * values.unsqueeze(-2) - distance.unsqueeze(-2)) / temperature
    # A finite fill: rows of an empty set must not become NaN.
    logits = logits.masked_fill(present.unsqueeze(-2) == 0, torch.finfo(logits.dtype).min)
    return logits.softmax(-1).to(dtype)


def element_weights(weight: Tensor, permutation: Tensor, mask: Tensor | None) -> Tensor:
    """Weight of each element in each feature, (C, B, N): the rank's weight, brought to the element's place."""
    if permutation.is_floating_point():  # relaxed: (B, C, rank, element)
        relaxed = permutation.transpose(0, 1)
        # Ranks run over present elements first, whatever their places.
        ranked = None if mask is None else mask.sort(dim=-1, descending=True).values.unsqueeze(0)
        rank_weights = _rank_weights(weight, permutation.shape[-1], ranked)
        return (rank_weights.unsqueeze(-2) @ relaxed).squeeze(-2)
    order = permutation.permute(2, 0, 1)
    ranked = None if mask is None else mask.expand_as(order).gather(-1, order)
    rank_weights = _rank_weights(weight, order.shape[-1], ranked)
    weights, rank_weights = rank_weights.new_empty(order.shape), rank_weights.expand_as(order)
    # In place, an unbatched tensor cannot take what vmap has batched.
    return (weights.scatter if in_transform() else weights.scatter_)(-1, order, rank_weights)


def sort_pool(
    elements: Tensor, weight: Tensor, mask: Tensor | None = None, *, relaxed: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Pool a set into a vector: featurewise sort, piecewise-linear weights, sum.

    .. math:: y_c = \sum_{k=0}^{n-1} f_c\!\left(\frac{k}{n-1}\right) x_{(k),c}

    where :math:`x_{(k),c}` is the (k+1)-th largest value of feature c over the set's own n elements, and
    :math:`f_c` is :func:`piecewise_linear`. A set of one element has r = 0; an empty set pools to zeros.

    A float mask makes the set's size soft: with :math:`m` in rank order and :math:`n = \sum_k m_k`, the
    element of rank k has weight :math:`m_k f_c(r_k)` at :math:`r_k = s_k / (n-1)`, :math:`s_k = \sum_{j<k} m_j`,
    where the divisor is at least 1 and r at most 1. For masks of zeros and ones this is the formula above, exactly.

    Args:
        elements: Shape ``(B, N, C)``.
        weight: Values of the C functions at their knots, shape ``(C, P+1)``.
        mask: Bool or float in [0, 1], shape ``(B, N)``. Elements of mask 0 do not exist: neither their values
            nor NaNs in them are seen.
        relaxed: Temperature of NeuralSort, which replaces the sort by a differentiable relaxation of O(N^2)
            memory per feature; None sorts exactly. Needs a bool mask.

    Returns:
        The pooled vectors, shape ``(B, C)``, and the permutation that :func:`sort_unpool` takes: indices of
        shape ``(B, N, C)`` (row k holds the place of the element of rank k) or, relaxed, doubly indexed
        matrices ``(B, C, N, N)`` (rows are ranks).

    Raises:
        ValueError: If a shape is wrong, ``relaxed`` is not positive, or it comes with a float mask.
        TypeError: If a dtype is wrong.

    Example:
        >>> first_is_largest = torch.tensor([[1.0, 0.0, 0.0]])  # f(0) = 1, f(1/2) = f(1) = 0
        >>> sort_pool(torch.tensor([[[3.0], [7.0], [5.0]]]), first_is_largest)[0]
        tensor([[7.]])

    Source: Zhang et al., FSPool (ICLR 2020), section 3; NeuralSort: Grover et al. (ICLR 2019), equation 5.
    """
    check_shape("elements", elements, "B", "N", "C")
    check_shape("weight", weight, elements.shape[-1], "P+1")
    check_mask("mask", mask, elements.shape[:2])
    values = elements.movedim(-1, 0)
    if mask is not None:
        values = values.masked_fill(mask == 0, 0)
    if relaxed is not None:
        check_positive("relaxed", relaxed)
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError("`mask` must be bool when `relaxed` is given: relaxed ranks have no soft size")
        permutation = _neural_sort(values, relaxed, mask).transpose(0, 1)
    else:
        # Stable, so that of two equal elements the same one comes first in every feature: which gradients they get, as
        # a multiset, must not depend on the order of the elements.
        permutation = argsort_descending(values).permute(1, 2, 0)
    # Flattened, the backward pass makes the small pooled gradient contiguous, and so gives the large one contiguous.
    pooled = (values.flatten(0, 1) * element_weights(weight, permutation, mask).flatten(0, 1)).sum(-1)
    return pooled.view(values.shape[:2]).t().contiguous(), permutation


def sort_unpool(vector: Tensor, permutation: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Spread a vector over a set in the order of an earlier :func:`sort_pool`.

    .. math:: x_{(k),c} = f_c\!\left(\frac{k}{n-1}\right) y_c

    Args:
        vector: Shape ``(B, C)``.
        permutation: As returned by :func:`sort_pool`, shape ``(B, N, C)`` or ``(B, C, N, N)``.
        weight: Values of the C functions at their knots, shape ``(C, P+1)``.
        mask: The mask that the pool was given, shape ``(B, N)``; absent elements become zeros.

    Returns:
        Shape ``(B, N, C)``.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is wrong.

    Example:
        >>> x = torch.tensor([[[3.0], [7.0], [5.0]]])
        >>> _, permutation = sort_pool(x, torch.ones(1, 2))
        >>> sort_unpool(torch.tensor([[1.0]]), permutation, torch.tensor([[1.0, 0.0]])).squeeze()
        tensor([0.0000, 1.0000, 0.5000])

    Source: Zhang et al., FSPool (ICLR 2020), section 3.4.
    """
    check_shape("vector", vector, "B", "C")
    batch, channels = vector.shape
    check_shape("weight", weight, channels, "P+1")
    if not isinstance(permutation, Tensor):
        raise TypeError(f"`permutation` must be a tensor, got {permutation!r}")
    if permutation.is_floating_point():
        check_shape("permutation", permutation, batch, channels, "N", permutation.shape[-1])
    elif permutation.dim() != 3 or permutation.shape[::2] != (batch, channels):
        raise ValueError(f"`permutation` must have shape ({batch}, N, {channels}), got {tuple(permutation.shape)}")
    elif permutation.dtype != torch.long:
        raise TypeError(f"`permutation` must be int64, or floating if relaxed, got {permutation.dtype}")
    size = permutation.shape[-1] if permutation.is_floating_point() else permutation.shape[1]
    check_mask("mask", mask, (batch, size))
    weights = element_weights(weight, permutation, mask)
    return (vector.t().unsqueeze(-1) * weights).permute(1, 2, 0)
