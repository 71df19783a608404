"""What a run does: configuration, training, evaluation, prediction, generation. `mambaseq.cli` only parses and
prints."""
