"""
Three set losses on the same two sets
=====================================

Hungarian, Chamfer and Sinkhorn losses differ in who is compared with whom. The lines below are the pairs that each one
charges, and the numbers are what it makes of them.
"""

import matplotlib.pyplot as plt
import torch

from setpred import chamfer_loss, hungarian_loss, sinkhorn_loss
from setpred.functional import nearest_neighbours

# %%
# Three targets; of four predictions, two crowd around one target, and one target is missed by all.

target = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]])
pred = torch.tensor([[[0.1, 0.1], [-0.1, 0.15], [1.1, 0.8], [1.0, 1.2]]])

hungarian, matching = hungarian_loss(pred, target, presence="none", return_matching=True)
to_target, to_pred = nearest_neighbours(pred, target)
chamfer = chamfer_loss(pred, target, presence="none")
sinkhorn = sinkhorn_loss(pred, target, presence="none")

pairs = {
    f"hungarian: {hungarian:.3f}": [(i, j) for i, j in enumerate(matching[0].tolist()) if j >= 0],
    f"chamfer: {chamfer:.3f}": list(enumerate(to_target[0].tolist()))
    + [(i, j) for j, i in enumerate(to_pred[0].tolist())],
}
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharex=True, sharey=True)
for axis, (title, matched) in zip(axes, pairs.items(), strict=True):
    for i, j in matched:
        axis.plot(*torch.stack([pred[0, i], target[0, j]]).T, color="0.5", linewidth=1)
    axis.scatter(*target[0].T, s=60, label="target")
    axis.scatter(*pred[0].T, s=40, marker="s", label="prediction")
    axis.set(title=title, aspect="equal")
axes[0].legend(loc="upper right", fontsize=8)
plt.show()
print(f"sinkhorn: {sinkhorn:.3f}")

# %%
# The Hungarian loss matches one to one, so that somebody must answer for the missed target. The Chamfer loss lets
# several elements share a neighbour: it costs less to compute on large sets, and does not punish crowding. The Sinkhorn
# loss is a smoothed matching without an assignment problem to solve.
