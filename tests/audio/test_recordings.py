"""Manifests, channels, and folders in which not everything is a sound."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mambaseq_audio.clips import ClipData
from mambaseq_audio.io import read_audio, read_signal, write_wav
from mambaseq_audio.labelled import LabelledClips
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.waveform import WaveformData

from mambaseq.errors import ConfigError, DataError
from mambaseq.runs.parsing import parse_config

RATE = 8000


def noise(seed: int, length: int = 80, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (length, channels))


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Four clips: of one stem in two folders, one with a comma, and one whose accent is a character of its own."""
    names = ("a/one.wav", "b/one.wav", "Smith, Ann.wav", unicodedata.normalize("NFD", "Åsa.wav"))
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, noise(seed), RATE)
    return tmp_path


def clips(files: Path | str, **options: object) -> ClipData:
    made = ClipData(**{"files": str(files), "sample_rate": RATE, **options})  # type: ignore[arg-type]
    made.setup()
    return made


def plain(files: Path, **options: object) -> ClipData:
    """All clips are for training, by the names of their files."""
    names = {"pattern": "(?P<take>.*)", "condition": [], "validation": "", "test": ""}
    return clips(files, **{**names, **options})


ROWS: list[dict[str, object]] = [
    {"file": "a/one.wav", "split": "train", "start": 0, "end": 0.005, "who": "Åsa", "take": 1},
    {"file": "a/one.wav", "split": "train", "start": 0.005, "end": None, "who": "Ann, Bo", "take": 2},
    {"file": "b/one.wav", "split": "val", "start": None, "end": None, "who": unicodedata.normalize("NFD", "Åsa")},
    {"file": "Smith, Ann.wav", "split": "test", "start": 0.001, "end": None, "who": "Ann, Bo", "take": None},
    {"file": "Åsa.wav", "split": "train", "start": None, "end": None, "who": "Åsa", "take": 3},
]


def manifest(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    path = folder / f"list.{kind}"
    if kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        separator = "," if kind == "csv" else "\t"
        cells = [list(rows[0])] + [["" if row.get(k) is None else row[k] for k in rows[0]] for row in rows]
        text = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in cells)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_manifest_says_files_parts_splits_and_conditions(four: Path, kind: str) -> None:
    path = manifest(four, kind, ROWS)
    (four / "c.yaml").write_text(f"data: {{name: audio/clips, files: '{path}', condition: [who], sample_rate: {RATE}}}")
    made = parse_config(str(four / "c.yaml"), []).make_data()
    assert isinstance(made, ClipData)
    train, validation, test = (made.clips(split) for split in ("train", "validation", "test"))
    assert [len(clip) for clip in train] == [40, 40, 80]
    whole = MuLaw().encode(read_signal(four / "a/one.wav", RATE))
    assert np.concatenate(train[:2]).tolist() == whole.tolist()
    assert validation[0].tolist() == MuLaw().encode(read_signal(four / "b/one.wav", RATE)).tolist()
    assert test[0].tolist() == MuLaw().encode(read_signal(four / "Smith, Ann.wav", RATE))[8:].tolist()
    assert list(made.condition_names) == ["Ann, Bo", "Åsa"]
    assert [made.train().conditions, made.validation().conditions, made.test().conditions] == [[1, 0, 1], [1], [0]]  # type: ignore[union-attr]
    records = list(read_audio(path, MuLaw(), sample_rate=RATE, fields=["who"]))
    assert [record.fields["who"] for record in records] == ["Åsa", "Ann, Bo", "Åsa", "Ann, Bo", "Åsa"]
    with pytest.raises(DataError, match=r"line \d\): there is no column 'whom'. Did you mean 'who'"):
        list(read_audio(path, MuLaw(), sample_rate=RATE, fields=["whom"]))
    names = [record.name for record in records]
    assert names == ["a/one.wav@0-0.005", "a/one.wav@0.005-", "b/one.wav", "Smith, Ann.wav@0.001-", "Åsa.wav"]
    both = clips(path, split="take", validation="", test=[], condition=["who", "take"])
    assert [one.names for one in both.conditions] == [("Ann, Bo", "Åsa"), ("1", "2", "3")]
    assert both.conditions[1].missing  # of some clips
    labelled = LabelledClips(files=str(path), label="who", sample_rate=RATE)
    labelled.setup()
    assert (labelled.class_names, len(labelled.train())) == (("Ann, Bo", "Åsa"), 3)
    assert len(clips(path, split="who", validation="", test=["Ann, Bo"]).clips("test")) == 2
    assert len(clips(path, split="take", validation=[], test="1-2", condition=["who"]).clips("train")) == 3


