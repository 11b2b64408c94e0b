"""Quickstart: handwritten digits as point sets, through a vector and back, by four decoders.

Each digit is the set of its bright pixels' coordinates. An encoder squeezes it into one vector; a decoder makes the
set again. DSPN and iDSPN decode by gradient descent on the set; the MLP and the LSTM emit a list. Every decoder trains
for about the same time on one core; the table at the end shows the error on digits that none of them saw.

    python examples/quickstart.py            # about two minutes on two CPU cores
    python examples/quickstart.py --seeds 3  # mean and spread over three seeds
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from common.digits import Sets, load_digit_sets
from common.parallel import side_by_side
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
SHOWN_STEPS = (0, 1, 2, 4, 8, 15, 80)


class Recipe(NamedTuple):
    """How one decoder is made, trained and evaluated; settings were chosen on the validation digits."""

    name: str
    decoder: Callable[[PooledEncoder, int], nn.Module]
    steps: int  # so that each decoder trains for about as long
    lr: float
    all_inner_steps: bool = False
    evaluation: Mapping[str, Any] = MappingProxyType({})  # options of the decoder's forward


# Inner descent: lr 100 where the papers have 25 and 1, since the vector is short and FSPool divides by the set's size;
# and more steps in evaluation than in training, since the descent goes on to improve.
def make_dspn(encoder: PooledEncoder, size: int) -> nn.Module:
    """The DSPN paper's decoder."""
    return DSPNDecoder.paper(encoder, set_size=size, channels=2, lr=100.0)


def make_idspn(encoder: PooledEncoder, size: int) -> nn.Module:
    """The iDSPN recipe, with fewer steps and a fixed initial set."""
    return DSPNDecoder.idspn(encoder, set_size=size, channels=2, lr=100.0, iters=15, momentum=0.8, anchor=0.0)


def make_mlp(encoder: PooledEncoder, size: int) -> nn.Module:
    """The usual decoder: one output for each coordinate of each point."""
    return MLPDecoder(encoder.out_channels, size, 2, HIDDEN)


def make_lstm(encoder: PooledEncoder, size: int) -> nn.Module:
    """Point after point."""
    return LSTMDecoder(encoder.out_channels, size, 2, HIDDEN)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("DSPN", make_dspn, steps=240, lr=0.01, all_inner_steps=True, evaluation={"iters": 80}),
        Recipe("iDSPN", make_idspn, steps=330, lr=0.007, evaluation={"iters": 80}),
        Recipe("MLP", make_mlp, steps=3600, lr=0.005),
        Recipe("LSTM", make_lstm, steps=1900, lr=0.005),
    )
}


def make_loss(recipe: Recipe, encoder: nn.Module) -> Loss:
    """Hungarian loss of the prediction, or averaged over all inner steps; an autoencoder needs no other term."""
    loss = DSPNLoss(encoder, HungarianLoss(), steps="all" if recipe.all_inner_steps else "last")
    return lambda prediction, target, mask: loss(prediction, target, mask)


def hungarian_error(prediction: SetPrediction, target: Tensor, mask: Tensor) -> Tensor:
    """Huber distance over x, y and mask of the best one-to-one matching."""
    error: Tensor = HungarianLoss()(prediction.elements, target, prediction.mask, mask)
    return error


def make_model(recipe: Recipe, size: int) -> Autoencoder:
    """Encoder and decoder for sets of up to `size` points."""
    encoder = PooledEncoder(2, LATENT, HIDDEN)
    return Autoencoder(encoder, recipe.decoder(encoder, size))


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
    data = load_digit_sets()
    test = Sets(*(part[:32] for part in data.test)) if run.quick else data.test
    model = make_model(recipe, data.train.elements.shape[1])
    steps = 3 if run.quick else recipe.steps
    seconds = train(
        model,
        data.train,
        make_loss(recipe, model.encoder),
        steps=steps,
        batch_size=BATCH_SIZE,
        lr=recipe.lr,
        seed=run.seed,
        name=f"{run.name:5} seed {run.seed}",
        bar_position=bar_position,
    )
    error = evaluate(model, test, hungarian_error, **recipe.evaluation)
    return Result(error, seconds, steps, model.count_parameters(), model.state_dict())


def draw(states: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Draw targets, the inner steps of iDSPN, and the other predictions, for some digits that none has seen."""
    test = load_digit_sets().test
    sets = Sets(test.elements[:6], test.mask[:6])
    columns = {"target": (sets.elements, sets.mask)}
    for name in ("iDSPN", *(name for name in states if name != "iDSPN")):
        recipe = RECIPES[name]
        model = make_model(recipe, sets.elements.shape[1])
        model.load_state_dict(states[name])
        model.eval()
        with torch.inference_mode():
            if name == "iDSPN":
                steps = model(*sets, **recipe.evaluation, record=True).trajectory
                columns |= {f"{name} $Y_{{{t}}}$": (steps.elements[t], steps.mask[t]) for t in SHOWN_STEPS}
            else:
                elements, mask, _ = model(*sets, **recipe.evaluation)
                columns[name] = elements, mask
    rows = [[(elements[i], mask[i]) for elements, mask in columns.values()] for i in range(len(sets.elements))]
    draw_set_grid(rows, list(columns), path)


def main(arguments: list[str] | None = None) -> None:
    """Train side by side on the machine's cores, report and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each decoder from seeds 0..N-1")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, not what it learns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--out", type=Path, default=Path("out/quickstart"), metavar="DIR", help="where the picture goes"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")

    runs = [Run(name, seed, options.quick) for seed in range(options.seeds) for name in RECIPES]
    results = dict(zip(runs, side_by_side(perform, runs), strict=True))
    figures = {}
    for name in RECIPES:
        own = [result for run, result in results.items() if run.name == name]
        figures[name] = {
            "hungarian_error": [result.error for result in own],
            "training_seconds": [result.seconds for result in own],
            "training_steps": own[0].steps,
            "parameters": own[0].parameters,
        }
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "digits.png"
    draw({name: results[Run(name, 0, options.quick)].state for name in RECIPES}, picture)
    header = ["decoder", "Hungarian error, held-out digits", "parameters", "training steps", "training seconds"]
    rows = [
        [
            name,
            mean_and_spread(figure["hungarian_error"]),
            f"{figure['parameters']:,}",
            f"{figure['training_steps']:,}",
            mean_and_spread(figure["training_seconds"], 0),
        ]
        for name, figure in figures.items()
    ]
    print(table(header, rows))
    print(f"picture: {picture}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
