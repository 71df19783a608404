"""Which models read a sequence part by part, handing the state on."""

from __future__ import annotations

from mambaseq.models import SequenceModel


def reads_in_parts(model: SequenceModel) -> bool:
    """Whether reading in parts gives what one reading gives: the backbone is causal, and the encoder says that it looks
    at no input but a position's own."""
    return bool(model.backbone.causal and getattr(model.encoder, "position_wise", False))
