"""Objects with position, material, colour, shape and size, from one vector: the DSPN paper's third experiment.

    python examples/clevr_state.py --backbone small --size 64 --max-objects 5  # rendered scenes, for CPUs
    python examples/clevr_state.py                                             # rendered scenes, the paper's network
    python examples/clevr_state.py --data DIR                                  # DIR is CLEVR v1.0
    accelerate launch examples/clevr_state.py --data DIR                       # on several GPUs
    python examples/clevr_state.py --evaluate out/clevr_state-recommended-0/best.pt --eval-steps 20 40 80

The table is the paper's: average precision, where an object is right if all its attributes are and its position is
within a distance, in the scene's units.
"""

import argparse

import common.requirements  # noqa: F401
from common.batches import Batch
from common.clevr_task import ClevrExperiment
from common.decoders import DESCENT
from common.engine import Predictions, Scores, run
from common.models import SetPredictor
from common.report import table
from common.state_pictures import draw_states

from setpred import hungarian_loss
from setpred.metrics import AveragePrecision

DISTANCES = (float("inf"), 1.0, 0.5, 0.25, 0.125)


class ClevrState(ClevrExperiment):
    """What the engine is told."""

    name = "clevr_state"
    target = "states"

    def score(self, predictions: Predictions) -> dict[str, float]:
        """Compute the average precisions and the Hungarian loss."""
        elements, mask, target, target_mask = predictions
        metric = AveragePrecision.dspn_state(DISTANCES)
        metric.update(elements, mask, target, target_mask=target_mask)
        precisions = metric.compute().tolist()
        scores = {f"AP{distance:g}": ap for distance, ap in zip(DISTANCES, precisions, strict=True)}
        scores["mean AP"] = sum(precisions) / len(precisions)
        scores["hungarian"] = hungarian_loss(elements, target, mask, target_mask).item()
        return scores

    def report(self, scores: Scores, options: argparse.Namespace) -> str:
        """Make the table, in per cent."""
        names = [f"AP{distance:g}" for distance in DISTANCES]
        rows = [[steps, *(f"{100 * score[name]:.1f}" for name in names)] for steps, score in scores.items()]
        return table(["inner steps", *names], rows)

    def draw(self, model: SetPredictor, batch: Batch, options: argparse.Namespace) -> None:
        """Draw tables of the true and the predicted objects, for DSPN after several numbers of steps."""
        if options.decoder in DESCENT:
            most = max(options.eval_steps)
            shown = sorted({max(most // 6, 1), *options.eval_steps})[-3:]
            columns = {f"step {t}": prediction for t, prediction in model.after(batch, shown).items()}
        else:
            columns = {options.decoder: model(batch)[0][:2]}
        draw_states(batch, columns, self.source(options), options.out / "states.png")


if __name__ == "__main__":
    run(ClevrState())
