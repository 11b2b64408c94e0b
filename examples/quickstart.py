"""Quickstart: handwritten digits as point sets, through a vector and back, by three decoders.

Each digit is the set of its bright pixels' coordinates. An encoder squeezes it into one vector; a decoder makes the
set again. DSPN, of which nothing is set but the steps in evaluation, decodes by gradient descent on the set; the MLP
and the LSTM emit a list. Every decoder trains for about the same time on one core; the table at the end shows the
error on digits that none of them saw.

    python examples/quickstart.py            # about two minutes on two CPU cores
    python examples/quickstart.py --seeds 3  # mean and spread over three seeds

This file is the whole program: copy it and change it.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

if missing := [name for name in ("matplotlib", "setpred", "sklearn", "torch", "tqdm") if find_spec(name) is None]:
    raise SystemExit(f'not installed: {", ".join(missing)}; in a checkout of setpred: pip install -e ".[examples]"')

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from setpred import DSPNDecoder, HungarianLoss, LSTMDecoder, MLPDecoder, PooledEncoder, pad_sets

LATENT = HIDDEN = 128
BATCH_SIZE = 32
SHOWN_STEPS = (0, 1, 2, 4, 8, 20, 80)


class Sets(NamedTuple):
    """Padded sets."""

    elements: Tensor  # (S, N, 2), x and y in [0, 1], y downwards
    mask: Tensor  # (S, N), bool


def load_sets() -> tuple[Sets, Sets]:
    """Each 8x8 image as the set of its pixels above its own mean: 1,200 to train on, 300 to test on.

    Settings were chosen on the 297 that are left.
    """
    images = torch.tensor(load_digits().images, dtype=torch.float32)
    bright = images > images.mean(dim=(1, 2), keepdim=True)
    points = [image.nonzero().flip(1) / (image.shape[0] - 1) for image in bright]
    elements, mask = pad_sets(points)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    test, train = order[297:597], order[597:]
    return Sets(elements[train], mask[train]), Sets(elements[test], mask[test])


class Recipe(NamedTuple):
    """How one decoder is made, trained and evaluated."""

    decoder: Callable[[PooledEncoder, int], nn.Module]  # of the encoder and the size of the sets
    steps: int  # so that each decoder trains for about as long
    lr: float
    evaluation: Mapping[str, Any] = MappingProxyType({})  # options of the decoder's forward


RECIPES = {
    # In evaluation with more steps than in training (10) and by default (40), since the descent goes on to improve.
    "DSPN": Recipe(
        lambda encoder, size: DSPNDecoder.recommended(encoder, set_size=size, channels=2),
        steps=650,
        lr=0.007,
        evaluation={"iters": 80},
    ),
    # The usual decoder: one output for each coordinate of each point.
    "MLP": Recipe(lambda encoder, size: MLPDecoder(encoder.out_channels, size, 2, HIDDEN), steps=3600, lr=0.005),
    # Point after point.
    "LSTM": Recipe(lambda encoder, size: LSTMDecoder(encoder.out_channels, size, 2, HIDDEN), steps=1900, lr=0.005),
}


class Autoencoder(nn.Module):
    """A set encoder and a decoder; in DSPN the decoder holds the same encoder."""

    def __init__(self, recipe: Recipe, size: int) -> None:
        super().__init__()
        self.encoder = PooledEncoder(2, LATENT, HIDDEN)
        self.decoder = recipe.decoder(self.encoder, size)

    def forward(self, sets: Sets, **options: object) -> Any:
        """Encode and decode sets; options go to the decoder."""
        return self.decoder(self.encoder(*sets), **options)


def train(model: Autoencoder, data: Sets, recipe: Recipe, seed: int, bar: tqdm) -> None:
    """Train with Adam, its learning rate decayed along a cosine, on batches drawn without replacement."""
    loss = HungarianLoss()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    batches: list[Tensor] = []
    for _ in range(recipe.steps):
        if not batches:
            batches = list(torch.randperm(len(data.mask), generator=generator).split(BATCH_SIZE))
        rows = batches.pop()
        batch = Sets(data.elements[rows], data.mask[rows])
        value = loss(model(batch), batch.elements, target_mask=batch.mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.5f}", refresh=False)
        bar.update()


@torch.inference_mode()
def evaluate(model: Autoencoder, data: Sets, recipe: Recipe) -> float:
    """Huber distance over x, y and mask of the best one-to-one matching, a mean over sets."""
    prediction = model.eval()(data, **recipe.evaluation)
    return HungarianLoss()(prediction, data.elements, target_mask=data.mask).item()


class Run(NamedTuple):
    """One decoder, trained from one seed."""

    name: str
    seed: int
    quick: bool


class Result(NamedTuple):
    """What came of a run."""

    error: float
    seconds: float
    steps: int
    parameters: int
    state: dict[str, Tensor]


def perform(run: Run, bar_position: int) -> Result:
    """Train and evaluate one decoder on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    recipe = RECIPES[run.name]
    training, test = load_sets()
    if run.quick:
        recipe, test = recipe._replace(steps=3), Sets(*(part[:32] for part in test))
    model = Autoencoder(recipe, training.elements.shape[1])
    start = time.perf_counter()
    with tqdm(total=recipe.steps, desc=f"{run.name:5} seed {run.seed}", unit="step", position=bar_position) as bar:
        train(model, training, recipe, run.seed, bar)
    seconds = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Result(evaluate(model, test, recipe), seconds, recipe.steps, parameters, model.state_dict())


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


