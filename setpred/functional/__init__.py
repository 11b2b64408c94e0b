"""The numeric core: pure tensor functions, no modules."""

from setpred.functional.descent import Descent, descend
from setpred.functional.sort_pool import piecewise_linear, sort_pool, sort_unpool

__all__ = ["piecewise_linear", "sort_pool", "sort_unpool", "Descent", "descend"]
