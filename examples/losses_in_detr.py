"""Set losses without DSPN: a small DETR-like detector, with queries, trained by DETR's criterion.

Images hold one to five coloured rectangles over noise. Eight queries predict a box and a colour each, or no object.
At the end, the average precision on unseen images, and for one image which query was matched to which rectangle.

    python examples/losses_in_detr.py          # one to two minutes on two CPU cores
    python examples/losses_in_detr.py --quick
"""

import argparse
import time
from importlib.util import find_spec

if missing := [name for name in ("setpred", "torch", "tqdm") if find_spec(name) is None]:
    raise SystemExit(f'not installed: {", ".join(missing)}; in the checkout of setpred: pip install -e ".[examples]"')

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from setpred import HungarianLoss, matched_cross_entropy, on_channels, sum_costs
from setpred.functional import box_convert, box_cost, probability_cost
from setpred.metrics import average_precision

SIZE, MOST, QUERIES, CHANNELS, BATCH = 32, 5, 8, 64, 32
COLOURS = ("red", "green", "blue")
CLASSES = len(COLOURS) + 1  # the last is "no object"
BOX, CLASS = slice(0, 4), slice(4, 4 + CLASSES)  # channels of an element: left, top, right, bottom, then the classes

# What is charged for a matched box, and what boxes are matched by.
charged = sum_costs(on_channels("l1", BOX, weight=20.0), on_channels(box_cost, BOX, weight=2.0))
matched_by = sum_costs(charged, on_channels(probability_cost, CLASS))
box_loss = HungarianLoss(charged, matching_cost=matched_by, presence="none", average_over="batch")


def criterion(
    boxes: Tensor, logits: Tensor, target_boxes: Tensor, colours: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss, and which rectangle each query is matched to (B, 8)."""
    pred, target = torch.cat([boxes, logits], -1), torch.cat([target_boxes, F.one_hot(colours, CLASSES)], -1)
    of_boxes, matching = box_loss(pred, target, target_mask=mask, return_matching=True)
    return of_boxes + matched_cross_entropy(logits, colours, matching), matching


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw images (B, 3, 32, 32), boxes of rectangles (B, 5, 4), their colours (B, 5) and which exist (B, 5).

    Later ones lie on top.
    """
    mask = torch.arange(MOST) < torch.randint(1, MOST + 1, (count, 1), generator=generator)
    size = 0.15 + 0.25 * torch.rand(count, MOST, 2, generator=generator)
    corner = (1 - size) * torch.rand(count, MOST, 2, generator=generator)
    colour = torch.randint(len(COLOURS), (count, MOST), generator=generator)
    boxes = torch.cat([corner, corner + size], -1)
    images = 0.3 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    place = (torch.arange(SIZE) + 0.5) / SIZE
    for k in range(MOST):
        left, top, right, bottom = (edge.view(-1, 1) for edge in boxes[:, k].unbind(-1))
        inside_x, inside_y = (left < place) & (place < right), (top < place) & (place < bottom)
        inside = inside_y.unsqueeze(2) & inside_x.unsqueeze(1) & mask[:, k].view(-1, 1, 1)
        paint = torch.eye(3)[colour[:, k]].view(-1, 3, 1, 1)
        images = torch.where(inside.unsqueeze(1), 0.7 * paint + 0.3 * images, images)
    return images, boxes, colour, mask


class Detector(nn.Module):
    """Convolutions, then queries that attend to the feature map and to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        )
        self.positions = nn.Parameter(0.1 * torch.randn((SIZE // 4) ** 2, CHANNELS))
        self.queries = nn.Parameter(torch.randn(QUERIES, CHANNELS))
        layer = nn.TransformerDecoderLayer(CHANNELS, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=2)
        self.head = nn.Linear(CHANNELS, 4 + CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict boxes (B, 8, 4) and logits of classes (B, 8, 4)."""
        features = self.backbone(images).flatten(2).mT + self.positions
        queries = self.decoder(self.queries.expand(len(images), -1, -1), features)
        boxes, logits = self.head(queries).split([4, CLASSES], -1)
        return box_convert(boxes.sigmoid(), "cxcywh", "xyxy"), logits


def describe(box: Tensor, colour: Tensor) -> str:
    """Format one rectangle."""
    return f"{COLOURS[int(colour)]:5} [{' '.join(f'{edge:.2f}' for edge in box.tolist())}]"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate and print; return the figures."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and images: shows that it runs")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: 1500, with --quick 20)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and images (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    steps, test_images = (20, 50) if options.quick else (1500, 1000)
    steps = options.steps or steps

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = Detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    start = time.perf_counter()
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for step in bar:
            images, *targets = make_images(BATCH, generator)
            value, _ = criterion(*model(images), *targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    seconds = time.perf_counter() - start

    model.eval()
    with torch.inference_mode():
        images, *targets = make_images(test_images, torch.Generator().manual_seed(10_000 + options.seed))
        boxes, logits = model(images)
        value, matching = criterion(boxes, logits, *targets)
        score, colour = logits.softmax(-1)[..., :-1].max(-1)
        target_boxes, target_colour, mask = targets
        thresholds = (0.5, 0.75)
        precision = average_precision(
            boxes,
            score,
            target_boxes,
            target_mask=mask,
            pred_class=colour,
            target_class=target_colour,
            thresholds=thresholds,
        )
    print(f"\nQueries and the rectangles that they are matched to, in the first of {test_images} unseen images:")
    for query, column in enumerate(matching[0].tolist()):
        partner = describe(target_boxes[0, column], target_colour[0, column]) if column >= 0 else "-"
        found = describe(boxes[0, query], colour[0, query])
        print(f"  query {query}  score {score[0, query]:.2f}  {found}  ->  {partner}")
    figures = {"loss": value.item(), "seconds": seconds}
    figures |= {f"AP{100 * t:.0f}": ap for t, ap in zip(thresholds, precision.tolist(), strict=True)}
    print("\n" + ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items()))
    return figures


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
