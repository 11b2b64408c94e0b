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

from setpred import (
    DSPNDecoder,
    GradientDescent,
    HungarianLoss,
    MLPDecoder,
    PooledEncoder,
    hungarian_loss,
    representation_loss,
)

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
mlp_encoder = PooledEncoder(2, LATENT, 64, scaling="dspn")
mlp = MLPDecoder(LATENT, 4, 2, 128, mask_clamp=None)
train(mlp_encoder, mlp, steps=800, lr=0.003)

# %%
# iDSPN from random initial sets. The sets have a fixed size, so no mask is carried.

encoder = PooledEncoder(2, LATENT, 64, scaling="dspn")
dspn = DSPNDecoder.idspn(
    encoder, set_size=4, channels=2, mask_clamp=None, lr=GradientDescent(15.0, 0.9, nesterov=True, grad_clip=10.0)
)
train(encoder, dspn, steps=200, lr=0.01)

# %%
# Now every tenth of a degree. A descent can end in a local minimum, and for some squares it does. But it tells: the
# representation loss of what it found is then large. So decode from eight starts, and keep of each square the set
# that encodes closest to ``z``. Targets are not looked at.

angle = torch.linspace(0, math.pi / 2, 901)
target = squares(angle)
with torch.no_grad():
    error_mlp = distance(mlp(mlp_encoder(target)).elements, target)
    z = encoder(target)
    tries = [dspn(z, iters=60).elements for _ in range(8)]
    misfit = torch.stack([representation_loss(encoder(y, None), z, kind="mse", reduction="none") for y in tries])
    errors = torch.stack([distance(y, target) for y in tries])
error_one = errors[0]
error_best = errors.gather(0, misfit.argmin(0, keepdim=True))[0]

figure, axes = plt.subplots(figsize=(7, 3.6))
degrees = angle.rad2deg()
for error, label, style in (
    (error_one, "iDSPN, one start", {"linestyle": "", "marker": ".", "markersize": 2.5, "color": "C4"}),
    (error_mlp, "MLP", {"color": "C1"}),
    (error_best, "iDSPN, best of 8 starts", {"color": "C0"}),
):
    axes.plot(degrees, error, label=f"{label}: worst {error.max():.2f}, mean {error.mean():.3f}", **style)
axes.set(xlabel="angle of the square (degrees)", ylabel="error (circumradius = 1)")
axes.legend(loc="upper left", bbox_to_anchor=(0, 1.35))
plt.show()
print(f"squares that one start misses by more than 0.2: {(error_one > 0.2).float().mean():.1%}")

# %%
# The MLP's error is a spike of one angle's width, which a mean over angles hides. Its place is wherever training
# happened to put it; it never goes away. Where a single descent fails, it fails for single squares, and the
# representation loss says for which.
#
# One seed is shown, and training is short.
