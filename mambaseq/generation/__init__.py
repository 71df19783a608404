"""Autoregressive generation."""

from __future__ import annotations

from mambaseq.generation.decode import generate, generate_all, stream
from mambaseq.generation.decoder import Decoder

__all__ = ["Decoder", "generate", "generate_all", "stream"]
