"""Nearest neighbours between two sets, both ways at once, without a graph and without the whole cost matrix."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpred._checks import check_mask, check_shape, in_transform
from setpred.functional._batching import in_front
from setpred.functional._precision import common_dtype
from setpred.functional.pairwise import Cost, by_name, check_cost, cost_of_all_pairs

_TREE_NORM = {"mse": 2, "l1": 1}  # the costs that are monotone functions of a norm


def nearest_neighbours(
    x: Tensor, y: Tensor, cost: Cost = "huber", *, x_mask: Tensor | None = None, y_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Find the nearest element of the other set for all elements of two sets.

    .. math:: j(i) = \arg\min_j d(x_i, y_j), \qquad i(j) = \arg\min_i d(x_i, y_j)

    Exact for any cost. Costs are computed in tiles, so that memory grows with N + M, not with N M; on the CPU, large
    sets with few channels are searched by SciPy's k-d tree where the cost is ``"mse"`` or ``"l1"``. No gradient flows.

    Args:
        x: Shape ``(B, N, C)``.
        y: Shape ``(B, M, C)``.
        cost: As in :func:`~setpred.functional.pairwise.pairwise_cost`. Callables are not tiled under ``torch.compile``
            and transforms of ``torch.func``.
        x_mask: Which elements of x exist, bool or float (0 = absent), shape ``(B, N)``.
        y_mask: Which elements of y exist, shape ``(B, M)``.

    Returns:
        Index into y of the nearest of each x, int64 of shape ``(B, N)``, and into x of the nearest of each y,
        shape ``(B, M)``. Where there is none, and for elements that do not exist, the index is 0.

    Raises:
        ValueError: If a shape is wrong, or the name of the cost is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> x, y = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[3.0], [0.5], [9.0]]])
        >>> nearest_neighbours(x, y)
        (tensor([[1, 0]]), tensor([[1, 0, 1]]))

    Source: the two minima of Zhang et al. (NeurIPS 2019), equation 1.
    """
    check_shape("x", x, "B", "N", "C")
    check_shape("y", y, x.shape[0], "M", x.shape[2])
    check_cost("cost", cost)
    check_mask("x_mask", x_mask, x.shape[:2])
    check_mask("y_mask", y_mask, y.shape[:2])
    dtype = common_dtype(x, y)
    x, y, cost = by_name(x.detach().to(dtype), y.detach().to(dtype), cost)
    x_mask, y_mask = (None if mask is None else mask.bool() for mask in (x_mask, y_mask))
    if callable(cost):
        with torch.no_grad():
            return _by_tiles(x, y, cost, x_mask, y_mask)
    found: tuple[Tensor, Tensor] = torch.ops.setpred.nearest_neighbours.default(x, y, cost, x_mask, y_mask)
    return found


