"""The MIT-BIH Arrhythmia Database as classified heartbeats."""

from __future__ import annotations

import csv
import dataclasses
import lzma
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.cache import fingerprint
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError
from mambaseq.limits import EPOCH, SEEDS, check_setting
from mambaseq.resources import find
from mambaseq_ecg.window import Window

CLASSES = ("N", "S", "V", "F")


@dataclasses.dataclass(frozen=True)
class Patient:
    """signal: `(samples,)` int16, ADC units. beats, labels: sample and class (-1 for Q) of every beat, ascending."""

    name: str
    split: str
    signal: np.ndarray
    beats: np.ndarray
    labels: np.ndarray


def read_patients() -> list[Patient]:
    """The 44 records that ship with the package."""
    folder = find("mambaseq_ecg:data")
    with lzma.open(folder / "mitbih_mlii_100hz.npy.xz") as file:
        signals = np.load(file, allow_pickle=False)
    with lzma.open(folder / "beats.csv.xz", "rt") as file:
        beats: dict[str, list[tuple[int, int]]] = {}
        for row in csv.DictReader(file):
            label = CLASSES.index(row["aami"]) if row["aami"] in CLASSES else -1
            beats.setdefault(row["record"], []).append((int(row["sample"]), label))
    with (folder / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Patient(r["record"], r["split"], signals[int(r["row"])], *np.array(beats[r["record"]]).T) for r in rows]


def _batch(patient: Patient, beat: int, window: Window, rng: np.random.Generator | None = None) -> Batch:
    inputs = torch.from_numpy(window.read(patient.signal, patient.beats, beat, rng))[None]
    return Batch(inputs=inputs, targets=torch.tensor([int(patient.labels[beat])]))


class DrawnBeats:
    """Endless random beats. Item i is drawn by a generator seeded with (seed, i): a class with the probabilities
    `shares`, a patient of those who have it with a probability that grows as the root of how many, a beat."""

    endless = True

    def __init__(self, patients: list[Patient], window: Window, shares: Sequence[float], size: int, seed: int) -> None:
        self.patients, self.window, self.size, self.seed = patients, window, size, seed
        self.shares = np.array(shares) / sum(shares)
        self.found = [[np.flatnonzero(p.labels == k) for p in patients] for k in range(len(CLASSES))]
        roots = np.sqrt([[len(beats) for beats in of_class] for of_class in self.found])
        if not all(roots.sum(axis=1)):
            raise ConfigError("A class has no beat left to train on. Name fewer validation_records.")
        self.of_patients = roots / roots.sum(axis=1, keepdims=True)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, index))
        label = rng.choice(len(CLASSES), p=self.shares)
        who = rng.choice(len(self.patients), p=self.of_patients[label])
        return _batch(self.patients[who], rng.choice(self.found[label][who]), self.window, rng)


class AllBeats:
    """Every labelled beat of some patients, in order."""

    def __init__(self, patients: list[Patient], window: Window) -> None:
        self.window = window
        self.items = [(p, int(beat)) for p in patients for beat in np.flatnonzero(p.labels >= 0)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        return _batch(*self.items[index], self.window)


class Beats(SequenceData):
    """Heartbeats of the MIT-BIH Arrhythmia Database: raw samples of lead MLII at 100 Hz, and where the beats are.

    Classes are those of the AAMI (EC57) but Q, of which there are 15: N normal and bundle branch block, S
    supraventricular ectopic, V ventricular ectopic, F fusion of V and N. Training and validation patients are those of
    DS1, all of DS2 is the test set (de Chazal et al., IEEE Trans Biomed Eng 51(7), 2004).

    Args:
        window: samples that are read for a beat; several beats, so that rhythm can be seen.
        after: how many of them are later than the beat; few, so that the window's end shows the beat itself.
        patch: neighbouring samples that enter the model at one position.
        validation_records: records of DS1 that are held out of training.
        shares: how often the classes N, S, V, F are drawn in training.
        samples_per_epoch: beats that make an epoch.
        seed: of the draws and their augmentation; the seed of weights is the run's.
    """

    class_names = CLASSES
    reader = "ecg/csv"

    def __init__(
        self,
        window: int = 1024,
        after: int = 24,
        patch: int = 8,
        validation_records: Sequence[str] = ("114", "119", "124"),
        shares: Sequence[float] = (0.7, 0.12, 0.15, 0.03),
        samples_per_epoch: int = 25600,
        seed: int = 0,
    ) -> None:
        self.window = Window(window, after, patch)
        self.length, self.n_channels = self.window.length, self.window.n_channels
        self.held_out, self.shares = [str(name) for name in validation_records], shares
        check_setting("data.samples_per_epoch", samples_per_epoch, *EPOCH)
        check_setting("data.seed", seed, *SEEDS)
        if len(shares) != len(CLASSES) or not all(0 <= share <= 1e9 for share in shares) or not sum(shares):
            raise ConfigError(f"shares must be a number of 0 or more for each of N, S, V, F, not {shares}.")
        self.samples_per_epoch, self.seed = samples_per_epoch, seed
        self.patients: list[Patient] = []

    def setup(self) -> None:
        """Read the records. Raises ConfigError for a validation record that is not one of DS1."""
        self.patients = self.patients or read_patients()
        known = [p.name for p in self.patients if p.split == "DS1"]
        if wrong := sorted(set(self.held_out) - set(known)):
            raise ConfigError(f"validation_records: {wrong} are not records of DS1. Those are {', '.join(known)}.")

    def _of(self, split: str, held_out: bool = False) -> list[Patient]:
        return [p for p in self.patients if p.split == split and (p.name in self.held_out) == held_out]

    def train(self) -> DrawnBeats:
        return DrawnBeats(self._of("DS1"), self.window, self.shares, self.samples_per_epoch, self.seed)

    def validation(self) -> AllBeats | None:
        return AllBeats(self._of("DS1", held_out=True), self.window) if self.held_out else None

    def test(self) -> AllBeats:
        return AllBeats(self._of("DS2"), self.window)

    def sources(self) -> dict[str, str]:
        return {path.name: fingerprint(path)["sha256"] for path in sorted(find("mambaseq_ecg:data").glob("*.[cn]*"))}

    def reader_options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.window)
