"""Why variants have no score, for messages: reasons that differ in a name or an allele alone are one."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from mambaseq.errors import cut_list

OTHER_REF, NO_SEQUENCE = "REF is", "the reference has no sequence"
"""How reasons begin that say: the reference has other bases than a variant; it has no sequence of that name."""

_NAMED = 5


def reasons_told(without: Mapping[str, int], most: int = 5) -> list[str]:
    """How many variants have no score, by reason, the commonest first, at most so many and a count of the others.

    without: how many, by reason.
    """
    counts: collections.Counter[str] = collections.Counter()
    of: dict[str, list[str]] = {}
    for reason, count in without.items():
        kind = next((kind for kind in (OTHER_REF, NO_SEQUENCE) if reason.startswith(kind)), reason)
        counts[kind] += count
        of.setdefault(kind, []).append(reason)
    told = []
    for kind, count in counts.most_common(most):
        what = of[kind][0]
        if kind == OTHER_REF and len(of[kind]) > 1:
            what += " (and the like)"
        elif kind == NO_SEQUENCE:
            names = [reason.removeprefix(NO_SEQUENCE).strip() for reason in of[kind]]
            what = f"{NO_SEQUENCE} {cut_list(names, _NAMED)}"
        told.append(f"{count:,} {what}")
    if rest := counts.total() - sum(count for _, count in counts.most_common(most)):
        told.append(f"{rest:,} for other reasons")
    return told
