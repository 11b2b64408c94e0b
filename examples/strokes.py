"""Strokes: an image of a Chinese character becomes the set of its strokes, by three decoders.

Each stroke is a curve of five points, in no order. A small convolutional network makes a vector of the image; a decoder
makes 1 to 12 strokes of the vector. DSPN, of which nothing is set but four starts in evaluation, decodes by gradient
descent on the set; the MLP and the LSTM emit a list. Every decoder trains for the same seconds of one core; the table
at the end is of characters that none of them saw.

    npm pack hanzi-writer-data && tar xzf hanzi-writer-data-*.tgz
    python examples/strokes.py --data package             # about ten minutes on two CPU cores
    python examples/strokes.py --data package --seeds 3   # mean and spread over three seeds

The characters are of Make Me a Hanzi, derived from Arphic's fonts, under the Arphic Public License. This file is the
whole program: copy it and change it.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

if missing := [name for name in ("matplotlib", "setpred", "torch", "tqdm") if find_spec(name) is None]:
    raise SystemExit(f'not installed: {", ".join(missing)}; in a checkout of setpred: pip install -e ".[examples]"')

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from torch import Tensor, nn
from tqdm import tqdm

from setpred import DSPNDecoder, HungarianLoss, LSTMDecoder, MLPDecoder, PooledEncoder, StandardScaler
from setpred.metrics import AveragePrecision

STROKES, POINTS = 12, 5  # the most strokes of a character, points of a stroke
CHANNELS = 2 * POINTS
SIDE = 64  # of the images, in pixels
LATENT = HIDDEN = 128
BATCH_SIZE = 32
TESTED = 500  # the first, the next as many are left for choosing settings
THRESHOLDS = (0.2, 0.1, 0.05, 0.025)  # distances of strokes, in widths of the image
SHOWN_STEPS = (0, 1, 2, 4, 8, 16, 40)
SHOWN = 8  # characters
MOST_SHOWN = 6  # strokes of a character in the pictures
COLOURS = [f"C{k}" for k in range(10)] + ["black", "navy"]


class Characters(NamedTuple):
    """Images, and the strokes in each."""

    images: Tensor  # (S, 1, 64, 64), float32 in [0, 1], 1 = ink
    strokes: Tensor  # (S, 12, 10): x1, y1, ..., x5, y5 in [0, 1], y downwards
    mask: Tensor  # (S, 12), bool

    def __getitem__(self, rows: Any) -> "Characters":  # type: ignore[override]
        """Take some characters."""
        return Characters(self.images[rows], self.strokes[rows], self.mask[rows])


def load_characters(root: Path) -> Characters:
    """Read all characters of at most 12 strokes, in a fixed random order."""
    arrays = root / "strokes.npz"
    if arrays.exists():
        with np.load(arrays) as file:
            images, strokes, counts = (torch.from_numpy(file[name]) for name in ("images", "strokes", "counts"))
    elif files := sorted(path for path in root.glob("*.json") if len(path.stem) == 1):
        images, strokes, counts = read_outlines(files)
    else:
        raise SystemExit(
            f"--data: {root} has no characters; to get them: npm pack hanzi-writer-data && "
            "tar xzf hanzi-writer-data-*.tgz, then --data package"
        )
    present = torch.arange(STROKES) < counts.unsqueeze(1)
    return Characters(images.unsqueeze(1).float() / 255, strokes.float(), present)


def read_outlines(files: Sequence[Path]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the outlines of hanzi-writer-data, and space five points evenly along the middle of each stroke."""
    images, strokes, counts = [], [], []
    figure = Figure((1, 1), dpi=SIDE)
    axis = figure.add_axes((0, 0, 1, 1))
    canvas = FigureCanvasAgg(figure)
    for file in tqdm(files, desc="drawing", unit="character"):
        character = json.loads(file.read_text())
        if len(character["medians"]) > STROKES:
            continue
        axis.clear()
        axis.set(xlim=(0, 1024), ylim=(-124, 900))
        axis.set_axis_off()
        for outline in character["strokes"]:
            axis.add_patch(PathPatch(as_path(outline), facecolor="black", linewidth=0))
        canvas.draw()
        images.append(255 - np.asarray(canvas.buffer_rgba())[..., 0])
        rows = np.zeros((STROKES, CHANNELS), np.float32)
        for row, median in zip(rows, character["medians"], strict=False):
            row[:] = evenly_spaced(np.array(median, float)).ravel()
        strokes.append(rows)
        counts.append(len(character["medians"]))
    order = np.random.default_rng(0).permutation(len(counts))
    return tuple(torch.from_numpy(np.stack(part)[order]) for part in (images, strokes, counts))  # type: ignore[return-value]


