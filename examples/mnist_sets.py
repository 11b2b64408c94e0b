"""MNIST digits as point sets, through a vector and back: the DSPN paper's first experiment.

A digit is the set of its pixels above the mean. A set encoder makes a vector of it, and a decoder makes the set again.

    python examples/mnist_sets.py                       # scikit-learn's 8x8 digits, nothing to download
    python examples/mnist_sets.py --data DIR            # DIR/MNIST/raw holds MNIST's files
    python examples/mnist_sets.py --data DIR --decoder mlp
    python examples/mnist_sets.py --evaluate out/mnist_sets-recommended-0/best.pt

The figure is the paper's: Chamfer distance with the Huber loss over x, y and mask, a mean over all rows, padding
included, and over digits; the paper's table shows it times 1,000.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import common.requirements  # noqa: F401
from common.arguments import count
from common.batches import Batch, InMemory
from common.decoders import DESCENT, Loss, make_decoder, make_encoder, make_loss, make_scaler
from common.engine import Predictions, Scores, run
from common.mnist import LARGEST, LARGEST_SMALL, find_images, load_test_digits, load_training_digits
from common.models import EncodedTarget, SetPredictor
from common.plots import draw_set_grid
from common.report import table

from setpred import ChamferLoss, chamfer_loss

FEW = 8  # digits of a part, with --quick


class MnistSets:
    """What the engine is told."""

    name = "mnist_sets"
    lr = 0.01
    selection = "chamfer"
    largest = False
    evaluated = ("data",)
    quick: ClassVar = {}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the data and the sizes of the networks."""
        group = parser.add_argument_group("data and network")
        group.add_argument(
            "--data",
            type=Path,
            metavar="DIR",
            help="where torchvision puts MNIST: its files are in DIR/MNIST/raw (default: scikit-learn's digits)",
        )
        group.add_argument(
            "--latent",
            type=count,
            default=256,
            help="size of the vector (default: %(default)s; the published script: 64)",
        )
        group.add_argument(
            "--width", type=count, default=256, help="hidden units of encoder and baselines (default: %(default)s)"
        )

    def check(self, options: argparse.Namespace, given: Mapping[str, Any]) -> None:
        """Refuse a directory without the files that are needed."""
        if options.data is not None:
            for part, needed in (("train", options.evaluate is None), ("test", options.test)):
                if needed:
                    find_images(options.data, part)

    def set_size(self, options: argparse.Namespace) -> int:
        """Points of the largest digit."""
        return LARGEST_SMALL if options.data is None else LARGEST

    def training_data(self, options: argparse.Namespace) -> tuple[InMemory, InMemory]:
        """Load digits to train on and to validate."""
        return load_training_digits(options.data, FEW if options.quick else None)

    def test_data(self, options: argparse.Namespace) -> InMemory:
        """Load digits to test on."""
        return load_test_digits(options.data, FEW if options.quick else None)

    def build(self, options: argparse.Namespace) -> tuple[SetPredictor, Loss]:
        """Make the autoencoder; DSPN decodes with the encoder itself."""
        encoder = make_encoder(options, "pooled", 2)
        scaler = make_scaler(options, 2)
        decoder = make_decoder(options, encoder, scaler, set_size=self.set_size(options), channels=2)
        model = SetPredictor(EncodedTarget(encoder, scaler), decoder)
        return model, make_loss(options, encoder, ChamferLoss(), scaler, repr_weight=0)

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
