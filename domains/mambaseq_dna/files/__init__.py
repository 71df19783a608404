"""File formats of genomics: sequences, intervals and tracks."""
