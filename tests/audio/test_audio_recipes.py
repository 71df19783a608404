"""The recipes on sound: how rows are drawn, what noise costs, and each recipe at a tiny scale on made recordings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.io import in_sixteen_bits
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.recipes import audio_context, spoken, spoken_clips, spoken_digits, spoken_training
from mambaseq_audio.recipes.spoken import Rows, Variation, bits, bits_of_each, bits_of_pieces, noise_bits

from mambaseq.cli.main import main
from mambaseq.errors import DataError, UserError
from mambaseq.models import causal_lm
from mambaseq.reproduction import Context

CPU = torch.device("cpu")


def context(folder: Path, *only: str) -> Context:
    (folder / "trials").mkdir(exist_ok=True)
    return Context(CPU, "tiny", [0], folder, only=list(only))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two digits by three speakers, one of whom is held out, in noise."""
    folder = tmp_path_factory.mktemp("recordings") / "made"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for digit in range(2):
        for number, speaker in enumerate(("ann", "bob", "theo")):
            for take in (0, 1, 5, 6, 47):
                n = int(rng.integers(250, 400))
                tone = 3000 * np.sin(np.arange(n) * (0.2 + digit + 0.05 * number)) + rng.normal(0, 30, n)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", tone.astype(np.int16), spoken.RATE)
    return folder


def test_rows_hold_recordings_and_their_conditions() -> None:
    signals = [np.arange(1, 6, dtype=np.int16) * 1000, -(100 * 1.1 ** np.arange(40)).astype(np.int16)]
    rows = Rows(signals, np.array([7, 3]), 8, CPU)
    batch = rows.batches(4000, 0, Variation())(torch.tensor(0))
    assert batch.condition is not None
    assert batch.targets is not None
    levels = [MuLaw().encode(signal / 32768.0).tolist() for signal in signals]
    short = batch.condition == 7
    assert abs(float(short.float().mean()) - 8 / 48) < 0.02  # a row of five
    assert (batch.targets[short] == torch.tensor([*levels[0], -100, -100, -100])).all()
    assert (batch.inputs[short][:, :6] == torch.tensor([128, *levels[0]])).all()
    starts = [levels[1].index(int(row[0])) for row in batch.targets[~short]]
    assert set(starts) == set(range(33))
    for start, inputs, targets in zip(starts[:50], batch.inputs[~short], batch.targets[~short], strict=False):
        assert targets.tolist() == levels[1][start : start + 8]
        assert inputs.tolist() == [levels[1][start - 1] if start else 128, *targets.tolist()[:-1]]
    seen = np.bincount(np.concatenate([np.arange(start, start + 8) for start in starts]), minlength=40)
    assert seen.min() > 0.4 * seen.mean()  # the ends, too
    varied = rows.batches(4000, 0, Variation(gain=6.0, shift=2))(torch.tensor(0))
    assert varied.targets is not None
    first = MuLaw().decode(varied.targets[short][:, 0].numpy()) * 32768
    assert 0.2 < np.mean(first == MuLaw().decode(np.array(levels[0][:1])) * 32768) < 0.5  # as they are
    assert set(varied.targets[short][:, -4].tolist()) & {-100}
    loud = first[np.abs(first) < 1995]
    assert loud.min() < 600 < 1700 < loud.max()


def test_bits_are_those_of_each_clip_alone() -> None:
    torch.manual_seed(0)
    model = causal_lm(256, 8, 1, "s4d").eval()
    clips = [np.random.default_rng(n).integers(0, 256, n).astype(np.uint8) for n in (3, 300, 40)]
    each = []
    for clip in clips:
        ids = torch.from_numpy(clip.astype(np.int64))
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([128]), ids[:-1]])[None]).logits[0]
        each.append(float(torch.nn.functional.cross_entropy(logits, ids)) / math.log(2))
    expected = (3 * each[0] + 300 * each[1] + 40 * each[2]) / 343

    class WithoutCondition(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor, condition: torch.Tensor) -> object:
            return self.inner(ids)

    for together in (1, 2**17):
        given = (WithoutCondition(), clips, np.zeros(3, np.int64), together)
        assert bits(*given) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
        np.testing.assert_allclose(bits_of_each(*given), each, rtol=1e-5)  # type: ignore[arg-type]


