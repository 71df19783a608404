"""An assembly: the sequences of one or several FASTA or 2bit files, read by name and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mambaseq.data.cache import locate
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.files.fasta import fasta_stores
from mambaseq_dna.tokenizer import BaseTokenizer, N

_OTHER_NAMES = {"M": "MT", "MT": "M"}  # UCSC's name of the mitochondrion, and Ensembl's


class Assembly:
    """Sequences by name, from FASTA or 2bit files that are read once into token stores.

    names, lengths: of all sequences, in the order of the files. stores: one a file. Pickles as its stores' paths.

    Raises DataError for a file that cannot be used (see `fasta_store`), and for a name that two files have.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        cache: str | Path | None = None,
        *,
        stores: Mapping[Path, TokenStore] | None = None,
    ) -> None:
        """files: paths, patterns, `fetched:` or `mambaseq:` names. stores: of these files, if they are open."""
        patterns = [files] if isinstance(files, str | Path) else list(files)
        self.paths = list(dict.fromkeys(path for pattern in patterns for path in locate(pattern)))
        if not self.paths:
            raise ConfigError("An assembly needs a FASTA file; none is named.")
        self.stores: list[TokenStore] = (
            fasta_stores(self.paths, cache) if stores is None else [stores[path] for path in self.paths]
        )
        self._place: dict[str, tuple[int, int]] = {}
        for number, (path, store) in enumerate(zip(self.paths, self.stores, strict=True)):
            for record, name in enumerate(store.names):
                if name in self._place:
                    first = self.paths[self._place[name][0]]
                    raise DataError(
                        f"Two files of the assembly have a sequence {shown(name)}: {first} and {path}. Leave one out."
                    )
                self._place[name] = (number, record)

    @property
    def names(self) -> list[str]:
        return list(self._place)

    @property
    def lengths(self) -> dict[str, int]:
        """Bases of each sequence, by name."""
        return {name: int(self.stores[file].lengths[record]) for name, (file, record) in self._place.items()}

    def sources(self) -> dict[str, str]:
        """The sha256 of each file, by its name (its path, if two have the same name)."""
        names = [path.name for path in self.paths]
        return {
            path.name if names.count(path.name) == 1 else str(path): store.meta["sources"][0]["sha256"]
            for path, store in zip(self.paths, self.stores, strict=True)
        }

    def find(self, name: str) -> str | None:
        """The assembly's own name of a sequence: the same, or with or without `chr`, with `M` for `MT`."""
        if name in self._place:
            return name
        bare = name[3:] if name.lower().startswith("chr") else name
        for core in (bare, _OTHER_NAMES.get(bare, bare)):
            for known in (core, f"chr{core}"):
                if known in self._place:
                    return known
        return None

    def resolve(self, name: str, where: str = "") -> str:
        """As `find`. Raises DataError for a name that there is not; where: the file and line that named it."""
        if (known := self.find(name)) is not None:
            return known
        raise DataError(
            f"{where}{': ' if where else ''}the assembly ({cut_list(path.name for path in self.paths)}) has no "
            f"sequence {shown(name)}.{did_you_mean(name[:80], self.names[:2000])} It has: "
            f"{cut_list(self.names[:100], most=8)}. Give the assembly that the positions refer to."
        )

    def number(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of sequences, in the order of `names` → the numbers of their files, and of their records there."""
        places = np.array(list(self._place.values()), dtype=np.int64).reshape(-1, 2)
        return places[sequence, 0], places[sequence, 1]

    def place(self, name: str) -> tuple[TokenStore, int]:
        """The store of a sequence, and the number of its record there. Raises DataError as `resolve`."""
        file, record = self._place[self.resolve(name)]
        return self.stores[file], record

    def read(self, name: str, start: int, stop: int, strand: str = "+") -> np.ndarray:
        """Bases `[start, stop)`, counted from 0 on the forward strand; N where that is outside of the sequence.

        strand: `-` gives the reverse complement. Returns `(stop - start,)` uint8 ids of `BaseTokenizer("keep")`, a
        copy. Raises DataError as `resolve`, ConfigError for stop < start or another strand.
        """
        if stop < start or strand not in ("+", "-"):
            raise ConfigError(f"There is no interval {start} to {stop} on strand {shown(strand)}.")
        store, record = self.place(name)
        ids = np.full(stop - start, N, dtype=np.uint8)
        first, last = max(start, 0), min(stop, int(store.lengths[record]))
        if last > first:
            ids[first - start : last - start] = store[record][first:last]
        return BaseTokenizer("keep").reverse_complement(ids) if strand == "-" else ids
