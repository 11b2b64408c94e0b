"""The iDSPN paper's two experiments with multisets: class-specific numbering, and random multisets.

Numbering: a multiset of 64 elements of 4 classes is given, and each element is to get its number among those of its
class, in any order. A function that maps equal elements to equal ones, as self-attention does, cannot. A decoder by
descent starts from random numbers beside the given classes, and moves them apart. Random multisets: normal points are
autoencoded. Every decoder trains for the same seconds of one core. Of three learning rates, each takes the one that is
best on validation data of the experiment's first task, and keeps it for all.

    python examples/multisets.py                                         # trains for two and a half hours of one core
    python examples/multisets.py --tasks 16x4-6400 --decoders dspn lstm  # one task, two decoders
    python examples/multisets.py --report                                # tables of what is there, no training

Each run is one process of one thread, and leaves one JSON file in --out. What is there is not made again: give the
command again to go on.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import common.requirements  # noqa: F401
import torch
from common import trial
from common.arguments import positive
from common.batches import Batch
from common.models import SetPredictor
from common.numbering import Loss, draw_numbered, given_classes_loss, pair_loss, score_numbers
from common.numbering_models import WIDTH, Attended, EachNumbered, Given, InOrder, Numberer
from common.report import mean_and_spread, table
from common.runs import Run, add_run_arguments, best_of, check_budgets, perform_missing
from common.tasks import Data, Figure, Sources, Task
from common.trial import LATENT, Budget, MakeDecoder, learn, make_model
from common.trial import WIDTH as HIDDEN
from torch import Tensor, nn

from setpred import DSPNDecoder, GradientDescent, LSTMDecoder, MLPDecoder, TransformerDecoder, hungarian_loss
from setpred.functional import cross_entropy_cost, euclidean_cost

VALIDATED, TESTED = 200, 500
RATES = (1e-3, 5e-3, 3e-2)  # of Adam
QUICK_STEPS = 2


def numbering(size: int, classes: int, samples: int) -> Task:
    """Make the task of numbering multisets, of so many samples."""

    def load(sources: Sources) -> Data:
        counts = (samples, VALIDATED, TESTED)
        generators = (torch.Generator().manual_seed(seed) for seed in range(3))
        return Data(
            *(draw_numbered(sources.limit(n), size, classes, g) for n, g in zip(counts, generators, strict=True))
        )

    figures = {"elements": Figure("elements, %", 100, 1, True), "sets": Figure("sets, %", 100, 1, True)}
    return Task(
        f"{size} elements of {classes} classes, {samples:,} samples",
        size,
        size + classes,
        load,
        score_numbers,
        figures,
        batch_size=16,
    )


def random_multisets(size: int, channels: int) -> Task:
    """Make the task of autoencoding independent normal points, new ones for every batch."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        points = torch.randn(count, size, channels, generator=generator)
        return Batch(points, torch.ones(count, size, dtype=torch.bool))

    def load(sources: Sources) -> Data:
        seeds = {VALIDATED: -1, TESTED: -2}  # of training they are not negative
        parts = (draw(sources.limit(n), torch.Generator().manual_seed(seed)) for n, seed in seeds.items())
        return Data(draw, *parts)

    def loss(elements: Tensor, target: Tensor, *masks: Tensor) -> Tensor:
        return hungarian_loss(elements, target, presence="none")

    def score(*sets: Tensor) -> dict[str, float]:
        elements, _, target, _ = sets
        return {"error": loss(elements, target).item()}

    figures = {"error": Figure("error x 1000", 1000, 2)}
    return Task(f"{size} points of {channels} coordinates", size, channels, load, score, figures, loss=loss)


class Contestant(NamedTuple):
    """A decoder as it takes part in an experiment, the same for all tasks."""

    what: str
    make: Callable[[Task], SetPredictor]
    loss: Loss | None = None  # if not the task's


def descent(make: Callable[..., DSPNDecoder], **options: Any) -> Callable[[Task], SetPredictor]:
    """Number elements by descent."""
    make = partial(make, iters=10, eval_iters=20, **options)
    return lambda task: Numberer(task.set_size, task.channels - task.set_size, make)


def each(make: Callable[[int], nn.Module], width: int) -> Callable[[Task], SetPredictor]:
    """Number each element in its place."""
    return lambda task: SetPredictor(Given(), EachNumbered(make(task.channels - task.set_size), width, task.set_size))


