"""What a model says of alleles: a `Scorer` turns sites into a row of numbers for each alternative."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.runs.answers import CHUNK, Sequences
from mambaseq.runs.embeddings import Embeddings
from mambaseq.runs.likelihoods import Likelihood, PseudoLikelihood
from mambaseq.runs.meaning import answer_of
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case
from mambaseq_dna.variants.sites import Site

Pool = Literal["mean", "last", "variant"]

INDEL_FLANK = 32
"""Bases on either side of an insertion or deletion whose pseudo-likelihood counts, too."""

_TIMES = 7  # every seventh base is hidden at once, as in `PseudoLikelihood`


class Scorer(abc.ABC):
    """columns: names of the numbers. both_strands: whether the mean over both strands is meant unless told otherwise.
    tokens: bases that are read at once; this bounds the memory."""

    columns: list[str]
    both_strands = True

    def __init__(self, loaded: LoadedModel, tokens: int) -> None:
        self.loaded, self.model, self.tokens = loaded, loaded.model, tokens
        self.device = next(loaded.model.parameters()).device
        assert isinstance(loaded.tokenizer, BaseTokenizer)
        self.tokenizer = loaded.tokenizer
        encoder = loaded.model.encoder
        self.least = int(getattr(encoder, "min_length", 1))
        self.one_strand = getattr(loaded.model.backbone, "strands", 1) == 1

    @abc.abstractmethod
    def scores(self, sites: Sequence[Site]) -> list[np.ndarray]:
        """For each site `(alternatives, columns)` float64, read on the strand that is given."""

    def effects(self, sites: Sequence[Site], both_strands: bool | None = None) -> list[np.ndarray]:
        """As `scores`, or their mean over both strands. None: as is meant for the model; one that reads both strands
        alike is asked once. Raises DataError for numbers that are not finite."""
        both = (self.both_strands if both_strands is None else both_strands) and self.one_strand
        with torch.no_grad():
            found = self.scores(sites)
            if both:
                other = self.scores([site.turned(self.tokenizer) for site in sites])
                found = [(one + two) / 2 for one, two in zip(found, other, strict=True)]
        if not all(np.isfinite(one).all() for one in found):
            raise DataError(
                f"The model at {self.loaded.source} gives numbers that are not finite: its computation overflows. Use "
                "an earlier checkpoint."
            )
        return found

    def _batches(self, rows: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of rows of one length, and the rows as `(rows, length)` int64 on the device."""
        lengths: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            lengths.setdefault(len(row), []).append(number)
        for length, numbers in lengths.items():
            for some in _some(numbers, self.tokens // length):
                yield some, self._tensor(np.stack([rows[number] for number in some]))

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    def _alleles(self, sites: Sequence[Site]) -> tuple[list[np.ndarray], list[slice]]:
        """Whole windows of all alleles, and where each site's are."""
        rows: list[np.ndarray] = []
        places = []
        for site in sites:
            places.append(slice(len(rows), len(rows) + 1 + len(site.alts)))
            rows += [site.whole(allele) for allele in site.alleles]
        return rows, places


def _some(numbers: list[int], at_most: int) -> Iterator[list[int]]:
    step = max(at_most, 1)
    for first in range(0, len(numbers), step):
        yield numbers[first : first + step]


class LogLikelihoodRatio(Scorer):
    """log P(window with the alternative) - log P(window with the reference's allele), in nats, by a causal model.

    What is before the variant is the same for all alleles: it is read once, and its state is forked. From the variant
    on, all bases to the window's end count, but N. Both windows have the same flanks, so an allele pays for each base
    that it is longer.
    """

    def __init__(self, loaded: LoadedModel, tokens: int) -> None:
        super().__init__(loaded, tokens)
        self.columns = ["llr"]
        backbone, encoder = self.model.backbone, self.model.encoder
        self.in_parts = bool(backbone.causal and getattr(encoder, "position_wise", False))

    def scores(self, sites: Sequence[Site]) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0)] * len(sites)
        alike: dict[int, list[int]] = {}
        for number, site in enumerate(sites):
            alike.setdefault(len(site.before), []).append(number)
        for length, numbers in alike.items():
            for some in _some(numbers, self.tokens // max(length, 1)):
                for number, one in zip(some, self._alike([sites[number] for number in some]), strict=True):
                    found[number] = one
        return found

    def _alike(self, sites: list[Site]) -> list[np.ndarray]:
        """Of sites with as many bases before them."""
        shared = max(len(sites[0].before) - 1, 0) if self.in_parts else 0  # the last one is read with the alleles
        state = None
        if shared:
            state, _ = self._read(self._tensor(np.stack([site.before[:shared] for site in sites])), None, None)
        rows, owners, known = [], [], []
        for owner, site in enumerate(sites):
            for allele in site.alleles:
                rows.append(np.concatenate([site.before[shared:], allele, site.after]))
                owners.append(owner)
                known.append(len(site.before) - shared)  # of the row, these are given
        totals = np.empty(len(rows))
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        for some in _some(order, self.tokens // len(rows[order[-1]])):
            longest = max(len(rows[number]) for number in some)
            ids = np.zeros((len(some), longest), dtype=np.uint8)  # padding is at the end, where no base sees it
            labels = np.full((len(some), longest), -100, dtype=np.int64)
            for place, number in enumerate(some):
                row, first = rows[number], known[number]
                ids[place, : len(row)] = row
                labels[place, first : len(row)] = np.where(fold_case(row) == N, -100, row.astype(np.int64))[first:]
            owner_of = torch.tensor([owners[number] for number in some], device=self.device)
            forked = None if state is None else [one.select(owner_of) for one in state]
            _, nats = self._read(self._tensor(ids[:, :-1]), torch.from_numpy(labels[:, 1:]).to(self.device), forked)
            totals[some] = -nats
        result, first = [], 0
        for site in sites:
            stop = first + 1 + len(site.alts)
            result.append((totals[first + 1 : stop] - totals[first])[:, None])
            first = stop
        return result

    def _read(self, ids: Tensor, labels: Tensor | None, state: Any) -> tuple[Any, np.ndarray]:
        """Read `(rows, length)` from a state on, in parts if the model can be. Returns the last state, and the summed
        nats of the labels `(rows,)`, those of -100 left out."""
        length = ids.shape[1]
        step = max(CHUNK, self.tokens // len(ids)) if self.in_parts else length
        total = torch.zeros(len(ids), dtype=torch.float64, device=self.device)
        for first in range(0, length, step):
            last = first + step >= length and labels is not None
            x = self.model.encoder(ids[:, first : first + step])
            if last:  # nobody needs its state
                hidden = self.model.backbone(x, state=state)
            else:
                hidden, state = self.model.backbone(x, state=state, return_state=True)
            if labels is not None:
                _, logits = self.model.head(hidden)
                losses = F.cross_entropy(
                    logits.float().transpose(1, 2), labels[:, first : first + step], reduction="none"
                )
                total += losses.double().sum(1)
        return state, total.cpu().numpy()


class MaskedRatio(Scorer):
    """The same by pseudo-likelihoods of a masked model, in nats.

    Substitutions: the bases that differ are hidden together, and the sum of log P(alternative) - log P(reference) over
    them is the score. Insertions and deletions: the sum of the log probabilities of the allele's bases and of
    `INDEL_FLANK` bases on either side, every seventh hidden at once, with the alternative less with the reference.
    """

    def __init__(self, loaded: LoadedModel, tokens: int, mask_id: int) -> None:
        super().__init__(loaded, tokens)
        self.columns = ["llr"]
        self.mask_id = mask_id

    def scores(self, sites: Sequence[Site]) -> list[np.ndarray]:
        found = [np.zeros((len(site.alts), 1)) for site in sites]
        rows: list[np.ndarray] = []  # with hidden bases
        asked: list[np.ndarray] = []  # the hidden positions of each
        uses: list[list[tuple[int, int, np.ndarray, float]]] = []  # site, alternative, bases, sign
        for number, site in enumerate(sites):
            first, reads = len(site.before), {}
            for which, alt in enumerate(site.alts):
                if len(alt) != len(site.ref):
                    continue
                differ = np.flatnonzero(alt != site.ref)
                key = differ.tobytes()
                if key not in reads:
                    reads[key] = len(rows)
                    self._hide(site.whole(site.ref), first + differ, rows, asked)
                    uses.append([])
                uses[reads[key]] += [(number, which, alt[differ], 1.0), (number, which, site.ref[differ], -1.0)]
            longer = [which for which, alt in enumerate(site.alts) if len(alt) != len(site.ref)]
            if longer:
                users_of = [(site.ref, [(which, -1.0) for which in longer])]
                users_of += [(site.alts[which], [(which, 1.0)]) for which in longer]
                for allele, users in users_of:
                    whole = site.whole(allele)
                    region = np.arange(max(first - INDEL_FLANK, 0), min(first + len(allele) + INDEL_FLANK, len(whole)))
                    for offset in range(min(_TIMES, len(region))):
                        places = region[offset::_TIMES]
                        places = places[fold_case(whole[places]) != N]
                        if len(places):
                            self._hide(whole, places, rows, asked)
                            uses.append([(number, which, whole[places], sign) for which, sign in users])
        for numbers, ids in self._batches(rows):
            for one, logits in zip(numbers, self._logits(ids, [asked[one] for one in numbers]), strict=True):
                for number, which, bases, sign in uses[one]:
                    found[number][which, 0] += sign * logits[np.arange(len(bases)), bases].sum()
        return found

    def _hide(self, whole: np.ndarray, places: np.ndarray, rows: list[np.ndarray], asked: list[np.ndarray]) -> None:
        hidden = whole.copy()
        hidden[places] = self.mask_id
        rows.append(hidden)
        asked.append(places)

    def _logits(self, ids: Tensor, asked: list[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities at the hidden places of each row, `(places, vocabulary)` float64."""
        _, logits = self.model.head(self.model.backbone(self.model.encoder(ids)))
        owner = np.repeat(np.arange(len(asked)), [len(places) for places in asked])
        place = torch.from_numpy(np.concatenate(asked)).to(self.device)
        told = logits[torch.from_numpy(owner).to(self.device), place].double().log_softmax(-1).cpu().numpy()
        return np.split(told, np.cumsum([len(places) for places in asked])[:-1])


class AnswerDifference(Scorer):
    """The answer for the window with the alternative less that with the reference: probabilities of classes or labels,
    or values. Unless asked, of the strand that is given: a model may have learned from one."""

    both_strands = False

    def __init__(self, loaded: LoadedModel, tokens: int, answer: Sequences) -> None:
        super().__init__(loaded, tokens)
        self.answer = answer
        answer.cells(self._answers([np.zeros(max(self.least, 8), np.uint8)]))  # the names are known after an answer
        first = int(answer.classes is not None and not answer.several)  # the first column says which class is likeliest
        self.columns = [f"delta_{name}" for name in answer.columns[first:]]

    @torch.no_grad()
    def _answers(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """`(rows, answers)` float64."""
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for numbers, ids in self._batches(rows):
            output = self.model(ids).logits.float().cpu().view(len(ids), -1)
            for number, answers in zip(numbers, self.answer.numbers(output), strict=True):
                found[number] = answers.astype(np.float64)
        return np.asarray(found)

    def scores(self, sites: Sequence[Site]) -> list[np.ndarray]:
        rows, places = self._alleles(sites)
        answers = self._answers(rows)
        return [answers[place][1:] - answers[place][0] for place in places]


class Distance(Scorer):
    """The distance between the embeddings of both windows: L2, and 1 less the cosine.

    pool: the "mean" over the window, its "last" position, or the mean over the allele ("variant"). layer: see
    `mambaseq.runs.embeddings.Embeddings`.
    """

    def __init__(self, loaded: LoadedModel, tokens: int, pool: Pool = "mean", layer: int | None = None) -> None:
        super().__init__(loaded, tokens)
        if pool not in ("mean", "last", "variant"):
            raise ConfigError(f"Embeddings of variants are pooled by mean, last or variant, not by {shown(pool)}.")
        self.columns = ["distance_l2", "distance_cosine"]
        self.pool: Pool = pool
        self.embeddings = Embeddings(loaded, None, "mean", layer)
        if pool == "variant" and getattr(self.model.encoder, "stride", 1) != 1:
            raise ConfigError(
                "The model's positions are not single bases, so that none is the variant's. Pool by mean or last."
            )

    def vectors(self, sites: Sequence[Site]) -> list[np.ndarray]:
        """For each site the embeddings of its alleles, the reference's first: `(1 + alternatives, width)` float64."""
        rows, places = self._alleles(sites)
        spans = [(len(site.before), len(site.before) + len(allele)) for site in sites for allele in site.alleles]
        found: list[np.ndarray] = [np.empty(0)] * len(rows)
        for numbers, ids in self._batches(rows):
            hidden = self.embeddings.hidden(ids)
            if self.pool == "mean":
                pooled = hidden.double().mean(1)
            elif self.pool == "last":
                pooled = hidden[:, -1].double()
            else:
                pooled = torch.stack(
                    [row[slice(*spans[number])].double().mean(0) for row, number in zip(hidden, numbers, strict=True)]
                )
            for number, vector in zip(numbers, pooled.cpu().numpy(), strict=True):
                found[number] = vector
        return [np.stack(found[place]) for place in places]

    def scores(self, sites: Sequence[Site]) -> list[np.ndarray]:
        return [_distances(vectors) for vectors in self.vectors(sites)]


def _distances(vectors: np.ndarray) -> np.ndarray:
    one, others = vectors[0], vectors[1:]
    far = np.linalg.norm(others - one, axis=1)
    lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(one)
    cosine = (others @ one) / np.where(lengths > 0, lengths, 1)
    return np.stack([far, np.clip(1 - cosine, 0, 2)], axis=1)


def scorer_of(loaded: LoadedModel, tokens: int) -> Scorer:
    """The scorer of a model's answers: likelihoods of a language model, differences of classes and values.

    Raises ConfigError for a model that does not read single bases, is conditional, or whose answers are of positions.
    """
    check_bases(loaded)
    answer = answer_of(loaded, None)
    if isinstance(answer, PseudoLikelihood):
        return MaskedRatio(loaded, tokens, answer.mask_id)
    if isinstance(answer, Likelihood):
        return LogLikelihoodRatio(loaded, tokens)
    if type(answer) is Sequences:
        return AnswerDifference(loaded, tokens, answer)
    raise ConfigError(
        f"The model at {loaded.source} answers for each position, so that a window has no one answer that a variant "
        "changes. Ask for the distance of embeddings instead (--what embeddings)."
    )


def check_bases(loaded: LoadedModel) -> None:
    """Raise ConfigError for a model that variants cannot be given to."""
    if not isinstance(loaded.tokenizer, BaseTokenizer):
        raise ConfigError(f"The model at {loaded.source} does not read bases (dna/base), so it knows no variants.")
    if getattr(loaded.model.encoder, "condition", None) is not None:
        raise ConfigError(f"The model at {loaded.source} is conditional, which variants are not scored by.")
