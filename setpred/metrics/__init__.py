"""Metrics of predicted sets."""

from setpred.functional.boxes import box_iou
from setpred.metrics.average_precision import AveragePrecision, average_precision
from setpred.metrics.coco import CocoAveragePrecision
from setpred.metrics.matched import cardinality_error, matching_accuracy
from setpred.metrics.points import point_f_score
from setpred.metrics.rules import attribute_distance, keypoint_similarity

__all__ = [
    "average_precision",
    "AveragePrecision",
    "CocoAveragePrecision",
    "cardinality_error",
    "matching_accuracy",
    "point_f_score",
    "box_iou",
    "keypoint_similarity",
    "attribute_distance",
]
