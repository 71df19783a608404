"""Recipes of published results on DNA."""
