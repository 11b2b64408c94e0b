"""Metrics of predicted sets."""

from setpred.metrics.average_precision import AveragePrecision, attribute_distance, average_precision, box_iou
from setpred.metrics.points import point_f_score

__all__ = ["average_precision", "AveragePrecision", "box_iou", "attribute_distance", "point_f_score"]
