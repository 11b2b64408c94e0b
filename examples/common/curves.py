"""Training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

Runs = Mapping[str, Sequence[Sequence[tuple[int, float, float]]]]  # decoder -> its runs, of (step, seconds, score)


def draw_curves(lines: Sequence[Mapping[str, Any]], score: str, title: str, path: Path) -> None:
    """Draw the training loss and the validation score, the latter once for each number of inner steps.

    Args:
        lines: The run's metrics.
        score: Name of the score.
        title: What the data is.
        path: Where to write the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    losses = [line for line in lines if "loss" in line]
    left.plot([line["step"] for line in losses], [line["loss"] for line in losses], color="0.3", linewidth=1)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    validations = [line for line in lines if "validation" in line]
    for steps in validations[-1]["validation"] if validations else ():
        values = [line["validation"][steps][score] for line in validations]
        label = None if steps == "-" else f"{steps} inner steps"
        right.plot([line["step"] for line in validations], values, marker="o", markersize=3, linewidth=1, label=label)
        if label:
            right.legend(fontsize=8, frameon=False)
    right.set(xlabel="step", ylabel=f"validation {score}")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_panel(tasks: Mapping[str, tuple[str, bool, Runs]], path: Path) -> None:
    """Draw the validation curves of several tasks, each against training time and steps.

    Args:
        tasks: Name of a task -> what its score is called, whether its axis is logarithmic, and its runs.
        path: Where to write the PNG.
    """
    rows = (len(tasks) + 1) // 2
    figure, axes = plt.subplots(rows, 4, figsize=(13, 2.6 * rows), sharey=False, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for *_, runs in tasks.values() for name in runs))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    pairs = axes.reshape(-1, 2)
    for (left, right), (task, (score, logarithmic, runs)) in zip(pairs, tasks.items(), strict=False):
        right.sharey(left)
        _draw_against_time_and_steps(left, right, runs, colours)
        left.set(ylabel=score, yscale="log" if logarithmic else "linear")
        left.set_title(task, fontsize=9, loc="left")
    for axis in pairs[len(tasks) :].flat:
        axis.set_axis_off()
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_against_time_and_steps(left: Axes, right: Axes, curves: Runs, colours: Mapping[str, str]) -> None:
    for decoder, runs in curves.items():
        for k, points in enumerate(runs):
            if not points:  # it diverged before the first validation
                continue
            steps, seconds, scores = zip(*points, strict=True)
            left.plot(seconds, scores, color=colours[decoder], linewidth=1, label=None if k else decoder)
            right.plot(steps, scores, color=colours[decoder], linewidth=1)
    left.set(xlabel="training seconds")
    right.set(xlabel="training steps", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.xaxis.set_minor_formatter(NullFormatter())
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
