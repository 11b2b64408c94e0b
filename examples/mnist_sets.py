"""MNIST digits as point sets, through a vector and back: the DSPN paper's first experiment.

A digit is the set of its pixels above the mean. A set encoder makes a vector of it, and a decoder makes the set again.

    python examples/mnist_sets.py                       # scikit-learn's 8x8 digits, nothing to download
    python examples/mnist_sets.py --data DIR            # DIR/MNIST/raw holds MNIST's files (needs torchvision)
    python examples/mnist_sets.py --data DIR --decoder mlp
    python examples/mnist_sets.py --evaluate out/mnist_sets-dspn-0/best.pt

The figure is the paper's: Chamfer distance with the Huber loss over x, y and mask, a mean over all rows, padding
included, and over digits; the paper's table shows it times 1,000.
"""

import argparse
from pathlib import Path

from common.batches import Batch, Splits
from common.decoders import DESCENT, Loss, evaluation_descent, make_decoder, make_loss
from common.engine import Predictions, Scores, run
from common.mnist import LARGEST, load_point_sets
from common.models import EncodedTarget, SetPredictor
from common.plots import draw_set_grid
from common.report import table

from setpred import ChamferLoss, PooledEncoder, chamfer_loss

SMALL_DIGITS = 32  # points of the largest of scikit-learn's digits


class MnistSets:
    """The experiment, for the engine."""

    name = "mnist_sets"
    description = __doc__
    eval_steps = (10,)
    lr = 0.01
    selection = "chamfer"
    largest = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the data and the sizes of the networks."""
        group = parser.add_argument_group("data and model")
        group.add_argument("--data", type=Path, metavar="DIR", help="MNIST's files; default: scikit-learn's digits")
        group.add_argument(
            "--latent", type=int, default=256, help="size of the vector; default: 256 (published script: 64)"
        )
        group.add_argument("--width", type=int, default=256, help="hidden units of encoder and baselines; default: 256")

    def data(self, options: argparse.Namespace) -> Splits:
        """Load the digits."""
        return load_point_sets(options.data, quick=options.quick)

    def build(self, options: argparse.Namespace) -> tuple[SetPredictor, Loss]:
        """Make the autoencoder; DSPN decodes with the encoder itself."""
        encoder = PooledEncoder(2, options.latent, options.width)
        size = SMALL_DIGITS if options.data is None else LARGEST
        decoder = make_decoder(options, encoder, latent=options.latent, set_size=size, channels=2, width=options.width)
        model = SetPredictor(EncodedTarget(encoder), decoder, evaluation_descent(options))
        return model, make_loss(options, encoder, ChamferLoss(), repr_weight=0)

    def score(self, predictions: Predictions) -> dict[str, float]:
        """Compute the paper's metric."""
        elements, mask, target, target_mask = predictions
        return {"chamfer": chamfer_loss(elements, target, mask, target_mask).item()}

    def source(self, options: argparse.Namespace) -> str:
        """Name the data."""
        return "scikit-learn's digits, not MNIST" if options.data is None else f"MNIST files in {options.data}"

    def report(self, scores: Scores, options: argparse.Namespace) -> str:
        """Make the table."""
        rows = [[steps, f"{1000 * score['chamfer']:.3f}"] for steps, score in scores.items()]
        return table(["inner steps", "Chamfer x 1000"], rows)

    def draw(self, model: SetPredictor, batch: Batch, options: argparse.Namespace) -> None:
        """Draw targets and predictions, for DSPN with its inner steps."""
        columns = {"target": (batch.elements, batch.mask)}
        if options.decoder in DESCENT:
            most = max(options.eval_steps)
            shown = sorted(t for t in {0, 1, 2, 3, 5, *options.eval_steps} if t <= most)
            columns |= {f"$Y_{{{t}}}$": prediction for t, prediction in model.after(batch, shown).items()}
        else:
            columns[options.decoder] = model(batch)[0][:2]
        rows = [
            [(elements[i].cpu(), mask[i].cpu()) for elements, mask in columns.values()] for i in range(len(batch.mask))
        ]
        draw_set_grid(rows, list(columns), options.out / "sets.png", point=9 if options.data is None else 3)


if __name__ == "__main__":
    run(MnistSets())
