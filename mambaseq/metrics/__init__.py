"""Metrics: what a run measures besides its loss."""

from mambaseq.metrics.base import Metric

__all__ = ["Metric"]
