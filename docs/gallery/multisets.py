"""
Multisets: equal elements that must part
========================================

A decoder that is equivariant to permutations treats equal elements equally: from two equal elements it can only make
two equal elements. Started from a set of equal elements, it cannot produce anything else. Multisets need less than
that: it must not matter *which* of the two equal ones moves. Sorting breaks the tie, so the gradient of an encoder with
FSPool can part what is equal; that of an encoder with a sum pool cannot.
"""

import matplotlib.pyplot as plt
import torch

from setpred import GradientDescent, PooledEncoder
from setpred.functional import descend
from setpred.plot import draw_points, draw_trajectory

target = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
start = torch.zeros(1, 3, 2)  # three times the same point

figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharex=True, sharey=True)
for axis, pool in zip(axes, ("sum", "fspool"), strict=True):
    torch.manual_seed(0)
    encoder = PooledEncoder(2, 256, 256, pool=pool)
    z = encoder(target)
    with torch.no_grad():
        steps = descend(
            lambda y, e=encoder, z=z: 0.5 * (e(y) - z).square().mean(1),
            start,
            steps=400,
            lr=GradientDescent(1.0, momentum=0.9),
            record=True,
        ).trajectory[:, 0]
    for i, marker in enumerate("o^s"):
        draw_trajectory(steps[:, i : i + 1], ax=axis, marker=marker, markersize=9, alpha=0.7)
    draw_points(target[0], ax=axis, s=160, facecolors="none", edgecolors="0.5")
    axis.set(title=f"pool={pool!r}")
    parted = len(steps[-1].round(decimals=3).unique(dim=0))
    print(f"{pool:7} distinct elements at the end: {parted}")
plt.show()

# %%
# Grey circles are the target, lines the descent of the three elements. The encoders are untrained: this is what the
# pools can do, not what they learned. Hence the learned initial set of :class:`setpred.DSPNDecoder` matters less with
# FSPool than with other pools. With a sum pool, start from distinct elements, which ``init="learned"`` and
# ``init="random"`` both do.
#
# Source: Zhang et al., Multiset-Equivariant Set Prediction with Approximate Implicit Differentiation (ICLR 2022).
