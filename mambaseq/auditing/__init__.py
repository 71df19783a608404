"""What `mambaseq data audit` finds out about a dataset: copies, shared words, and properties that give classes away."""
