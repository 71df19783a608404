"""Metrics: what a run measures beside its loss."""

from mambaseq.metrics.base import Metric

__all__ = ["Metric"]
