"""
Where set losses pull
=====================

A set loss is a force on points. Here the points of a cloud go where it pulls them; nothing else is trained. The target
are two rings, of which the small one has 90 points, the large one 30.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from setpred import chamfer_loss, earth_mover_distance, hungarian_loss, sinkhorn_loss, sliced_wasserstein_loss
from setpred.plot import draw_points, draw_trajectory


def ring(points: int, radius: float, x: float) -> Tensor:
    """Points on a circle, (N, 2)."""
    angle = torch.arange(points) * 2 * torch.pi / points
    return torch.stack([x + radius * angle.cos(), radius * angle.sin()], -1)


torch.manual_seed(0)
target = torch.cat([ring(90, 0.35, -1.2), ring(30, 0.8, 0.6)]).unsqueeze(0)
start = torch.tensor([-0.4, 0.0]) + 0.1 * torch.randn(1, 120, 2)

# %%
# The same 300 steps of Adam on each loss; then the exact earth mover's distance that is left, and how many of the
# points went to the small ring.

LOSSES = {
    "Chamfer": lambda cloud: chamfer_loss(cloud, target, cost="mse", presence="none"),
    "sliced Wasserstein": lambda cloud: sliced_wasserstein_loss(cloud, target, presence="none"),
    "Sinkhorn": lambda cloud: sinkhorn_loss(cloud, target, cost="mse", presence="none"),
    "Hungarian": lambda cloud: hungarian_loss(cloud, target, cost="mse", presence="none"),
}
figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex=True, sharey=True)
for axis, (name, loss) in zip(axes.flat, LOSSES.items(), strict=True):
    cloud = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([cloud], 0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    steps = []
    for _ in range(300):
        optimizer.zero_grad()
        loss(cloud).backward()
        optimizer.step()
        schedule.step()
        steps.append(cloud[0].detach().clone())
    left, small = earth_mover_distance(cloud, target).item(), int((steps[-1][:, 0] < -0.6).sum())
    print(f"{name:18}  earth mover's distance {left:.4f}, on the small ring {small}")

    draw_trajectory(torch.stack(steps), ax=axis, color="0.8", linewidth=0.4, markersize=0)
    draw_points(target[0], ax=axis, s=14, facecolors="none", edgecolors="0.5", linewidths=0.6)
    draw_points(steps[-1], ax=axis, s=7, color="C0", zorder=3)
    axis.set_title(name)
    axis.set_axis_off()
plt.show()

# %%
# The Chamfer loss asks each target for one near point, and each point for one near target: most points go to the
# nearest part of a ring and stay there, on top of each other. The others compare how much is where. The Hungarian loss
# gives each target a point of its own; the sliced one sorts along random lines, the Sinkhorn one smooths the matching,
# and both leave some points a little off.
