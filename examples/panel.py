"""A panel of tasks in which nothing is tuned: one decoder of each kind, the same for all tasks, on equal terms.

Sets are autoencoded (digits, MNIST, a rotating square, clouds in three dimensions) or predicted from an image (shapes,
boxes and states of rendered objects, strokes of Chinese characters). No setting of a decoder changes between tasks.
Each is trained from seed 0 with the same three learning rates for the same seconds of one core; the rate that is best
on validation data is taken for the other seeds. Elements are standardised for all decoders alike, predictions are
mapped back before they are scored. What is in the table is of test data and of the network as training leaves it.

    python examples/panel.py                       # hours: about 8 tasks x decoders x 5 runs of 2 to 3 minutes
    python examples/panel.py --tasks digits boxes  # two tasks
    python examples/panel.py --report              # table and picture of what is there, no training

Each run is one process of one thread, and leaves one JSON file in --out. What is there is not made again: give the
command again to go on.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import common.requirements  # noqa: F401
import torch
from common.curves import draw_panel
from common.files import cache_directory
from common.models import Refined
from common.report import mean_and_spread, table
from common.runs import Run, add_run_arguments, best_of, check_budgets, missing, perform_missing
from common.tasks import TASKS, Sources
from common.trial import LATENT, WIDTH, Budget, Contestant, run_trial

from setpred import DSPNDecoder, LSTMDecoder, MLPDecoder, PooledEncoder, SlotDecoder, TransformerDecoder

TOKENS = 16  # that a vector is split into for slots to share


def transformer(_: PooledEncoder, size: int, channels: int) -> TransformerDecoder:
    """Decode a vector, or tokens."""
    return TransformerDecoder(LATENT, size, channels, WIDTH)


def recommended(encoder: PooledEncoder, size: int, channels: int) -> DSPNDecoder:
    """Decode a vector as recommended, and nothing set."""
    return DSPNDecoder.recommended(encoder, set_size=size, channels=channels)


CONTESTANTS = {
    "dspn": Contestant(
        recommended,
        {"DSPN": {}, "DSPN, 80 steps": {"iters": 80}, "DSPN, 4 starts": {"starts": 4}},
    ),
    "mlp": Contestant(lambda encoder, size, channels: MLPDecoder(LATENT, size, channels, WIDTH), {"MLP": {}}),
    "lstm": Contestant(lambda encoder, size, channels: LSTMDecoder(LATENT, size, channels, WIDTH), {"LSTM": {}}),
    "transformer": Contestant(transformer, {"transformer": {}}, of_tokens=transformer),
    "slots": Contestant(
        lambda encoder, size, channels: SlotDecoder(LATENT, size, channels, WIDTH, tokens=TOKENS),
        {"slots": {}},
        of_tokens=lambda encoder, size, channels: SlotDecoder(LATENT, size, channels, WIDTH),
    ),
    "refined": Contestant(
        lambda *task: Refined(transformer(*task), recommended(*task)),
        {"transformer, then DSPN": {}, "its start": {"refine": False}},
    ),
}
RATES = {"autoencoded": (1e-3, 3e-3, 1e-2), "image": (3e-4, 1e-3, 3e-3)}  # of Adam, for every decoder
SECONDS = {"autoencoded": 120.0, "image": 180.0}
QUICK_STEPS = 2


def kind(task: str) -> str:
    """Name the kind of a task."""
    return "image" if TASKS[task].images else "autoencoded"


def budget_of(task: str, options: argparse.Namespace) -> Budget:
    """Say how long a run of a task trains."""
    return Budget(options.seconds or SECONDS[kind(task)], QUICK_STEPS if options.quick else None)


def sources_of(options: argparse.Namespace) -> Sources:
    """Say where data is, and how much of it is wanted."""
    return Sources(options.data, options.cache, options.quick)


def perform(run: Run, options: argparse.Namespace) -> None:
    """Train and evaluate on one core, write what came of it, and print a line."""
    torch.set_num_threads(1)
    task, budget = TASKS[run.task], budget_of(run.task, options)
    data = task.load(sources_of(options))
    result = run_trial(task, data, CONTESTANTS[run.decoder], lr=run.lr, seed=run.seed, budget=budget)
    run.write(options.out, budget, result)
    end = "diverged" if result["diverged"] else "collapsed" if result["collapsed"] else "done"
    scores = f"validation {result['final']:.4g} (best {result['best']:.4g})"
    print(f"{run.file(options.out).stem}: {end}, {result['steps']:,} steps, {scores}", flush=True)


def perform_all(runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Perform the runs that are not there; returns how many failed."""
    if not options.quick:
        for task in {run.task for run in missing(runs, options.out)}:
            TASKS[task].load(sources_of(options))  # renders what is not kept yet, which several runs would do at once
    return perform_missing(runs, perform, options)


def chosen(task: str, decoder: str, out: Path) -> Run | None:
    """Find the run from seed 0 that is best on validation data at its end, if all learning rates were tried."""
    trials = [Run(task, decoder, lr, 0) for lr in RATES[kind(task)]]
    return best_of(trials, out, TASKS[task].figures[TASKS[task].selection].larger_is_better)


