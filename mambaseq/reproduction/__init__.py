"""Recipes that repeat published results: what is trained, what the paper reports, and our results.

A domain registers a `Recipe` under `recipes`; `mambaseq reproduce NAME` runs it, prints its tables and writes them as
JSON and Markdown.
"""

from __future__ import annotations

from mambaseq.reproduction.context import FINISHED, Context, Recipe
from mambaseq.reproduction.tables import Bound, Column, Line, Table
from mambaseq.reproduction.training import Trained, train

__all__ = ["FINISHED", "Bound", "Column", "Context", "Line", "Recipe", "Table", "Trained", "train"]
