"""Quickstart: handwritten digits as point sets, through a vector and back, by four decoders.

Each digit is the set of its bright pixels' coordinates. An encoder squeezes it into one vector; a decoder makes the
set again. DSPN and iDSPN decode by gradient descent on the set; the MLP and the LSTM emit a list. Each decoder trains for
about the same time; the table at the end shows the error on digits that none of them saw.

    python examples/quickstart.py            # about two minutes on two CPU cores
    python examples/quickstart.py --seeds 3  # mean and spread over three seeds
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common.digits import Sets, load_digit_sets
from common.plots import draw_set_grid
from common.report import mean_and_spread, table
from common.training import Autoencoder, Loss, evaluate, train
from torch import Tensor, nn

from setpred import (
    DSPNDecoder,
    DSPNLoss,
    HungarianLoss,
    LSTMDecoder,
    MLPDecoder,
    PooledEncoder,
    SetPrediction,
)

LATENT = HIDDEN = 128
BATCH_SIZE = 32
LR = 0.005  # the best of 0.001, 0.003, 0.005 on the validation digits for each decoder


class Recipe(NamedTuple):
    """How one decoder is made and trained; `steps` is set so that each takes about as long."""

    name: str
    decoder: Callable[[PooledEncoder, int], nn.Module]
    steps: int
    all_inner_steps: bool = False


# The inner lr is larger than in the papers: FSPool divides by the set's size, and the vector is small.
RECIPES = (
    Recipe(
        "DSPN",
        lambda encoder, size: DSPNDecoder.paper(encoder, set_size=size, channels=2, lr=100.0),
        steps=230,
        all_inner_steps=True,
    ),
    Recipe(
        "iDSPN",
        lambda encoder, size: DSPNDecoder.idspn(encoder, set_size=size, channels=2, lr=100.0, anchor=0.0),
        steps=350,
    ),
    Recipe("MLP", lambda encoder, size: MLPDecoder(LATENT, size, 2, HIDDEN), steps=1800),
    Recipe("LSTM", lambda encoder, size: LSTMDecoder(LATENT, size, 2, HIDDEN), steps=800),
)


def make_loss(recipe: Recipe, encoder: PooledEncoder) -> Loss:
    """Hungarian loss of the prediction, or averaged over all inner steps; an autoencoder needs no other term."""
    loss = DSPNLoss(encoder, HungarianLoss(), steps="all" if recipe.all_inner_steps else "last")
    return lambda prediction, target, mask: loss(prediction, target, mask)


def hungarian_error(prediction: SetPrediction, target: Tensor, mask: Tensor) -> Tensor:
    """Huber distance over x, y and mask of the best one-to-one matching."""
    error: Tensor = HungarianLoss()(prediction.elements, target, prediction.mask, mask)
    return error


def draw(models: dict[str, Autoencoder], data: Sets, path: Path) -> None:
    """Draw targets, the inner steps of iDSPN, and the other predictions, for the first digits of a data set."""
    shown = range(6)
    shown_steps = (0, 1, 2, 4, 8, 20)
    sets = Sets(data.elements[: len(shown)], data.mask[: len(shown)])
    with torch.inference_mode():
        steps = models["iDSPN"](*sets, record=True).trajectory
        others = {name: model(*sets) for name, model in models.items() if name != "iDSPN"}
    rows = [
        [
            (sets.elements[i], sets.mask[i]),
            *((steps.elements[t, i], steps.mask[t, i]) for t in shown_steps),
            *((other.elements[i], other.mask[i]) for other in others.values()),
        ]
        for i in shown
    ]
    draw_set_grid(rows, ["target", *(f"iDSPN $Y_{{{t}}}$" for t in shown_steps), *others], path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, report and draw; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each decoder from seeds 0..N-1")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, not what it learns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), metavar="DIR", help="where the picture goes")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)

    data = load_digit_sets()
    size = data.train.elements.shape[1]
    models: dict[str, Autoencoder] = {}
    figures: dict[str, Any] = {}
    for recipe in RECIPES:
        errors, seconds = [], []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            encoder = PooledEncoder(2, LATENT, HIDDEN)
            model = Autoencoder(encoder, recipe.decoder(encoder, size))
            trained = train(
                model,
                data.train,
                make_loss(recipe, encoder),
                steps=3 if options.quick else recipe.steps,
                batch_size=BATCH_SIZE,
                lr=LR,
                seed=seed,
                name=f"{recipe.name}, seed {seed}",
            )
            errors.append(evaluate(model, data.test, hungarian_error))
            seconds.append(trained.seconds)
            models.setdefault(recipe.name, model)
        figures[recipe.name] = {
            "hungarian_error": errors,
            "seconds": seconds,
            "parameters": model.count_parameters(),
            "steps": 3 if options.quick else recipe.steps,
        }

    picture = options.out / "digits.png"
    draw(models, data.test, picture)
    rows = [
        [
            name,
            mean_and_spread(f["hungarian_error"]),
            f"{f['parameters']:,}",
            str(f["steps"]),
            mean_and_spread(f["seconds"], 0),
        ]
        for name, f in figures.items()
    ]
    print(table(["decoder", "Hungarian error, held-out digits", "parameters", "steps", "training seconds"], rows))
    print(f"picture: {picture}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    main()
