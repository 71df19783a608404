"""Variants on their assembly: what is read on either side, and why a variant cannot be scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mambaseq.errors import cut, shown
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.vcf import Variant
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case
from mambaseq_dna.variants.reasons import NO_SEQUENCE, OTHER_REF

_BASES = set("ACGTUacgtu")
_LETTERS = _BASES | set("NRYSWKMBDHVnryswkmbdhv")


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """The alleles of a place between the same flanks. All are ids of the model's tokenizer, uint8.

    before, after: the reference on either side, shorter where the sequence ends. ref: the reference's allele. alts: the
    alternatives, none of which is empty.
    """

    before: np.ndarray
    ref: np.ndarray
    alts: tuple[np.ndarray, ...]
    after: np.ndarray

    @property
    def alleles(self) -> list[np.ndarray]:
        """The reference's, then the alternatives."""
        return [self.ref, *self.alts]

    def whole(self, allele: np.ndarray) -> np.ndarray:
        """The window with this allele."""
        return np.concatenate([self.before, allele, self.after])

    def turned(self, tokenizer: BaseTokenizer) -> Site:
        """The same on the other strand."""
        turn = tokenizer.reverse_complement
        return Site(turn(self.after), turn(self.ref), tuple(turn(alt) for alt in self.alts), turn(self.before))


class Places:
    """Finds variants on an assembly and cuts windows around them.

    window: bases with the reference's allele, which is in the middle; near the end of a sequence there are fewer.
    tokenizer: the model's. With `lowercase: keep` an alternative has the case of the reference's first base.
    """

    def __init__(self, assembly: Assembly, tokenizer: BaseTokenizer, window: int) -> None:
        self.assembly, self.tokenizer, self.window = assembly, tokenizer, window
        self.lengths = assembly.lengths
        self._plain = BaseTokenizer()

    def why_not(self, variant: Variant) -> str:
        """Why a variant cannot be scored; "" for one that can."""
        if told := _no_bases(variant):
            return told
        name = self.assembly.find(variant.chrom)
        if name is None:
            return f"{NO_SEQUENCE} {cut(variant.chrom, 40)}"
        stop = variant.pos - 1 + len(variant.ref)
        if variant.pos < 1 or stop > self.lengths[name]:
            return f"not within {name}, which has {self.lengths[name]:,} bases"
        found = self._plain.decode(fold_case(self.assembly.read(name, variant.pos - 1, stop)))
        given = variant.ref.upper().replace("U", "T")
        if found != given:
            return f"{OTHER_REF} {cut(given, 20)}, but the reference has {cut(found, 20)}"
        if given == variant.alt.upper().replace("U", "T"):
            return "ALT is the same as REF"
        longest = max(len(variant.ref), len(variant.alt))
        if longest > self.window - 2:
            return f"an allele of {longest:,} bases does not fit into a window of {self.window:,}"
        return ""

    def site(self, variants: Sequence[Variant]) -> Site:
        """The site of variants with the same sequence, POS and REF, all of which can be scored."""
        first = variants[0]
        alts = [self._plain.encode(variant.alt) for variant in variants]
        return self.cut(first.chrom, first.pos - 1, first.pos - 1 + len(first.ref), alts)

    def cut(self, name: str, start: int, stop: int, alts: Sequence[np.ndarray]) -> Site:
        """The site of bases [start, stop), counted from 0, that are replaced by `alts` (ids 0 to 3)."""
        found = self.assembly.find(name)
        assert found is not None
        spare = self.window - (stop - start)
        left, right = max(start - spare // 2, 0), min(stop + spare - spare // 2, self.lengths[found])
        ids = self.assembly.read(found, left, right)
        if self.tokenizer.lowercase == "fold":
            ids = fold_case(ids)
        elif ids[start - left] > N:
            alts = [alt + np.uint8(N + 1) for alt in alts]
        return Site(ids[: start - left], ids[start - left : stop - left], tuple(alts), ids[stop - left :])


def _no_bases(variant: Variant) -> str:
    """Why the alleles of a variant are no sequences of bases; "" if they are."""
    ref, alt = variant.ref, variant.alt
    if not ref or set(ref) - _LETTERS:
        return f"REF is {shown(ref, 20)}, which is no sequence of bases"
    if set(ref) - _BASES:
        return "REF has N or another ambiguous base"
    if alt in (".", ""):
        return "there is no alternative"
    if alt == "*":
        return "ALT is *: deleted by another variant"
    if alt.startswith("<"):
        return f"ALT is symbolic ({cut(alt, 20)}): its bases are not given"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return f"ALT is a breakend ({cut(alt, 20)})"
    if set(alt) - _LETTERS:
        return f"ALT is {shown(alt, 20)}, which is no sequence of bases"
    return "ALT has N or another ambiguous base" if set(alt) - _BASES else ""
