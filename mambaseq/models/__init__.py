"""Models: an encoder, a backbone and a head."""

from mambaseq.models.building import build_empty, build_model, causal_lm, check_parts, count_parameters
from mambaseq.models.model import SequenceModel
from mambaseq.models.output import ModelOutput

__all__ = ["ModelOutput", "SequenceModel", "build_empty", "build_model", "causal_lm", "check_parts", "count_parameters"]
