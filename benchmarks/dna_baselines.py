"""Linear classifiers of k-mer counts on the windows that species models are tested on.

    python benchmarks/dna_baselines.py [--lengths 1024 4096] [--k 6]

Trained on ENm001 of human, galago, mouse, cow and dog, tested on tiles of ENm002, equally many a species
(chance 0.20).
"""

from __future__ import annotations

import argparse
import time

from mambaseq_dna.baselines import kmer_baseline
from mambaseq_dna.species import SpeciesData


def main() -> None:
    parser = argparse.ArgumentParser(description="k-mer baselines of species classification")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--k", type=int, default=6)
    arguments = parser.parse_args()
    for length in arguments.lengths:
        data = SpeciesData(length=length)
        data.setup()
        for both_strands in (False, True):
            start = time.perf_counter()
            found = kmer_baseline(data, arguments.k, both_strands=both_strands)
            print(f"{length:>7,} bases  {found}  ({time.perf_counter() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
