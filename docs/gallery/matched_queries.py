"""
Which query is matched to which box
===================================

A detection head makes more queries than there are objects. Each object is given to one of them, all others are charged
as "no object". Who is given to whom depends on what is matched by: that need not be what is charged.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from setpred import linear_assignment, on_channels, sum_costs
from setpred.functional import box_cost, matched_pairs, probability_cost
from setpred.plot import draw_boxes

# %%
# Three objects of two classes, and seven queries: two near each object, one far from all. An element is a box (left,
# top, right, bottom), then the logits of both classes and of "no object".

target = torch.tensor([[[0.5, 0.6, 2.5, 2.4], [3.2, 1.8, 5.2, 3.4], [5.8, 0.4, 7.6, 2.2]]])
classes = torch.tensor([[0, 1, 0]])
near = target.repeat_interleave(2, 1)
shift = torch.tensor([[0.15, -0.1], [-0.3, 0.35], [0.1, 0.15], [-0.35, -0.25], [-0.2, -0.15], [0.3, 0.35]])
pred = torch.cat([near + shift.repeat(1, 2), torch.tensor([[[3.3, 0.3, 4.3, 1.0]]])], 1)
label = torch.tensor([[0, 0, 0, 1, 0, 0, 1]])  # of the queries that are nearest to the second object, one errs
logits = 3 * F.one_hot(label, 3).float()

pred, target = torch.cat([pred, logits], 2), torch.cat([target, F.one_hot(classes, 3)], 2)

# %%
# Matched by overlap alone, by overlap and class, and each object to two queries.

BOX, CLASS = slice(0, 4), slice(4, None)
overlap = on_channels(box_cost, BOX)
both = sum_costs(overlap, on_channels(probability_cost, CLASS))
matchings = {
    "by box": linear_assignment(overlap(pred, target)),
    "by box and class": linear_assignment(both(pred, target)),
    "two queries per object": linear_assignment(both(pred, target), rows_per_column=2),
}

# %%
# Objects are filled, queries are outlines; the colour is the class. Lines are matched pairs, and dashed queries are
# charged as "no object".


def centre(element: torch.Tensor) -> torch.Tensor:
    """Middle of a box."""
    return element[:4].view(2, 2).mean(0)


figure, axes = plt.subplots(2, 2, figsize=(8, 4.4), sharex=True, sharey=True)
axes[1, 1].set_axis_off()
for axis, (title, matching) in zip(axes.flat, matchings.items(), strict=False):
    draw_boxes(target[0, :, BOX], ax=axis, facecolors=[f"C{c}" for c in classes[0]], alpha=0.25, linewidths=0)
    styles = ["-" if j >= 0 else (0, (2, 3)) for j in matching[0]]
    draw_boxes(pred[0, :, BOX], ax=axis, edgecolors=[f"C{c}" for c in label[0]], linestyles=styles)
    _, row, column = matched_pairs(matching)
    for i, j in zip(row.tolist(), column.tolist(), strict=True):
        ends = torch.stack([centre(pred[0, i]), centre(target[0, j])])
        axis.plot(*ends.T, color="0.5", linewidth=2)
        axis.plot(*ends[0], "o", color=f"C{label[0, i]}", markersize=6)
        axis.plot(*ends[1], "s", color=f"C{classes[0, j]}", markersize=5)
    axis.set(title=title, xlim=(0, 8.1), ylim=(4, 0))
    axis.set_axis_off()
plt.show()

# %%
# The second object has two queries. The better box says the wrong class: matched by boxes alone, it is told to change
# its class; matched by both, the other one is told to move a little. Where each object has two queries, both are told.
