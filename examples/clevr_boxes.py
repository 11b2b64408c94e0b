"""Bounding boxes of the objects in an image, from one vector: the DSPN paper's second experiment.

    python examples/clevr_boxes.py --backbone small --size 64 --max-objects 5  # rendered scenes, for CPUs
    python examples/clevr_boxes.py                                             # rendered scenes, the paper's network
    python examples/clevr_boxes.py --data DIR                                  # DIR is CLEVR v1.0
    accelerate launch examples/clevr_boxes.py --data DIR                       # on several GPUs
    python examples/clevr_boxes.py --evaluate out/clevr_boxes-recommended-0/best.pt --eval-steps 20 40 80

Two tables of average precision: as the paper has it, with one pixel added to the sides of boxes in an image that is
itself one wide, which makes all its thresholds loose; and by the plain intersection over union.
"""

import argparse

import common.requirements  # noqa: F401
from common.batches import Batch
from common.box_pictures import draw_box_grid
from common.clevr_task import ClevrExperiment
from common.decoders import DESCENT
from common.engine import Predictions, Scores, run
from common.models import SetPredictor
from common.report import table

from setpred import hungarian_loss
from setpred.metrics import AveragePrecision, box_iou

PAPER = (0.5, 0.9, 0.95, 0.98, 0.99)
PLAIN = (0.5, 0.6, 0.7, 0.8, 0.9)


class ClevrBoxes(ClevrExperiment):
    """What the engine is told."""

    name = "clevr_boxes"
    target = "boxes"  # the mean of the plain average precisions selects
    evaluated = (*ClevrExperiment.evaluated, "clip_boxes")

    def score(self, predictions: Predictions) -> dict[str, float]:
        """Compute the average precisions and the Hungarian loss."""
        elements, mask, target, target_mask = predictions
        paper, plain = AveragePrecision.dspn_boxes(PAPER), AveragePrecision(box_iou, thresholds=PLAIN)
        for metric in (paper, plain):
            metric.update(elements, mask, target, target_mask=target_mask)
        precisions = plain.compute().tolist()
        scores = {f"paper AP{100 * t:.0f}": ap for t, ap in zip(PAPER, paper.compute().tolist(), strict=True)}
        scores |= {f"AP{100 * t:.0f}": ap for t, ap in zip(PLAIN, precisions, strict=True)}
        scores["mean AP"] = sum(precisions) / len(precisions)
        scores["hungarian"] = hungarian_loss(elements, target, mask, target_mask).item()
        return scores

    def report(self, scores: Scores, options: argparse.Namespace) -> str:
        """Make the tables, in per cent."""
        tables = []
        for title, names in (
            ("as published", [f"paper AP{100 * t:.0f}" for t in PAPER]),
            ("plain IoU", [f"AP{100 * t:.0f}" for t in PLAIN]),
        ):
            header = [f"inner steps, {title}", *(name.removeprefix("paper ") for name in names)]
            rows = [[steps, *(f"{100 * score[name]:.1f}" for name in names)] for steps, score in scores.items()]
            tables.append(table(header, rows))
        return "\n\n".join(tables)

    def draw(self, model: SetPredictor, batch: Batch, options: argparse.Namespace) -> None:
        """Draw true and predicted boxes over the images, for DSPN with its inner steps."""
        columns = {"target": (batch.elements, batch.mask.float())}
        if options.decoder in DESCENT:
            most = max(options.eval_steps)
            shown = sorted(t for t in {0, 1, 2, 5, *options.eval_steps} if t <= most)
            columns |= {f"step {t}": prediction for t, prediction in model.after(batch, shown).items()}
        else:
            columns[options.decoder] = model(batch)[0][:2]
        draw_box_grid(batch.images, columns, self.source(options), options.out / "boxes.png")


if __name__ == "__main__":
    run(ClevrBoxes())
