"""The moving picture of the landing page: shapes as sets of points, decoded from vectors.

An autoencoder with the recommended decoder is trained for half a minute; then shapes that it was not trained on are
decoded, and every inner step becomes a frame.

    python docs/animation.py   # writes descent-light.webp and descent-dark.webp into docs/_static
"""

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from setpred import DSPNDecoder, HungarianLoss, PooledEncoder

POINTS, LATENT, FRAMES = 24, 256, 40


def outlines() -> Tensor:
    """A ring, a triangle, a square, a star and a moon, each of POINTS points, (5, POINTS, 2)."""
    t = torch.arange(POINTS) / POINTS

    def polygon(corners: Tensor) -> Tensor:
        place = t * len(corners)
        left = place.long()
        a, b = corners[left], corners[(left + 1) % len(corners)]
        return a + (place - left).unsqueeze(1) * (b - a)

    def circle(n: int, radius: Tensor | float = 1.0) -> Tensor:
        angle = 2 * math.pi * torch.arange(n) / n
        return torch.stack([angle.sin(), angle.cos()], -1) * radius

    star = circle(10, torch.tensor([1.0, 0.4] * 5).unsqueeze(1))
    angle = math.pi * (0.25 + 1.5 * 2 * t[: POINTS // 2])
    inner = torch.stack([0.45 + 0.75 * angle.cos(), 0.75 * angle.sin()], -1)
    moon = torch.cat([torch.stack([angle.cos(), angle.sin()], -1), inner])
    return torch.stack([circle(POINTS), polygon(circle(3)), polygon(circle(4)), polygon(star), moon])


def sample(count: int, kind: Tensor | None = None) -> Tensor:
    """Outlines turned, scaled and moved at random, (count, POINTS, 2)."""
    kind = torch.randint(5, (count,)) if kind is None else kind
    angle, size = 2 * math.pi * torch.rand(count), 0.7 + 0.3 * torch.rand(count)
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    return size.view(-1, 1, 1) * outlines()[kind] @ rows + 0.3 * torch.rand(count, 1, 2) - 0.15


def train(steps: int = 600) -> DSPNDecoder:
    """Train an autoencoder of shapes."""
    encoder = PooledEncoder(2, LATENT, 64)
    decoder = DSPNDecoder.recommended(encoder, set_size=POINTS, channels=2, mask_clamp=None)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = HungarianLoss("mse", presence="none")
    for _ in range(steps):
        target = sample(16)
        value = loss(decoder(encoder(target)).elements, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return decoder.eval()


def draw(targets: Tensor, steps: Tensor, path: Path, ink: str, accent: str, paper: str) -> None:
    """Draw the targets (B, N, 2) and the steps (T+1, B, N, 2), a frame a step; the first and the last stay a while."""
    import matplotlib.pyplot as plt
    from PIL import Image

    with plt.rc_context({"figure.facecolor": paper, "text.color": ink, "figure.constrained_layout.use": False}):
        figure, axes = plt.subplots(1, len(targets), figsize=(9, 2.1), dpi=100)
        figure.subplots_adjust(0, 0.1, 1, 1, 0, 0)
        dots = []
        for axis, target in zip(axes, targets, strict=True):
            axis.scatter(*target.T, s=46, facecolors="none", edgecolors=ink, linewidths=0.8, alpha=0.55)
            dots.append(axis.scatter([], [], s=20, color=accent))
            axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
            axis.axis("off")
        caption = figure.text(0.5, 0.02, "", ha="center", fontsize=10)
        frames = []
        for step, sets in enumerate(steps):
            for dot, elements in zip(dots, sets, strict=True):
                dot.set_offsets(elements)
            caption.set_text(f"inner step {step}")
            figure.canvas.draw()
            size = figure.canvas.get_width_height()
            frames.append(Image.frombytes("RGBA", size, bytes(figure.canvas.buffer_rgba())).convert("RGB"))
        plt.close(figure)
    milliseconds = [700, *[100] * (len(steps) - 2), 1500]
    # Of so few colours, without loss is smaller; so it is by a slower method than the default.
    options = {"lossless": True, "method": 6}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)


def render(folder: Path, *, only_if_older: bool = False) -> None:
    """Write the picture for light and for dark pages."""
    paths = [folder / "descent-light.webp", folder / "descent-dark.webp"]
    changed = Path(__file__).stat().st_mtime
    if only_if_older and all(path.exists() and path.stat().st_mtime > changed for path in paths):
        return
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    decoder = train()
    targets = sample(5, torch.arange(5))
    with torch.no_grad():
        steps = decoder(decoder.encoder(targets, None), iters=FRAMES, record=True).trajectory.elements
        error = HungarianLoss("mse", presence="none")
        print(f"animation: mean squared error {error(steps[0], targets):.4f} at first, {error(steps[-1], targets):.6f}")
    draw(targets, steps, paths[0], ink="#3b3f46", accent="#3355bb", paper="#ffffff")
    draw(targets, steps, paths[1], ink="#cfd0d0", accent="#8fabff", paper="#131416")


if __name__ == "__main__":
    render(Path(__file__).parent / "_static")
