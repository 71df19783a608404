"""Recipes of published results on raw waveforms: sizes of models, codes, splits, and all of it on made data."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.recipes import sc09, youtubemix
from mambaseq_audio.recipes.published import Sounds, codes, nats_a_sample, spec

from mambaseq.checkpoints import load_model
from mambaseq.errors import DataError
from mambaseq.models import build_model, count_parameters
from mambaseq.reproduction import Context
from mambaseq.runs.parsing import parse_config

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "audio" / "published.md"
PAGE_COUNTS = ["6.09", "24.26", "5.83", "3.47", "3.37"]
ALL = [
    *(("audio/sc09", one) for one in (*sc09.TABLE_4, *sc09.TABLE_5)),
    *(("audio/youtubemix", one) for one in (*youtubemix.FIGURE_7, *youtubemix.LEFT, *youtubemix.RIGHT)),
]


def test_models_are_as_large_as_published() -> None:
    """The backbone's parameters, without embedding and head; where the paper says "about 6 M", within 6 %."""
    found = {}
    for config, variant in ALL:
        model = spec(config, variant.settings)
        found[config, variant.name] = (count_parameters(model) - 2 * 256 * model["d_model"]) / 1e6
        if variant.published is not None:
            assert found[config, variant.name] == pytest.approx(variant.published, rel=0.01)
            assert round(found[config, variant.name], 1) == variant.published
    assert sum(variant.published is not None for _, variant in ALL) == 4
    exact = [*sc09.TABLE_4, *youtubemix.FIGURE_7]
    told = [found[config, one.name] for config, one in ALL if one in exact]
    assert [f"{count:.2f}" for count in told] == PAGE_COUNTS
    about_six = [found["audio/sc09", one.name] for one in sc09.TABLE_5]
    about_six += [found["audio/youtubemix", one.name] for one in (*youtubemix.LEFT, *youtubemix.RIGHT)]
    assert all(abs(count / 6 - 1) <= 0.06 for count in about_six), found
    assert found["audio/youtubemix", "S4+MLP"] == pytest.approx(3.5, rel=0.05)


def test_settings_are_those_of_fit() -> None:
    config, variant = "audio/youtubemix", youtubemix.RIGHT[0]
    run = parse_config(config, [f"--{setting}" for setting in variant.settings])
    with torch.device("meta"):
        theirs = build_model(run.model_spec(run.make_data()))
        ours = build_model(spec(config, variant.settings))
    assert str(theirs) == str(ours)
    assert {name: p.shape for name, p in theirs.named_parameters()} == {
        name: p.shape for name, p in ours.named_parameters()
    }


def test_the_page_of_published_models_has_their_settings() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for variant in (*sc09.TABLE_4, *youtubemix.FIGURE_7):
        for setting in variant.settings:
            assert f"`{setting}`" in page, setting
    counts = re.findall(r"^\| (?:SC09|YouTubeMix), .* ([\d.]+) M \|$", page, re.MULTILINE)
    assert counts == PAGE_COUNTS
    wanted = re.findall(r"--only (.*?) +#", page)
    assert len(wanted) == 3
    names = {one.name for _, one in ALL}
    for only in wanted:
        assert {one for one in shlex.split(only) if not one.isdigit()} <= names


def test_codes_are_those_of_the_published_code() -> None:
    """By hand: the least sample is code 0 and the largest 255, whatever the recording's scale. What is half-way
    comes to 127, as the published code adds a little to the range."""
    signal = np.array([-0.2, 0.0, 0.2, 0.02, -0.002], dtype=np.float32)
    expected = [0, 127, 255, *(_by_hand(x) for x in (0.1, -0.01))]
    assert codes(signal).tolist() == expected
    assert codes(3 * signal).tolist() == expected
    assert codes(signal + 0.1).tolist() == expected  # an offset is taken out, too


def _by_hand(x: float) -> int:
    y = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
    return math.floor((y + 1) / 2 * 255.99 + 0.005)


