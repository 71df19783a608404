"""Comparisons on text, for `mambaseq reproduce`."""
