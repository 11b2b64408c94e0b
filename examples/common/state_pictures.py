"""Tables of true and predicted objects beside their images: what is right in green, what is wrong in red."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from common.batches import Batch
from common.scenes import ATTRIBUTES
from setpred import hungarian_loss

NEAR = 0.25  # a position is right within this distance, in the scene's units
RIGHT, WRONG = "#1a7f37", "#cf222e"
ORDER = ("size", "color", "material", "shape")  # as people say them
PLACES = {"position": 0.0, "size": 0.37, "color": 0.51, "material": 0.66, "shape": 0.82}  # in a cell


def describe(element: Tensor) -> dict[str, str]:
    """Name the position and the attributes of an object (18,)."""
    position = " ".join(f"{3 * value:5.2f}" for value in element[:3].tolist())
    words, end = {}, 3
    for name, values in ATTRIBUTES.items():
        words[name] = values[int(element[end : end + len(values)].argmax())]
        end += len(values)
    return {"position": position} | {name: words[name] for name in ORDER}


def draw_states(batch: Batch, columns: Mapping[str, tuple[Tensor, Tensor]], title: str, path: Path) -> None:
    """Draw one image and its table a row; predictions stand beside the true objects that they are matched to.

    Args:
        batch: Images and true states.
        columns: Predicted states (B, N, 18) and masks (B, N), by the columns' titles.
        title: What the data is.
        path: Where to write the PNG.
    """
    assert batch.images is not None
    lines = [max(int(mask.sum()), 1) + 2 for mask in batch.mask]
    figure, axes = plt.subplots(
        len(lines),
        2,
        figsize=(2.2 + 3.4 * (1 + len(columns)), 0.19 * sum(lines) + 0.5),
        gridspec_kw={"width_ratios": [1.9, 3.4 * (1 + len(columns))], "height_ratios": lines},
        squeeze=False,
        layout="constrained",
    )
    shown = {"target": (batch.elements, batch.mask.float()), **columns}
    for i, (image, axis) in enumerate(axes):
        image.imshow(batch.images[i].permute(1, 2, 0).cpu().numpy(), aspect=2 / 3)
        image.set_axis_off()
        axis.set(xlim=(0, len(shown)), ylim=(lines[i] - 0.5, -0.7))
        axis.set_axis_off()
        for column, (name, (elements, mask)) in enumerate(shown.items()):
            axis.text(column, -0.2, name, fontsize=8, weight="bold")
            _draw_cells(axis, column, elements[i].cpu(), mask[i].cpu(), batch.elements[i].cpu(), batch.mask[i].cpu())
    legend = (
        f"position right within {NEAR}; predictions with a mask under 0.5 are missing, those that match none are extra"
    )
    figure.suptitle(f"{title}\n{legend}", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_cells(axis: Axes, column: int, elements: Tensor, mask: Tensor, target: Tensor, target_mask: Tensor) -> None:
    present = mask >= 0.5
    _, matching = hungarian_loss(
        elements[None], target[None], mask[None], target_mask[None], presence="bce", return_matching=True
    )
    partner = {int(t): p for p, t in enumerate(matching[0].tolist()) if t >= 0 and present[p]}
    row = 0
    for t in target_mask.nonzero().flatten().tolist():
        row += 1
        if t not in partner:
            axis.text(column, row, "missing", fontsize=7, color=WRONG, family="monospace")
            continue
        truth, prediction = target[t], elements[partner[t]]
        expected, words = describe(truth), describe(prediction)
        near = 3 * torch.dist(prediction[:3], truth[:3]) <= NEAR
        for name, word in words.items():
            right = bool(near) if name == "position" else word == expected[name]
            colour = "0.2" if column == 0 else RIGHT if right else WRONG
            axis.text(column + PLACES[name] * 0.98, row, word, fontsize=7, color=colour, family="monospace")
    extra = int(present.sum()) - len(partner)
    if extra > 0:
        axis.text(column, row + 1, f"{extra} extra", fontsize=7, color=WRONG, family="monospace")
