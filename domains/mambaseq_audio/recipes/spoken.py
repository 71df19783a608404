"""What the recipe on spoken digits reads and draws: recordings on the device, rows of them for training, bits a sample,
and what background noise alone costs."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio.functional
from scipy.special import digamma, ndtr
from torch import Tensor

from mambaseq.atomic import atomic_folder
from mambaseq.batch import Batch
from mambaseq.data.archives import unpack
from mambaseq.data.cache import locate
from mambaseq.data.drawing import below, words
from mambaseq.errors import DataError, UserError
from mambaseq.models import SequenceModel
from mambaseq.reproduction import Context
from mambaseq.reproduction.batches import numbers
from mambaseq.reproduction.training import BatchOf
from mambaseq_audio.clips import DIGITS_NAMES
from mambaseq_audio.mulaw import LEVELS, MuLaw

RATE = 8000
ARCHIVE = "fsdd_recordings.tar.xz"
SHA256 = "961cd77491b0d99a71dcd53f81ef244ff41026f7d6f4b9a7b4717aa9e719dfb7"
SOURCE = (
    "the folder recordings of the Free Spoken Digit Dataset (GitHub repository Jakobovski/free-spoken-digit-dataset, "
    "commit 26eb9aaf76e81b692f806f9140c2d2777410d7a1, CC BY-SA 4.0), packed with tar and xz"
)
TEST, VALIDATION = range(5), range(47, 50)
"""Takes: the official test set, and those left out of training to choose weights by."""
HELD_OUT = ("lucas", "theo")
"""Speakers, where others are asked for than training hears."""

_FULL_SCALE = 32768.0


class Recordings(NamedTuple):
    """All recordings, in the order of their names. signals: `(length,)` int16 each. digits, speakers, takes:
    `(recordings,)` int64, speakers as numbers of `names`."""

    signals: list[np.ndarray]
    digits: np.ndarray
    speakers: np.ndarray
    takes: np.ndarray
    names: list[str]

    def split(self, held: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Indices of "train", "validation" and "test": the official test takes, or all takes of some speakers.

        Raises DataError if one is empty.
        """
        if held:
            test = np.isin(self.speakers, [i for i, name in enumerate(self.names) if name in held])
        else:
            test = np.isin(self.takes, TEST)
        validation = np.isin(self.takes, VALIDATION) & ~test
        found = {"train": ~test & ~validation, "validation": validation, "test": test}
        if empty := [name for name, of in found.items() if not of.any()]:
            raise DataError(f"The recordings have none for {' and '.join(empty)}. Bring the whole set.")
        return {name: np.flatnonzero(of) for name, of in found.items()}

    def levels(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Mu-law levels of some, `(length,)` uint8 each."""
        codec = MuLaw()
        return [codec.encode(self.signals[i] / _FULL_SCALE) for i in chosen]

    def conditions(self, with_speaker: bool = True) -> np.ndarray:
        """`(recordings,)` int64: the digit and the speaker as one name, or the digit. Told apart, and with the length
        as a third, models of equal size and time are heard less often as what they were asked for."""
        return self.digits * len(self.names) + self.speakers if with_speaker else self.digits


SAMPLED = {"tiny": (0, 1, 5, 6, 47), "small": tuple(range(50))}
"""Takes of the recordings that ship, which are read if none are brought."""


def is_sample(context: Context) -> bool:
    """Whether the recordings that ship with the project are taken, since none are brought and the scale shows no
    result. Raises UserError for a folder that holds trainings on the others."""
    sample = context.data is None and context.scale in SAMPLED
    other = context.folder / ("recordings" if sample else "sample")
    if other.is_dir():
        held = (
            "the whole set: name its folder again with --data" if sample else "the sample that ships: leave --data out"
        )
        raise UserError(f"{context.folder} holds trainings on {held}, or choose another --out.")
    return sample


def sampled(context: Context) -> Path:
    """The recordings that ship with the project, or a few of them, as wav files."""
    folder = context.folder / "sample"
    if not folder.is_dir():
        # another process may be first
        with contextlib.suppress(FileExistsError), atomic_folder(folder, replace=False) as temporary:
            for file in locate("mambaseq:data/fsdd/recordings/*.flac"):
                if int(file.stem.rpartition("_")[2]) in SAMPLED[context.scale]:
                    signal, rate = soundfile.read(file, dtype="int16")
                    soundfile.write(temporary / f"{file.stem}.wav", signal, rate, subtype="PCM_16")
    return folder


def unpacked(context: Context) -> Path:
    """The folder of the recordings that the user has brought, as single files."""
    ships = "" if context.data is not None else " (--scale small and tiny also run on the digits that ship)"
    archive = context.brought(ARCHIVE, SHA256, SOURCE + ships)
    folder = context.folder / "recordings"
    if not folder.is_dir():
        # another process may be first
        with contextlib.suppress(FileExistsError), atomic_folder(folder, replace=False) as temporary:
            unpack(archive, temporary)
    return folder


def load(folder: Path) -> Recordings:
    """The wav files in a folder, at any depth, named digit_speaker_take.

    Raises DataError for other names and rates.
    """
    files = sorted(folder.rglob("*.wav"))
    signals, groups = [], []
    for file in files:
        match = re.search(DIGITS_NAMES, file.stem)
        signal, rate = soundfile.read(file, dtype="int16")
        if match is None or rate != RATE or signal.ndim != 1:
            raise DataError(f"{file} is not a recording of one channel at {RATE} Hz that is named digit_speaker_take.")
        signals.append(signal)
        groups.append(match.groupdict())
    if not files:
        raise DataError(f"{folder} holds no wav files. Unpack the recordings again.")
    names = sorted({group["speaker"] for group in groups})
    digits, takes = (np.array([int(group[key]) for group in groups]) for key in ("digit", "take"))
    return Recordings(signals, digits, np.array([names.index(group["speaker"]) for group in groups]), takes, names)


class Variation(NamedTuple):
    """How training recordings are changed. gain: one half is made louder or softer by up to so many dB, before it is
    rounded to levels. shift: one half of the rows begins up to so many samples later, as pooling over windows sees
    it."""

    gain: float = 0.0
    shift: int = 0


class Rows:
    """Rows of `length` samples on the device, drawn so that every sample of every recording is about as frequent: short
    recordings whole and padded, long ones from any place.

    signals: `(length,)` int16 each. conditions: `(recordings,)` int64.
    """

    def __init__(
        self, signals: Sequence[np.ndarray], conditions: np.ndarray, length: int, device: torch.device
    ) -> None:
        self.length = length
        self.samples = torch.from_numpy(np.concatenate(signals)).to(device)
        self.lengths = torch.tensor([len(signal) for signal in signals], device=device)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.ends = self.lengths.clamp(min=length).cumsum(0)  # a recording's chance is that of its rows
        self.total = int(self.ends[-1])
        self.conditions = torch.from_numpy(conditions).to(device)
        self.within = torch.arange(-1, length, device=device)

    def places(self, drawn: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Recordings and the sample that a row begins with, `(rows,)` int64 each, from `(rows, 4)` random words."""
        which = torch.searchsorted(self.ends, (drawn[:, 0] * self.total) >> 32, right=True)
        room = (self.lengths[which] - self.length).clamp(min=0)
        # places beyond both ends count as the ends, so that these are not rare
        anywhere = below(drawn[:, 1], room + self.length) - self.length // 2
        start = anywhere.clamp(min=torch.zeros_like(room), max=room)
        later = torch.minimum(below(drawn[:, 2], shift + 1), self.lengths[which] // 2)
        return which, torch.where((start == 0) & (drawn[:, 3] < 2**31), later, start)

    def batches(self, batch_size: int, seed: int, variation: Variation) -> BatchOf:
        """Batches of inputs, the next samples (-100 behind a recording's end) and conditions. Gains are drawn from the
        seed too, what rounds them from PyTorch's generator."""

        def batch_of(step: Tensor) -> Batch:
            drawn = words(seed, numbers(step, batch_size), 6)
            which, start = self.places(drawn, variation.shift)
            at = start[:, None] + self.within  # (rows, length + 1)
            real = (at >= 0) & (at < self.lengths[which][:, None])
            place = (self.starts[which][:, None] + at).clamp(0, len(self.samples) - 1)
            signal = self.samples[place].float()
            if variation.gain:
                loud = (drawn[:, 4] / 2**31 - 1) * (drawn[:, 5] < 2**31)  # -1 to 1, and 0 for one half
                # without the noise, multiples of a 16-bit step would tell the gain
                noise = (torch.rand_like(signal) - 0.5) * (loud != 0)[:, None]
                signal = (signal + noise) * 10 ** (loud.float() * variation.gain / 20)[:, None]
            levels = torchaudio.functional.mu_law_encoding((signal / _FULL_SCALE).clamp(-1, 1), LEVELS)
            levels = torch.where(real, levels, MuLaw.start_id)
            targets = torch.where(real[:, 1:], levels[:, 1:], -100)
            return Batch(inputs=levels[:, :-1], targets=targets, condition=self.conditions[which])

        return batch_of


@torch.no_grad()
def bits_of_each(
    model: SequenceModel, clips: Sequence[np.ndarray], conditions: np.ndarray, together: int = 2**17
) -> np.ndarray:
    """`(clips,)` float64: bits a sample of whole clips, each predicted from those before it.

    clips: `(length,)` levels each. together: samples that are read at once, with the padding.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    found = np.empty(len(clips))
    while order:
        longest = -(-len(clips[order[-1]]) // 256) * 256  # few shapes
        some, order = order[-max(together // longest, 1) :], order[: -max(together // longest, 1)]
        targets = np.full((len(some), longest), -100)
        for row, i in enumerate(some):
            targets[row, : len(clips[i])] = clips[i]
        inputs = np.where(targets < 0, MuLaw.start_id, targets)
        inputs = np.concatenate([np.full((len(some), 1), MuLaw.start_id), inputs[:, :-1]], 1)
        ids, labels, of = (torch.from_numpy(M).to(device) for M in (inputs, targets, conditions[some]))
        logits = model(ids, condition=of).logits.float().transpose(1, 2)
        nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().sum(1)  # 0 for padding
        found[some] = nats.cpu().numpy() / [len(clips[i]) for i in some] / math.log(2)
    return found


def bits(model: SequenceModel, clips: Sequence[np.ndarray], conditions: np.ndarray, together: int = 2**17) -> float:
    """Mean bits of all samples of whole clips: see `bits_of_each`."""
    return float(np.average(bits_of_each(model, clips, conditions, together), weights=[len(clip) for clip in clips]))


@torch.no_grad()
def bits_of_pieces(model: SequenceModel, stretches: Tensor, length: int, together: int = 2**17) -> float:
    """Mean bits of all samples of `(stretches, samples + 1)` uint8 but each stretch's first, in pieces of `length`
    targets that know only the sample before them and what is in the piece. `length` divides the samples."""
    inputs, targets = (part.reshape(-1, length) for part in (stretches[:, :-1], stretches[:, 1:]))
    total = torch.zeros((), dtype=torch.float64, device=stretches.device)
    rows = max(together // length, 1)
    for some, labels in zip(inputs.split(rows), targets.split(rows), strict=True):
        loss = model(some.long(), labels.long()).loss
        assert loss is not None
        total += loss.double() * labels.numel()
    return float(total) / targets.numel() / math.log(2)


_FRAME = 256  # samples, 32 ms


def noise_bits(signals: Sequence[np.ndarray]) -> float:
    """Bits a sample that no model can save, if each recording is speech plus stationary Gaussian noise that is
    independent of it: the entropy of mu-law levels given all but the part of the noise that its past does not tell.

    That part's variance is exp of the mean log spectrum (Kolmogorov and Szegö) of the quietest tenth of a recording's
    frames of 32 ms. Quiet frames are chosen, so it is rather too low, and speech has surprises of its own.
    """
    window = np.hanning(_FRAME)
    total, count = 0.0, 0
    for signal in signals:
        of = signal.astype(np.float64)
        padded = np.pad(of, (0, max(_FRAME - len(of), 0)))
        frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[:: _FRAME // 4]
        chosen = max(2, len(frames) // 10)
        quiet = frames[np.argsort(frames.var(1))[:chosen]]
        quiet = quiet - quiet.mean(1, keepdims=True)
        spectrum = np.square(np.abs(np.fft.rfft(quiet * window))).mean(0)[1:-1] / np.square(window).sum()
        independent = max(1.0, chosen / 2)  # frames overlap
        low = digamma(independent) - math.log(independent)  # of the log of an estimated spectrum
        deviation = math.exp((np.log(spectrum + 1e-9).mean() - low) / 2)
        step = _FULL_SCALE * 2 / 255 * math.log(256) * (1 / 255 + np.abs(of) / _FULL_SCALE)
        total += float(_entropy(np.log(deviation / step)).sum())
        count += len(of)
    return total / count


def _entropy(log_ratio: np.ndarray) -> np.ndarray:
    """Bits of a rounded normal variable by log(deviation / step), the mean over where its mean lies in a step."""
    grid, values = _entropies()
    wide = (log_ratio + 0.5 * math.log(2 * math.pi * math.e)) / math.log(2)
    narrow = values[0] * np.exp(np.minimum(log_ratio - grid[0], 0))  # as often as the step's edge is near
    inside = np.where(log_ratio < grid[0], narrow, np.interp(log_ratio, grid, values))
    found: np.ndarray = np.where(log_ratio > grid[-1], wide, inside)
    return found


@functools.cache
def _entropies() -> tuple[np.ndarray, np.ndarray]:
    grid, offsets = np.linspace(math.log(0.02), math.log(20), 100), (np.arange(64) + 0.5) / 64 - 0.5
    values = []
    for ratio in np.exp(grid):
        k = np.arange(-int(6 * ratio + 3), int(6 * ratio + 3) + 1)[:, None] - offsets
        p = ndtr((k + 0.5) / ratio) - ndtr((k - 0.5) / ratio)
        values.append(float(-(p * np.log2(p.clip(1e-300))).sum(0).mean()))
    return grid, np.array(values)
