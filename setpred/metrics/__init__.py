"""Metrics of predicted sets."""

from setpred.metrics.average_precision import AveragePrecision, attribute_distance, average_precision, box_iou

__all__ = ["average_precision", "AveragePrecision", "box_iou", "attribute_distance"]