def from_queries(queries: Literal["learned", "random"]) -> Callable[[Task], SetPredictor]:
    """Predict numbers and classes by a transformer that sees the elements as tokens."""

    def make(task: Task) -> SetPredictor:
        tokens = nn.Sequential(Given(), Attended(task.channels - task.set_size, layers=2))
        size, channels = task.set_size, task.channels
        return SetPredictor(
            tokens, TransformerDecoder(WIDTH, size, channels, WIDTH, layers=2, queries=queries, mask_clamp=None)
        )

    return make


def autoencoded(make: MakeDecoder) -> Callable[[Task], SetPredictor]:
    """Decode the vector that a set encoder makes of points."""
    return lambda task: make_model(task, trial.Contestant(make, {}))


MOMENTUM = GradientDescent(1.0, momentum=0.9, nesterov=True, grad_clip=40.0)
of_probabilities, of_logits = given_classes_loss(euclidean_cost), given_classes_loss(cross_entropy_cost)
CONTESTANTS = {
    "numbering": {
        "dspn": Contestant("DSPN, recommended", descent(DSPNDecoder.recommended), of_probabilities),
        "idspn": Contestant("iDSPN", descent(DSPNDecoder.idspn, lr=MOMENTUM), of_probabilities),
        "unrolled": Contestant(
            "DSPN, unrolled", descent(DSPNDecoder, lr=1.0, repr_loss="mse", init="random"), of_probabilities
        ),
        "learned": Contestant("transformer, learned queries", from_queries("learned"), pair_loss),
        "random": Contestant("transformer, random queries", from_queries("random"), pair_loss),
        "attention": Contestant(
            "self-attention of the elements", each(lambda classes: Attended(classes, 4), WIDTH), of_logits
        ),
        "lstm": Contestant("bidirectional LSTM", each(InOrder, 2 * WIDTH), of_logits),
    },
    "random": {
        "dspn": Contestant(
            "DSPN, recommended",
            autoencoded(
                lambda encoder, n, d: DSPNDecoder.recommended(encoder, set_size=n, channels=d, mask_clamp=None)
            ),
        ),
        "idspn": Contestant(
            "iDSPN",
            autoencoded(
                lambda encoder, n, d: DSPNDecoder.idspn(
                    encoder, set_size=n, channels=d, mask_clamp=None, init="learned", anchor=0.1
                )
            ),
        ),
        "unrolled": Contestant(
            "DSPN, unrolled",
            autoencoded(
                lambda encoder, n, d: DSPNDecoder(
                    encoder, lr=1.0, set_size=n, channels=d, mask_clamp=None, repr_loss="mse"
                )
            ),
        ),
        "mlp": Contestant("MLP", autoencoded(lambda _, n, d: MLPDecoder(LATENT, n, d, HIDDEN, mask_clamp=None))),
        "lstm": Contestant("LSTM", autoencoded(lambda _, n, d: LSTMDecoder(LATENT, n, d, HIDDEN, mask_clamp=None))),
    },
}
NUMBERING = {
    f"{size}x{classes}-{samples}": numbering(size, classes, samples)
    for size, classes in ((16, 4), (64, 4), (64, 8))
    for samples in (6_400, 640, 64_000)
}
RANDOM = {f"random-{n}x{d}": random_multisets(n, d) for n in (8, 32) for d in (2, 8)}
TASKS = NUMBERING | RANDOM
SECONDS = {"16x4": 20.0, "64x4": 300.0, "64x8": 300.0, "random": 20.0}  # by what a task's name begins with
BY_DEFAULT = ["16x4-640", "16x4-6400", "64x4-6400", *RANDOM]


def contestants(task: str) -> dict[str, Contestant]:
    """List the decoders of the experiment that a task belongs to, by name."""
    return CONTESTANTS["numbering" if task in NUMBERING else "random"]


