"""Testing a domain against the laws: `mambaseq check NAME`."""

from mambaseq.checking.domain import Finding, check

__all__ = ["Finding", "check"]
