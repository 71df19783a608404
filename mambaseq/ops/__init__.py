"""Functions on tensors: one signature an op, several backends behind it."""

from __future__ import annotations

from mambaseq.ops.causal_conv import causal_conv
from mambaseq.ops.selective_scan import selective_scan

__all__ = ["causal_conv", "selective_scan"]
