"""Decoding, one position at a time: steps of single ops, of a whole block (CPU) and of a whole model (GPU)."""
