"""The classifier of sounds: its data, its parts, and scores by it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.frechet import frechet, read_embeddings
from mambaseq_audio.io import read_signal
from mambaseq_audio.labelled import LabelledClips
from mambaseq_audio.likelihoods import log_likelihoods
from mambaseq_audio.mel import MelEncoder
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.scores import best_band, inception_score
from mambaseq_audio.scoring import recognise, rejected, score
from pages import blocks

from mambaseq.batch import Batch
from mambaseq.checkpoints import LoadedModel, ModelCard, load_model, save_model
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, DataError
from mambaseq.heads.classification import ClassificationHead
from mambaseq.models import build_model

PITCHES = {"low": 300, "high": 2500}
PAGE = Path(__file__).parents[2] / "docs" / "audio" / "scores.md"
PATTERN = r"^(?P<word>[a-z]+)_(?P<take>\d+)$"


def tone(pitch: float, take: int) -> np.ndarray:
    rng = np.random.default_rng((int(pitch), take))
    n = int(rng.integers(700, 1500))
    signal: np.ndarray = 0.3 * np.sin(2 * np.pi * pitch * (1 + 0.02 * rng.uniform()) * np.arange(n) / 8000)
    return signal + rng.normal(scale=0.01, size=n)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    path.mkdir()
    for name, pitch in PITCHES.items():
        for take in range(8):
            soundfile.write(path / f"{name}_{take}.wav", tone(pitch, take), 8000)
    return path


def data(folder: Path, **options: object) -> LabelledClips:
    given = {"files": str(folder), "pattern": PATTERN, "label": "word", "validation": "1", "test": "0", "length": 1000}
    made = LabelledClips(**{**given, **options})  # type: ignore[arg-type]
    made.setup()
    made.setup()
    return made


def targets(item: Batch) -> torch.Tensor:
    assert item.targets is not None
    return item.targets


def test_labels_and_whole_clips(folder: Path) -> None:
    made = data(folder)
    assert made.class_names == ("high", "low")
    assert (made.n_conditions, made.condition_names) == (0, ())
    test = made.test()
    assert test is not None
    assert made.collate([test[0], test[1]]).kind == "labels"
    assert torch.equal(torch.cat([targets(test[i]) for i in range(2)]), torch.tensor([0, 1]))
    whole = MuLaw().encode(read_signal(folder / "high_0.wav", 8000))
    start = (len(whole) - 1000) // 2  # the middle of a longer clip
    assert len(whole) > 1000
    assert test[0].inputs[0].tolist() == whole[start : start + 1000].tolist()
    assert test[0].condition is None


def test_training_clips_vary_by_their_index_alone(folder: Path) -> None:
    plain, varied = (data(folder, length=4000, **more).train() for more in ({}, {"speed": 0.2, "gain": 6.0}))
    assert len(plain) == 12
    for i in (0, 11, 12, 30):
        one, again, as_it_is = varied[i], varied[i], plain[i]
        assert torch.equal(one.inputs, again.inputs)
        assert torch.equal(targets(one), targets(as_it_is))
        share = one.inputs.shape[1] / as_it_is.inputs.shape[1]
        assert 1 / 1.21 < share < 1 / 0.79
        assert share != 1
    assert not torch.equal(varied[0].inputs, data(folder, length=4000, speed=0.2, gain=6.0, seed=1).train()[0].inputs)
    with pytest.raises(ConfigError, match=r"data\.speed must be from 0 to 0\.5"):
        data(folder, speed=0.6)


def test_a_tone_is_in_its_band_however_loud() -> None:
    """Bands peak in mel order; the mean over time takes loudness away, and a signal is read as its levels are."""
    torch.manual_seed(0)
    encoder = MelEncoder(40, n_mels=40)
    with torch.no_grad():
        encoder.linear.weight.copy_(torch.eye(40))
        encoder.linear.bias.zero_()
        time = torch.arange(8000) / 8000
        swell = torch.sin(2 * torch.pi * 2 * time).abs()  # so that a band's mean over time is not all that it has
        for pitch in (500.0, 1500.0, 3000.0):
            signal = 0.5 * swell * torch.sin(2 * torch.pi * pitch * time)
            frames = encoder(signal[None, :, None])
            assert frames.shape == (1, 100, 40)
            mel = 2595 * np.log10(1 + pitch / 700)
            expected = mel / (2595 * np.log10(1 + 4000 / 700)) * 41 - 1
            assert abs(int(frames[0].std(0).argmax()) - expected) <= 1.5
            torch.testing.assert_close(encoder(0.7 * signal[None, :, None]), frames, atol=0.3, rtol=0)
            levels = torch.from_numpy(MuLaw().encode(signal.numpy()).astype(np.int64))[None]
            loudest = int(frames[0].std(0).argmax())
            torch.testing.assert_close(encoder(levels)[0, 10:20, loudest], frames[0, 10:20, loudest], atol=0.02, rtol=0)
        hidden = MelEncoder(4, n_mels=40, mask_bands=8, mask_frames=8)
        ids = levels.repeat(4, 1)
        assert not torch.equal(hidden(ids)[0], hidden(ids)[1])
        assert torch.equal(hidden.eval()(ids)[0], hidden(ids)[1])
    with pytest.raises(ConfigError, match="200 mel bands are too many for a window of 256"):
        MelEncoder(4, n_mels=200)


def classifier(folder: Path, place: Path, steps: int = 25) -> Path:
    """A model that learned the two tones in so many steps."""
    made = data(folder)
    spec = {
        "d_model": 8,
        "encoder": {"name": "audio/mel", "n_mels": 16},
        "backbone": {"name": "audio/convolutions", "n_layers": 2},
        "mixer": {"name": "mamba"},
        "head": {"name": "classification", "n_classes": 2, "pooling": "max"},
    }
    torch.manual_seed(0)
    model = build_model(spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    train = made.train()
    for step in range(steps):
        batch = made.collate([train[8 * step + i] for i in range(8)])
        optimizer.zero_grad()
        model(batch.inputs, batch.targets, mask=batch.mask).loss.backward()
        optimizer.step()
    card = ModelCard(
        spec=spec,
        tokenizer={"name": "audio/mulaw", "options": {}},
        class_names=list(made.class_names),
        length=made.length,
        start_ids=list(made.start_ids),
        task=made.task,
        writer=made.writer,
        reader=made.reader,
        reader_options=made.reader_options(),
    )
    save_model(place, model, card, MuLaw())
    return place


def test_scores_of_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = classifier(folder, tmp_path / "model")
    loaded = load_model(place)
    found = recognise(loaded, folder)
    assert found.features.shape == (16, 8)
    head = loaded.model.head
    assert isinstance(head, ClassificationHead)
    logits = head.linear(torch.from_numpy(found.features))
    np.testing.assert_allclose(torch.log_softmax(logits, 1).detach(), found.log_p, atol=1e-4)
    alone = recognise(loaded, folder / "low_*.wav")  # other clips and padding beside it
    np.testing.assert_allclose(alone.features, found.features[8:], rtol=1e-4, atol=1e-5)
    out = tmp_path / "scores.json"
    wrong = tmp_path / "wrong"  # low tones under either name
    wrong.mkdir()
    for name in PITCHES:
        for take in range(8, 12):
            soundfile.write(wrong / f"{name}_{take}.wav", tone(300, take + 10 * (name == "high")), 8000)
    options = ["--real", str(folder), "--classifier", str(place), "--pattern", "^(?P<word>[a-z]+)_", "--out", str(out)]
    assert main(["audio/score", "--generated", str(folder), "--generated", str(wrong), *options]) == 0
    same, low = json.loads(out.read_text()).values()
    assert (same["clips"], same["accuracy"], low["accuracy"]) == (16, 1.0, 0.5)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert low["fid"] > 0.1
    assert same["inception_score"] > 1.7
    assert low["inception_score"] < 1.1
    assert low["am_score"] > same["am_score"] + 0.5
    assert "no more clips than features (8)" in low["note"]
    assert "IS as published" in capsys.readouterr().out
    for number, name in enumerate(["low", "high"]):  # as generate names them, with what was asked for beside them
        (folder / f"{name}_0.wav").rename(wrong.parent / f"both-00{number}.wav")
        said = name if number else f"take=1 word={name}"
        (wrong.parent / f"both-00{number}.json").write_text(json.dumps({"condition": said}))
    (tmp_path / "bad").mkdir()
    for name in ("one", "two"):
        (tmp_path / "bad" / f"{name}.wav").write_bytes(b"")
    (folder / "three.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 25 recordings cannot be used: .*three\.wav', .*one\.wav', .*two\.wav'"):
        score([wrong, tmp_path / "bad"], folder, place)
    (folder / "three.wav").unlink()
    both = score([tmp_path / "both-*.wav"], folder, place, pattern="^(?P<word>low|high)_")
    assert [one["accuracy"] for one in both.values()] == [1.0]
    capsys.readouterr()
    arguments = ["audio/score", "--generated", str(tmp_path / "both-*.wav"), *options[:4], "--pattern", "(?P<wrd>low)_"]
    assert main(arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "both-000.json says of its clip 'take=1 word=low', and nothing there is called 'wrd'" in error
    assert "Did you mean 'word'? Call the group as one of these: take, word." in error
    caplog.clear()
    soundfile.write(tmp_path / "both-000.wav", np.sign(tone(300, 1)), 8000)
    score([tmp_path / "both-*.wav"], tmp_path / "both-*.wav", place)
    told = [line.partition(":")[0] for line in caplog.messages]
    assert told == ["Files that were clipped when they were recorded", "Generated clips that reach full scale"]


@pytest.fixture
def maker(tmp_path: Path) -> Path:
    """An unconditional model of sounds."""
    spec = {
        "d_model": 8,
        "encoder": {"name": "tokens", "vocab_size": 256},
        "backbone": {"name": "residual", "n_layers": 1},
        "mixer": {"name": "attention"},
        "head": {"name": "lm", "vocab_size": 256},
    }
    torch.manual_seed(0)
    card = ModelCard(
        spec=spec,
        tokenizer={"name": "audio/mulaw", "options": {}},
        start_ids=[MuLaw.start_id],
        reader="audio/audio",
        reader_options={"sample_rate": 8000, "resample": True, "channels": "mean"},
    )
    save_model(tmp_path / "maker", build_model(spec), card, MuLaw())
    return tmp_path / "maker"


def test_rejection_sampling_keeps_a_band(
    folder: Path, tmp_path: Path, maker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = classifier(folder, tmp_path / "model", steps=0)
    found = log_likelihoods(load_model(maker), folder)
    assert len(found.names) == 16
    levels = MuLaw().encode(read_signal(folder / "low_3.wav", 8000)).astype(np.int64)
    ids = torch.from_numpy(np.concatenate([[128], levels]))
    with torch.no_grad():
        logits = load_model(maker).model(ids[None, :-1]).logits[0]
    expected = -torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    clips = recognise(load_model(place), folder)
    which = [Path(name).stem for name in clips.names].index("low_3")
    assert found.log_p[which] == pytest.approx(float(expected), rel=1e-4)
    options = ["--real", str(folder), "--classifier", str(place), "--likelihoods", str(maker)]
    out = tmp_path / "scores.json"
    assert main(["audio/score", "--generated", str(folder), *options, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())[f"{folder}, kept"]
    chosen = np.argsort(found.log_p)[6:15]  # of 16, from 0.40 to 0.95
    assert kept["clips"] == 9
    assert kept["band"] == [0.4, 0.95]
    assert kept["inception_score"] == pytest.approx(inception_score(clips.log_p[chosen]))
    assert "band 0.4 to 0.95 (of different lengths" in capsys.readouterr().out
    rows, told = rejected(clips, load_model(maker), folder, "best")
    band = best_band(found.log_p[::2], clips.log_p[::2])
    assert told["band"] == [band.lower, band.upper]
    order = 2 * np.argsort(found.log_p[1::2]) + 1
    assert rows.tolist() == order[int(band.lower * 8) : int(band.upper * 8)].tolist()
    with pytest.raises(ConfigError, match="does not generate sounds"):
        log_likelihoods(load_model(place), folder)
    loaded = load_model(maker)
    told_of = dataclasses.replace(loaded.card, condition_names=["a", "b"])
    with pytest.raises(ConfigError, match="generates on a condition"):
        log_likelihoods(dataclasses.replace(loaded, card=told_of), folder)
    with pytest.raises(ConfigError, match="as different clips"):
        rejected(clips, loaded, folder / "low_*.wav", "best")


def test_the_page_of_scores(
    folder: Path, tmp_path: Path, maker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    (work / "runs").mkdir(parents=True)
    classifier(folder, work / "runs" / "listener", steps=0)
    maker.rename(work / "runs" / "speaker")
    (work / "made").symlink_to(folder)
    (work / "recordings").symlink_to(folder)
    for name in ("made", "recordings"):
        np.save(work / f"{name}.npy", np.random.default_rng(0).random((4, 2)))
    monkeypatch.chdir(work)
    commands = [line for _, text, _ in blocks(PAGE) for line in text.splitlines()]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == [
        *("made", "made", "made, kept", "made", "made, kept", "made.npy")
    ]
    assert "accuracy" in printed[0]


def test_frechet_distance_of_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means apart by 3 and 4, and one variance four times the other: 25 + (2 - 1)^2."""
    square = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # covariance 1
    parts, real = tmp_path / "parts", tmp_path / "real.npy"
    parts.mkdir()
    moved = square * [2, 1] + [3, 4]
    np.save(parts / "a.npy", moved[:1])
    np.save(parts / "b.npy", moved[1:].astype(np.float32))
    np.save(real, square)
    out = tmp_path / "fad.json"
    assert main(["audio/frechet", "--generated", str(parts), "--real", str(real), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {str(parts): pytest.approx(26, rel=1e-6)}
    assert "Fréchet audio distance 26" in capsys.readouterr().out
    with pytest.raises(DataError, match="cannot be read"):
        frechet([tmp_path / "none"], real)
    np.save(tmp_path / "wide.npy", np.zeros((2, 3)))
    with pytest.raises(DataError, match="has 3 features a frame, but"):
        frechet([tmp_path / "wide.npy"], real)
    third = parts / "c.npy"
    for wrong, told in (
        (np.zeros((2, 3)), "have 2, 3 features"),
        (np.array(["a"]), "not floats of"),
        (np.zeros((1, 9000), np.float16), "more than 8,192 features"),
        (np.array([[1.0, np.nan]]), r"c\.npy has embeddings that are not finite"),
    ):
        np.save(third, wrong)
        with pytest.raises(DataError, match=told):
            read_embeddings(parts)
    for damaged in (b"no", b"\x93NUMPY\x01\x00\x06\x00{'a': ("):
        third.write_bytes(damaged)
        with pytest.raises(DataError, match=r"c\.npy cannot be read"):
            read_embeddings(parts)
    with pytest.raises(DataError, match="fewer than 2 frames"):
        read_embeddings(parts / "a.npy")
    assert frechet([real], real) == {str(real): 0.0}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.npy files"):
        read_embeddings(tmp_path / "empty")


def test_what_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    place = classifier(folder, tmp_path / "model", steps=0)
    for pattern, error, told in (
        ("^(?P<word>[a-z]", ConfigError, "not a regular expression"),
        ("^[a-z]+", ConfigError, "names no group"),
        (r"(?P<take>\d)", DataError, "which is no class of the classifier"),
    ):
        with pytest.raises(error, match=told):
            score([folder], folder, place, pattern=pattern)
    with pytest.raises(ConfigError, match="names no group"):
        score([folder], folder, tmp_path / "nowhere", pattern="^[a-z]+")  # before anything is read
    with pytest.raises(DataError, match="at least 2 clips"):
        score([folder / "low_1.wav"], folder, place)
    loaded = load_model(place)
    other = LoadedModel(loaded.model, ModelCard(spec=loaded.card.spec, reader="csv"), None, place)
    with pytest.raises(ConfigError, match="not a classifier of sounds"):
        recognise(other, folder)