def as_path(outline: str) -> Outline:
    """Make matplotlib's path of an SVG path of M, L, Q, C and Z."""
    codes = {"M": [Outline.MOVETO], "L": [Outline.LINETO], "Q": [Outline.CURVE3] * 2, "C": [Outline.CURVE4] * 3}
    vertices: list[tuple[float, float]] = []
    kinds: list[int] = []
    for letter, numbers in re.findall(r"([MLQCZ])([^MLQCZ]*)", outline):
        values = [float(number) for number in numbers.split()]
        points = list(zip(values[::2], values[1::2], strict=True))
        vertices += points or [(0.0, 0.0)]
        kinds += codes[letter] * (len(points) // len(codes[letter])) if points else [Outline.CLOSEPOLY]
    return Outline(vertices, kinds)


def evenly_spaced(median: np.ndarray) -> np.ndarray:
    """Place five points along a polyline at equal distances, in [0, 1] with y downwards."""
    length = np.concatenate([[0], np.hypot(*np.diff(median, axis=0).T).cumsum()])
    at = np.linspace(0, length[-1], POINTS)
    x, y = (np.interp(at, length, coordinate) for coordinate in median.T)
    return np.stack([x, 900 - y], 1) / 1024


def stroke_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Distance of strokes (B, N, 10) and (B, M, 10) for all pairs (B, N, M): the mean of their points' distances.

    A stroke has a direction: the one that ends where the other begins is not near.
    """
    pairs = pred.unsqueeze(2) - target.unsqueeze(1)
    return pairs.unflatten(-1, (POINTS, 2)).norm(dim=-1).mean(-1)


class Recipe(NamedTuple):
    """How one decoder is made, trained and evaluated."""

    decoder: Callable[[StandardScaler], nn.Module]
    lr: float  # of Adam; chosen from 0.0003, 0.001 and 0.003 on the validation characters (examples/panel.py)
    evaluation: Mapping[str, Any] = MappingProxyType({})  # options of the decoder's forward


def dspn(scaler: StandardScaler) -> DSPNDecoder:
    """Make the decoder as it is recommended."""
    encoder = PooledEncoder(CHANNELS, LATENT, HIDDEN)
    return DSPNDecoder.recommended(encoder, set_size=STROKES, channels=CHANNELS, scaler=scaler)


RECIPES = {
    # Of four descents from random starts, the one that comes nearest to the vector.
    "DSPN": Recipe(dspn, lr=3e-3, evaluation={"starts": 4}),
    # The usual decoder: one output for each coordinate of each stroke.
    "MLP": Recipe(lambda scaler: MLPDecoder(LATENT, STROKES, CHANNELS, HIDDEN, scaler=scaler), lr=1e-3),
    # Stroke after stroke.
    "LSTM": Recipe(lambda scaler: LSTMDecoder(LATENT, STROKES, CHANNELS, HIDDEN, scaler=scaler), lr=3e-3),
}


class StrokePredictor(nn.Module):
    """A backbone that makes a vector of an image, and a set decoder."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 32, 2), (32, 64, 2), (64, 96, 2), (96, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (SIDE // 16) ** 2, LATENT))
        self.scaler = StandardScaler(CHANNELS)  # of the strokes' coordinates; the decoder works in its units
        self.decoder = recipe.decoder(self.scaler)

    def forward(self, images: Tensor, **options: object) -> Any:
        """Predict the strokes in images; options go to the decoder."""
        return self.decoder(self.backbone(images), **options)


def batches(data: Characters, seed: int) -> Iterator[Characters]:
    """Draw batches without replacement, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data.mask), generator=generator).split(BATCH_SIZE):
            yield data[rows]


def train(model: StrokePredictor, data: Characters, lr: float, seed: int, seconds: float, bar: tqdm) -> int:
    """Train for some processor time with Adam, its learning rate decayed along a cosine; returns the steps."""
    model.scaler.fit(data.strokes, data.mask)
    loss = HungarianLoss(scaler=model.scaler)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    start, used, steps = time.process_time(), 0.0, 0
    for batch in batches(data, seed):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * used))
        strokes, mask, _ = model(batch.images)
        value = loss(strokes, batch.strokes, mask, batch.mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        steps += 1
        before, used = used, min((time.process_time() - start) / seconds, 1)
        bar.set_postfix(loss=f"{value.item():.4f}", step=steps, refresh=False)
        bar.update(round(seconds * used) - round(seconds * before))
        if used >= 1:
            break
    return steps


@torch.inference_mode()
def predict(model: StrokePredictor, images: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Predict strokes and their presence for many images."""
    model.eval()
    elements, masks = zip(*(model(part, **options)[:2] for part in images.split(100)), strict=True)
    return torch.cat(elements), torch.cat(masks)


def evaluate(model: StrokePredictor, data: Characters, recipe: Recipe) -> list[float]:
    """Compute the average precision of strokes at each threshold."""
    metric = AveragePrecision(stroke_distance, thresholds=THRESHOLDS, largest=False)
    metric.update(*predict(model, data.images, **recipe.evaluation), data.strokes, target_mask=data.mask)
    precisions: list[float] = metric.compute().tolist()
    return precisions


class Run(NamedTuple):
    """One decoder, trained from one seed."""

    name: str
    seed: int
    data: Path
    seconds: float


class Result(NamedTuple):
    """What came of a run."""

    precisions: list[float]
    steps: int
    parameters: int
    state: dict[str, Tensor]


def perform(run: Run, bar_position: int) -> Result:
    """Train and evaluate one decoder on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    recipe, data = RECIPES[run.name], load_characters(run.data)
    model = StrokePredictor(recipe)
    title = f"{run.name:5} seed {run.seed}"
    with tqdm(total=round(run.seconds), desc=title, unit="s", position=bar_position) as bar:
        steps = train(model, data[2 * TESTED :], recipe.lr, run.seed, run.seconds, bar)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Result(evaluate(model, data[:TESTED], recipe), steps, parameters, model.state_dict())


def start_process(lock: Any) -> None:
    """Share one lock, so that progress bars do not write over each other; leave Ctrl-C to the parent."""
    tqdm.set_lock(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def side_by_side(runs: Sequence[Run]) -> dict[Run, Result]:
    """Perform runs in processes, one a core, which for small models beats several threads a run."""
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, len(runs))
    with ProcessPoolExecutor(workers, context, initializer=start_process, initargs=(context.RLock(),)) as pool:
        futures = {run: pool.submit(perform, run, bar_position=i) for i, run in enumerate(runs)}
        try:
            return {run: future.result() for run, future in futures.items()}
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def draw_character(axis: Axes, image: Tensor, strokes: Tensor, presence: Tensor) -> None:
    """Draw strokes over their character, thick where they begin; what is less present is fainter."""
    axis.imshow(1 - 0.25 * image[0], cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    for stroke, shown, colour in zip(strokes.unflatten(-1, (POINTS, 2)), presence.tolist(), COLOURS, strict=True):
        alpha = min(max(float(shown), 0.0), 1.0)
        if alpha > 0.05:
            axis.plot(*stroke.T, color=colour, alpha=alpha, linewidth=1.6, solid_capstyle="round")
            axis.plot(*stroke[0], "o", color=colour, alpha=alpha, markersize=3)
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_grid(data: Characters, columns: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw a row for each character, a column for each version of its strokes."""
    figure = Figure((1.15 * len(columns), 1.15 * len(data.mask) + 0.3), layout="constrained")
    axes = figure.subplots(len(data.mask), len(columns), squeeze=False)
    for column, (title, versions) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, image, strokes, presence in zip(column, data.images, *versions, strict=True):
            draw_character(axis, image, strokes, presence)
    figure.savefig(path, dpi=150)


def draw(states: Mapping[str, dict[str, Tensor]], data: Path, out: Path) -> None:
    """Draw the first test characters of few strokes: true and predicted strokes, and the inner steps of DSPN."""
    test = load_characters(data)[:TESTED]
    few = test[(test.mask.sum(1) <= MOST_SHOWN).nonzero().squeeze(1)[:SHOWN]]
    columns = {"true": (few.strokes, few.mask)}
    for name, state in states.items():
        model = StrokePredictor(RECIPES[name])
        model.load_state_dict(state)
        columns[name] = predict(model, few.images, **RECIPES[name].evaluation)
        if name == "DSPN":
            with torch.inference_mode():
                _, _, steps = model.eval()(few.images, **RECIPES[name].evaluation, record=True)
            descent = {f"$Y_{{{t}}}$": (steps.elements[t], steps.mask[t]) for t in SHOWN_STEPS}
            draw_grid(few, descent | {"true": columns["true"]}, out / "steps.png")
    draw_grid(few, columns, out / "strokes.png")


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Format as 'mean ± standard deviation', the latter only for several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Format a Markdown table of average precisions in per cent, whose columns line up."""
    cells = [["decoder", *(f"AP{threshold:g}" for threshold in THRESHOLDS), "mean", "training steps", "parameters"]]
    for name, own in results.items():
        columns = [*zip(*(result.precisions for result in own), strict=True)]
        columns.append(tuple(statistics.mean(result.precisions) for result in own))
        precisions = [mean_and_spread([100 * value for value in column], 1) for column in columns]
        steps = f"{statistics.mean(result.steps for result in own):,.0f}"
        cells.append([name, *precisions, steps, f"{own[0].parameters:,}"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Train side by side on the machine's cores, report and draw."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds only: shows that it runs")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="train each decoder from seeds 0..N-1 (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="processor time that each decoder trains (default: 270; with --quick 1)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data/hanzi"),
        metavar="DIR",
        help="holds strokes.npz, or is the unpacked npm package hanzi-writer-data (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="pictures and weights (default: out/strokes, with --quick out/strokes-quick)",
    )
    options = parser.parse_args(arguments)
    seconds = options.seconds or (1.0 if options.quick else 270.0)
    if options.seeds < 1 or not 0 < seconds < math.inf:
        parser.error(f"--seeds and --seconds must be positive, got {options.seeds} and {seconds}")
    out = options.out or Path(f"out/strokes{'-quick' if options.quick else ''}")
    try:  # what cannot be read or written is said before the training
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    characters = load_characters(options.data)
    if not (options.data / "strokes.npz").exists():  # drawn once, for all runs
        images, counts = (255 * characters.images[:, 0]).byte().numpy(), characters.mask.sum(1).numpy()
        np.savez_compressed(out / "strokes.npz", images=images, strokes=characters.strokes.numpy(), counts=counts)
        options.data = out

    runs = [Run(name, seed, options.data, seconds) for seed in range(options.seeds) for name in RECIPES]
    results = side_by_side(runs)
    by_decoder = {name: [results[run] for run in runs if run.name == name] for name in RECIPES}
    first = {name: own[0].state for name, own in by_decoder.items()}
    torch.save(first, out / "weights.pt")
    draw(first, options.data, out)
    print(f"{table(by_decoder)}\npictures and weights of seed 0: {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
