"""Autoregressive generation."""

from __future__ import annotations

from mambaseq.generation.decode import generate

__all__ = ["generate"]
