"""Labelled sequences in the layouts that people have: tables, FASTA, a folder a class, intervals of an assembly."""
