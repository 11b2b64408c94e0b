"""
From one digit to another
=========================

Handwritten digits as sets of points: the places of the bright pixels, of which there are more or fewer. An autoencoder
makes a vector of each. Between the vectors of two digits lie others, and the decoder says which sets these stand for.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from setpred import DSPNDecoder, HungarianLoss, PooledEncoder, pad_sets
from setpred.plot import draw_points

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)
bright = images > images.mean((1, 2), keepdim=True)
elements, present = pad_sets([image.nonzero().flip(1) / 7 for image in bright])
print(f"{len(elements)} digits of {present.sum(1).min()} to {present.sum(1).max()} points")

# %%
# An encoder and a decoder, with nothing set, trained on all digits but the last 300.

STEPS = 200
torch.manual_seed(0)
encoder = PooledEncoder(2, 128, 128)
decoder = DSPNDecoder.recommended(encoder, set_size=elements.shape[1], channels=2)
loss = HungarianLoss()
optimizer = torch.optim.Adam(decoder.parameters(), 0.007)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for _ in range(STEPS):
    rows = torch.randint(len(elements) - 300, (32,))
    points, mask, _ = decoder(encoder(elements[rows], present[rows].float()))
    value = loss(points, elements[rows], mask, present[rows])
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    schedule.step()

decoder.eval()
elements, present, target = elements[-300:], present[-300:], digits.target[-300:]
with torch.inference_mode():
    points, mask, _ = decoder(encoder(elements, present.float()))
right = ((mask > 0.5).sum(1) == present.sum(1)).float().mean()
print(f"held-out digits: Hungarian error {loss(points, elements, mask, present):.5f}, {right:.0%} have the right size")

# %%
# Now from a 3 to an 8 and so on, along the straight line between their vectors. Left and right are held-out digits,
# encoded and decoded; what is between never was a digit.


def first(digit: int) -> Tensor:
    """Vector (1, 128) of the first held-out example of a digit."""
    row = [int((target == digit).argmax())]
    return encoder(elements[row], present[row].float())


pairs = [(3, 8), (1, 7), (6, 0)]
figure, axes = plt.subplots(len(pairs), 7, figsize=(8, 3.9), sharex=True, sharey=True)
for row, (start, end) in zip(axes, pairs, strict=True):
    with torch.inference_mode():
        z = torch.lerp(first(start), first(end), torch.linspace(0, 1, 7).unsqueeze(1))
        points, mask, _ = decoder(z, starts=4)
    for axis, *digit in zip(row, points, mask, strict=True):
        draw_points(*digit, ax=axis, s=24, color="C0", linewidths=0)
        axis.set(xlim=(-0.1, 1.1), ylim=(1.1, -0.1))
        axis.set_axis_off()
plt.show()

# %%
# No pixel is faded in or out, as between two images: points move. Those that come or go are faint, and near the upper
# left corner. That is where absent rows are: padding is zero, and this loss, with ``presence="feature"``, asks absent
# rows to be as padding is.
