"""RMSNorm and LayerNorm in fp32, alone or joined with the residual addition before them."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, shown
from mambaseq.ops import add_rms_norm

NormName = Literal["rms", "layer"]


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467), computed in fp32 for any input dtype.

    The input, the residual stream, is fp32. The output has the weight's dtype, or autocast's if it is on for the
    device: the next linear map would cast it to that anyway, and read and write it once more.
    """

    adds_bias = False  # so that `is_plain` knows it

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        check_not_negative("A norm", eps=eps)
        super().__init__(d_model, eps=eps)

    def forward(self, x: Tensor | None, residual: Tensor | None = None) -> Any:
        """The norm of x `(..., d_model)`; given a residual of its shape, `(norm of residual + x, residual + x)`, the
        sum in fp32. x may then be None, which adds nothing."""
        stream = x if residual is None else residual
        assert stream is not None
        kind, weight = stream.device.type, self.weight
        out_dtype = _out_dtype(stream, weight)
        if kind != "cuda":  # called often in decoding on a CPU, so without overhead
            total = stream.float()
            if residual is not None and x is not None:
                total = total + x.float()
            y = F.rms_norm(total, self.normalized_shape, weight.float(), self.eps).to(out_dtype)
        else:
            assert self.eps is not None
            y, total = add_rms_norm(None if residual is None else x, stream, weight, eps=self.eps, out_dtype=out_dtype)
        return y if residual is None else (y, total)


class LayerNorm(nn.LayerNorm):
    """Layer norm with a bias (arXiv:1607.06450), computed in fp32, called as `RMSNorm` is."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        check_not_negative("A norm", eps=eps)
        super().__init__(d_model, eps=eps)

    def forward(self, x: Tensor | None, residual: Tensor | None = None) -> Any:
        """See `RMSNorm.forward`."""
        stream = x if residual is None else residual
        assert stream is not None
        total = stream.float()
        if residual is not None and x is not None:
            total = total + x.float()
        y = F.layer_norm(total, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        y = y.to(_out_dtype(stream, self.weight))
        return y if residual is None else (y, total)


def _out_dtype(stream: Tensor, weight: Tensor) -> torch.dtype:
    kind = stream.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def make_norm(name: NormName, d_model: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm of a backbone. Raises ConfigError for another name."""
    if name not in ("rms", "layer"):
        raise ConfigError(f"norm must be rms or layer, not {shown(name)}.")
    return RMSNorm(d_model, eps) if name == "rms" else LayerNorm(d_model, eps)
