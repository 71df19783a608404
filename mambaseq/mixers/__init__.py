"""Mixers: layers that mix positions, with a state."""

from mambaseq.mixers.base import Mixer, State

__all__ = ["Mixer", "State"]
