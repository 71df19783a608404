"""Models on disk."""

from __future__ import annotations

from mambaseq.checkpoints.export import LoadedModel, ModelCard, load_model, save_model
from mambaseq.checkpoints.upstream import load_upstream

__all__ = ["LoadedModel", "ModelCard", "load_model", "load_upstream", "save_model"]
