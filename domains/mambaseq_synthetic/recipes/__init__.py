"""Published results on synthetic tasks, for `mambaseq reproduce`."""
