"""Reports: what a run leaves for people to look at."""

from __future__ import annotations

from mambaseq.reporting.sections import Report, Section, audio_player, drawing, picture, side_by_side, table

__all__ = ["Report", "Section", "audio_player", "drawing", "picture", "side_by_side", "table"]
