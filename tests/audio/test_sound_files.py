from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mambaseq_audio.io import audio_files, read_audio, read_signal, write_wav
from mambaseq_audio.mulaw import MuLaw

from mambaseq.errors import ConfigError, DataError, UserError


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "PCM_U8", 2**-7),
        ("wav", "FLOAT", 0),
        ("flac", "PCM_16", 2**-15),
        ("flac", "PCM_24", 2**-23),
        ("ogg", "VORBIS", 0.05),
    ],
)
def test_formats(tmp_path: Path, tone: np.ndarray, suffix: str, subtype: str, tolerance: float) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone, 8000, subtype=subtype)
    signal = read_signal(path, 8000)
    assert signal.dtype == np.float32
    assert np.abs(signal - tone).max() <= tolerance


def test_two_channels_are_averaged_or_refused(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([tone, 0 * tone], axis=1), 8000, subtype="FLOAT")
    assert np.allclose(read_signal(path, 8000), tone / 2, atol=1e-7)
    with pytest.raises(DataError, match=r"stereo\.wav has 2 channels.*channels: mean"):
        read_signal(path, 8000, channels="refuse")


def test_another_rate_is_resampled_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "fast.wav"
    time = np.arange(22050) / 22050
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * time), 22050)
    signal = read_signal(path, 8000)
    assert len(signal) == 8000
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert np.abs(signal - wanted)[100:-100].max() < 1e-2
    with pytest.raises(DataError, match=r"fast\.wav has 22,050 samples a second and 8,000.*resample: true"):
        read_signal(path, 8000, resample=False)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sound file .*gone\.wav"):
        read_signal(tmp_path / "gone.wav", 8000)


@pytest.mark.parametrize("content", [b"", b"this is a letter, not a recording"])
def test_not_audio(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.wav cannot be read as audio.*convert"):
        read_signal(path, 8000)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_zero_length(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"nothing.{suffix}"
    soundfile.write(path, np.zeros(0), 8000)
    with pytest.raises(DataError, match=r"nothing\.\w+ .*(zero length|empty)"):
        read_signal(path, 8000)


@pytest.mark.parametrize("share", [0.4, 0.9, 0.999])
@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        ("wav", "PCM_16"),
        ("wav", "PCM_24"),
        ("aiff", "PCM_16"),
        ("au", "PCM_16"),
        ("w64", "PCM_16"),
        ("flac", "PCM_16"),
        ("ogg", "VORBIS"),
    ],
)
def test_truncated(tmp_path: Path, suffix: str, subtype: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 80_000)
    soundfile.write(path, noise, 8000, subtype=subtype)
    assert len(read_signal(path, 8000)) == 80_000
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"a\.\w+ .*cut short"):
        read_signal(path, 8000)


def test_a_streamed_wav_of_unknown_size_is_read(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone, 8000)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_signal(path, 8000)) == len(tone)


def test_values_that_are_no_sound(tmp_path: Path, tone: np.ndarray) -> None:
    broken = tone.copy()
    broken[17] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 8000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"nan\.wav .*not a finite number at sample 17"):
        read_signal(tmp_path / "nan.wav", 8000)
    soundfile.write(tmp_path / "loud.wav", tone * 32768, 8000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"loud\.wav .*peaks at 16,\d+.*divide"):
        read_signal(tmp_path / "loud.wav", 8000)


def test_read_audio_makes_records_of_files_folders_and_patterns(tmp_path: Path, tone: np.ndarray) -> None:
    (tmp_path / "b").mkdir()
    soundfile.write(tmp_path / "b/two.wav", tone[:50], 8000)
    soundfile.write(tmp_path / "one.flac", tone, 8000)
    (tmp_path / "notes.txt").write_text("no sound")
    records = list(read_audio(tmp_path, MuLaw(), sample_rate=8000))
    assert [(record.name, len(record)) for record in records] == [("two", 50), ("one", 4000)]
    assert (records[1].ids == MuLaw().encode(read_signal(tmp_path / "one.flac", 8000))).all()
    (record,) = read_audio(str(tmp_path / "*.flac"), None, sample_rate=8000)
    assert record.signal is not None
    assert record.signal.shape == (4000, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no sound file"):
        audio_files(tmp_path / "empty")


def test_write_wav_round_trip(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 255, 300)  # 0 and 255 are ±1, which 16 bits reach on one side only
    assert write_wav(tmp_path / "x.wav", [ids], MuLaw(), sample_rate=8000) == [tmp_path / "x.wav"]
    info = soundfile.info(tmp_path / "x.wav")
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (8000, 1, 300, "PCM_16")
    (record,) = read_audio(tmp_path / "x.wav", MuLaw(), sample_rate=8000, resample=False)
    assert record.ids is not None
    # 16 bits are finer than the levels, except around silence, where two levels are less than a step apart
    assert (np.abs(record.ids.astype(int) - ids) <= np.where(np.abs(ids - 127.5) < 2, 1, 0)).all()


def test_write_wav_names(tmp_path: Path) -> None:
    three = [np.full(10, 128)] * 3
    files = write_wav(tmp_path / "digit.flac", three, MuLaw(), sample_rate=8000)
    assert [file.name for file in files] == ["digit-000.flac", "digit-001.flac", "digit-002.flac"]
    files = write_wav(tmp_path / "folder", three, MuLaw(), sample_rate=8000)
    assert sorted((tmp_path / "folder").iterdir()) == files
    assert soundfile.info(files[2]).format == "WAV"
    with pytest.raises(ConfigError, match=r"\.wav or \.flac"):
        write_wav(tmp_path / "x.mp3", three, MuLaw(), sample_rate=8000)


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.wav").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_wav(tmp_path / "x.wav", [np.full(10, 128)], MuLaw(), sample_rate=8000)
    assert (tmp_path / "x.wav").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]
