"""Many requests answered at once: they join and leave a batch of fixed-size states, and prompts that begin alike are
read once."""

from __future__ import annotations

from mambaseq.serving.engine import Closed, Engine, Full
from mambaseq.serving.prefixes import PrefixCache
from mambaseq.serving.requests import Request, Ticket

__all__ = ["Closed", "Engine", "Full", "PrefixCache", "Request", "Ticket"]
