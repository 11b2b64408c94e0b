"""
The responsibility problem
==========================

Turn a square by 90 degrees and it is the same set of four corners. A network that lists the corners must have moved
every one of them to its neighbour's place by then, and since the input is the same again, so must be the output. The
list has to jump somewhere. A continuous network cannot jump, so near that angle it is wrong, however long it trains.
A decoder that searches for the set has no such list to keep.

Both autoencoders below squeeze the set of corners into 32 numbers with the same kind of encoder.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from setpred import DSPNDecoder, HungarianLoss, MLPDecoder, PooledEncoder, hungarian_loss

LATENT = 32


def squares(angle: Tensor) -> Tensor:
    """Corners of squares turned by some angles, (B, 4, 2)."""
    corners = angle.unsqueeze(1) + torch.arange(4) * math.pi / 2
    return torch.stack([corners.cos(), corners.sin()], -1)


def distance(elements: Tensor, target: Tensor) -> Tensor:
    """Root mean square distance between matched corners, one per square."""
    return (2 * hungarian_loss(elements, target, cost="mse", presence="none", reduction="none")).sqrt()


def train(encoder: nn.Module, decoder: nn.Module, steps: int, lr: float) -> None:
    """Train an autoencoder on squares at random angles."""
    parameters = {id(p): p for module in (encoder, decoder) for p in module.parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = HungarianLoss("mse", presence="none")
    for _ in range(steps):
        target = squares(torch.rand(32) * math.pi / 2)
        value = loss(decoder(encoder(target)).elements, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


# %%
# The MLP decoder, with more training steps than it needs: elsewhere on the circle it is nearly exact.

torch.manual_seed(0)
mlp_encoder = PooledEncoder(2, LATENT, 64)
mlp = MLPDecoder(LATENT, 4, 2, 128, mask_clamp=None)
train(mlp_encoder, mlp, steps=800, lr=0.003)

# %%
# DSPN, with nothing tuned. The sets have a fixed size, so no mask is carried.

encoder = PooledEncoder(2, LATENT, 64)
dspn = DSPNDecoder.recommended(encoder, set_size=4, channels=2, mask_clamp=None)
train(encoder, dspn, steps=200, lr=0.01)

# %%
# Now every tenth of a degree: after the 10 inner steps of training, and after more of them.

angle = torch.linspace(0, math.pi / 2, 901)
target = squares(angle)
with torch.no_grad():
    error_mlp = distance(mlp(mlp_encoder(target)).elements, target)
    z = encoder(target)
    error_early, error_late = (distance(dspn(z, iters=iters).elements, target) for iters in (10, 60))

figure, axes = plt.subplots(figsize=(7, 3.6))
degrees = angle.rad2deg()
for error, label, style in (
    (error_early, "DSPN, 10 inner steps", {"linestyle": "", "marker": ".", "markersize": 2.5, "color": "C4"}),
    (error_mlp, "MLP", {"color": "C1"}),
    (error_late, "DSPN, 60 inner steps", {"color": "C0"}),
):
    axes.plot(degrees, error, label=f"{label}: worst {error.max():.2f}, mean {error.mean():.3f}", **style)
axes.set(xlabel="angle of the square (degrees)", ylabel="error (circumradius = 1)")
axes.legend(loc="upper left", bbox_to_anchor=(0, 1.35))
plt.show()

# %%
# The MLP's error is a spike of one angle's width, which a mean over angles hides. Its place is wherever training
# happened to put it; it never goes away. Where the descent was stopped early, some squares are still on their way.
#
# One seed is shown, and training is short.
