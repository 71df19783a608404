"""Genomes of several classes in the recipes, and the five mammals of the ENCODE regions that ship with the project."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.data.intervals import Intervals
from mambaseq.reproduction import Context
from mambaseq_dna.species import SpeciesData
from mambaseq_dna.splits import Splits
from mambaseq_dna.tokenizer import fold_case


class Genomes(NamedTuple):
    """tokens: `(bases,)` uint8 ids in upper case, on the device. train, validation, test: for each class the stretches
    without N, `(stretches, 2)` int64."""

    names: list[str]
    tokens: Tensor
    train: list[np.ndarray]
    validation: list[np.ndarray]
    test: list[np.ndarray]

    @classmethod
    def of(cls, splits: Splits, device: torch.device) -> Genomes:
        """The genomes of a dataset's splits."""
        groups = [splits.train, splits.validation, splits.test]
        tables = [[Intervals.of(group.intervals) for group in of] for of in groups]
        stores = {store.folder: store for of in tables for one in of for store in one.stores}
        first = dict(zip(stores, np.cumsum([0, *(len(store.tokens) for store in stores.values())]), strict=False))
        tokens = np.concatenate([fold_case(store.tokens) for store in stores.values()])

        def places(one: Intervals) -> np.ndarray:
            begin = [first[store.folder] + store.starts for store in one.stores]
            shift = np.array([begin[row[0]][row[1]] for row in one.table])
            return one.table[:, 2:] + shift[:, None]

        train, validation, test = ([places(one) for one in of] for of in tables)
        names = [group.name for group in splits.train]
        return cls(names, torch.from_numpy(tokens).to(device), train, validation, test)


def mammals(context: Context) -> Genomes:
    """Human, galago, mouse, cow and dog: ENm001 for training, its last tenth for validation, ENm002 for test."""
    return Genomes.of(SpeciesData().splits, context.device)
