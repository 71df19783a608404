from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.io import read_signal
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.waveform import WaveformData

from mambaseq.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, length in (("a", 10_000), ("b", 5_003)):
        soundfile.write(tmp_path / f"{name}.flac", rng.uniform(-0.5, 0.5, length), 16000)
    return tmp_path


def data(folder: Path, **options: object) -> WaveformData:
    made = WaveformData(**{"files": str(folder), "length": 64, "epoch_size": 50, **options})  # type: ignore[arg-type]
    made.setup()
    return made


def test_splits_cover_every_recording_and_do_not_overlap(folder: Path) -> None:
    waves = data(folder)
    for record, n in enumerate((10_000, 5_003)):
        parts = [i for split in ("train", "validation", "test") for i in waves.intervals(split) if i.record == record]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == n
        assert len(parts[2]) == round(0.1 * n)


def test_every_test_sample_but_the_first_is_predicted_once(folder: Path) -> None:
    waves = data(folder)
    test = waves.test()
    assert test is not None
    targets = torch.cat([test[i].targets[0] for i in range(len(test))])  # type: ignore[index]
    levels = [MuLaw().encode(read_signal(folder / f"{name}.flac", 16000)) for name in "ab"]
    wanted = [wave[i.start + 1 : i.stop] for wave, i in zip(levels, waves.intervals("test"), strict=True)]
    assert targets.tolist() == np.concatenate(wanted).tolist()
    first, second = test[0], test[1]
    assert first.targets is not None
    assert first.inputs[0].tolist() == [levels[0][9000], *first.targets[0, :-1].tolist()]
    assert second.inputs[0, 0] == first.targets[0, -1]


def test_training_windows(folder: Path) -> None:
    one, two = data(folder).train(), data(folder).train()
    assert len(one) == 50
    for index in (7, 0, 1234):
        assert torch.equal(one[index].inputs, two[index].inputs)
        assert torch.equal(one[index].inputs[0, 1:], one[index].targets[0, :-1])  # type: ignore[index]


def test_resampled(folder: Path) -> None:
    waves = data(folder, sample_rate=8000)
    assert waves.intervals("test")[0].stop == 5000
    assert waves.reader_options() == {"sample_rate": 8000, "resample": True, "channels": "mean"}


def test_shorter_than_the_window(folder: Path) -> None:
    with pytest.raises(DataError, match=r"as long as a window, which reads 20,001 tokens.*a\.flac"):
        data(folder, length=20_000).train()


def test_bad_fractions(folder: Path) -> None:
    with pytest.raises(ConfigError, match="leave some of it for training"):
        data(folder, validation_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize(
    ("key", "value"), [("epoch_size", 0), ("epoch_size", 2**63), ("seed", -1), ("length", 0), ("length", 2**40)]
)
def test_numbers_out_of_range(folder: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key} must be"):
        data(folder, **{key: value})


def test_fractions_that_are_no_number(folder: Path) -> None:
    for key in ("validation_fraction", "test_fraction"):
        with pytest.raises(ConfigError, match="leave some of it for training"):
            data(folder, **{key: float("nan")})


def test_copies_and_sources(folder: Path) -> None:
    assert set(data(folder).sources()) == {str(folder / "a.flac"), str(folder / "b.flac")}
    levels, rate = soundfile.read(folder / "b.flac", dtype="int16")
    soundfile.write(folder / "c.wav", levels, rate)
    with pytest.raises(DataError, match=r"c\.wav is a copy of .*b\.flac: the same samples"):
        data(folder)
    with pytest.raises(ConfigError, match=r"data\.files names nothing"):
        WaveformData(files=[]).setup()
