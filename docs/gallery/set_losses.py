"""
Three set losses on the same two sets
=====================================

Hungarian, Chamfer and Sinkhorn losses differ in who is compared with whom. All three are sums over pairs: of the pair's
cost, times a weight. The lines below are those pairs, and how thick a line is says how much its pair weighs, on one
scale for all three.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from setpred import chamfer_loss, hungarian_loss, sinkhorn_loss
from setpred.functional import nearest_neighbours, pairwise_cost
from setpred.plot import draw_points

# %%
# Three targets; of four predictions, two crowd around one target, and one target is missed by all.

target = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]])
pred = torch.tensor([[[0.1, 0.15], [-0.1, 0.3], [0.9, 0.7], [1.15, 0.65]]])
options = {"cost": "mse", "presence": "none"}
rows, columns = torch.arange(4), torch.arange(3)

# One to one: the three matched pairs weigh the same.
hungarian, matching = hungarian_loss(pred, target, **options, return_matching=True)
matched = matching[0] >= 0
one_to_one = torch.zeros(4, 3)
one_to_one[rows[matched], matching[0, matched]] = 1 / 3

# To the nearest, from both sides: each side's weights add up to 1.
chamfer = chamfer_loss(pred, target, **options)
to_target, to_pred = nearest_neighbours(pred, target, "mse")
nearest = torch.zeros(4, 3)
nearest[rows, to_target[0]] += 1 / 4
nearest[to_pred[0], columns] += 1 / 3

# By a plan: each prediction has a mass of 1/4 to give, each target takes 1/3.
sinkhorn, transport = sinkhorn_loss(pred, target, **options, epsilon=0.05, return_transport=True)

# %%
# Added up, weights times costs are the loss. In the Sinkhorn loss an entropy and the transport of each set onto itself
# come to it, so that equal sets cost 0.

cost = pairwise_cost(pred, target, "mse")[0]
panels: dict[str, tuple[Tensor, Tensor]] = {
    "Hungarian": (hungarian, one_to_one),
    "Chamfer": (chamfer, nearest),
    "Sinkhorn": (sinkhorn, transport.plan[0]),
}
figure, axes = plt.subplots(2, 2, figsize=(7, 4.4), sharex=True, sharey=True)
*drawn, legend = axes.flat
for axis, (name, (loss, weight)) in zip(drawn, panels.items(), strict=True):
    print(f"{name:9}  loss {loss:.3f}  weights times costs {(weight * cost).sum():.3f}")
    for i, j in (weight > 0.003).nonzero().tolist():
        ends = torch.stack([pred[0, i], target[0, j]])
        axis.plot(*ends.T, color="0.6", linewidth=14 * weight[i, j].item(), solid_capstyle="round", zorder=1)
    draw_points(target[0], ax=axis, s=110, facecolors="none", edgecolors="C0", linewidths=2, label="target", zorder=3)
    draw_points(pred[0], ax=axis, s=45, marker="s", color="C1", label="prediction", zorder=2)
    axis.set(title=f"{name}: {loss:.3f}", xlim=(-0.4, 2.3), ylim=(-0.25, 1.25))
legend.legend(*drawn[0].get_legend_handles_labels(), loc="center")
legend.set_axis_off()
plt.show()

# %%
# The Hungarian loss matches one to one, so that somebody must answer for the missed target, and somebody is left over.
# The Chamfer loss lets several elements share a neighbour: it costs less to compute on large sets, and does not punish
# crowding. The Sinkhorn loss is a smoothed matching without an assignment problem to solve: all of both sides must be
# moved, also where their sizes differ.
