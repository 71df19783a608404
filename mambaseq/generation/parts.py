"""Which models read a sequence part by part, handing the state on."""

from __future__ import annotations

from mambaseq.models import SequenceModel


def looks_ahead(model: SequenceModel) -> bool:
    """Whether what the encoder makes of a position depends on later ones."""
    return bool(getattr(model.encoder, "looks_ahead", False) or getattr(model.encoder, "min_length", 1) > 1)


def reads_in_parts(model: SequenceModel) -> bool:
    """Whether reading in parts gives what one reading gives: the backbone is causal, and the encoder makes one
    position of each input and looks at no other."""
    return bool(model.backbone.causal and getattr(model.encoder, "stride", 1) == 1 and not looks_ahead(model))
