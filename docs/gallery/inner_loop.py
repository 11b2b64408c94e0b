"""
What to look at: the inner loop
===============================

With ``record=True`` a decoder keeps every inner step in ``prediction.trajectory``; in training that is differentiated
through all of them, as here, it does so by itself.
Three curves tell most of what can be wrong with the inner learning rate: the representation loss, the gradient norm,
and the error of the set, step by step.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from setpred import DSPNDecoder, DSPNLoss, HungarianLoss, PooledEncoder
from setpred.plot import draw_diagnosis


def rings(count: int) -> Tensor:
    """Circles of 12 points at random places, of random radius, (count, 12, 2)."""
    angle = torch.arange(12) * 2 * torch.pi / 12
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    centre, radius = 0.3 + 0.4 * torch.rand(count, 1, 2), 0.1 + 0.2 * torch.rand(count, 1, 1)
    return centre + radius * circle


# %%
# A short training by the DSPN paper's recipe: 10 inner steps of a fixed learning rate, 25.

encoder = PooledEncoder(2, 32, 64, scaling="dspn")
decoder = DSPNDecoder.paper(encoder, set_size=12, channels=2, mask_clamp=None)
loss = DSPNLoss(encoder, HungarianLoss("mse", presence="none"))
optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
for _ in range(100):
    target = rings(16)
    value = loss(decoder(encoder(target)), target)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

# %%
# Then 30 inner steps on sets that were not trained on, with this learning rate, a smaller and a larger one. ``lr`` and
# ``iters`` are settings, not weights: they may be changed at any time.

decoder.eval()
target = rings(64)
figure, axes = plt.subplots(1, 3, figsize=(10, 3))
for lr in (1.0, 25.0, 250.0):
    decoder.lr = lr
    with torch.no_grad():
        trajectory = decoder(encoder(target), iters=30, record=True).trajectory
        error = HungarianLoss("mse", presence="none", reduction="none")(trajectory.elements, target)
    axes[0].semilogy(trajectory.repr_loss.median(1).values, label=f"lr={lr:g}")
    axes[1].semilogy(trajectory.grad_norm.median(1).values)
    axes[2].semilogy(error.median(1).values)
for axis, title in zip(axes, ("representation loss", "inner gradient norm", "set error"), strict=True):
    axis.set(xlabel="inner step", title=title)
axes[0].legend()
plt.show()

# %%
# Read them like this:
#
# - **Too small**: the representation loss is still falling steadily where the loop ends.
# - **Right**: it falls by orders of magnitude within the steps that you train with, then flattens.
# - **Too large**: it stays high or goes up and down, and the gradient norm does not shrink.
#
# An encoder adapts its scale to the inner learning rate that it is trained with, so that a trained network forgives a
# wrong one more than this picture of a changed one suggests. Look at the curves of your own training.

# %%
# :meth:`setpred.DSPNDecoder.diagnose` judges them for you. Of the smallest learning rate it says:

decoder.lr = 1.0
# sphinx_gallery_thumbnail_number = 2
diagnosis = decoder.diagnose(encoder(target), target, set_loss=HungarianLoss("mse", presence="none"))
print(diagnosis)
draw_diagnosis(diagnosis)
plt.show()