def draw(states: Mapping[str, dict[str, Tensor]], path: Path) -> None:
    """Draw targets, the inner steps of DSPN, and the other predictions, for some digits that none has seen."""
    sets = Sets(*(part[:6] for part in load_sets()[1]))
    columns = {"target": (sets.elements, sets.mask)}
    for name in states:
        recipe = RECIPES[name]
        model = Autoencoder(recipe, sets.elements.shape[1])
        model.load_state_dict(states[name])
        with torch.inference_mode():
            if name == "DSPN":
                steps = model.eval()(sets, **recipe.evaluation, record=True).trajectory
                columns |= {f"{name} $Y_{{{t}}}$": (steps.elements[t], steps.mask[t]) for t in SHOWN_STEPS}
            else:
                elements, mask, _ = model.eval()(sets, **recipe.evaluation)
                columns[name] = elements, mask
    figure = Figure((1.05 * len(columns), 1.05 * len(sets.mask) + 0.3), layout="constrained")
    axes = figure.subplots(len(sets.mask), len(columns), squeeze=False)
    for column, (title, cells) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=8)
        for axis, points, presence in zip(column, *cells, strict=True):
            axis.scatter(*points.T, s=9, c="black", alpha=presence.float().clamp(0, 1), linewidths=0)
            axis.set(xlim=(-0.15, 1.15), ylim=(1.15, -0.15), xticks=[], yticks=[], aspect="equal")
            axis.spines[:].set_color("0.8")
    figure.savefig(path, dpi=150)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Format as 'mean ± standard deviation', the latter only for several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a Markdown table whose columns line up."""
    cells = [["decoder", "Hungarian error, held-out digits", "parameters", "training steps", "training seconds"]]
    for name, figure in figures.items():
        error, seconds = mean_and_spread(figure["hungarian_error"], 5), mean_and_spread(figure["training_seconds"], 0)
        cells.append([name, error, f"{figure['parameters']:,}", f"{figure['training_steps']:,}", seconds])
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
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, not what it learns")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="train each decoder from seeds 0..N-1 (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there (default: nowhere)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the picture goes (default: out/quickstart, with --quick out/quickstart-quick)",
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    picture = (options.out or Path(f"out/quickstart{'-quick' if options.quick else ''}")) / "digits.png"
    for file in filter(None, (picture, options.json)):  # what cannot be written is said before the training
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(str(error))
        if file.is_dir():
            parser.error(f"{file} is a directory")

    runs = [Run(name, seed, options.quick) for seed in range(options.seeds) for name in RECIPES]
    results = side_by_side(runs)
    figures = {}
    for name in RECIPES:
        own = [result for run, result in results.items() if run.name == name]
        figures[name] = {
            "hungarian_error": [result.error for result in own],
            "training_seconds": [result.seconds for result in own],
            "training_steps": own[0].steps,
            "parameters": own[0].parameters,
        }
    draw({name: results[Run(name, 0, options.quick)].state for name in RECIPES}, picture)
    print(table(figures))
    print(f"picture: {picture}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