def train(options: argparse.Namespace) -> int:
    """Choose learning rates, then train from the other seeds; returns how many runs failed."""
    tasks, decoders = options.tasks, options.decoders
    # Decoders take turns, so that what is done is always comparable.
    first = [Run(task, name, lr, 0) for task in tasks for lr in RATES[kind(task)] for name in decoders]
    failed = perform_all(first, options)
    best = [run for task in tasks for name in decoders if (run := chosen(task, name, options.out)) is not None]
    return failed + perform_all([run._replace(seed=k) for k in range(1, options.seeds) for run in best], options)


def results_of(task: str, decoder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the results from all seeds with the chosen learning rate, as far as they are there."""
    best = chosen(task, decoder, options.out)
    runs = [] if best is None else [best._replace(seed=k) for k in range(options.seeds)]
    return [result for run in runs if (result := run.result(options.out)) is not None]


def report(options: argparse.Namespace) -> str:
    """Make the table of what is there: a block of rows for each task, a column for each way to decode."""
    columns = [(name, evaluation) for name in options.decoders for evaluation in CONTESTANTS[name].evaluations]
    rows = []
    for task in options.tasks:
        results = {name: results_of(task, name, options) for name in options.decoders}
        if not any(results.values()):
            continue
        start = len(rows)
        for score, figure in TASKS[task].figures.items():
            values = [[figure.factor * r["test"][way][score] for r in results[name]] for name, way in columns]
            means = [mean(v) if v else None for v in values]
            there = [m for m in means if m is not None]
            best = (max if figure.larger_is_better else min)(there)
            bold = min(there) < max(there)
            cells = [mean_and_spread(v, figure.digits) if v else "-" for v in values]
            cells = [f"**{cell}**" if bold and m == best else cell for cell, m in zip(cells, means, strict=True)]
            rows.append(["", figure.heading, *cells])
        facts: dict[str, Callable[[list[dict[str, Any]]], str]] = {
            "learning rate": lambda of: f"{of[0]['lr']:g}",
            "training steps": lambda of: f"{mean(r['steps'] for r in of):,.0f}",
            "parameters": lambda of: f"{of[0]['parameters']:,}",
            "seeds, collapsed": lambda of: f"{len(of)}, {sum(r['collapsed'] for r in of)}",
        }
        for heading, fact in facts.items():
            cells = [
                "" if way != next(iter(CONTESTANTS[n].evaluations)) else fact(results[n]) if results[n] else "-"
                for n, way in columns
            ]
            rows.append(["", heading, *cells])
        rows[start][0] = task
    header = ["task", "", *(evaluation for _, evaluation in columns)]
    return table(header, rows) if rows else "nothing is finished: the table needs all learning rates of a decoder"


def draw(options: argparse.Namespace) -> None:
    """Draw the validation curves of what is in the table, against seconds and steps."""
    panels = {}
    for task in options.tasks:
        figure, curves = TASKS[task].figures[TASKS[task].selection], {}
        for name in options.decoders:
            if results := results_of(task, name, options):
                label = next(iter(CONTESTANTS[name].evaluations))
                curves[label] = [[(k, s, figure.factor * score) for k, s, score in r["curve"]] for r in results]
        if curves:
            panels[task] = (figure.heading, not figure.larger_is_better, curves)
    if panels:
        draw_panel(panels, options.out / "panel.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet, and report."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is run")
    for name, choices in (("tasks", TASKS), ("decoders", CONTESTANTS)):
        what.add_argument(
            f"--{name}", nargs="+", choices=list(choices), default=list(choices), help=f"(default: {' '.join(choices)})"
        )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        metavar="DIR",
        help="holds mnist10k/ and hanzi/; tasks whose data is not there are left out (default: %(default)s)",
    )
    where.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where rendered scenes are kept, 172 MB (default: $XDG_CACHE_HOME/setpred or ~/.cache/setpred)",
    )
    add_run_arguments(what, where, "panel", SECONDS)
    options = parser.parse_args(arguments)
    options.out = options.out or Path(f"out/panel{'-quick' if options.quick else ''}")
    options.tasks, options.decoders = (list(dict.fromkeys(names)) for names in (options.tasks, options.decoders))
    try:
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
        cache_directory(options.cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    failed = 0
    if not options.report:
        for task in options.tasks:
            if lacking := TASKS[task].missing(options.data):
                print(f"{task} is left out: {lacking}")
        options.tasks = [task for task in options.tasks if TASKS[task].missing(options.data) is None]
        if not options.tasks:
            raise SystemExit("no task is left")
        check_budgets(options.out, options.tasks, partial(budget_of, options=options))
        try:
            failed = train(options)
        except KeyboardInterrupt:
            raise SystemExit("\ninterrupted; the same command goes on") from None
    text = report(options)
    print(f"\n{text}")
    (options.out / "panel.md").write_text(text + "\n")
    draw(options)
    if failed:
        raise SystemExit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
