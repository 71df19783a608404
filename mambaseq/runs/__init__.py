"""What a run does: it is configured, trained, evaluated, applied, finished. `mambaseq.cli` only parses and prints."""
