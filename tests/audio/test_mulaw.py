from __future__ import annotations

import numpy as np
import pytest
from mambaseq_audio.mulaw import MuLaw

from mambaseq.domain import catalog


def test_known_levels() -> None:
    # round((sign · ln(1 + 255·|x|) / ln 256 + 1) / 2 · 255) by hand: |0.5| is 0.8756 of the way
    levels = MuLaw().encode(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]))
    assert levels.dtype == np.uint8
    assert levels.tolist() == [0, 16, 128, 239, 255]


def test_levels_survive_decoding_and_encoding() -> None:
    codec = MuLaw()
    assert codec.encode(codec.decode(np.arange(256))).tolist() == list(range(256))


def test_error_is_small_beside_the_amplitude() -> None:
    signal = np.random.default_rng(0).uniform(-1, 1, 10_000).astype(np.float32)
    error = np.abs(MuLaw().decode(MuLaw().encode(signal)) - signal)
    # half a step of ln(1 + 255·|x|) is ln(256) / 255
    assert (error <= (np.abs(signal) + 1 / 255) * np.expm1(np.log(256) / 255) + 1e-6).all()


def test_scale_is_fixed_so_that_a_cut_changes_no_level(tone: np.ndarray) -> None:
    fading = tone * np.linspace(1, 0.01, len(tone), dtype=np.float32)
    whole = MuLaw().encode(fading)
    assert (MuLaw().encode(fading[3000:]) == whole[3000:]).all()


def test_beyond_full_scale_is_clipped() -> None:
    assert MuLaw().encode(np.array([-3.0, 3.0])).tolist() == [0, 255]


def test_start_is_silence() -> None:
    assert MuLaw().encode(np.zeros(1)).tolist() == [MuLaw.start_id]


def test_decode_refuses_what_is_no_level() -> None:
    with pytest.raises(ValueError, match="256"):
        MuLaw().decode(np.array([0, 256]))


def test_registered_names_load() -> None:
    names = catalog()
    assert isinstance(names["tokenizers"].get("audio/mulaw")(), MuLaw)
    for kind in ("datasets", "readers", "writers"):
        for entry in names[kind]:
            if entry.name.startswith("audio/"):
                assert callable(entry.load())
