"""What decodes: one step of each op, of a whole block on a CPU, and of a whole model on a GPU."""
