"""The numeric core: pure tensor functions, no modules."""

from setpred.functional.argsort import argsort_descending
from setpred.functional.assignment import linear_assignment
from setpred.functional.descent import Descent, descend
from setpred.functional.pairwise import pairwise_cost
from setpred.functional.sort_pool import piecewise_linear, sort_pool, sort_unpool

__all__ = [
    "argsort_descending",
    "piecewise_linear",
    "sort_pool",
    "sort_unpool",
    "pairwise_cost",
    "linear_assignment",
    "Descent",
    "descend",
]