def _search(x: Tensor, y: Tensor, cost: str, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if _tree_is_faster(x, y, cost):
        return _by_tree(x, y, cost, x_mask, y_mask)
    return _by_tiles(x, y, cost, x_mask, y_mask)  # type: ignore[arg-type]


# An operator, so that torch.compile does not unroll the loop over tiles.
torch.library.define(
    "setpred::nearest_neighbours",
    "(Tensor x, Tensor y, str cost, Tensor? x_mask, Tensor? y_mask) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("setpred::nearest_neighbours", "CompositeExplicitAutograd")(_search)


@torch.library.register_fake("setpred::nearest_neighbours")  # type: ignore[untyped-decorator]
def _found_shape(
    x: Tensor, y: Tensor, cost: str, x_mask: Tensor | None, y_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.int64), y.new_empty(y.shape[:2], dtype=torch.int64)


@torch.library.register_vmap("setpred::nearest_neighbours")  # type: ignore[untyped-decorator]
def _search_all(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    y: Tensor,
    cost: str,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    dims = (*in_dims[:2], *in_dims[3:])
    batched = in_front(info, dims, x, y, x_mask, y_mask)
    x, y, x_mask, y_mask = (None if side is None else side.flatten(0, 1) for side in batched)  # type: ignore[assignment]
    of_x, of_y = torch.ops.setpred.nearest_neighbours.default(x, y, cost, x_mask, y_mask)
    sizes = batched[0].shape[:2]
    return (of_x.unflatten(0, sizes), of_y.unflatten(0, sizes)), (0, 0)


def _tile(device: torch.device) -> int:
    """Pairs in a tile: what stays in a core's cache; a GPU wants more at once."""
    return 2**18 if device.type == "cpu" else 2**26


def _by_tiles(x: Tensor, y: Tensor, cost: Cost, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, n, m = len(x), x.shape[1], y.shape[1]
    of_x, of_y = x.new_zeros(batch, n, dtype=torch.int64), x.new_zeros(batch, m, dtype=torch.int64)
    if min(batch, n, m) == 0:
        return of_x, of_y
    if torch.compiler.is_compiling() or in_transform():  # which unroll the loop, and cannot write in place
        value = _masked_cost(x, y, cost, x_mask, y_mask)
        (least_of_x, of_x), (least_of_y, of_y) = value.min(2), value.min(1)
        return torch.where(least_of_x < torch.inf, of_x, 0), torch.where(least_of_y < torch.inf, of_y, 0)
    least_of_x, least_of_y = x.new_full((batch, n), torch.inf), x.new_full((batch, m), torch.inf)
    tile = _tile(x.device)
    cols = min(m, max(math.isqrt(tile), tile // n))
    rows = min(n, max(tile // cols, 1))
    sets = max(tile // (rows * cols), 1)
    for s, i, j in product(range(0, batch, sets), range(0, n, rows), range(0, m, cols)):
        at_x = slice(s, s + sets), slice(i, i + rows)
        at_y = slice(s, s + sets), slice(j, j + cols)
        own_masks = [None if mask is None else mask[at] for mask, at in ((x_mask, at_x), (y_mask, at_y))]
        value = _masked_cost(x[at_x], y[at_y], cost, *own_masks)
        for least, of, at, dim, start in ((least_of_x, of_x, at_x, 2, j), (least_of_y, of_y, at_y, 1, i)):
            here, index = value.min(dim)
            closer = here < least[at]
            least[at] = torch.where(closer, here, least[at])
            of[at] = torch.where(closer, index + start, of[at])
    return of_x, of_y


def _masked_cost(x: Tensor, y: Tensor, cost: Cost, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    value = cost_of_all_pairs(x, y, cost)
    if x_mask is not None:
        value = value.masked_fill(~x_mask.unsqueeze(2), torch.inf)
    if y_mask is not None:
        value = value.masked_fill(~y_mask.unsqueeze(1), torch.inf)
    return value


def _tree_is_faster(x: Tensor, y: Tensor, cost: str) -> bool:
    """Measured on uniform points: trees win from about 400 x 400 points of 3 channels, 1000 x 1000 of 8."""
    channels = x.shape[2]
    return (
        cost in _TREE_NORM
        and x.device.type == "cpu"
        and 1 <= channels <= 8
        and x.shape[1] * y.shape[1] >= 20_000 * channels**2
        and bool(x.isfinite().all() & y.isfinite().all())  # trees refuse others
    )


def _by_tree(x: Tensor, y: Tensor, cost: str, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from scipy.spatial import cKDTree  # loaded by those who need it

    points = x.double().numpy(), y.double().numpy()
    present = [
        np.ones(side.shape[:2], bool) if mask is None else mask.numpy()
        for side, mask in zip(points, (x_mask, y_mask), strict=True)
    ]
    found = [np.zeros(side.shape[:2], np.int64) for side in points]
    threads = torch.get_num_threads() if x.numel() + y.numel() > 30_000 else 1

    def search(s: int) -> None:
        place = [np.flatnonzero(side[s]) for side in present]
        if len(place[0]) == 0 or len(place[1]) == 0:
            return
        own = [side[s, at] for side, at in zip(points, place, strict=True)]
        for of in (0, 1):
            tree = cKDTree(own[1 - of])
            _, index = tree.query(own[of], p=_TREE_NORM[cost], workers=max(threads // len(x), 1))
            found[of][s, place[of]] = place[1 - of][index]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(search, range(len(x))))
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])
