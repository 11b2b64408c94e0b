"""
A decoder without training: the roots of a polynomial
=====================================================

The coefficients of a polynomial are a function of its roots in which their order does not matter: sums of products of
them, by Vieta's formulas. That makes them a set encoder, one that needs no training. To decode its vectors, which are
lists of coefficients, is to find the roots.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

from setpred import DSPNDecoder, HungarianLoss
from setpred.plot import draw_points, draw_trajectory

# %%
# An encoder is any function of elements and mask that can be differentiated twice. Here an element is a complex number,
# as two real ones. One root r after the other makes p(x) (x - r) of the polynomial p(x).


def vieta(roots: Tensor, mask: Tensor | None = None) -> Tensor:
    """Coefficients (B, 2N) of the polynomials with roots (B, N, 2) and leading coefficient 1."""
    real = roots.new_ones(len(roots), 1)
    imaginary = torch.zeros_like(real)
    for root in roots.unbind(1):
        a, b = root.split(1, 1)
        times = F.pad(a * real - b * imaginary, (1, 0)), F.pad(a * imaginary + b * real, (1, 0))
        real, imaginary = F.pad(real, (0, 1)) - times[0], F.pad(imaginary, (0, 1)) - times[1]
    return torch.cat([real[:, 1:], imaginary[:, 1:]], 1)


# %%
# Two hundred polynomials of degree five in double precision, whose roots are normally distributed. The decoder is the
# recommended one; only the number of steps is another.

torch.manual_seed(0)
roots = torch.randn(200, 5, 2, dtype=torch.float64)
z = vieta(roots)
decoder = DSPNDecoder.recommended(vieta, set_size=5, channels=2, mask_clamp=None).eval()
loss = HungarianLoss("mse", presence="none", reduction="none")
with torch.no_grad():
    steps = decoder(z, init=0.1 * torch.randn_like(roots), iters=4000, record=True).trajectory
for step in (0, 40, 400, 4000):
    error = (2 * loss(steps.elements[step], roots)).sqrt()
    print(
        f"after {step:4} steps: off by {error.median():.1e} (median), below 0.01 in {(error < 0.01).float().mean():.0%}"
    )

# %%
# Those that are not there yet have two roots that lie close to each other: where two roots meet, to move them apart
# changes the coefficients but little, so that the descent is slow.

apart = (torch.cdist(roots, roots) + 9 * torch.eye(5)).amin((1, 2))
print(f"distance of the two nearest roots, median: {apart[error < 0.01].median():.2f} where they are found, ", end="")
print(f"{apart[error >= 0.01].median():.2f} where not yet")

# Two whose roots lie apart and whose descent stays near.
shown = (steps.elements.abs().amax((0, 2, 3)) + 9 * (apart < 0.6)).argsort()
figure, axes = plt.subplots(1, 2, figsize=(7, 3.8), sharex=True, sharey=True)
for row, axis in zip(shown[:2], axes, strict=True):
    draw_points(roots[row], ax=axis, s=130, facecolors="none", edgecolors="0.5", linewidths=1.5)
    draw_trajectory(steps.elements[:, row], ax=axis, markersize=6)
    axis.set(xlabel="real part", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
axes[0].set_ylabel("imaginary part")
plt.show()

# %%
# Circles are the roots, lines the descent. To find roots, take ``numpy.roots``, which is exact in microseconds. What
# this shows is what a decoder does: it inverts whatever encoder it is given. Where no encoder is known, one is learned.
