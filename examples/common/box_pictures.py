"""Pictures of boxes over images."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor


def draw_boxes(images: Tensor, columns: Mapping[str, tuple[Tensor, Tensor]], title: str, path: Path) -> None:
    """Draw one image a row and one set of boxes a column; a box is as opaque as its mask.

    Args:
        images: Shape (B, 3, S, S), in [0, 1] or uint8.
        columns: Boxes (B, N, 4), as left, top, right, bottom in [0, 1], and masks (B, N), by the columns' titles.
        title: What the data is.
        path: Where to write the PNG.
    """
    size = images.shape[-1]
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    figure, axes = plt.subplots(
        len(images),
        len(columns),
        figsize=(1.5 * len(columns), 1.5 * len(images) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    colours = plt.get_cmap("tab10").colors
    for row, picture in enumerate(pictures):
        for axis, (name, (boxes, mask)) in zip(axes[row], columns.items(), strict=True):
            axis.imshow(picture, extent=(0, 1, 1, 0), interpolation="nearest" if size < 64 else "bilinear")
            for slot, (box, presence) in enumerate(zip(boxes[row].tolist(), mask[row].tolist(), strict=True)):
                left, top, right, bottom = box
                axis.add_patch(
                    Rectangle(
                        (left, top),
                        right - left,
                        bottom - top,
                        fill=False,
                        linewidth=1.4,
                        edgecolor="white" if name == "target" else colours[slot % 10],
                        alpha=min(max(presence, 0.0), 1.0),
                    )
                )
            axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