def test_what_noise_costs() -> None:
    """White noise of so many steps near silence; of a narrow band, less; of none, nothing."""
    rng = np.random.default_rng(0)
    step = 32768 * 2 / 255**2 * math.log(256)
    noise = 4 * step * rng.normal(size=2**15)
    steps = step * (1 + 255 * np.abs(noise) / 32768)
    expected = np.log2(4 * step / steps * math.sqrt(2 * math.pi * math.e)).mean()
    assert noise_bits([noise]) == pytest.approx(expected, abs=0.2)
    spread = np.fft.rfft(noise)
    spread[len(spread) // 4 :] *= 0.01
    assert noise_bits([np.fft.irfft(spread)]) < 0.3 * expected
    assert noise_bits([np.zeros(2000)]) < 0.05


def test_spoken_digits_on_made_recordings(recordings: Path, tmp_path: Path) -> None:
    only = ["classifier", spoken_digits.LTI, f"{spoken_digits.LTI}, held-out speakers"]
    heard, main, chosen, guided, held = spoken_digits.tables(context(tmp_path, *only), recordings)
    assert [line.values["clips"] for line in heard.lines] == [[12.0]]
    lines = {line.name: line.values for line in main.lines}
    assert list(lines)[:3] == [spoken_digits.LTI, "training recordings", "test recordings"]
    of = lines[spoken_digits.LTI]
    assert 7 < of["bits"][0] < 9
    assert 7 < of["train_bits"][0] < 9
    assert {"fid", "accuracy", "seconds", "parameters"} <= set(of)
    assert lines["counting samples"]["bits"][0] < 8
    assert 0 < lines["background noise alone"]["bits"][0] < lines["counting pairs of samples"]["bits"][0]
    assert [line.name for line in guided.lines] == [line.name for line in chosen.lines] == list(lines)[:3]
    assert chosen.lines[0].values["clips"] == of["clips"]
    assert held.lines[0].note == "10 recordings of theo"
    (ogg,) = (tmp_path / "clips").glob("LTI_U-Net-0.05min-seed0.ogg")
    clips = sorted(path.name for path in ogg.with_suffix("").glob("*.wav"))
    assert len(clips) == 12
    assert clips[0] == "0_ann_0.wav"
    assert len(soundfile.read(ogg)[0]) > 2 * spoken.RATE // 8
    from mambaseq.runs.run import load

    made = load(tmp_path / "models" / "LTI_U-Net-0.05min-seed0").generate(condition="1 bob", max_new_tokens=4)
    assert len(made.sequences[0]) == 4
    again = spoken_digits.tables(context(tmp_path, *only), recordings)  # from the finished trials
    assert again[1].lines[0].values == of
    with pytest.raises(DataError, match="none for test"):
        spoken.load(recordings).split(["nobody"])


def test_spoken_digits_run_on_those_that_ship(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["reproduce", "spoken_digits", "--device", "cpu", "--out", str(tmp_path / "o")]
    assert main([*out, "--scale", "tiny", "--only", "classifier, held-out speakers"]) == 0
    told = capsys.readouterr().out
    assert "**A sample: these are not the figures of the table" in told
    assert "50 recordings of theo" in told
    assert "0.702" not in told  # what was measured on all six speakers
    assert len(list((tmp_path / "o" / "sample").glob("*.wav"))) == 150
    assert main([*out, "--scale", "tiny", "--data", str(tmp_path)]) == 2  # what is kept is of the sample
    assert "holds trainings on the sample that ships" in capsys.readouterr().err
    assert main([*out[:-1], str(tmp_path / "p"), "--scale", "full"]) == 2
    assert "small and tiny also run on the digits that ship" in capsys.readouterr().err


def test_a_training_that_diverges_is_told(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "bits", lambda *_: math.nan)
    digits = spoken_digits.Digits(context(tmp_path), recordings)
    of = spoken_training.CONTENDERS[spoken_digits.LTI]
    with pytest.raises(UserError, match="LTI U-Net diverged"):
        spoken_training.learn(digits, spoken_digits.LTI, of, 0, 0.01, tmp_path / "trial")
    for _ in range(2):  # run, and read from its file
        assert math.isnan(spoken_training.tried(digits, spoken_digits.LTI, 1e-3)["validation"])


def test_rejection_keeps_the_published_band_of_each_condition() -> None:
    assert [spoken_clips.pool(n) for n in (1, 2, 5)] == [2, 4, 9]
    cost = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 11, 10, 13, 18, 15, 16, 17, 14])  # the second speaker's cost more
    assert spoken_clips.kept_within(cost, 9).tolist() == [1, 2, 3, 4, 5, 9, 10, 12, 14, 17]
    assert spoken_clips.kept_within(cost[:4], 2).tolist() == [1, 3]


def test_clips_are_the_samples_of_their_levels(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8)
    spoken_clips.write(tmp_path / "clips", ["0_ann_0"], [levels])
    found, rate = soundfile.read(tmp_path / "clips" / "0_ann_0.wav", dtype="int16")
    assert rate == spoken.RATE
    np.testing.assert_array_equal(found, in_sixteen_bits(MuLaw().decode(levels)))


def test_bits_by_context_on_made_recordings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    recordings = [rng.integers(100, 150, n).astype(np.uint8) for n in (700, 400)]
    sound = audio_context.Sound.of(recordings, 64, CPU)
    assert torch.equal(
        sound.test,
        torch.from_numpy(
            np.stack(
                [
                    r[a : a + 65]
                    for r, a in zip(
                        [recordings[0], recordings[0], recordings[1]], (700 - 129, 700 - 65, 400 - 65), strict=True
                    )
                ]
            )
        ),
    )
    assert sound.train.tolist() == [*recordings[0][: 700 - 129], *recordings[1][: 400 - 65]]
    with pytest.raises(DataError, match="holds no 64 samples"):
        audio_context.Sound.of([recordings[1][:300]], 64, CPU)
    torch.manual_seed(0)
    model = causal_lm(256, 8, 1, "attention").eval()
    total = torch.zeros(())
    for piece in (row[a : a + 33].long() for row in sound.test for a in (0, 32)):
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(model(piece[None, :-1]).logits[0], piece[1:], reduction="sum")
    found = bits_of_pieces(model, sound.test, 32, 64)
    assert found == pytest.approx(float(total) / (3 * 64) / math.log(2), rel=1e-5)
    (table,) = audio_context.tables(context(tmp_path, "LTI, complex", "selective, real"), recordings)
    own, other, verdict = (line.values for line in table.lines)
    assert set(own) == {"bits 32", "bits 64", "parameters", "seconds"}
    assert verdict["bits 64"][0] == pytest.approx(other["bits 64"][0] - own["bits 64"][0])
    assert table.lines[2].note == f"at the longest context: {'yes' if verdict['bits 64'][0] > 0 else 'no'}"
    picture = (tmp_path / "context.svg").read_text()
    assert picture.count('class="c0 curve"') == picture.count('class="c1 curve"') == 1
    assert "LTI \u2102" in picture
