"""Reading frames as features of bases: how far the six open reading frames around a base reach."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.encoders import Encoder, refuse_condition
from mambaseq.ops import sequences
from mambaseq_dna.encoders import KmerEncoder
from mambaseq_dna.tokenizer import N

STOPS = ("TAA", "TAG", "TGA")
FEATURES = 24
"""Six frames of four features; see `frame_features`."""
_SCALE = 8.0  # e^8 is about 3,000 bases


def _code(codon: str) -> int:
    first, second, third = ("ACGT".index(base) for base in codon)
    return first * 16 + second * 4 + third


def _one_strand(ids: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Features of the codon that begins at each base, `(batch, length, 4)` fp32.

    start, stop: `(batch, length)` int64, the bounds of the sequence that a base belongs to.
    """
    batch, length = ids.shape
    place = torch.arange(length, device=ids.device)
    bases = F.pad(ids, (0, 2), value=N)
    first, second, third = bases[:, :length], bases[:, 1 : length + 1], bases[:, 2:]
    whole = (torch.stack((first, second, third)) < N).all(0) & (place + 2 < stop)
    code = torch.where(whole, first * 16 + second * 4 + third, 64)
    is_stop = torch.stack([code == _code(codon) for codon in STOPS]).any(0)  # numbers, which a CUDA graph can hold
    is_start = code == _code("ATG")

    filled = -length % 3

    def by_frame(values: Tensor, fill: int) -> Tensor:  # (batch, length) → (batch, 3, codons), which scans run along
        return F.pad(values, (0, filled), value=fill).view(batch, -1, 3).transpose(1, 2).contiguous()

    def flat(values: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(batch, -1)[:, :length]

    far = length + 3
    here = place.expand(batch, -1)
    # within a frame: the stop before each codon, the stop at it or behind it, the start at it or behind it
    before = by_frame(torch.where(is_stop, here, -far), -far).cummax(2).values
    before = flat(F.pad(before, (1, 0), value=-far)[..., :-1])
    behind = flat(by_frame(torch.where(is_stop, here, far), far).flip(2).cummin(2).values.flip(2))
    begins = flat(by_frame(torch.where(is_start, here, far), far).flip(2).cummin(2).values.flip(2))
    # a frame is cut at the ends of its sequence: at the last codon that begins before it, the first that leaves it
    before = torch.maximum(before, here - 3 * ((here - start) // 3 + 1))
    behind = torch.minimum(behind, here + 3 * torch.clamp((stop - here) // 3, min=0))
    opened = before + 3  # the first codon of the open frame
    begun = begins.gather(1, opened.clamp(0, length - 1))
    started = (begun <= here) & (begun < behind)
    reach = torch.where(started, behind - begun, 0)
    features = (behind - before, reach, behind - here)
    logs = [torch.log1p(of.clamp(min=0).float()) / _SCALE for of in features]
    return torch.stack((*logs, started.float()), -1)


def frame_features(ids: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """What the reading frames around each base say, `(batch, length, 24)` fp32.

    For each of the three codons that hold the base, on the forward and then on the other strand, in the order of the
    base's place in the codon: the length of the open frame from stop to stop, the length from its first ATG to the stop
    if the codon lies there, and the bases left to the stop (as log(1 + bases) / 8), and whether the codon lies behind
    the ATG; the stop is one of them. Frames are cut at the ends of a sequence.

    ids: `(batch, length)` int64, A C G T N = 0..4; larger ids count as N.
    """
    batch, length = ids.shape
    place = torch.arange(length, device=ids.device)
    bases = ids if mask is None else ids.masked_fill(~mask, N)
    bases = bases.clamp(max=N)
    if cu_seqlens is not None:
        sequences.check(cu_seqlens, batch, length)
        of = sequences.of_positions(cu_seqlens, length)
        start, stop = cu_seqlens[of].long()[None], cu_seqlens[of + 1].long()[None]
    else:
        start = torch.zeros_like(bases)
        stop = torch.full_like(bases, length) if mask is None else mask.sum(1, keepdim=True).expand(-1, length)
    found = []
    for reverse in (False, True):
        if reverse:
            strand = torch.where(bases < N, 3 - bases, bases).flip(1)
            features = _one_strand(strand, (length - stop).flip(1), (length - start).flip(1))
        else:
            features = _one_strand(bases, start, stop)
        for back in range(3):  # the codon that began so many bases before
            moved = F.pad(features, (0, 0, back, 0))[:, :length]
            begin = (length - stop).flip(1) if reverse else start
            moved = torch.where((place - back >= begin)[..., None], moved, 0.0)
            found.append(moved.flip(1) if reverse else moved)
    return torch.cat(found, -1)


class FrameEncoder(Encoder):
    """Words of k bases at each base, as `dna/kmer` with stride 1 has them, and a linear map of what the six reading
    frames around the base say (`frame_features`): for models of genes.

    It looks at whole sequences, so it is for models that read both ways.

    Args:
        d_model: width.
        k: bases a word.
    """

    takes_mask: ClassVar[bool] = True
    causal = False

    def __init__(self, d_model: int, k: int = 6) -> None:
        super().__init__()
        self.words = KmerEncoder(d_model, k, stride=1)
        self.min_length = self.words.min_length
        self.frames = nn.Linear(FEATURES, d_model)

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Raises ConfigError for a condition."""
        refuse_condition("dna/frames", condition)
        features = frame_features(inputs, cu_seqlens, mask).to(self.frames.weight.dtype)
        return self.words(inputs, None, cu_seqlens, mask) + self.frames(features)
