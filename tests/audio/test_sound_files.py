from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mambaseq_audio.clips import ClipData
from mambaseq_audio.io import read_audio, read_signal, signal_blocks, write_wav
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.recordings import audio_files
from mambaseq_audio.waveform import WaveformData

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


def sine(rate: int, seconds: float, frequency: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8001, 11_127, 22_050, 44_100, 44_101, 48_000, 48_001, 655_343])
def test_another_rate_is_resampled(tmp_path: Path, rate: int) -> None:
    """Against the sine itself: length to the sample, place in time, amplitude, and nothing beside it."""
    seconds = 0.5
    soundfile.write(tmp_path / "a.wav", sine(rate, seconds, 1000), rate, subtype="FLOAT")
    signal = read_signal(tmp_path / "a.wav", 16_000)
    assert len(signal) == -(-round(rate * seconds) * 16_000 // rate)
    wanted = sine(16_000, 0.6, 1000)[: len(signal)]
    assert np.abs(signal - wanted)[800:-800].max() < 2e-6
    assert np.abs(signal - wanted).max() < 0.2  # the sine begins and ends at once, which no band holds


def test_what_no_longer_has_a_place_is_taken_out(tmp_path: Path) -> None:
    """5 kHz would be heard at 3 kHz in 8 kHz; 3.4 kHz stays as it is."""
    soundfile.write(tmp_path / "high.wav", sine(44_100, 0.5, 5000), 44_100, subtype="FLOAT")
    assert np.abs(read_signal(tmp_path / "high.wav", 8000))[400:-400].max() < 1e-6
    soundfile.write(tmp_path / "low.wav", sine(44_100, 0.5, 3400), 44_100, subtype="FLOAT")
    signal = read_signal(tmp_path / "low.wav", 8000)
    assert np.abs(signal - sine(8000, 0.5, 3400))[400:-400].max() < 1e-3


@pytest.mark.parametrize(("rate", "wanted", "length"), [(8000, 48_000, 600_001), (48_000, 8000, 5), (48_000, 8000, 1)])
def test_lengths_of_long_and_short_files(tmp_path: Path, rate: int, wanted: int, length: int) -> None:
    soundfile.write(tmp_path / "a.flac", np.full(length, 0.25), rate)
    signal = read_signal(tmp_path / "a.flac", wanted)
    assert len(signal) == -(-length * wanted // rate)
    if length > 100:
        assert np.abs(signal - 0.25)[1000:-1000].max() < 1e-6


def test_resampling_takes_no_more_memory_than_what_comes_out(tmp_path: Path) -> None:
    """10 s between rates without a common factor, where a table of all phases would take gigabytes."""
    soundfile.write(tmp_path / "a.wav", np.zeros(111_270), 11_127)
    tracemalloc.start()
    (one, *others) = signal_blocks(tmp_path / "a.wav", 16_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(one) + sum(map(len, others)) == 160_000
    assert peak < 8 * 2**20


def test_another_rate_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "fast.wav", np.zeros(100), 22_050)
    with pytest.raises(DataError, match=r"fast\.wav has 22,050 samples a second, but 8,000.*resample: true"):
        read_signal(tmp_path / "fast.wav", 8000, resample=False)


@pytest.mark.parametrize("rate", [0, -1, 999, 768_001, 2**63, 8000.5])
def test_rates_that_nothing_has(tmp_path: Path, tone: np.ndarray, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone, 8000)
    with pytest.raises(ConfigError, match="sample_rate must be a whole number of 1,000 to 768,000"):
        read_signal(tmp_path / "a.wav", rate)
    with pytest.raises(ConfigError, match="sample_rate must be"):
        write_wav(tmp_path / "b.wav", [np.zeros(3)], MuLaw(), sample_rate=rate)
    for kind in (ClipData, WaveformData):
        with pytest.raises(ConfigError, match=r"data\.sample_rate must be"):
            kind(files=str(tmp_path), sample_rate=rate).setup()


@pytest.mark.parametrize("rate", [1, 999, 2**31 - 1])
def test_a_header_with_a_rate_that_nothing_has(tmp_path: Path, tone: np.ndarray, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone, 8000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.wav (claims .* samples a second|cannot be read as audio)"):
        read_signal(tmp_path / "a.wav", 8000)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.wav: there is no such sound file"):
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
    assert [(record.name, len(record)) for record in records] == [("b/two", 50), ("one", 4000)]
    assert (records[1].ids == MuLaw().encode(read_signal(tmp_path / "one.flac", 8000))).all()
    (record,) = read_audio(str(tmp_path / "*.flac"), None, sample_rate=8000)
    assert record.signal is not None
    assert record.signal.shape == (4000, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no sound file"):
        audio_files(tmp_path / "empty")
    for name in ("", "~nobody-of-that-name/x", "x" * 300, "a\0b"):
        with pytest.raises(DataError):
            audio_files(name)


def test_records_of_one_stem(tmp_path: Path, tone: np.ndarray) -> None:
    for name in ("a/x.wav", "b/x.wav", "b/x.flac", "b/._x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, tone, 8000, format=name[-4:].strip("."))
    for given in (tmp_path, tmp_path / "**/*"):
        names = [record.name for record in read_audio(given, MuLaw(), sample_rate=8000)]
        assert names == ["a/x", "b/x.flac", "b/x.wav"]


def test_small_files_that_unpack_to_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.flac"
    soundfile.write(path, np.zeros(40_000_000, dtype=np.int16), 44_100)
    assert path.stat().st_size < 200_000
    decoded = []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **options: decoded.append(args))
    with pytest.raises(UserError, match=r"bomb\.flac, unpacked .* asks for .*MAMBASEQ_MAX_UNPACKED_RATIO"):
        read_signal(path, 44_100)
    assert not decoded


def test_limits_on_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(200_000, dtype=np.int16), 8000)
    assert len(read_signal(path, 8000)) == 200_000
    monkeypatch.setenv("MAMBASEQ_MAX_SAMPLES", "300000")
    assert len(read_signal(path, 8000)) == 200_000
    with pytest.raises(UserError, match=r"long\.flac, at 16,000 samples a second, asks for 400,000 samples"):
        read_signal(path, 16_000)
    monkeypatch.setenv("MAMBASEQ_MAX_SAMPLES", "100000")
    with pytest.raises(UserError, match=r"long\.flac asks for 200,000 samples of sound; .*MAMBASEQ_MAX_SAMPLES"):
        read_signal(path, 8000)


def test_a_flac_of_unknown_length(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "piped.flac"
    soundfile.write(path, tone, 8000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the number of samples: 4 bits and the four bytes that follow
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"piped\.flac does not say how many samples it has.*Convert"):
        read_signal(path, 8000)


def test_samples_beyond_full_scale_are_told(tmp_path: Path, tone: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "loud.wav", 3 * tone, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "fine.wav", tone, 8000, subtype="FLOAT")
    click = tone.copy()
    click[5] = 7.0
    soundfile.write(tmp_path / "click.wav", click, 8000, subtype="FLOAT")
    assert len(list(read_audio(tmp_path, MuLaw(), sample_rate=8000))) == 3
    (line,) = caplog.messages
    count = int((np.abs(3 * tone) > 1).sum())
    assert f"which are clipped: 2 ({count:,} samples of {tmp_path}/loud.wav; its peak is 1.5)" in line
    caplog.clear()
    read_signal(tmp_path / "fine.wav", 8000)
    assert not caplog.messages


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64"])
def test_flipped_bytes(tmp_path: Path, tone: np.ndarray, suffix: str) -> None:
    """Whatever comes out is finite and about as long, or one paragraph that names the file."""
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone[:1500], 8000)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in {*range(60), *rng.integers(len(whole), size=60).tolist()}:
        content = bytearray(whole)
        content[place % len(whole)] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        signal, message = np.zeros(0), path.name
        try:
            signal = read_signal(path, 8000)
        except UserError as error:
            message = str(error)
        assert path.name in message
        assert len(message) < 1000
        assert np.isfinite(signal).all()
        assert len(signal) < 40_000


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
    assert write_wav(tmp_path / "folder", three, MuLaw(), sample_rate=8000) == files  # once more into the same folder
    assert sorted((tmp_path / "folder").iterdir()) == files
    assert soundfile.info(files[2]).format == "WAV"
    with pytest.raises(ConfigError, match=r"\.wav, \.flac, not as x\.mp3"):
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
