"""Pictures of point sets."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from setpred.plot import draw_points


def draw_set_grid(
    rows: Sequence[Sequence[tuple[Tensor, Tensor]]], titles: Sequence[str], path: Path, *, point: float = 9
) -> None:
    """Draw one set a cell: points in [0, 1]^2, y downwards, as dark as their mask.

    Args:
        rows: Elements (N, 2) and mask (N,) of each cell, row by row.
        titles: One title a column.
        path: Where to write the PNG.
        point: Area of a point.
    """
    size = (1.05 * len(titles), 1.05 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False, layout="constrained")
    for row, cells in zip(axes, rows, strict=True):
        for axis, (elements, mask) in zip(row, cells, strict=True):
            draw_points(elements, mask.nan_to_num(), ax=axis, s=point, color="black", linewidths=0)
            axis.set(xlim=(-0.15, 1.15), ylim=(1.15, -0.15), xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_color("0.8")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
