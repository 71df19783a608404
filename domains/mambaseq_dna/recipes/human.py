"""Human chromosome 22 in the recipes: blocks of an alignment of four great apes, split by place."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.reproduction import Context
from mambaseq_dna.files.maf import read_maf
from mambaseq_dna.recipes.common import stretches_of
from mambaseq_dna.tokenizer import BaseTokenizer

FILE = "epo_catarrhini_chr22.maf.xz"
SHA256 = "b47ca82498952291f288c34688df4696330d567a4af5e7447f6da288cd6ab869"
SOURCE = (
    "four great apes aligned on human chromosome 22, from the Debian package maffilter-examples 1.3.1+dfsg-4 "
    "(Compara.epo_5_catarrhini_hsap-projected.chr22.subset.nogap.cleaned_aln.maf.gz), recompressed with xz"
)
APES = {"Hsap": "human", "Ptro": "chimpanzee", "Ggor": "gorilla", "Ppyg": "orangutan"}
VALIDATION, TEST = 45_099_268, 47_893_836
"""Human starts from which blocks are validation and test data: 80, 10 and 10 % of the bases."""


class Blocks(NamedTuple):
    """One ape's bases in all blocks, end to end. tokens: uint8 ids on the device, upper case. bounds: `(blocks + 1,)`
    int64. split: 0 training, 1 validation, 2 test, `(blocks,)` int64."""

    tokens: Tensor
    bounds: np.ndarray
    split: np.ndarray

    def places(self, split: int, joined: bool = False) -> np.ndarray:
        """Stretches without N of a split's blocks, `(stretches, 2)` int64; joined: as if its blocks followed each
        other, which skips sequence between them."""
        chosen = np.flatnonzero(self.split == split)
        edges = [chosen[0], chosen[-1] + 1] if joined else [*chosen, chosen[-1] + 1]
        return stretches_of(self.tokens, self.bounds[edges])


def partners(context: Context, ape: str) -> np.ndarray:
    """For each human base of all blocks, how many of another ape's the alignment has before it, `(bases,)` int64."""
    found, total = [], 0
    for block in read_maf(context.brought(FILE, SHA256, SOURCE)):
        rows = {row.source.partition(".")[0]: np.frombuffer(row.text.encode(), np.uint8) for row in block}
        theirs = rows[ape] != ord("-")
        found.append((np.cumsum(theirs) - theirs)[rows["Hsap"] != ord("-")] + total)
        total += int(theirs.sum())
    return np.concatenate(found)


def load(context: Context, ape: str = "Hsap") -> Blocks:
    """The blocks of an ape. Raises UserError if the user has not brought the file (`Context.brought`)."""
    tokenizer = BaseTokenizer()
    ids, starts = [], []
    for block in read_maf(context.brought(FILE, SHA256, SOURCE)):
        rows = {row.source.partition(".")[0]: row for row in block}
        ids.append(tokenizer.encode(rows[ape].bases))
        starts.append(rows["Hsap"].start)
    bounds = np.cumsum([0, *map(len, ids)])
    split = np.searchsorted([VALIDATION, TEST], starts, side="right")
    return Blocks(torch.from_numpy(np.concatenate(ids)).to(context.device), bounds, split)
