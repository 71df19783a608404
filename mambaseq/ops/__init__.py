"""Functions on tensors: one signature an op, several backends behind it."""

from __future__ import annotations

from mambaseq.ops import causal_conv as _causal_conv
from mambaseq.ops import decays as _decays
from mambaseq.ops import delta_rule as _delta_rule
from mambaseq.ops import linear_cross_entropy as _linear_cross_entropy
from mambaseq.ops import lti as _lti
from mambaseq.ops import norm as _norm
from mambaseq.ops import selective_scan as _selective_scan
from mambaseq.ops import ssd as _ssd
from mambaseq.ops import state_space as _state_space
from mambaseq.ops import trapezoid as _trapezoid
from mambaseq.ops import wkv as _wkv
from mambaseq.ops.dispatch import Op
from mambaseq.ops.eager import only_reference

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _selective_scan.OP,
        _causal_conv.OP,
        _lti.OP,
        _state_space.OP,
        _ssd.OP,
        _wkv.OP,
        _delta_rule.OP,
        _decays.OP,
        _trapezoid.OP,
        _norm.ADD_OP,
        _norm.GATED_OP,
        _norm.UNIT_OP,
        _linear_cross_entropy.OP,
    )
}

add_rms_norm = _norm.add_rms_norm
causal_conv = _causal_conv.causal_conv
delta_rule = _delta_rule.delta_rule
gated_rms_norm = _norm.gated_rms_norm
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
log_decays = _decays.log_decays
lti_scan = _lti.lti_scan
selective_scan = _selective_scan.selective_scan
ssd = _ssd.ssd
state_space_scan = _state_space.state_space_scan
trapezoidal_scan = _trapezoid.trapezoidal_scan
unit_norm = _norm.unit_norm
wkv = _wkv.wkv

__all__ = [
    "OPS",
    "add_rms_norm",
    "causal_conv",
    "delta_rule",
    "gated_rms_norm",
    "linear_cross_entropy",
    "log_decays",
    "lti_scan",
    "only_reference",
    "selective_scan",
    "ssd",
    "state_space_scan",
    "trapezoidal_scan",
    "unit_norm",
    "wkv",
]
