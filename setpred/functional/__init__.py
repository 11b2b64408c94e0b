"""The numeric core: pure tensor functions, no modules."""

from setpred.functional.argsort import argsort_descending
from setpred.functional.assignment import linear_assignment, matched_indices, matched_pairs
from setpred.functional.boxes import (
    box_convert,
    box_cost,
    box_iou,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
)
from setpred.functional.classes import focal_cost, probability_cost
from setpred.functional.descent import Descent, descend
from setpred.functional.nearest import nearest_neighbours
from setpred.functional.pairwise import (
    cross_entropy_cost,
    euclidean_cost,
    on_channels,
    paired_cost,
    pairwise_cost,
    sum_costs,
)
from setpred.functional.sinkhorn import Transport, entropic_transport
from setpred.functional.sort_pool import piecewise_linear, sort_pool, sort_unpool
from setpred.functional.step import Gradient, StepRule
from setpred.functional.transport import exact_transport

__all__ = [
    "argsort_descending",
    "piecewise_linear",
    "sort_pool",
    "sort_unpool",
    "pairwise_cost",
    "paired_cost",
    "sum_costs",
    "on_channels",
    "cross_entropy_cost",
    "euclidean_cost",
    "probability_cost",
    "focal_cost",
    "box_convert",
    "box_iou",
    "generalized_box_iou",
    "distance_box_iou",
    "complete_box_iou",
    "box_cost",
    "linear_assignment",
    "matched_pairs",
    "matched_indices",
    "nearest_neighbours",
    "Transport",
    "entropic_transport",
    "exact_transport",
    "Gradient",
    "StepRule",
    "Descent",
    "descend",
]
