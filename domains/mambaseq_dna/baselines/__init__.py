"""What a model of DNA must beat: words, GC, N, and a small convolutional network."""

from mambaseq_dna.baselines.kmers import kmer_frequencies
from mambaseq_dna.baselines.windows import Baseline, kmer_baseline

__all__ = ["Baseline", "kmer_baseline", "kmer_frequencies"]