def test_a_manifest_of_long_recordings(four: Path) -> None:
    rows: list[dict[str, object]] = [{"file": "a/one.wav", "split": "test"}, {"file": "b/one.wav", "split": ""}]
    waves = WaveformData(files=str(manifest(four, "csv", rows)), sample_rate=RATE)
    waves.setup()
    found = {split: [len(i) for i in waves.intervals(split)] for split in ("train", "validation", "test")}
    assert found == {"train": [68], "validation": [4], "test": [80, 8]}
    parts: list[dict[str, object]] = [
        {"file": "a/one.wav", "end": 0.006},
        {"file": "b/one.wav"},
        {"file": "a/one.wav", "start": 0.005},
    ]
    with pytest.raises(
        DataError, match=r"line 1\) and .*line 3\) hold the same time, and would be in different splits"
    ):
        WaveformData(files=str(manifest(four, "jsonl", parts)), sample_rate=RATE).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "tset"}, r"line 3\): the split is 'tset'. Did you mean 'test'"),
        ({"file": ""}, r"list\.csv, line 3: there is no file"),
        ({"file": "a/two.wav"}, r"a/two\.wav.* \(.*list\.csv, line 3\): there is no such sound file"),
        ({"end": "0.02"}, r"one\.wav@0\.005-0\.02 .*line 3\) is no part of the file, which has 0\.01 s"),
        ({"end": 0.001}, r"line 3: end \(0\.001 s\) must come after start"),
        ({"start": "1:30"}, r"line 3: start is '1:30'. Give seconds"),
        ({"start": 0, "end": 0.005}, r"line 3 is about the same recording as line 2\."),
        ({"start": 0.004, "split": "test"}, r"line 2\) and .*line 3\) are in different splits and hold the same time"),
        ({"who": ""}, r"line 3\) has no condition: who is empty"),
        ({"who": "Eva", "split": "test"}, r"line 3\) has the who 'Eva', which no training sequence has"),
    ],
)
def test_wrong_rows_are_named(four: Path, change: dict[str, object], message: str) -> None:
    rows = [ROWS[0], {**ROWS[1], **change}, ROWS[4]]
    with pytest.raises(DataError, match=message):
        clips(manifest(four, "csv", rows), condition=["who"])


