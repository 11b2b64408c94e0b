"""The tasks of the panel: sets that are autoencoded, and sets that are predicted from an image."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import clouds, hanzi, mnist, shapes, squares
from common.batches import Batch
from common.digits import load_digit_sets
from common.rendered import kept_scenes
from setpred import chamfer_loss, hungarian_loss
from setpred.metrics import AveragePrecision, box_iou

FEW = 8  # samples of a part, with --quick

Draw = Callable[[int, torch.Generator], Batch]  # makes so many new samples
Score = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, float]]  # of elements, mask, target and its mask


class Data(NamedTuple):
    """What a task is learned from; settings are chosen on `validation`, results come from `test`."""

    train: Batch | Draw
    validation: Batch
    test: Batch


class Sources(NamedTuple):
    """Where data is, or is kept."""

    data: Path
    cache: Path | None
    quick: bool = False

    def limit(self, count: int) -> int:
        """So many samples, or a few."""
        return min(count, FEW) if self.quick else count

    def first(self, batch: Batch, count: int) -> Batch:
        """Take so many samples, or a few."""
        return Batch(*(None if part is None else part[: self.limit(count)] for part in batch))


class Figure(NamedTuple):
    """How a score is shown."""

    heading: str
    factor: float
    digits: int
    larger_is_better: bool = False


class Task(NamedTuple):
    """A kind of sets, and how predictions of them are judged; the first figure is the one that selects."""

    what: str
    set_size: int
    channels: int
    load: Callable[[Sources], Data]
    score: Score
    figures: Mapping[str, Figure]
    images: bool = False  # whether sets are predicted from images; else they are autoencoded
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = hungarian_loss
    batch_size: int = 32
    needs: str | None = None  # a file in --data
    origin: str = ""  # where that comes from

    @property
    def selection(self) -> str:
        """Name of the score that selects."""
        return next(iter(self.figures))

    def missing(self, root: Path) -> str | None:
        """Say what is not there, and how to get it."""
        if self.needs is None or list(root.glob(f"{self.needs}*")):  # it may be gzipped
            return None
        return f"there is no {root / self.needs}: {self.origin.format(root=root)}"


def _digits(sources: Sources) -> Data:
    return Data(*(sources.first(Batch(*part), len(part.mask)) for part in load_digit_sets()))


def _mnist(sources: Sources) -> Data:
    root = sources.data / "mnist10k"
    train, validation = mnist.load_training_digits(root, FEW if sources.quick else None)
    test = mnist.load_test_digits(root, sources.limit(200))
    return Data(train.data, sources.first(validation.data, 50), test.data)


def _squares(sources: Sources) -> Data:
    validation = squares.grid_of_squares(sources.limit(360), offset=0.5)
    return Data(squares.draw_squares, validation, squares.grid_of_squares(sources.limit(1440)))


def _clouds(sources: Sources) -> Data:
    seeds = {200: -1, 500: -2}  # of training they are not negative
    parts = (clouds.draw_clouds(sources.limit(n), torch.Generator().manual_seed(seed)) for n, seed in seeds.items())
    return Data(clouds.draw_clouds, *parts)


def _shapes(sources: Sources) -> Data:
    counts = (12_000, 500, 1000)
    parts = (shapes.draw_shapes(sources.limit(n), torch.Generator().manual_seed(seed)) for seed, n in enumerate(counts))
    return Data(*parts)


def _scenes(sources: Sources, target: str) -> Data:
    parts = {"train": 12_000, "validation": 500, "test": 1000}
    kept = [
        kept_scenes(part, sources.limit(n), size=64, max_objects=5, cache=sources.cache) for part, n in parts.items()
    ]
    return Data(*(Batch(getattr(scenes, target), scenes.mask, scenes.images) for scenes in kept))


def _strokes(sources: Sources) -> Data:
    characters = hanzi.load_characters(sources.data)
    first = [Batch(*(part[begin:end] for part in characters)) for begin, end in ((1000, None), (500, 1000), (0, 500))]
    return Data(*(sources.first(part, len(part.mask)) for part in first))


def _error(name: str, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Score:
    """Make a score of a set loss; what is absent is at 0 in the targets, and so in what was predicted."""

    def score(elements: Tensor, mask: Tensor, target: Tensor, target_mask: Tensor) -> dict[str, float]:
        elements = elements.masked_fill((mask < 0.5).unsqueeze(-1), 0)
        return {name: loss(elements, target, mask, target_mask).item()}

    return score


def _precision(make: Callable[[list[float]], AveragePrecision], thresholds: Mapping[str, float]) -> Score:
    """Make a score of average precisions, with their mean."""

    def score(elements: Tensor, mask: Tensor, target: Tensor, target_mask: Tensor) -> dict[str, float]:
        metric = make(list(thresholds.values()))
        metric.update(elements, mask, target, target_mask=target_mask)
        precisions = metric.compute().tolist()
        return {"mean": sum(precisions) / len(precisions), **dict(zip(thresholds, precisions, strict=True))}

    return score


def _iou(*per_cent: int) -> dict[str, float]:
    return {f"AP{t}": t / 100 for t in per_cent}


def _distances(*distances: float) -> dict[str, float]:
    return {f"AP{d:g}": d for d in distances}


def _per_cent(thresholds: Mapping[str, float]) -> dict[str, Figure]:
    return {"mean": Figure("mean AP, %", 100, 1, True)} | {
        name: Figure(f"{name}, %", 100, 1, True) for name in thresholds
    }


BOXES = _iou(50, 60, 70, 80, 90)
STATES = _distances(float("inf"), 1, 0.5, 0.25, 0.125)
SHAPES = _iou(30, 50, 75)
STROKES = _distances(0.2, 0.1, 0.05, 0.025)

TASKS = {
    "digits": Task(
        "digits of 8 x 8 pixels, autoencoded",
        32,
        2,
        _digits,
        _error("hungarian", hungarian_loss),
        {"hungarian": Figure("Hungarian error x 1e4", 1e4, 3)},
    ),
    "mnist": Task(
        "MNIST digits, autoencoded",
        mnist.LARGEST,
        2,
        _mnist,
        _error("chamfer", chamfer_loss),
        {"chamfer": Figure("Chamfer error x 1000", 1e3, 3)},
        loss=chamfer_loss,
        batch_size=8,
        needs="mnist10k/MNIST/raw/train-images-idx3-ubyte",
        origin="torchvision.datasets.MNIST('{root}/mnist10k', download=True) puts it there",
    ),
    "squares": Task(
        "a rotating square, autoencoded",
        4,
        2,
        _squares,
        squares.score_squares,
        {"worst": Figure("worst corner, circumradii", 1, 5), "mean": Figure("mean corner, circumradii", 1, 5)},
    ),
    "clouds": Task(
        "3-D clouds of 64 points, autoencoded",
        clouds.POINTS,
        3,
        _clouds,
        _error("hungarian", hungarian_loss),
        {"hungarian": Figure("Hungarian error x 1000", 1e3, 2)},
    ),
    "shapes": Task(
        "circles and squares in an image",
        shapes.MOST,
        shapes.CHANNELS,
        _shapes,
        _precision(lambda t: AveragePrecision(shapes.shape_iou, thresholds=t), SHAPES),
        _per_cent(SHAPES),
        images=True,
    ),
    "boxes": Task(
        "boxes of rendered objects in an image",
        5,
        4,
        partial(_scenes, target="boxes"),
        _precision(lambda t: AveragePrecision(box_iou, thresholds=t), BOXES),
        _per_cent(BOXES),
        images=True,
    ),
    "states": Task(
        "states of rendered objects in an image",
        5,
        18,
        partial(_scenes, target="states"),
        _precision(lambda t: AveragePrecision.dspn_state(t), STATES),
        _per_cent(STATES),
        images=True,
    ),
    "strokes": Task(
        "strokes of a Chinese character in an image",
        hanzi.STROKES,
        2 * hanzi.POINTS,
        _strokes,
        _precision(lambda t: AveragePrecision(hanzi.stroke_distance, thresholds=t, largest=False), STROKES),
        _per_cent(STROKES),
        images=True,
        needs=hanzi.FILE,
        origin="of the npm package hanzi-writer-data, unpacked into `package`, it is made by "
        "python examples/strokes.py --quick --data package --out {root}/hanzi",
    ),
}
