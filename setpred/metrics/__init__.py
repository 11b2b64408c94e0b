"""Metrics of predicted sets."""

from setpred.functional.boxes import box_iou
from setpred.metrics.average_precision import AveragePrecision, attribute_distance, average_precision

__all__ = ["average_precision", "AveragePrecision", "box_iou", "attribute_distance"]
