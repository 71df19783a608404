"""Samples of 8 and 16 bits in even steps: exact, whole through reading, storing and writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from mambaseq_audio.clips import ClipData
from mambaseq_audio.io import read_audio, write_wav
from mambaseq_audio.linear import Linear, codec_of
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.waveform import WaveformData

from mambaseq.errors import ConfigError

EVERY = np.arange(-(2**15), 2**15, dtype=np.int16)


def test_levels_by_hand() -> None:
    signal = np.array([-2.0, -1.0, -0.5, 0.0, 2**-7, 0.5, 1.0, 2.0])
    assert Linear(8).encode(signal).tolist() == [0, 0, 64, 128, 129, 192, 255, 255]
    assert Linear(16).encode(signal).tolist() == [0, 0, 16384, 32768, 33024, 49152, 65535, 65535]
    assert (Linear(8).encode(signal).dtype, Linear(16).encode(signal).dtype) == (np.uint8, np.uint16)
    assert Linear(8).decode(np.array([0, 128, 192])).tolist() == [-1.0, 0.0, 0.5]
    for bad in (-1, 65_536):
        with pytest.raises(ValueError, match=r"levels are in \[0, 65536\)"):
            Linear(16).decode(np.array([bad]))
    assert isinstance(codec_of("mulaw"), MuLaw)
    with pytest.raises(ConfigError, match="Linear samples have 8 or 16 bits, not 12"):
        Linear(12)


def test_every_sample_of_16_bits_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "one_1.wav"
    soundfile.write(path, EVERY, 8000, subtype="PCM_16")
    (record,) = read_audio(path, Linear(16), sample_rate=8000)
    assert record.ids is not None
    assert (record.ids == EVERY.astype(np.int64) + 2**15).all()
    for name in ("out.wav", "out.flac"):
        (file,) = write_wav(tmp_path / name, [record.ids], Linear(16), sample_rate=8000)
        back, rate = soundfile.read(file, dtype="int16")
        assert (back == EVERY).all()
        assert rate == 8000
        assert soundfile.info(file).subtype == "PCM_16"


def test_data_of_16_bits(tmp_path: Path) -> None:
    for number in (1, 2):
        soundfile.write(tmp_path / f"a_{number}.wav", np.roll(EVERY, number)[::64], 8000, subtype="PCM_16")
    named = {"pattern": r"(?P<who>.)_(?P<take>\d)", "condition": [], "validation": "", "test": "2"}
    clips = ClipData(files=str(tmp_path), samples="linear16", length=500, **named)  # type: ignore[arg-type]
    clips.setup()
    assert (clips.vocab_size, clips.start_ids, clips.tokenizer_name) == (65_536, (32_768,), "audio/linear")
    levels = np.roll(EVERY, 2)[::64].astype(np.int64) + 2**15
    assert (clips.clips("test")[0] == levels).all()
    tiles = clips.test()
    assert tiles is not None
    assert int(tiles[0].inputs[0, 0]) == 32_768
    assert tiles[0].targets is not None
    assert tiles[0].targets[0].tolist() == levels[:500].tolist()
    assert any(int(clips.train()[i].inputs[0, 0]) not in (32_768, 128) for i in range(8))
    long = WaveformData(files=str(tmp_path / "a_1.wav"), samples="linear8", length=100, sample_rate=8000)
    long.setup()
    assert int(long.train()[0].inputs.max()) < 256 == long.vocab_size
    with pytest.raises(ConfigError, match=r"data\.samples must be one of mulaw, linear8, linear16; it is 'linear12'"):
        ClipData(samples="linear12")  # type: ignore[arg-type]