def test_wrong_manifests(four: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no column named 'take'.* It has: who"):
        clips(manifest(four, "csv", [{"file": "a/one.wav", "who": 1}]), split="take", validation="1")
    with pytest.raises(DataError, match=r"line 2: there is no column file; it has path, who\."):
        clips(manifest(four, "csv", [{"path": "a/one.wav", "who": 1}]))
    with pytest.raises(ConfigError, match=r"'who' is a column of .* and a group of data\.pattern"):
        clips(manifest(four, "csv", ROWS), pattern="(?P<who>.*)")
    with pytest.raises(DataError, match=r"line 1: there is no column file; it has files, split\. Did you mean 'files'"):
        clips(manifest(four, "jsonl", [{"files": "a/one.wav", "split": "train"}]))
    (four / "none.csv").write_text("file,split\n")
    with pytest.raises(DataError, match=r"none\.csv has no row"):
        clips(four / "none.csv")


def test_channels(tmp_path: Path) -> None:
    """Left, right, each, and both in turn, also at another rate, against each channel as a file of its own."""
    both, six = noise(0, 400, 2), noise(1, 400, 6)
    soundfile.write(tmp_path / "both.wav", both, 16_000)
    soundfile.write(tmp_path / "six.wav", six, 16_000)
    for k in range(2):
        soundfile.write(tmp_path / f"{k}.wav", both[:, k], 16_000)
    for rate in (16_000, RATE):
        left, right = (read_signal(tmp_path / f"{k}.wav", rate) for k in range(2))
        assert np.array_equal(read_signal(tmp_path / "both.wav", rate, channels="left"), left)
        assert np.array_equal(read_signal(tmp_path / "both.wav", rate, channels="right"), right)
        stereo = read_signal(tmp_path / "both.wav", rate, channels="stereo")
        assert np.allclose(stereo.reshape(-1, 2), np.stack([left, right], axis=1), atol=1e-6)
        mono = read_signal(tmp_path / "0.wav", rate, channels="stereo")
        assert np.array_equal(mono, np.repeat(left, 2))
    records = list(read_audio(tmp_path / "both.wav", MuLaw(), sample_rate=16_000, channels="each"))
    assert [record.name for record in records] == ["both#1", "both#2"]
    assert np.allclose(read_signal(tmp_path / "six.wav", 16_000), six.mean(axis=1), atol=1e-4)
    assert len(plain(tmp_path / "[bs]*.wav", channels="each").clips("train")) == 8
    with pytest.raises(DataError, match=r"six\.wav has 6 channels, but channels: stereo wants two"):
        read_signal(tmp_path / "six.wav", RATE, channels="stereo")
    with pytest.raises(ConfigError, match=r"data\.channels must be one of .*'stero'. Did you mean 'stereo'"):
        plain(tmp_path, channels="stero")
    with pytest.raises(ConfigError, match="stereo is for audio/clips"):
        WaveformData(files=str(tmp_path), channels="stereo").setup()


def test_stereo_clips_begin_with_the_left_channel(tmp_path: Path) -> None:
    half = np.linspace(0.1, 0.9, 300)
    soundfile.write(tmp_path / "a.wav", np.stack([half, -half], axis=1), RATE)
    made = plain(tmp_path, channels="stereo", length=100)
    for index in range(20):
        targets = made.train()[index].targets
        assert targets is not None
        assert bool((targets[0, ::2] > 128).all())
        assert bool((targets[0, 1::2] < 128).all())
    (file,) = write_wav(tmp_path / "out.wav", [made.clips("train")[0]], MuLaw(), **made.writer_options())
    assert np.abs(soundfile.read(file)[0] - np.stack([half, -half], axis=1)).max() < 0.02
    with pytest.raises(ConfigError, match="must be even"):
        plain(tmp_path, channels="stereo", length=99)


def test_what_is_odd_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Silence, clipping, channels that cancel and float files beyond full scale: a line each, with how much."""
    wave = noise(0, 1000)[:, 0]
    soundfile.write(tmp_path / "fine.wav", np.stack([wave, noise(1, 1000)[:, 0]], axis=1), RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), RATE)
    soundfile.write(tmp_path / "clipped.flac", np.clip(4 * wave, -1, 1), RATE)
    soundfile.write(tmp_path / "float.wav", 4 * wave, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "opposite.wav", np.stack([wave, -0.8 * wave], axis=1), RATE, subtype="FLOAT")
    plain(tmp_path, condition=[])
    beyond = int((np.abs(4 * wave) > 1).sum())
    share = 100 * float((np.abs(4 * wave) >= 1).mean())
    loss = 10 * np.log10(((1 + 0.8**2) / 2) / 0.1**2)
    assert f"are clipped: 1 ({beyond} samples of {tmp_path}/float.wav" in caplog.text
    assert f"when they were recorded: 1 ({share:.2g}% of the samples of {tmp_path}/clipped.flac" in caplog.text
    assert f"silent from beginning to end: 1 (such as {tmp_path}/silent.wav)" in caplog.text
    assert f"cancel in their mean: 1 ({tmp_path}/opposite.wav loses {loss:.0f} dB)" in caplog.text
    assert "fine" not in caplog.text
    caplog.clear()
    plain(tmp_path, channels="left")
    assert "cancel" not in caplog.text


def bad_folder(folder: Path) -> None:
    """Three that are good (one at 96 kHz, one of three channels), five that are not, and texts."""
    soundfile.write(folder / "fast.wav", noise(0, 960), 96_000)
    soundfile.write(folder / "good.wav", noise(1), RATE)
    soundfile.write(folder / "three.wav", noise(2, 80, 3), RATE)
    soundfile.write(folder / "zero.wav", np.zeros(0), RATE)
    soundfile.write(folder / "integers.wav", 3e4 * noise(3), RATE, subtype="FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    content = (folder / "good.wav").read_bytes()
    (folder / "header.wav").write_bytes(b"RIFX" + content[4:20] + b"\xff" * 8 + content[28:])
    (folder / "cut.wav").write_bytes(content[:-40])
    (folder / "notes.txt").write_text("no sound")


def test_all_bad_files_are_listed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad_folder(tmp_path)
    with pytest.raises(DataError, match=r"5 of 8 recordings cannot be used: .*data\.skip_bad: true") as error:
        plain(tmp_path)
    assert len(str(error.value)) < 1000
    for name in ("zero", "integers", "empty", "header", "cut"):
        assert f"{tmp_path}/{name}.wav: " in caplog.text
        assert f"{name}.wav' (" in str(error.value)
    assert re.search(r"header\.wav: cannot be read as audio \([^()]+\): it is not", caplog.text)  # whole
    rows: list[dict[str, object]] = [{"file": "good.wav"}, {"file": "gone.wav"}, {"file": "zero.wav"}]
    caplog.clear()
    with pytest.raises(DataError, match="2 of 3 recordings"):
        plain(manifest(tmp_path, "csv", rows))
    assert "gone.wav (" in caplog.text
    assert "line 3): there is no such sound file\n" in caplog.text
    with pytest.raises(DataError, match="5 of 8 recordings"):
        WaveformData(files=str(tmp_path)).setup()


def test_bad_files_are_skipped_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_folder(tmp_path)
    for small in (8 * 2**20, 64):  # large files are not decoded beside others
        monkeypatch.setattr("mambaseq_audio.stores._SMALL", small)
        monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / f"cache{small}"))
        for again in (False, True):
            caplog.clear()
            made = plain(tmp_path / "*.wav", skip_bad=True)
            assert [len(clip) for clip in made.clips("train")] == [80, 80, 80]
            assert {Path(name).stem for name in made.sources()} == {"fast", "good", "three"}
            assert "5 of 8 recordings cannot be used" in caplog.text
            resampled = f"1 recording at 96,000 Hz is resampled to {RATE:,} Hz (data.sample_rate)."
            assert caplog.text.count("resampled") == caplog.text.count(resampled) == (not again)
            assert f"{tmp_path}/cut.wav: {'could not be used' if again else 'is cut short'}" in caplog.text
        with pytest.raises(DataError, match="5 of 8 recordings"):
            plain(tmp_path / "*.wav")
    for name in ("fast", "good", "three"):
        (tmp_path / f"{name}.wav").unlink()
    with pytest.raises(DataError, match=r"5 of 5 recordings cannot be used: (?!.*skip_bad)"):
        plain(tmp_path / "*.wav", skip_bad=True)


def test_folders_without_sound(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no sound")
    with pytest.raises(DataError, match="holds no sound file"):
        plain(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt cannot be read as audio"):
        plain(tmp_path / "*")


def test_many_small_files_have_a_bar_and_two_of_one_stem_are_told_apart(
    four: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mambaseq_audio.stores._MANY", 4)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    made = plain(four)
    assert "reading sounds: 100%" in capsys.readouterr().err
    store = made._clips[0].store
    names = [store.names[clip.record] for clip in made._clips]
    assert names == [unicodedata.normalize("NFD", "Åsa"), "Smith, Ann", "a/one", "b/one"]
