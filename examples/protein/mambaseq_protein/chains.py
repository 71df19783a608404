"""Chains of a hidden Markov model: its states are helix, strand and coil, each with its own preferences of residues."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from Bio.SeqIO.FastaIO import SimpleFastaParser

from mambaseq.batch import Batch
from mambaseq.data.masking import MaskedItems, MaskRule
from mambaseq.data.module import SequenceData
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Alphabet, Tokenizer
from mambaseq.errors import DataError, shown

RESIDUES, STATES = "ACDEFGHIKLMNPQRSTVWY", ("helix", "strand", "coil")
STAY = 0.9  # a residue keeps the state of the one before it; else it draws one


def preferences() -> np.ndarray:
    """`(states, residues)`: how often each residue stands in each state."""
    weights = np.exp(np.random.default_rng(20).normal(0, 0.7, (len(STATES), len(RESIDUES))))
    return weights / weights.sum(1, keepdims=True)


class Drawn:
    """Endless chains: item i is drawn by a generator seeded with (seed, i), and depends on nothing else."""

    endless = True

    def __init__(self, length: int, size: int, seed: int, labelled: bool) -> None:
        self.length, self.size, self.seed, self.labelled = length, size, seed, labelled
        self.upto = preferences().cumsum(1)[:, :-1]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, index))
        begins = np.append(True, rng.random(self.length)[1:] > STAY)
        states = rng.integers(len(STATES), size=self.length)[np.maximum.accumulate(begins * np.arange(self.length))]
        residues = (self.upto[states] < rng.random((self.length, 1))).sum(1)
        return Batch(torch.from_numpy(residues)[None], torch.from_numpy(states)[None] if self.labelled else None)


def read_fasta(path: Path, tokenizer: Tokenizer) -> Iterator[Record]:
    """A record a chain. Raises DataError, with the file and the chain, for what is no FASTA file of amino acids."""
    where = str(path)
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            if not next(filter(str.strip, file), "").startswith(">"):
                raise DataError("its first line is not > and the name of a chain. Begin it with one.")
            file.seek(0)
            for title, chain in SimpleFastaParser(file):
                where = f"{path}, chain {shown(title)}"
                if not chain:
                    raise DataError("it has no residues. Remove it.")
                yield Record(title, ids=tokenizer.encode(chain))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a FASTA file.") from error


class Chains(SequenceData):
    """Made-up chains of residues.

    Args:
        objective: masked asks for hidden residues of chains without end, labels for the state of each residue.
        labelled: chains whose states are known.
        length: residues a chain.
        seed: of the chains.
    """

    tokenizer, tokenizer_name, reader = Alphabet(RESIDUES, fold=True), "alphabet", "protein/fasta"

    def __init__(
        self, objective: Literal["masked", "labels"] = "masked", labelled: int = 8, length: int = 96, seed: int = 0
    ) -> None:
        self.task, self.labelled, self.length, self.seed = objective, labelled, length, seed
        self.vocab_size = len(RESIDUES) + (objective == "masked")  # the mask token
        self.class_names = STATES if objective == "labels" else ()

    def setup(self) -> None:
        pass

    def chains(self, part: int, count: int) -> MaskedItems | Drawn:
        drawn = Drawn(self.length, count, 3 * self.seed + part, self.task == "labels")
        return drawn if self.task == "labels" else MaskedItems(drawn, MaskRule(), len(RESIDUES), seed=self.seed)

    def train(self) -> MaskedItems | Drawn | list[Batch]:
        chains = self.chains(0, 4096)
        return [chains[index] for index in range(self.labelled)] if self.task == "labels" else chains

    def validation(self) -> MaskedItems | Drawn:
        return self.chains(1, 64)

    def test(self) -> MaskedItems | Drawn:
        return self.chains(2, 256)
