"""Backbones: stacks of mixers."""

from mambaseq.backbones.base import Backbone

__all__ = ["Backbone"]