def test_windows_begin_after_silence_and_every_sample_is_predicted_once() -> None:
    levels = [np.arange(1, 8, dtype=np.uint8), np.arange(101, 106, dtype=np.uint8)]
    sounds = Sounds._of(levels, CPU)
    places = sounds.windows(3, drop_last=False)
    assert places.tolist() == [[0, 3], [3, 3], [6, 1], [7, 3], [10, 2]]
    assert sounds.windows(3, drop_last=True).tolist() == [[0, 3], [3, 3], [7, 3]]
    batch = sounds.batch(places[[1, 4]], 3)
    assert batch.inputs[:, :2].tolist() == [[128, 4], [128, 104]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[4, 5, 6], [104, 105, -100]]
    drawn = sounds.drawn(places, 3, 200, 0)(torch.tensor(1))
    assert {tuple(row) for row in drawn.targets.tolist()} == {  # type: ignore[union-attr]
        tuple(row)
        for row in sounds.batch(places, 3).targets.tolist()  # type: ignore[union-attr]
    }
    with pytest.raises(DataError, match="No recording has 8 samples"):
        sounds.windows(8, drop_last=True)

    class Uniform(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> object:
            loss = torch.nn.functional.cross_entropy(torch.zeros(labels.numel(), 256), labels.flatten())
            return type("Output", (), {"loss": loss})

    assert nats_a_sample(Uniform(), sounds, places, 2) == pytest.approx(math.log(256))  # type: ignore[arg-type]


def write(path: Path, seed: int, samples: int = 300) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(seed).normal(0, 0.1, samples)
    soundfile.write(path, signal, 16_000)


def context(tmp_path: Path, *only: str) -> Context:
    (tmp_path / "out" / "trials").mkdir(parents=True, exist_ok=True)
    return Context(CPU, "tiny", [0], tmp_path / "out", list(only), "here", data=tmp_path)


def test_sc09_on_made_clips(tmp_path: Path) -> None:
    for number, word in enumerate((*sc09.WORDS, "bed")):
        for speaker in range(3):
            write(tmp_path / "sc09" / word / f"a{speaker}_nohash_0.wav", 3 * number + speaker)  # stems in many folders
    folder = tmp_path / "sc09"
    for split, speaker in (("validation", 0), ("test", 1)):
        names = [f"{word}/a{speaker}_nohash_0.wav\n" for word in ("bed", *sc09.WORDS)]
        (folder / sc09.LISTS[split]).write_text("".join(names))
    found = sc09.clips(folder, whole=False)
    assert [len(part) for part in found] == [10, 10, 10]
    assert {path.name for path in found.test} == {"a1_nohash_0.wav"}
    assert {path.parent.name for part in found for path in part} == set(sc09.WORDS)
    with pytest.raises(DataError, match="not the published SC09: 10 train clips instead of 31,158"):
        sc09.clips(folder, whole=True)
    for name in sc09.LISTS.values():  # the configuration's own lists have the ten words alone
        lines = (folder / name).read_text().splitlines()
        (tmp_path / name).write_text("\n".join(line for line in lines if not line.startswith("bed")))
    lists = [f"--data.{split}_list={tmp_path / name}" for split, name in sc09.LISTS.items()]
    data = parse_config("audio/sc09", [f"--data.files={folder}/[!b]*/*.wav", *lists]).make_data()
    data.setup()
    assert (data.n_conditions, len(data.train()), len(data.validation()), len(data.test())) == (0, 10, 10, 10)
    lines = ["Mamba, 6.1 M", "S4+MLP, MHA+MLP in the center", "Mamba, Mamba in the center"]
    tables = sc09.run(context(tmp_path, *lines))
    assert [[line.name for line in table.lines] for table in tables] == [lines[:1], lines[1:]]
    assert tables[0].lines[0].values == tables[1].lines[1].values  # trained once
    for table in tables:
        for line in table.lines:
            assert line.values["bits"][0] == pytest.approx(line.values["nats"][0] / math.log(2))
            assert 7 < line.values["bits"][0] < 9
    (kept,) = (tmp_path / "out" / "models").glob("Mamba*")
    loaded = load_model(kept)
    assert loaded.card.writer_options == {"sample_rate": 16_000}
    assert loaded.model.n_parameters() == tables[0].lines[0].values["parameters"][0]
    (folder / "nine" / "a1_nohash_0.wav").unlink()
    with pytest.raises(DataError, match="names 1 of the clips, but they are not there: nine/a1"):
        sc09.clips(folder, whole=False)
    (folder / sc09.LISTS["test"]).unlink()
    with pytest.raises(DataError, match=r"no .*testing_list\.txt"):
        sc09.clips(folder, whole=False)


def test_youtubemix_on_made_recordings(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "youtubemix" / f"out{number}.wav", number)
    parts = youtubemix.splits(tmp_path / "youtubemix")
    assert [[path.name for path in part] for part in parts[1:]] == [["out17.wav"], ["out18.wav", "out19.wav"]]
    assert [path.name for path in parts[0]] == [f"out{number}.wav" for number in range(17)]  # 10 comes after 9
    table = [
        f"{path.name},{split}" for split, part in zip(("train", "val", "test"), parts, strict=True) for path in part
    ]
    manifest = tmp_path / "youtubemix" / "split.csv"
    manifest.write_text("file,split\n" + "\n".join(table))
    data = parse_config("audio/youtubemix", [f"--data.files={manifest}", "--data.length=100"]).make_data()
    assert [len(data.validation()), len(data.test())] == [3, 6]
    one, other = "Mamba, 3.5 M", youtubemix.RIGHT[2].name
    tables = youtubemix.run(context(tmp_path, one, other, "64"))
    assert [[line.name for line in table.lines] for table in tables] == [[one], [other]]
    assert all(line.values.keys() == {"bits at 64", "parameters"} for table in tables for line in table.lines)
    with pytest.raises(DataError, match=r"hours of sound, not the published four"):
        youtubemix._check_hours(tmp_path, Sounds.read(parts[2], CPU, ""))
