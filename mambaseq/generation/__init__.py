"""Autoregressive generation."""

from __future__ import annotations

from mambaseq.generation.generate import generate

__all__ = ["generate"]
