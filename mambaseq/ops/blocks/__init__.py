"""Whole blocks on a GPU, each as one operator with a backward pass of its own."""
