"""
Solids: sets of different sizes in space
========================================

A tetrahedron has 4 corners, an octahedron 6, a cube 8. Turned at random, each becomes one vector, and of the vector the
decoder makes the corners again: where they are, and how many. One batch holds all three, padded to 8 rows with a mask.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from setpred import DSPNDecoder, HungarianLoss, PooledEncoder, pad_sets
from setpred.plot import draw_points, draw_trajectory

signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
SOLIDS = {
    "tetrahedron": signs[signs.prod(1) > 0] / math.sqrt(3),
    "octahedron": torch.cat([torch.eye(3), -torch.eye(3)]),
    "cube": signs / math.sqrt(3),
}
CORNERS, PRESENT = pad_sets(list(SOLIDS.values()))


def turned(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Corners (B, 8, 3) of solids of some kinds, turned at random, and which rows hold one (B, 8)."""
    turn = torch.linalg.qr(torch.randn(len(kind), 3, 3)).Q
    return CORNERS[kind] @ turn, PRESENT[kind].float()


# %%
# An encoder and a decoder, with nothing set; trained as an autoencoder for some seconds.

STEPS = 400
torch.manual_seed(0)
encoder = PooledEncoder(3, 128, 128)
decoder = DSPNDecoder.recommended(encoder, set_size=8, channels=3)
loss = HungarianLoss()
optimizer = torch.optim.Adam(decoder.parameters(), 0.003)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for _ in range(STEPS):
    corners, present = turned(torch.randint(3, (32,)))
    elements, mask, _ = decoder(encoder(corners, present))
    value = loss(elements, corners, mask, present)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    schedule.step()

# %%
# A hundred solids of each kind, turned as none was before: is their size right, and how far are the corners off? A
# bool mask of the predicted ones leaves out of the matching who is absent.

decoder.eval()
figure = plt.figure(figsize=(8, 3.2))
for kind, (name, solid) in enumerate(SOLIDS.items()):
    corners, present = turned(torch.full((100,), kind))
    with torch.inference_mode():
        elements, mask, steps = decoder(encoder(corners, present), record=True)
    found = mask > 0.5
    right = found.sum(1) == len(solid)
    rows = elements[right][found[right]].view(-1, len(solid), 3)
    error = HungarianLoss("mse", presence="none", reduction="none")(rows, corners[right, : len(solid)])
    distance = (3 * error).sqrt()
    print(f"{name:11} size right: {right.float().mean():.0%}  corners off by {distance.mean():.3f} of the radius")

    # The descent of one of them, and as edges the pairs of corners that are nearest to each other.
    axis = figure.add_subplot(1, 3, kind + 1, projection="3d")
    draw_trajectory(steps.elements[:, 0], steps.mask[:, 0], ax=axis, color="0.6", linewidth=0.7, markersize=0)
    points = elements[0, found[0]]
    draw_points(points, ax=axis, s=45, color="C1", depthshade=False)
    apart = torch.cdist(points, points).fill_diagonal_(math.inf)
    for i, j in (apart < 1.2 * apart.min()).nonzero().tolist():
        axis.plot(*points[[i, j]].T, color="C0", linewidth=2)
    axis.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(-0.8, 0.8), title=name)
    axis.set_box_aspect(None, zoom=1.2)
    axis.set_axis_off()
plt.show()

# %%
# Grey lines are the ways of the corners from random places; rows that end absent have faded. Nobody told the decoder
# that there are three kinds of solids: the vectors hold it.
