"""Pictures of boxes over images."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from setpred.plot import draw_boxes


def draw_box_grid(images: Tensor, columns: Mapping[str, tuple[Tensor, Tensor]], title: str, path: Path) -> None:
    """Draw one image a row and one set of boxes a column; a box is as opaque as its mask.

    Args:
        images: Shape (B, 3, S, S), in [0, 1] or uint8.
        columns: Boxes (B, N, 4), as left, top, right, bottom in [0, 1], and masks (B, N), by the columns' titles.
        title: What the data is.
        path: Where to write the PNG.
    """
    figure, axes = plt.subplots(
        len(images),
        len(columns),
        figsize=(1.5 * len(columns), 1.5 * len(images) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, image in enumerate(images):
        for axis, (name, (boxes, mask)) in zip(axes[row], columns.items(), strict=True):
            style = {"edgecolors": "white"} if name == "target" else {}
            draw_boxes(boxes[row], mask[row].nan_to_num(), image=image, normalized=True, ax=axis, **style)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
