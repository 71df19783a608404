"""How fast a FASTA file becomes a token store, and how fast the store opens.

    python benchmarks/dna_reading.py [--megabases 200] [--records 1000000]

A genome (few long records, lines of 60), the same gzipped, one line a record, many records of 20 bases, and the genome
as four gzipped files, read side by side; random bases. Checksums of the file and of records have threads of their own:
on two cores (`taskset -c 0,1`), more than 200 MB/s of the plain genome are to be stored.
"""

from __future__ import annotations

import argparse
import cProfile
import gzip
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from mambaseq_dna.files.fasta import fasta_store, fasta_stores, read_fasta
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.data.store import TokenStore


def write_files(folder: Path, megabases: int, records: int) -> dict[str, Path]:
    """The files that are read, by what they are."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    paths = {kind: folder / f"{kind}.fa" for kind in ("genome", "one line", "tiny")}
    with paths["genome"].open("wb") as lines, paths["one line"].open("wb") as one:
        for number in range(4):
            bases = letters[rng.integers(0, 4, megabases * 10**6 // 4 // 60 * 60, dtype=np.uint8)]
            for file in (lines, one):
                file.write(b">chr%d random\n" % number)
            one.write(bases.tobytes() + b"\n")
            lines.write(np.pad(bases.reshape(-1, 60), ((0, 0), (0, 1)), constant_values=10).tobytes())
    paths["gzip"] = folder / "genome.fa.gz"
    with paths["genome"].open("rb") as file, gzip.open(paths["gzip"], "wb", compresslevel=1) as packed:
        shutil.copyfileobj(file, packed)
    bases = letters[rng.integers(0, 4, (records, 20), dtype=np.uint8)]
    with paths["tiny"].open("wb") as file:
        for number, row in enumerate(bases):
            file.write(b">r%d\n%s\n" % (number, row.tobytes()))
    return paths


def write_parts(folder: Path, genome: Path) -> list[Path]:
    """A gzipped file for each record."""
    paths = []
    for number, record in enumerate(genome.read_bytes().split(b">")[1:]):
        paths.append(folder / f"part{number}.fa.gz")
        paths[-1].write_bytes(gzip.compress(b">" + record, compresslevel=1))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="speed of FASTA and of token stores")
    parser.add_argument("--megabases", type=int, default=200)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--best-of", type=int, default=1, help="how often a store is built; the quickest time counts")
    parser.add_argument("--profile", choices=("genome", "tiny"), help="show where the time goes for one of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, path in write_files(folder, arguments.megabases, arguments.records).items():
            if arguments.profile == kind:
                cProfile.runctx("fasta_store(path, folder / 'profiled')", globals(), locals(), sort="tottime")
            built = float("inf")
            for attempt in range(arguments.best_of):
                start = time.perf_counter()
                store = fasta_store(path, folder / f"cache{attempt}")
                built = min(built, time.perf_counter() - start)
            n, bases = len(store), len(store.tokens)
            start = time.perf_counter()
            TokenStore(store.folder)
            opened = time.perf_counter() - start
            start = time.perf_counter()
            for _ in read_fasta(path, BaseTokenizer()):
                pass
            read = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{kind:<9} {n:>9,} records {bases / 1e6:6.0f} Mb: store {built:6.2f} s "
                f"({bases / built / 1e6:5.0f} MB/s), opened {opened:5.2f} s ({bases / opened / 1e9:.2f} GB/s), "
                f"reader {read:6.2f} s ({n / read:,.0f} records/s), peak {peak:,.0f} MiB",
                flush=True,
            )
        parts = write_parts(folder, folder / "genome.fa")
        start = time.perf_counter()
        bases = sum(len(store.tokens) for store in fasta_stores(parts, folder / "cache of parts"))
        took = time.perf_counter() - start
        print(f"{len(parts)} x gzip {bases / 1e6:16.0f} Mb: stores {took:5.2f} s ({bases / took / 1e6:5.0f} MB/s)")


if __name__ == "__main__":
    main()
