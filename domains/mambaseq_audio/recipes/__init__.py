"""Published results, repeated."""
