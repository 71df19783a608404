"""Functions on tensors: one signature an op, several backends behind it."""

from __future__ import annotations

from mambaseq.ops import causal_conv as _causal_conv
from mambaseq.ops import lti as _lti
from mambaseq.ops import selective_scan as _selective_scan
from mambaseq.ops.dispatch import Op

OPS: dict[str, Op] = {op.name: op for op in (_selective_scan.OP, _causal_conv.OP, _lti.OP)}

causal_conv = _causal_conv.causal_conv
lti_scan = _lti.lti_scan
selective_scan = _selective_scan.selective_scan

__all__ = ["OPS", "causal_conv", "lti_scan", "selective_scan"]
