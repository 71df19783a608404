"""DNA for `mambaseq data audit`: copies on either strand, in either case; N, soft mask and GC as shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mambaseq.data.audited import Audited, AuditedSequence, Property
from mambaseq_dna.tokenizer import BASES, N, fold_case, is_lowercase

_ANY_CASE = np.where(np.arange(2 * len(BASES)) % len(BASES) == N, -1, np.arange(2 * len(BASES)) % len(BASES))
_COMPLEMENT = np.array([3, 2, 1, 0])


def n_share(ids: np.ndarray) -> float:
    """The share of N, 0 to 1, in ids `(length,)` of a base tokenizer, in either case; 0 without any."""
    return float(np.mean(fold_case(ids) == N)) if len(ids) else 0.0


def soft_mask_share(ids: np.ndarray) -> float:
    """The share of lower case, 0 to 1, in ids `(length,)` of `BaseTokenizer("keep")`; 0 without any."""
    return float(np.mean(is_lowercase(ids))) if len(ids) else 0.0


def gc_share(ids: np.ndarray) -> float:
    """The share of C and G, 0 to 1, among the bases of ids `(length,)` that are not N; 0 without any."""
    counts = np.bincount(fold_case(ids), minlength=len(BASES))
    return float((counts[1] + counts[2]) / max(int(counts[:N].sum()), 1))


def audited_dna(
    splits: Mapping[str, Sequence[AuditedSequence]],
    *,
    length: int | None = None,
    case_seen: bool = False,
    notes: Sequence[str] = (),
) -> Audited:
    """DNA to be audited.

    splits: sequences of ids of a base tokenizer; those of `BaseTokenizer("keep")` tell of the soft mask.
    length: what a model gets are windows of so many bases; None: whole sequences, as in a table of labelled ones.
    case_seen: whether a model tells lower case from upper case.
    """
    properties = (
        Property("share of N", n_share),
        Property("soft mask (lower case)", soft_mask_share, seen=case_seen),
        Property("GC", gc_share, artefact=False),
    )
    return Audited(splits, _ANY_CASE, _COMPLEMENT, properties, length, unit="bases", notes=notes)