def perform(run: Run, options: argparse.Namespace) -> None:
    """Train and evaluate on one core, write what came of it, and print a line."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task, contestant = TASKS[run.task], contestants(run.task)[run.decoder]
    data = task.load(Sources(Path(), None, options.quick))
    judged = task if contestant.loss is None else task._replace(loss=contestant.loss)
    budget = budget_of(run.task, options)
    result = learn(judged, data, contestant.make(task), {"": {}}, lr=run.lr, seed=run.seed, budget=budget)
    run.write(options.out, budget, result)
    print(
        f"{run.file(options.out).stem}: {result['steps']:,} steps, {task.selection} {result['final']:.4g}", flush=True
    )


def budget_of(task: str, options: argparse.Namespace) -> Budget:
    """Say how long a run of a task trains."""
    return Budget(options.seconds or SECONDS[task.split("-")[0]], QUICK_STEPS if options.quick else None)


def trials(task: str, decoder: str) -> list[Run]:
    """List the runs that choose a decoder's learning rate, for all tasks of an experiment."""
    first = next(iter(NUMBERING if task in NUMBERING else RANDOM))
    return [Run(first, decoder, lr, 0) for lr in RATES]


def runs_of(task: str, decoder: str, options: argparse.Namespace) -> list[Run]:
    """List a decoder's runs on a task with the learning rate that is given or chosen; none while it is not."""
    if options.lr is not None:
        return [Run(task, decoder, options.lr, seed) for seed in range(options.seeds)]
    best = best_of(trials(task, decoder), options.out, larger_is_better=task in NUMBERING)
    return [] if best is None else [Run(task, decoder, best.lr, seed) for seed in range(options.seeds)]


def train(options: argparse.Namespace) -> int:
    """Choose learning rates, then train on all tasks, seed after seed; returns how many runs failed."""
    pairs = [(task, name) for task in options.tasks for name in contestants(task) if name in options.decoders]
    failed = 0 if options.lr else perform_missing((run for pair in pairs for run in trials(*pair)), perform, options)
    by_seed = zip_longest(*(runs_of(*pair, options) for pair in pairs))
    return failed + perform_missing((run for runs in by_seed for run in runs if run is not None), perform, options)


def report(options: argparse.Namespace) -> str:
    """Make a table of what is there for each experiment: a row for each decoder, columns for scores on tasks."""
    tables = []
    for experiment in (NUMBERING, RANDOM):
        scores = [(task, score) for task in options.tasks if task in experiment for score in TASKS[task].figures]
        rows = []
        for name, contestant in contestants(next(iter(experiment))).items():
            found = {task: results_of(task, name, options) for task, _ in scores}
            if name not in options.decoders or not any(found.values()):
                continue
            row = [contestant.what]
            for task, score in scores:
                figure = TASKS[task].figures[score]
                values = [figure.factor * result["test"][""][score] for result in found[task]]
                row.append(mean_and_spread(values, figure.digits) if values else "-")
            some = next(results for results in reversed(found.values()) if results)
            rows.append(
                [*row, f"{some[0]['lr']:g}", f"{mean(r['steps'] for r in some):,.0f}", f"{some[0]['parameters']:,}"]
            )
        if rows:
            headings = [f"{task}: {TASKS[task].figures[score].heading}" for task, score in scores]
            tables.append(table(["decoder", *headings, "learning rate", "steps (last task)", "parameters"], rows))
    return "\n\n".join(tables) or "nothing is finished: the table needs all learning rates of a decoder"


def results_of(task: str, decoder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the results from all seeds, as far as they are there."""
    return [result for run in runs_of(task, decoder, options) if (result := run.result(options.out)) is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet, and report."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=BY_DEFAULT,
        metavar="TASK",
        help=f"of {' '.join(TASKS)} (default: {' '.join(BY_DEFAULT)})",
    )
    decoders = list(dict.fromkeys(name for those in CONTESTANTS.values() for name in those))
    what.add_argument("--decoders", nargs="+", choices=decoders, default=decoders, help="(default: all)")
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    what.add_argument("--lr", type=positive, metavar="LR", help=f"of Adam, for all (default: the best of {rates})")
    where = parser.add_argument_group("where")
    add_run_arguments(what, where, "multisets", SECONDS)
    options = parser.parse_args(arguments)
    options.out = options.out or Path(f"out/multisets{'-quick' if options.quick else ''}")
    options.tasks = list(dict.fromkeys(options.tasks))
    try:
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    failed = 0
    if not options.report:
        check_budgets(options.out, TASKS, partial(budget_of, options=options))
        try:
            failed = train(options)
        except KeyboardInterrupt:
            raise SystemExit("\ninterrupted; the same command goes on") from None
    text = report(options)
    print(f"\n{text}")
    (options.out / "multisets.md").write_text(text + "\n")
    if failed:
        raise SystemExit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
