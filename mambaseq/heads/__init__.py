"""Heads: from the backbone's output to predictions and a loss."""

from mambaseq.heads.base import Head

__all__ = ["Head"]
